//! What a disk can do: the contract between those who serve, fill and capture disks and those who hold them.

use std::future::Future;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::rc::Rc;

use crate::{AlignedBuf, ByteRange, Result};

/// The future of a device operation. It stays on the thread that made it, and it is run to its
/// end: dropping one while the kernel holds its buffer is a leak at best, so nobody puts it into
/// `select!` or `timeout`.
pub type DeviceFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What a device is like. It does not change while the device is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The device's size in bytes.
    pub size: u64,
    /// The smallest request it serves without reading and rewriting around it, in bytes; a power of two.
    pub minimum_io: u32,
    /// The request size at which it works well, in bytes; a power of two.
    pub preferred_io: u32,
    /// Whether every write is refused.
    pub read_only: bool,
    /// Whether `trim` may give room back.
    pub can_trim: bool,
    /// Whether `write_zeroes` is faster than writing zero bytes.
    pub fast_zero: bool,
    /// Whether a flush through any handle covers the writes that were acknowledged on every other
    /// handle of this device (NBD's CAN_MULTI_CONN).
    pub shared_flush: bool,
}

/// When a write may be acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// Once a later read sees it. It may be lost at a power cut until the next flush.
    Volatile,
    /// Once it is on stable storage (NBD's FUA).
    Stable,
}

/// How a range may be made to read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ZeroMode {
    /// Whether the room may be given back (the opposite of NBD's NO_HOLE).
    pub may_unmap: bool,
    /// Whether to fail with `Unsupported` where it would be no faster than writing zeroes.
    pub only_if_fast: bool,
}

impl ZeroMode {
    /// Give the room back where possible; take as long as it takes.
    pub const UNMAP: Self = Self { may_unmap: true, only_if_fast: false };
    /// Keep the room allocated; take as long as it takes.
    pub const ALLOCATE: Self = Self { may_unmap: false, only_if_fast: false };
}

/// What an attempt to act without waiting came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It is done, whole.
    Done,
    /// It was not done, or in part; the waiting form of the operation must be used for all of it.
    WouldWait,
    /// Of a read alone: all of it is zeroes, as is known without looking. The buffer holds whatever it held.
    Zeroes,
}

/// Where [`BlockDevice::load`] has put the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// In the buffer.
    Buffer,
    /// Where [`BlockDevice::resident`] finds them, at least for now. The buffer's contents mean nothing.
    Resident,
}

/// What is known of a range without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct ExtentState {
    /// No room is allocated for it.
    pub hole: bool,
    /// It reads as zeroes.
    pub zero: bool,
    /// How deep in a chain its bytes lie: 0 nowhere, 1 in this device itself, 2 in what stands behind it.
    pub depth: u32,
    /// It was written since the device's dirty bitmap began.
    pub dirty: bool,
}

/// A run of bytes of one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Which bytes.
    pub range: ByteRange,
    /// What is known of them.
    pub state: ExtentState,
}

/// A virtual disk, as one thread holds it.
///
/// Requests may overlap in time and complete in any order; a request that begins after another was
/// acknowledged sees its effect. A range outside the device is [`crate::ErrorKind::InvalidRange`]
/// and has no effect. A failed operation may have been done in part. Any byte offset and length is
/// served; those that are not multiples of `minimum_io` cost more.
///
/// Buffers are passed in and come back with the result, because the kernel holds them meanwhile.
pub trait BlockDevice {
    /// What the device is like.
    fn geometry(&self) -> Geometry;

    /// Reads `buf.len()` bytes at `offset`, if that takes no waiting.
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<Attempt> {
        let _ = (offset, buf);
        Ok(Attempt::WouldWait)
    }

    /// Writes `data` at `offset` ([`Durability::Volatile`]), if that takes no waiting.
    fn try_write(&self, offset: u64, data: &[u8]) -> Result<Attempt> {
        let _ = (offset, data);
        Ok(Attempt::WouldWait)
    }

    /// A file and the offset in it from which `range` can be sent by `sendfile` right now without
    /// waiting for a disk, because it is in memory there.
    fn resident(&self, range: ByteRange) -> Option<(BorrowedFd<'_>, u64)> {
        let _ = range;
        None
    }

    /// Says that what [`BlockDevice::resident`] told of could not be sent. It tells of nothing any more, so that who reads is told what
    /// is wrong, and where.
    fn not_resident(&self) {}

    /// Fills `buf` (its whole length) from `offset`. On failure the buffer's contents mean nothing.
    fn read(&self, offset: u64, buf: AlignedBuf) -> DeviceFuture<'_, (Result<()>, AlignedBuf)>;

    /// As [`BlockDevice::read`], but what this brings to where [`BlockDevice::resident`] finds it may be left there.
    fn load(&self, offset: u64, buf: AlignedBuf) -> DeviceFuture<'_, (Result<Loaded>, AlignedBuf)> {
        Box::pin(async move {
            let (result, buf) = self.read(offset, buf).await;
            (result.map(|()| Loaded::Buffer), buf)
        })
    }

    /// Writes the whole of `buf` at `offset`.
    fn write(
        &self,
        offset: u64,
        buf: AlignedBuf,
        durability: Durability,
    ) -> DeviceFuture<'_, (Result<()>, AlignedBuf)>;

    /// Makes `range` read as zeroes.
    fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> DeviceFuture<'_, Result<()>>;

    /// Says that nobody needs what `range` holds. It may read as anything that was there, or zeroes.
    fn trim(&self, range: ByteRange, durability: Durability) -> DeviceFuture<'_, Result<()>>;

    /// Puts on stable storage every write that was acknowledged before this call.
    fn flush(&self) -> DeviceFuture<'_, Result<()>>;

    /// What is known of `range`, without reading it: extents in order, without gaps, from the
    /// range's start; at most `limit` of them, so they may end before the range does.
    fn extents(&self, range: ByteRange, limit: usize) -> DeviceFuture<'_, Result<Vec<Extent>>>;

    /// A handle for one client alone, where telling clients apart is of use; `None` where all may share this one.
    fn for_client(&self) -> Option<Rc<dyn BlockDevice>> {
        None
    }

    /// Asks that `range` be fetched to where it is fast (NBD's CACHE).
    fn prefetch(&self, range: ByteRange) -> DeviceFuture<'_, Result<()>> {
        let _ = range;
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Opens one disk on whichever thread asks, so that each shard has a handle of its own.
pub trait OpenDevice: Send + Sync {
    /// A handle for the calling thread.
    fn open(&self) -> Result<Rc<dyn BlockDevice>>;
}
