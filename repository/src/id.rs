//! Ids: of chunks (by content), of packs and index segments (by time and chance). All print as hexadecimal.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// What a chunk is called: the SHA-256 of its plain bytes.
///
/// Map nodes and attachments are named in the same way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId([u8; 32]);

impl ChunkId {
    /// The id of these plain bytes.
    pub fn of(plain: &[u8]) -> Self {
        Self(Sha256::digest(plain).into())
    }

    /// An id from its 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first eight bytes as a number: ids are spread evenly over its range.
    pub(crate) fn prefix(&self) -> u64 {
        u64::from_be_bytes(self.0[..8].try_into().expect("eight of 32 bytes"))
    }
}

/// What a pack is called: the time of its creation (microseconds) and 8 random bytes, so that packs sort in the order of capture.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId([u8; 16]);

/// What an index segment is called; made like a [`PackId`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SegmentId([u8; 16]);

/// 16 bytes that sort after `previous` and, otherwise, by the clock.
fn timed_id(previous: Option<[u8; 16]>) -> Result<[u8; 16]> {
    let mut micros = u64::try_from(Timestamp::now().as_microsecond()).unwrap_or(0);
    if let Some(previous) = previous {
        let before = u64::from_be_bytes(previous[..8].try_into().expect("eight of 16 bytes"));
        micros = micros.max(before + 1);
    }
    let mut id = [0; 16];
    id[..8].copy_from_slice(&micros.to_be_bytes());
    fill_random(&mut id[8..])?;
    Ok(id)
}

/// Random bytes from the operating system.
pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| {
        Error::io("the operating system gave no random bytes", std::io::Error::other(error.to_string()))
    })
}

macro_rules! timed {
    ($name:ident) => {
        impl $name {
            /// A new id, which sorts after `previous`.
            pub(crate) fn after(previous: Option<Self>) -> Result<Self> {
                timed_id(previous.map(|id| id.0)).map(Self)
            }

            /// The 16 bytes.
            pub(crate) const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }
    };
}
timed!(PackId);
timed!(SegmentId);

impl PackId {
    /// An id from its 16 bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

macro_rules! hexadecimal {
    ($name:ident, $len:literal, $what:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl FromStr for $name {
            type Err = Error;

            /// Exactly as it prints: lower-case hexadecimal.
            fn from_str(text: &str) -> Result<Self> {
                let wrong = || Error::invalid(format!(concat!("{:?} is not ", $what), text));
                let digits = text.as_bytes();
                if digits.len() != 2 * $len {
                    return Err(wrong());
                }
                let mut bytes = [0; $len];
                for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
                    *byte =
                        nibble(pair[0]).zip(nibble(pair[1])).map(|(h, l)| h << 4 | l).ok_or_else(wrong)?;
                }
                Ok(Self(bytes))
            }
        }
    };
}
hexadecimal!(ChunkId, 32, "a chunk id (64 hexadecimal digits)");
hexadecimal!(PackId, 16, "a pack id (32 hexadecimal digits)");
hexadecimal!(SegmentId, 16, "a segment id (32 hexadecimal digits)");

/// Ids stand in JSON as their hexadecimal digits.
macro_rules! as_text {
    ($name:ident) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(
                deserializer: D,
            ) -> std::result::Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(<D::Error as serde::de::Error>::custom)
            }
        }
    };
}
pub(crate) use as_text;
as_text!(ChunkId);

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_prints_and_parses_back() {
        let id = ChunkId::of(b"abc");
        assert_eq!(id.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(id.to_string().parse::<ChunkId>().unwrap(), id);
        assert!("BA".repeat(32).parse::<ChunkId>().is_err());
        assert!("ba".parse::<ChunkId>().is_err());
    }

    #[test]
    fn packs_of_one_capture_sort_in_the_order_they_were_made() {
        let mut ids = vec![PackId::after(None).unwrap()];
        for _ in 0..1000 {
            ids.push(PackId::after(ids.last().copied()).unwrap());
        }
        assert!(ids.is_sorted());
        ids.dedup();
        assert_eq!(ids.len(), 1001);
    }
}
