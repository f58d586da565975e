//! One stored thing: the 56 bytes that a pack's table and an index have about it, and where that says it is.

use std::fmt;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::id::{ChunkId, PackId};

/// How the stored bytes were made from the plain ones. Numbers that this release does not know are kept, and refused when decoded.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Codec(pub u8);

impl Codec {
    /// Stored as they are.
    pub const PLAIN: Self = Self(0);
    /// One zstd frame.
    pub const ZSTD: Self = Self(1);
}

/// Which key the stored bytes are encrypted under.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KeyRef(pub u8);

impl KeyRef {
    /// Not encrypted.
    pub const NONE: Self = Self(0);
}

/// What the bytes are used for. For accounting only: an id names the same bytes whatever they are used for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RecordKind(pub u8);

impl RecordKind {
    /// A chunk of a disk.
    pub const CHUNK: Self = Self(0);
    /// A node of a disk map.
    pub const MAP_NODE: Self = Self(1);
    /// Something that rides along with a snapshot.
    pub const ATTACHMENT: Self = Self(2);
}

/// Where the stored bytes of a chunk are, and how to decode them.
///
/// Locations order by pack and offset: the order of capture, in which packs are best read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// The pack.
    pub pack: PackId,
    /// Where in the pack, in bytes.
    pub offset: u32,
    /// How many bytes are stored.
    pub stored_len: u32,
    /// How many bytes it decodes to.
    pub plain_len: u32,
    /// The CRC-32 of the stored bytes.
    pub crc: u32,
    /// How it was compressed.
    pub codec: Codec,
    /// How it was encrypted.
    pub key: KeyRef,
    /// What it is used for.
    pub kind: RecordKind,
}

impl Location {
    /// The offset after its last byte.
    pub fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.stored_len)
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}..{}", self.pack, self.offset, self.end())
    }
}

pub(crate) const RECORD_LEN: usize = size_of::<Record>();

/// As it stands in files.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Record {
    pub(crate) id: [u8; 32],
    pub(crate) pack: U32,
    pub(crate) offset: U32,
    pub(crate) stored_len: U32,
    pub(crate) plain_len: U32,
    pub(crate) crc: U32,
    pub(crate) codec: u8,
    pub(crate) key: u8,
    pub(crate) kind: u8,
    pub(crate) reserved: u8,
}

impl Record {
    pub(crate) fn chunk_id(&self) -> ChunkId {
        ChunkId::from_bytes(self.id)
    }

    pub(crate) fn location(&self, pack: PackId) -> Location {
        Location {
            pack,
            offset: self.offset.get(),
            stored_len: self.stored_len.get(),
            plain_len: self.plain_len.get(),
            crc: self.crc.get(),
            codec: Codec(self.codec),
            key: KeyRef(self.key),
            kind: RecordKind(self.kind),
        }
    }

    /// The same thing, in the pack of that number in another table.
    pub(crate) fn in_pack(mut self, number: u32) -> Self {
        self.pack = U32::new(number);
        self
    }
}
