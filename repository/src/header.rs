//! The first 64 bytes of every binary file: what it is, in which version, and its own id.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, ErrorKind, Result};

/// The version of the format that this release writes, and the only one that it reads.
pub const FORMAT_VERSION: u16 = 1;

pub(crate) const HEADER_LEN: usize = size_of::<Header>();
const MAGIC: [u8; 8] = *b"LIFEBOOT";

/// What a binary file holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FileKind {
    Pack,
    Index,
}

impl FileKind {
    fn tag(self) -> [u8; 4] {
        match self {
            Self::Pack => *b"PACK",
            Self::Index => *b"INDX",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Pack => "pack",
            Self::Index => "index segment",
        }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    kind: [u8; 4],
    version: U16,
    flags: U16,
    id: [u8; 16],
    reserved: [u8; 28],
    crc: U32,
}

pub(crate) fn encode(kind: FileKind, id: [u8; 16]) -> [u8; HEADER_LEN] {
    let mut header = Header {
        magic: MAGIC,
        kind: kind.tag(),
        version: U16::new(FORMAT_VERSION),
        flags: U16::ZERO,
        id,
        reserved: [0; 28],
        crc: U32::ZERO,
    };
    header.crc = U32::new(crc32fast::hash(&header.as_bytes()[..HEADER_LEN - 4]));
    header.as_bytes().try_into().expect("a header has its length")
}

/// Checks that these are the first bytes of the file `id` of this kind.
///
/// # Errors
/// `NewerFormat` for another version or flags under a right checksum; `Damaged` for all else.
pub(crate) fn check(bytes: &[u8], kind: FileKind, id: [u8; 16]) -> Result<()> {
    let name = kind.name();
    let header = Header::ref_from_bytes(bytes)
        .map_err(|_| Error::damaged(format!("the header of a {name} is cut short")))?;
    if header.magic != MAGIC || header.crc.get() != crc32fast::hash(&bytes[..HEADER_LEN - 4]) {
        return Err(Error::damaged(format!("the header of a {name} is damaged")));
    }
    if header.version.get() != FORMAT_VERSION || header.flags.get() != 0 || header.reserved != [0; 28] {
        let version = header.version.get();
        let flags = header.flags.get();
        return Err(newer(format!("a {name} has format version {version}, flags {flags:#x}")));
    }
    if header.kind != kind.tag() || header.id != id {
        return Err(Error::damaged(format!("what stands under the name of a {name} is another file")));
    }
    Ok(())
}

/// The refusal of what a newer release wrote.
pub(crate) fn newer(what: String) -> Error {
    Error::new(
        ErrorKind::NewerFormat,
        format!("{what}, and this release knows version {FORMAT_VERSION} only"),
    )
    .hint("use the release that wrote it, or a newer one")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = encode(FileKind::Pack, [7; 16]);
        check(&good, FileKind::Pack, [7; 16]).unwrap();
        for at in 0..8 * HEADER_LEN {
            let mut bad = good;
            bad[at / 8] ^= 1 << (at % 8);
            assert_eq!(check(&bad, FileKind::Pack, [7; 16]).unwrap_err().kind(), ErrorKind::Damaged);
        }
        assert_eq!(check(&good[..63], FileKind::Pack, [7; 16]).unwrap_err().kind(), ErrorKind::Damaged);
        assert_eq!(check(&good, FileKind::Index, [7; 16]).unwrap_err().kind(), ErrorKind::Damaged);
        assert_eq!(check(&good, FileKind::Pack, [8; 16]).unwrap_err().kind(), ErrorKind::Damaged);
    }

    #[test]
    fn another_version_or_flag_is_a_newer_format() {
        for at in [12, 14, 40] {
            let mut bytes = encode(FileKind::Index, [7; 16]);
            bytes[at] ^= 2;
            let crc = crc32fast::hash(&bytes[..60]);
            bytes[60..].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(check(&bytes, FileKind::Index, [7; 16]).unwrap_err().kind(), ErrorKind::NewerFormat);
        }
    }
}
