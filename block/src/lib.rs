//! Block storage beneath a virtual disk: what a range, an extent and a bitmap are; the
//! [`BlockDevice`] trait that everything serves and fills; the engines that implement it on files
//! and block devices; and a simulated disk that loses, reorders and tears what was not synced.
//!
//! This crate knows nobody: not NBD, not backups. Nothing here parses bytes from a peer.

mod bitmap;
mod buffer;
mod device;
mod engine;
mod error;
mod file;
mod mapped;
mod open_files;
mod parts;
mod pool;
mod queue;
mod range;
mod shelf;
pub mod sim;
mod spare;
mod turns;

pub use bitmap::AtomicBitmap;
pub use buffer::{ALIGNMENT, AlignedBuf};
pub use device::{
    Attempt, BlockDevice, DeviceFuture, Durability, Extent, ExtentState, Geometry, Loaded, OpenDevice,
    ZeroMode,
};
pub use engine::{Engine, IoEngine};
pub use error::{Error, ErrorKind, Result};
pub use file::{DirectIo, FileDisk, FileOptions};
pub use mapped::MappedFile;
pub use parts::BufPart;
pub use pool::{BufferPool, PoolOptions};
pub use range::{BLOCK_SIZE, ByteRange};
pub use shelf::Shelf;
pub use turns::{GiveWay, short_turns};
