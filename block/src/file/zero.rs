//! Zeroes and trims: by `fallocate`, by the block device's own means, or by writing zero bytes.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::{Errno, retry_on_intr};

use super::Inner;
use super::handle::Handle;
use super::range_lock::Hold;
use crate::queue::{Control, Queue, run_on_a_thread};
use crate::{AlignedBuf, BufferPool, ByteRange, Durability, Error, ErrorKind, Result, ZeroMode};

const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | KEEP_SIZE;

impl<Q: Queue> Handle<Q> {
    pub(super) async fn zero(&self, range: ByteRange, mode: ZeroMode, durability: Durability) -> Result<()> {
        self.inner.check_writable()?;
        self.inner.check(range)?;
        if durability == Durability::Stable {
            self.inner.check_syncs()?;
        }
        if mode.only_if_fast && !self.inner.geometry.fast_zero {
            return Err(self.inner.not_fast());
        }
        if range.is_empty() {
            return Ok(());
        }
        let inner = range.aligned_inward(self.inner.support.hole_unit);
        if inner.is_empty() {
            self.write_zero_bytes(range).await?;
        } else {
            if !self.zero_quickly(inner, mode.may_unmap).await? {
                if mode.only_if_fast {
                    return Err(self.inner.not_fast());
                }
                self.write_zero_bytes(inner).await?;
            }
            self.write_zero_bytes(ByteRange::from_bounds(range.start(), inner.start())).await?;
            self.write_zero_bytes(ByteRange::from_bounds(inner.end(), range.end())).await?;
        }
        match durability {
            Durability::Volatile => Ok(()),
            Durability::Stable => self.sync().await,
        }
    }

    /// Trims the whole units inside `range`; their neighbours are somebody else's.
    pub(super) async fn discard(&self, range: ByteRange, durability: Durability) -> Result<()> {
        self.inner.check_writable()?;
        self.inner.check(range)?;
        let units = range.aligned_inward(self.inner.support.hole_unit);
        if !units.is_empty() && !self.allocate(PUNCH_HOLE, units, &self.inner.support.no_punch).await? {
            self.discard_on_device(units).await?;
        }
        match durability {
            Durability::Volatile => Ok(()),
            Durability::Stable => self.sync().await,
        }
    }

    /// Zeroes whole units without writing them. `false` where that cannot be done here.
    async fn zero_quickly(&self, units: ByteRange, may_unmap: bool) -> Result<bool> {
        let support = &self.inner.support;
        if !self.inner.reaches(units.end())? {
            return Ok(false);
        }
        if may_unmap && self.allocate(PUNCH_HOLE, units, &support.no_punch).await? {
            return Ok(true);
        }
        if self.allocate(ZERO_RANGE, units, &support.no_zero_range).await? {
            return Ok(true);
        }
        if support.block_device || may_unmap || !self.allocate(PUNCH_HOLE, units, &support.no_punch).await? {
            return Ok(false);
        }
        // The room was asked for: take it again (tmpfs knows holes and room, but not ZERO_RANGE).
        self.allocate(KEEP_SIZE, units, &AtomicBool::new(false)).await
    }

    /// `fallocate` in this mode, unless it is known not to work. `false` where it does not.
    async fn allocate(&self, mode: i32, units: ByteRange, known_not_to_work: &AtomicBool) -> Result<bool> {
        if known_not_to_work.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let control = Control::Allocate { mode, offset: units.start(), len: units.len() };
        let _hold = if self.inner.is_direct() {
            Some(self.inner.locks.hold(units, Hold::Shared).await)
        } else {
            None
        };
        match self.queue.control(&self.inner.fd, control).await {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                known_not_to_work.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(source) => Err(self.inner.failed(format_args!("zero {units} of"), source)),
        }
    }

    /// BLKDISCARD, for devices whose trim does not promise zeroes. Where there is none, nothing is done:
    /// a trim is advice.
    async fn discard_on_device(&self, units: ByteRange) -> Result<()> {
        let no_discard = &self.inner.support.no_discard;
        if no_discard.load(Ordering::Relaxed) {
            return Ok(());
        }
        let _hold = if self.inner.is_direct() {
            Some(self.inner.locks.hold(units, Hold::Shared).await)
        } else {
            None
        };
        let fd = Arc::clone(&self.inner.fd);
        match run_on_a_thread(move || block_discard(&fd, units)).await {
            Ok(()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                no_discard.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(source) => Err(self.inner.failed(format_args!("trim {units} of"), source)),
        }
    }

    async fn write_zero_bytes(&self, range: ByteRange) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let piece = (BufferPool::LARGE as u64).min(range.len()) as usize;
        let mut buf = AlignedBuf::zeroed(piece);
        let mut at = range.start();
        while at < range.end() {
            buf.set_len((range.end() - at).min(piece as u64) as usize);
            let len = buf.len() as u64;
            let (result, returned) = self.write_any(at, buf, Durability::Volatile).await;
            result?;
            buf = returned;
            at += len;
        }
        Ok(())
    }
}

impl Inner {
    /// Makes a file that somebody else has shortened long enough again, as a write does: a hole beyond its end is none, and cannot be
    /// read. `false` where only writing makes it so.
    fn reaches(&self, end: u64) -> Result<bool> {
        let failed = |errno: Errno| self.failed(format_args!("lengthen to {end} bytes"), errno.into());
        let len = || rustix::fs::fstat(&self.fd).map(|stat| stat.st_size.cast_unsigned());
        if self.support.block_device || len().map_err(failed)? >= end {
            return Ok(true);
        }
        // Never shorter: a write may have made it longer meanwhile, which `ftruncate` would cut off.
        let lengthen = || rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), end - 1, 1);
        match retry_on_intr(lengthen) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
            Err(errno) => Err(failed(errno)),
        }
    }

    #[cold]
    fn not_fast(&self) -> Error {
        let path = self.path.display();
        Error::new(
            ErrorKind::Unsupported,
            format_args!("{path} has no way to zero that is faster than writing"),
        )
    }
}

/// `_IO(0x12, 119)` of `linux/fs.h`.
const BLKDISCARD: libc::Ioctl = 0x1277;

fn block_discard(fd: &OwnedFd, units: ByteRange) -> io::Result<()> {
    let range = [units.start(), units.len()];
    // SAFETY: BLKDISCARD reads two 64-bit numbers from the pointer, which live until the call returns.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
