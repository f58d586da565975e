//! What one end tells the other of an export.

use super::{MAX_PAYLOAD_BYTES, TransmissionFlags};

/// How large requests may and should be, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it.
    pub minimum: u32,
    /// Multiples of it are served best.
    pub preferred: u32,
    /// No payload is longer.
    pub maximum: u32,
}

/// An export, as the handshake tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its own name.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
    /// Its size in bytes, at most 2^63 - 1.
    pub size: u64,
    /// What it can do. A server leaves `SEND_DF` and `BLOCK_STATUS_PAYLOAD` to the handshake, which knows the kind of replies.
    pub flags: TransmissionFlags,
    /// Its request sizes.
    pub block_sizes: BlockSizes,
}

impl BlockSizes {
    /// What holds where nothing was said.
    pub const DEFAULT: Self = Self { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD_BYTES };
}
