//! One thread's handle on a disk: whole operations made of single ones.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::pace::Pace;
use super::range_lock::Hold;
use super::{Inner, extents, fast};
use crate::queue::{Control, Direction, Queue, Transfer, run_on_a_thread};
use crate::{
    AlignedBuf, Attempt, BlockDevice, ByteRange, DeviceFuture, Durability, Error, ErrorKind, Extent,
    Geometry, Loaded, Result, ZeroMode,
};

/// The most that is left in the page cache for whoever sends it from there: what is asked of it takes a moment for each piece, for
/// which others on the thread wait.
const LOAD_MAX: u64 = 1 << 20;

/// A disk by way of the queue `Q`.
pub(super) struct Handle<Q> {
    pub(super) inner: Arc<Inner>,
    pub(super) queue: Q,
    pace: Pace,
}

impl<Q: Queue> Handle<Q> {
    pub(super) fn new(inner: Arc<Inner>, queue: Q) -> Self {
        Self { inner, queue, pace: Pace::default() }
    }

    async fn read_any(&self, offset: u64, buf: AlignedBuf) -> (Result<()>, AlignedBuf) {
        let range = match self.inner.range(offset, buf.len()) {
            Ok(range) if range.is_empty() => return (Ok(()), buf),
            Ok(range) => range,
            Err(error) => return (Err(error), buf),
        };
        if self.inner.is_direct() && !range.is_aligned(self.inner.unit()) {
            return self.read_unaligned(range, buf).await;
        }
        self.transfer_all(Direction::Read, offset, buf).await
    }

    /// Has the page cache filled, and waits for that with a few bytes of it: nothing is copied, and nobody is woken for each page.
    async fn load_any(&self, offset: u64, mut buf: AlignedBuf) -> (Result<Loaded>, AlignedBuf) {
        let range = match self.inner.range(offset, buf.len()) {
            Ok(range) => range,
            Err(error) => return (Err(error), buf),
        };
        if range.len() <= LOAD_MAX && fast::begin_loading(&self.inner, range, &mut buf) {
            for at in fast::probes(range).filter(|&at| !fast::is_filled(&self.inner, at)) {
                let place = (at - offset) as usize;
                let transfer = Transfer { direction: Direction::Read, offset: at, span: place..place + 1 };
                // What fails is met again below, and told.
                buf = self.queue.transfer(&self.inner.fd, transfer, buf).await.1;
            }
            if fast::is_resident(&self.inner, range) {
                return (Ok(Loaded::Resident), buf);
            }
        }
        let (result, buf) = self.read_any(offset, buf).await;
        (result.map(|()| Loaded::Buffer), buf)
    }

    pub(super) async fn write_any(
        &self,
        offset: u64,
        buf: AlignedBuf,
        durability: Durability,
    ) -> (Result<()>, AlignedBuf) {
        let checked = self.inner.check_writable().and_then(|()| self.inner.range(offset, buf.len()));
        let range = match checked {
            Ok(range) if range.is_empty() => return (Ok(()), buf),
            Ok(range) => range,
            Err(error) => return (Err(error), buf),
        };
        if durability == Durability::Stable
            && let Err(error) = self.inner.check_syncs()
        {
            return (Err(error), buf);
        }
        if !self.inner.is_direct() {
            return self.write_range(range, buf, durability).await;
        }
        if !range.is_aligned(self.inner.unit()) {
            return self.write_unaligned(range, buf, durability).await;
        }
        let _hold = self.inner.locks.hold(range, Hold::Shared).await;
        self.write_range(range, buf, durability).await
    }

    /// Writes a range that the queue takes as it is; whatever hold it needs is held.
    pub(super) async fn write_range(
        &self,
        range: ByteRange,
        buf: AlignedBuf,
        durability: Durability,
    ) -> (Result<()>, AlignedBuf) {
        if durability == Durability::Volatile {
            return self.transfer_all(Direction::Write, range.start(), buf).await;
        }
        let no_dsync = &self.inner.support.no_dsync;
        let mut lost = None;
        let mut buf = buf;
        if !no_dsync.load(Ordering::Relaxed) {
            let result;
            (result, buf) = self.transfer_all(Direction::WriteStable, range.start(), buf).await;
            match result {
                Ok(()) => return (self.inner.check_syncs(), buf),
                Err(error) => match error.kind() {
                    ErrorKind::Unsupported => no_dsync.store(true, Ordering::Relaxed),
                    ErrorKind::NoSpace => lost = Some(error),
                    ErrorKind::Io => return (Err(self.inner.sync_failure(error)), buf),
                    _ => return (Err(error), buf),
                },
            }
        }
        let (result, buf) = self.transfer_all(Direction::Write, range.start(), buf).await;
        match (result, lost) {
            // There was room for the write: it was in the sync that something found none, and that something may
            // be an earlier write, of which no later sync would tell.
            (Ok(()), Some(error)) => (Err(self.inner.sync_failure(error)), buf),
            (Ok(()), None) => (self.sync().await, buf),
            (failed, _) => (failed, buf),
        }
    }

    pub(super) async fn sync(&self) -> Result<()> {
        self.inner.check_syncs()?;
        match self.queue.control(&self.inner.fd, Control::Sync).await {
            // A sync of another handle may have failed meanwhile, and taken the report of our loss with it.
            Ok(()) => self.inner.check_syncs(),
            Err(source) => Err(self.inner.sync_failure(self.inner.failed("sync", source))),
        }
    }

    /// Transfers the whole buffer, in as many steps as the kernel makes of it.
    pub(super) async fn transfer_all(
        &self,
        direction: Direction,
        offset: u64,
        mut buf: AlignedBuf,
    ) -> (Result<()>, AlignedBuf) {
        let len = buf.len();
        let mut done = 0;
        loop {
            let transfer = Transfer { direction, offset: offset + done as u64, span: done..len };
            let (result, returned) = self.queue.transfer(&self.inner.fd, transfer, buf).await;
            buf = returned;
            let mut reached = match result {
                Ok(count) => done + count,
                Err(source) => {
                    let error = self.transfer_failed(direction, offset, len, source);
                    let rest = ByteRange::from_bounds(offset + done as u64, offset + len as u64);
                    return (Err(error.at(rest)), buf);
                }
            };
            if reached >= len {
                return (Ok(()), buf);
            }
            if self.inner.is_direct() {
                // What follows must begin at a multiple again; the rest of the unit is done twice.
                reached -= reached % self.inner.unit() as usize;
            }
            if reached <= done {
                return (Err(self.ended(direction, offset + reached as u64)), buf);
            }
            done = reached;
        }
    }

    #[cold]
    fn transfer_failed(
        &self,
        direction: Direction,
        offset: u64,
        len: usize,
        source: std::io::Error,
    ) -> Error {
        let verb = if direction.is_write() { "write" } else { "read" };
        self.inner.failed(format_args!("{verb} bytes {offset}..{} of", offset + len as u64), source)
    }

    /// The file or device ended although it was larger when it was opened.
    #[cold]
    fn ended(&self, direction: Direction, offset: u64) -> Error {
        let verb = if direction.is_write() { "write to" } else { "read from" };
        let path = self.inner.path.display();
        Error::new(
            ErrorKind::Io,
            format_args!("{verb} {path}: it ends at byte {offset}, earlier than it did"),
        )
    }
}

impl<Q: Queue> BlockDevice for Handle<Q> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<Attempt> {
        fast::try_read(&self.inner, offset, buf)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<Attempt> {
        fast::try_write(&self.inner, &self.pace, offset, data)
    }

    fn resident(&self, range: ByteRange) -> Option<(BorrowedFd<'_>, u64)> {
        fast::is_resident(&self.inner, range).then(|| (self.inner.fd.as_fd(), range.start()))
    }

    fn not_resident(&self) {
        self.inner.missing.resident.store(true, Ordering::Relaxed);
    }

    fn read(&self, offset: u64, buf: AlignedBuf) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(self.read_any(offset, buf))
    }

    fn load(&self, offset: u64, buf: AlignedBuf) -> DeviceFuture<'_, (Result<Loaded>, AlignedBuf)> {
        Box::pin(self.load_any(offset, buf))
    }

    fn write(
        &self,
        offset: u64,
        buf: AlignedBuf,
        durability: Durability,
    ) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(self.write_any(offset, buf, durability))
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> DeviceFuture<'_, Result<()>> {
        Box::pin(self.zero(range, mode, durability))
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> DeviceFuture<'_, Result<()>> {
        Box::pin(self.discard(range, durability))
    }

    fn flush(&self) -> DeviceFuture<'_, Result<()>> {
        Box::pin(self.sync())
    }

    fn extents(&self, range: ByteRange, limit: usize) -> DeviceFuture<'_, Result<Vec<Extent>>> {
        Box::pin(async move {
            self.inner.check(range)?;
            let inner = Arc::clone(&self.inner);
            // Finding holes may read the file system's metadata from the disk.
            run_on_a_thread(move || extents::extents(&inner, range, limit)).await
        })
    }

    fn prefetch(&self, range: ByteRange) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            self.inner.check(range)?;
            let Some(len) = std::num::NonZeroU64::new(range.len()) else { return Ok(()) };
            if self.inner.is_direct() {
                return Ok(()); // What is not read through the page cache is not fetched into it.
            }
            let inner = Arc::clone(&self.inner);
            run_on_a_thread(move || {
                rustix::fs::fadvise(&inner.fd, range.start(), Some(len), rustix::fs::Advice::WillNeed)
                    .map_err(|errno| inner.failed(format_args!("prefetch {range} of"), errno.into()))
            })
            .await
        })
    }
}
