//! The kinds of replies in transmission.
//!
//! A simple reply is magic (4), error (4), cookie (8), and after a successful READ its bytes. A
//! chunk of a structured reply is magic (4), flags (2), kind (2), cookie (8), length (4), and that many bytes.

use super::option::numbers;

/// The length of a simple reply's header, in bytes.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// The length of a chunk's header, in bytes.
pub const STRUCTURED_REPLY_BYTES: usize = 20;

/// Which kind of replies the two ends agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum ReplyStyle {
    /// Simple replies: all that the Linux kernel's client has.
    #[default]
    Simple,
    /// Structured replies with 32-bit lengths. (Extended headers will be a third.)
    Structured,
}

const ERROR: u16 = 1 << 15;

numbers! {
    /// What a chunk of a structured reply carries.
    ChunkKind: u16 {
        /// Nothing.
        None = 0,
        /// An offset and the bytes there.
        OffsetData = 1,
        /// An offset and how many zeroes are there.
        OffsetHole = 2,
        /// A context and its extents.
        BlockStatus = 5,
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
