//! Sizes and rates as people write them: `64KiB`, `20MiB`, `1.5GB`; the one place that reads them.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use bytesize::ByteSize;

/// A number of bytes, from `4194304`, `4MiB`, `4M` (decimal) or `1.5GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(transparent)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.trim()
            .parse::<ByteSize>()
            .map(|size| Self(size.as_u64()))
            .map_err(|_| "not a size: write a number and a unit, like 64KiB, 20MiB or 1GB".to_owned())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::output::human_size(self.0).fmt(f)
    }
}

/// Bytes a second, from `20MiB` or `20MiB/s`; `0` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(transparent)]
pub struct Rate {
    bytes_per_second: u64,
}

impl Rate {
    /// No limit at all.
    pub const UNLIMITED: Self = Self { bytes_per_second: 0 };

    /// So many bytes a second; 0 is no limit.
    #[must_use]
    pub const fn per_second(bytes: u64) -> Self {
        Self { bytes_per_second: bytes }
    }

    /// The limit in bytes a second; `None` is no limit.
    #[must_use]
    pub const fn limit(self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.bytes_per_second)
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.trim().trim_end_matches("/s");
        number
            .parse::<Size>()
            .map(|size| Self { bytes_per_second: size.0 })
            .map_err(|_| "not a rate: write bytes a second with a unit, like 20MiB; 0 is no limit".to_owned())
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limit() {
            Some(limit) => write!(f, "{}/s", crate::output::human_size(limit.get())),
            None => f.write_str("unlimited"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_decimal_and_binary_units() {
        for (text, bytes) in [
            ("4096", 4096),
            ("64KiB", 65536),
            ("64kib", 65536),
            ("1.5MiB", 1_572_864),
            ("20MB", 20_000_000),
            (" 1 GiB ", 1 << 30),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "x", "-1", "12 parsecs", "1e9", "0x10"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_rate_of_zero_is_no_limit() {
        assert_eq!("0".parse(), Ok(Rate::UNLIMITED));
        assert_eq!("0".parse::<Rate>().unwrap().limit(), None);
        assert_eq!("20MiB/s".parse::<Rate>().unwrap().limit().map(NonZeroU64::get), Some(20 << 20));
        assert_eq!("20MiB".parse::<Rate>().unwrap().to_string(), "20.0 MiB/s");
    }
}
