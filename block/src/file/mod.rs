//! Raw files and block devices as disks: one open file description each, shared by all threads.
//!
//! The description carries the exclusive lock (`flock`), and operations in flight on a ring refer to
//! it. So the lock outlives its process until the last of its writes has ended, and whoever takes the
//! lock next knows that no write of a predecessor will land later.

mod extents;
mod fast;
mod handle;
mod open;
mod pace;
mod range_lock;
mod unaligned;
mod zero;

use std::fs::File;
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use rustix::fs::FlockOperation;

use crate::queue::{Inline, Ring, Threads};
use crate::{
    AlignedBuf, BlockDevice, ByteRange, Durability, Engine, Error, ErrorKind, Geometry, OpenDevice, Result,
    ZeroMode, engine,
};
use fast::Missing;
use handle::Handle;
use open::Support;
use range_lock::RangeLock;

/// Whether transfers go around the page cache. For one open disk it is all or nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum DirectIo {
    /// Around it where the file system and the disk's size allow.
    #[default]
    Auto,
    /// Around it, or an error.
    On,
    /// Through it.
    Off,
}

/// How a [`FileDisk`] is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Refuse every write.
    pub read_only: bool,
    /// Whether transfers go around the page cache.
    pub direct: DirectIo,
    /// The engine of the handles that [`OpenDevice::open`] makes.
    pub engine: Engine,
    /// Whether [`FileDisk::create`] may replace the contents of an existing file.
    pub overwrite: bool,
}

impl FileOptions {
    /// Reading and writing, direct where possible, never overwriting.
    #[must_use]
    pub const fn new(engine: Engine) -> Self {
        Self { read_only: false, direct: DirectIo::Auto, engine, overwrite: false }
    }

    /// Whether every write is refused.
    #[must_use]
    pub const fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Whether transfers go around the page cache.
    #[must_use]
    pub const fn direct(mut self, direct: DirectIo) -> Self {
        self.direct = direct;
        self
    }

    /// Whether [`FileDisk::create`] may replace an existing file.
    #[must_use]
    pub const fn overwrite(mut self, overwrite: bool) -> Self {
        self.overwrite = overwrite;
        self
    }
}

impl Default for FileOptions {
    /// With [`Engine::THREADS`], which works everywhere.
    fn default() -> Self {
        Self::new(Engine::THREADS)
    }
}

/// A raw file or a block device, open once. Clones share the one open file description.
///
/// A thread does its I/O through a handle of its own, from [`OpenDevice::open`]; threads that have
/// nothing else to do may use the blocking methods here.
#[derive(Clone, Debug)]
pub struct FileDisk {
    inner: Arc<Inner>,
}

/// What all handles of a disk share.
#[derive(Debug)]
struct Inner {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    geometry: Geometry,
    support: Support,
    engine: Engine,
    /// In direct mode: who writes where.
    locks: RangeLock,
    /// A sync failed: what was written before may be lost although a later sync would succeed.
    sync_failed: AtomicBool,
    missing: Missing,
}

impl FileDisk {
    /// Opens an existing raw file or block device. Its size is taken now and does not change. A block device that
    /// is set read-only is opened for reading whatever `options` say: its [`FileDisk::geometry`] says so.
    ///
    /// # Errors
    /// `NotPermitted` without the permission; `Unsupported` where it is neither a regular file nor a block
    /// device, or direct I/O was demanded and cannot be had; `Io` otherwise.
    pub fn open(path: impl AsRef<Path>, options: FileOptions) -> Result<Self> {
        open::open(path.as_ref(), options).map(Self::from)
    }

    /// The disk behind a file that is open for what `options` say: its description, with the lock that it may hold,
    /// is the disk's. `path` is what it was opened by.
    ///
    /// # Errors
    /// As for [`FileDisk::open`].
    pub fn from_file(file: File, path: impl AsRef<Path>, options: FileOptions) -> Result<Self> {
        open::inspect(file, path.as_ref(), options).map(Self::from)
    }

    /// Makes a new raw file of `size` bytes, all holes, whose name is on stable storage, and opens it.
    ///
    /// # Errors
    /// As for [`FileDisk::open`]; also where the file exists and `overwrite` was not given.
    pub fn create(path: impl AsRef<Path>, size: u64, options: FileOptions) -> Result<Self> {
        open::create(path.as_ref(), size, options).map(Self::from)
    }

    /// Takes the exclusive lock, on the very file description that all operations use. `false` where
    /// somebody else has it, or where operations of a process that had it are still in flight.
    /// It is held until the last clone, handle and operation in flight is gone.
    ///
    /// # Errors
    /// Where the file system cannot lock.
    pub fn try_lock(&self) -> Result<bool> {
        match rustix::fs::flock(&self.inner.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(self.inner.failed("lock", errno.into())),
        }
    }

    /// Drops what the kernel keeps of the disk in memory and takes for written. After a sync that failed,
    /// that may be what readers see and storage does not have.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn forget_clean_pages(&self) -> Result<()> {
        rustix::fs::fadvise(&self.inner.fd, 0, None, rustix::fs::Advice::DontNeed)
            .map_err(|errno| self.inner.failed("drop cached pages", errno.into()))
    }

    /// What the disk is like.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.inner.geometry
    }

    /// The size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.inner.geometry.size
    }

    /// Whether it is a block device, not a file.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.inner.support.block_device
    }

    /// Whether transfers go around the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.inner.is_direct()
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The parts of `range` that may hold something else than zeroes, in order: what is allocated in a file,
    /// and all of it on a block device.
    ///
    /// # Errors
    /// `InvalidRange` outside the disk; `Io`.
    pub fn data_ranges(&self, range: ByteRange) -> Result<Vec<ByteRange>> {
        self.inner.check(range)?;
        extents::data_ranges(&self.inner, range, usize::MAX)
    }

    /// Fills `buf` from `offset`, blocking the calling thread.
    ///
    /// # Errors
    /// As [`BlockDevice::read`].
    pub fn read_blocking(&self, offset: u64, buf: AlignedBuf) -> (Result<()>, AlignedBuf) {
        block_on(self.blocking().read(offset, buf))
    }

    /// Writes `buf` at `offset`, blocking the calling thread.
    ///
    /// # Errors
    /// As [`BlockDevice::write`].
    pub fn write_blocking(
        &self,
        offset: u64,
        buf: AlignedBuf,
        durability: Durability,
    ) -> (Result<()>, AlignedBuf) {
        block_on(self.blocking().write(offset, buf, durability))
    }

    /// Makes `range` read as zeroes, blocking the calling thread.
    ///
    /// # Errors
    /// As [`BlockDevice::write_zeroes`].
    pub fn write_zeroes_blocking(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<()> {
        block_on(self.blocking().write_zeroes(range, mode, durability))
    }

    /// Puts everything written so far on stable storage, blocking the calling thread.
    ///
    /// # Errors
    /// As [`BlockDevice::flush`].
    pub fn flush_blocking(&self) -> Result<()> {
        block_on(self.blocking().flush())
    }

    fn blocking(&self) -> Handle<Inline> {
        Handle::new(Arc::clone(&self.inner), Inline)
    }
}

impl From<Inner> for FileDisk {
    fn from(inner: Inner) -> Self {
        Self { inner: Arc::new(inner) }
    }
}

impl AsFd for FileDisk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }
}

impl OpenDevice for FileDisk {
    /// A handle on the calling thread's ring, if the engine is `uring` and [`Engine::run`] runs here;
    /// on the pool of threads otherwise.
    fn open(&self) -> Result<Rc<dyn BlockDevice>> {
        let inner = Arc::clone(&self.inner);
        if inner.engine.is_uring() && engine::has_ring() {
            Ok(Rc::new(Handle::new(inner, Ring)))
        } else {
            Ok(Rc::new(Handle::new(inner, Threads)))
        }
    }
}

impl Inner {
    const fn is_direct(&self) -> bool {
        self.support.direct
    }

    /// The granularity of transfers in direct mode.
    const fn unit(&self) -> u64 {
        self.geometry.minimum_io as u64
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        if range.fits(self.geometry.size) {
            return Ok(());
        }
        Err(self.outside(range))
    }

    #[cold]
    fn outside(&self, range: impl std::fmt::Display) -> Error {
        let size = self.geometry.size;
        Error::new(
            ErrorKind::InvalidRange,
            format_args!("{range} of {} lie beyond its {size} bytes", self.path.display()),
        )
    }

    fn range(&self, offset: u64, len: usize) -> Result<ByteRange> {
        match ByteRange::new(offset, len as u64) {
            Some(range) => self.check(range).map(|()| range),
            None => Err(self.outside(format_args!("{len} bytes from {offset}"))),
        }
    }

    fn check_writable(&self) -> Result<()> {
        if !self.geometry.read_only {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NotPermitted,
            format_args!("{} is open for reading only", self.path.display()),
        ))
    }

    /// Fails once a sync has failed: another would report success for data that the kernel has dropped.
    fn check_syncs(&self) -> Result<()> {
        if !self.sync_failed.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Poisoned,
            format_args!("an earlier sync of {} failed; what was written may be lost", self.path.display()),
        ))
    }

    #[cold]
    fn failed(&self, doing: impl std::fmt::Display, source: std::io::Error) -> Error {
        Error::io(format_args!("{doing} {}", self.path.display()), source)
    }

    /// A failure of something that had to reach stable storage.
    #[cold]
    fn sync_failure(&self, error: Error) -> Error {
        if !matches!(error.kind(), ErrorKind::Shutdown | ErrorKind::Unsupported) {
            self.sync_failed.store(true, Ordering::Release);
        }
        error
    }
}

/// Runs a future that waits for nothing but other threads' holds.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}
