//! The one error of this crate: what went wrong (a kind to match on), what was being done, and the cause.

use std::fmt;

use crate::ByteRange;

/// The result of everything here that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it was. Callers match on this, never on the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The range does not lie within the device, or the device refuses its alignment.
    InvalidRange,
    /// The device has no room left for this write.
    NoSpace,
    /// The device is read-only, or its permissions forbid the operation.
    NotPermitted,
    /// The device cannot do this at all (trim, fast zeroes).
    Unsupported,
    /// What the device holds at this range is damaged and was not given out.
    Damaged,
    /// The device is closing or its session was given up after a failed sync.
    Poisoned,
    /// The device is ending: nothing more is begun.
    Shutdown,
    /// Anything else that the operating system reported.
    Io,
}

/// A failure of a device.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    range: Option<ByteRange>,
    #[source]
    source: Option<std::sync::Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A failure of `kind`; `context` says what was being done, on what.
    pub fn new(kind: ErrorKind, context: impl fmt::Display) -> Self {
        Self { kind, context: context.to_string(), range: None, source: None }
    }

    /// A failure that the operating system reported, its kind taken from `source`.
    pub fn io(context: impl fmt::Display, source: std::io::Error) -> Self {
        let kind = match (source.kind(), source.raw_os_error()) {
            (std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded, _) => ErrorKind::NoSpace,
            (std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem, _) => {
                ErrorKind::NotPermitted
            }
            (_, Some(libc::EOPNOTSUPP | libc::ENOSYS)) => ErrorKind::Unsupported,
            (_, Some(libc::EBADF)) => ErrorKind::NotPermitted,
            (_, Some(libc::EFBIG)) => ErrorKind::NoSpace,
            (_, Some(libc::ESHUTDOWN)) => ErrorKind::Shutdown,
            _ => ErrorKind::Io,
        };
        Self {
            kind,
            context: format!("{context}: {source}"),
            range: None,
            source: Some(std::sync::Arc::new(source)),
        }
    }

    /// The same failure, seen as another kind by the callers.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The same failure, which concerns `range` of the device. What was known more closely stays.
    #[must_use]
    pub fn at(mut self, range: ByteRange) -> Self {
        self.range.get_or_insert(range);
        self
    }

    /// Which bytes of the device it concerns, where that is known.
    #[must_use]
    pub const fn range(&self) -> Option<ByteRange> {
        self.range
    }

    /// What kind of failure it was.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }
}
