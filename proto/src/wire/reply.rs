//! The kinds of replies in transmission.
//!
//! A simple reply is magic (4), error (4), cookie (8), and after a successful READ its bytes. A
//! chunk of a structured reply is magic (4), flags (2), kind (2), cookie (8), length (4), and that many bytes. With
//! extended headers it is magic (4), flags (2), kind (2), cookie (8), the request's offset (8), length (8), and that many bytes.

use super::RequestHeader;
use super::option::numbers;

/// The length of a simple reply's header, in bytes.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// The length of a chunk's header, in bytes.
pub const STRUCTURED_REPLY_BYTES: usize = 20;
/// The length of a chunk's header with extended headers, in bytes.
pub const EXTENDED_REPLY_BYTES: usize = 32;

/// Which kind of replies the two ends agreed on. A later one can all that an earlier one can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum ReplyStyle {
    /// Simple replies: all that the Linux kernel's client has.
    #[default]
    Simple,
    /// Structured replies with 32-bit lengths.
    Structured,
    /// Extended headers: requests and replies with 64-bit lengths.
    Extended,
}

impl ReplyStyle {
    /// Whether replies come in chunks, and so can tell of holes, extents and the places of errors.
    #[must_use]
    pub const fn has_chunks(self) -> bool {
        !matches!(self, Self::Simple)
    }

    /// Whether headers are extended, those of requests too.
    #[must_use]
    pub const fn is_extended(self) -> bool {
        matches!(self, Self::Extended)
    }

    /// The length of a request's header, in bytes.
    #[must_use]
    pub const fn request_bytes(self) -> usize {
        if self.is_extended() { RequestHeader::EXTENDED_BYTES } else { RequestHeader::BYTES }
    }
}

const ERROR: u16 = 1 << 15;

numbers! {
    /// What a chunk of a reply carries.
    ChunkKind: u16 {
        /// Nothing.
        None = 0,
        /// An offset and the bytes there.
        OffsetData = 1,
        /// An offset and how many zeroes are there.
        OffsetHole = 2,
        /// A context and its extents, of 32 bits each.
        BlockStatus = 5,
        /// A context and its extents, of 64 bits each.
        BlockStatusExt = 6,
        /// An error.
        Error = 0x8001,
        /// An error and where it struck.
        ErrorOffset = 0x8002,
    }
}

impl ChunkKind {
    /// Whether it says that the request failed.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.number() & ERROR != 0
    }
}
