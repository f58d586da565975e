//! The errors that the protocol has numbers for.

use std::fmt;

/// An error as it stands in a reply. Whatever else went wrong becomes [`Errno::Io`]; a raw error
/// number of the system never reaches the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Errno {
    /// The operation is not permitted, such as a write to a read-only export.
    NotPermitted,
    /// Reading or writing failed.
    Io,
    /// There was no memory for it.
    NoMemory,
    /// The request makes no sense, or lies outside the export.
    Invalid,
    /// There is no room, or a write lies outside the export.
    NoSpace,
    /// The reply would be too large.
    Overflow,
    /// The server cannot do this, or not fast.
    NotSupported,
    /// The server is ending.
    Shutdown,
}

impl Errno {
    /// The number for the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::NotPermitted => 1,
            Self::Io => 5,
            Self::NoMemory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::Shutdown => 108,
        }
    }

    /// The error of a number from the wire, which is not 0. One that is not known is taken as
    /// [`Errno::Invalid`], as the protocol asks.
    #[must_use]
    pub const fn from_code(code: u32) -> Self {
        match code {
            1 => Self::NotPermitted,
            5 => Self::Io,
            12 => Self::NoMemory,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSupported,
            108 => Self::Shutdown,
            _ => Self::Invalid,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotPermitted => "operation not permitted",
            Self::Io => "input/output error",
            Self::NoMemory => "out of memory",
            Self::Invalid => "invalid argument",
            Self::NoSpace => "no space left",
            Self::Overflow => "too large",
            Self::NotSupported => "not supported",
            Self::Shutdown => "the server is shutting down",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_keeps_its_number() {
        for code in [1, 5, 12, 22, 28, 75, 95, 108] {
            assert_eq!(Errno::from_code(code).code(), code);
        }
        assert_eq!(Errno::from_code(9999), Errno::Invalid);
    }
}
