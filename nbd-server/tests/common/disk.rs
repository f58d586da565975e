//! A disk in memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use block::{
    AlignedBuf, Attempt, BlockDevice, ByteRange, DeviceFuture, Durability, Error, ErrorKind, Extent,
    ExtentState, Geometry, OpenDevice, Result, ZeroMode,
};
use tokio::sync::Semaphore;

const BLOCK: u64 = 4096;

/// Bytes that every shard shares. Blocks of zeroes are holes.
pub(crate) struct MemoryDisk {
    state: Arc<State>,
}

struct State {
    bytes: Mutex<Vec<u8>>,
    dirty: Mutex<BTreeSet<u64>>,
    /// Whether what takes no waiting is offered.
    fast: AtomicBool,
    /// Async operations pass one permit each, unless the gate is open.
    gate: Semaphore,
    gate_closed: AtomicBool,
    failure: Mutex<Option<ErrorKind>>,
    /// How many operations that wait still succeed before that.
    succeed: AtomicUsize,
    handles: AtomicUsize,
    waiting: AtomicUsize,
    stable_writes: AtomicUsize,
    flushes: AtomicUsize,
    prefetched: AtomicUsize,
    extents: AtomicUsize,
    /// The file where all of it is said to be, until that is found not to be so.
    resident: OnceLock<File>,
    is_resident: AtomicBool,
}

impl MemoryDisk {
    pub(crate) fn new(len: usize) -> Self {
        let state = State {
            bytes: Mutex::new(vec![0; len]),
            dirty: Mutex::default(),
            fast: AtomicBool::new(true),
            gate: Semaphore::new(0),
            gate_closed: AtomicBool::new(false),
            failure: Mutex::new(None),
            succeed: AtomicUsize::new(0),
            handles: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            stable_writes: AtomicUsize::new(0),
            flushes: AtomicUsize::new(0),
            prefetched: AtomicUsize::new(0),
            extents: AtomicUsize::new(0),
            resident: OnceLock::new(),
            is_resident: AtomicBool::new(true),
        };
        Self { state: Arc::new(state) }
    }

    /// The same, and every operation waits at least once.
    pub(crate) fn slow(self) -> Self {
        self.state.fast.store(false, Ordering::SeqCst);
        self
    }

    pub(crate) fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.state.bytes.lock().expect("nobody panics with it")
    }

    /// Makes operations that wait wait until [`MemoryDisk::open_gate`].
    pub(crate) fn close_gate(&self) {
        self.state.gate_closed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn open_gate(&self) {
        self.state.gate_closed.store(false, Ordering::SeqCst);
        self.state.gate.add_permits(self.state.waiting.load(Ordering::SeqCst) + 1000);
    }

    /// How many operations wait at the gate.
    pub(crate) fn waiting(&self) -> usize {
        self.state.waiting.load(Ordering::SeqCst)
    }

    pub(crate) fn wait_for_waiting(&self, count: usize) {
        while self.waiting() < count {
            std::thread::yield_now();
        }
    }

    /// Every operation fails like this from now on.
    pub(crate) fn fail(&self, kind: ErrorKind) {
        *self.state.failure.lock().expect("nobody panics with it") = Some(kind);
    }

    /// Every operation that waits fails like this, after so many of them.
    pub(crate) fn fail_after(&self, count: usize, kind: ErrorKind) {
        self.state.succeed.store(count, Ordering::SeqCst);
        self.fail(kind);
    }

    /// Nothing fails any more.
    pub(crate) fn mend(&self) {
        *self.state.failure.lock().expect("nobody panics with it") = None;
    }

    /// Says of everything that it can be sent from `file`.
    pub(crate) fn claim_resident(&self, file: File) {
        self.state.resident.set(file).expect("it is said once");
    }

    pub(crate) fn handles(&self) -> usize {
        self.state.handles.load(Ordering::SeqCst)
    }

    pub(crate) fn stable_writes(&self) -> usize {
        self.state.stable_writes.load(Ordering::SeqCst)
    }

    pub(crate) fn flushes(&self) -> usize {
        self.state.flushes.load(Ordering::SeqCst)
    }

    /// How often it was asked where it has data.
    pub(crate) fn asked_for_extents(&self) -> usize {
        self.state.extents.load(Ordering::SeqCst)
    }

    pub(crate) fn prefetched_bytes(&self) -> usize {
        self.state.prefetched.load(Ordering::SeqCst)
    }
}

impl OpenDevice for MemoryDisk {
    fn open(&self) -> Result<Rc<dyn BlockDevice>> {
        self.state.handles.fetch_add(1, Ordering::SeqCst);
        Ok(Rc::new(Handle(Arc::clone(&self.state))))
    }
}

struct Handle(Arc<State>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.handles.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Handle {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.bytes.lock().expect("nobody panics with it")
    }

    fn failure(&self) -> Result<()> {
        match *self.0.failure.lock().expect("nobody panics with it") {
            Some(kind) => Err(Error::new(kind, "made to fail")),
            None => Ok(()),
        }
    }

    async fn pass(&self) -> Result<()> {
        self.0.waiting.fetch_add(1, Ordering::SeqCst);
        if self.0.gate_closed.load(Ordering::SeqCst) {
            self.0.gate.acquire().await.expect("the gate is never removed").forget();
        } else {
            tokio::task::yield_now().await;
        }
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
        let one_less = |left: usize| left.checked_sub(1);
        match self.0.succeed.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less) {
            Ok(_) => Ok(()),
            Err(_) => self.failure(),
        }
    }

    fn is_fast(&self) -> bool {
        self.0.fast.load(Ordering::SeqCst)
    }

    fn store(&self, offset: u64, data: &[u8]) {
        let start = offset as usize;
        self.bytes()[start..start + data.len()].copy_from_slice(data);
        let range = ByteRange::from_bounds(offset, offset + data.len() as u64);
        self.0.dirty.lock().expect("nobody panics with it").extend(range.units(BLOCK));
    }

    fn count_stable(&self, durability: Durability) {
        if durability == Durability::Stable {
            self.0.stable_writes.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl BlockDevice for Handle {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.bytes().len() as u64,
            minimum_io: 1,
            preferred_io: 4096,
            read_only: false,
            can_trim: true,
            fast_zero: false,
            shared_flush: true,
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<Attempt> {
        self.failure()?;
        if !self.is_fast() {
            return Ok(Attempt::WouldWait);
        }
        let start = offset as usize;
        buf.copy_from_slice(&self.bytes()[start..start + buf.len()]);
        Ok(Attempt::Done)
    }

    fn resident(&self, range: ByteRange) -> Option<(BorrowedFd<'_>, u64)> {
        let file = self.0.resident.get()?;
        self.0.is_resident.load(Ordering::SeqCst).then(|| (file.as_fd(), range.start()))
    }

    fn not_resident(&self) {
        self.0.is_resident.store(false, Ordering::SeqCst);
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<Attempt> {
        self.failure()?;
        if !self.is_fast() {
            return Ok(Attempt::WouldWait);
        }
        self.store(offset, data);
        Ok(Attempt::Done)
    }

    fn read(&self, offset: u64, mut buf: AlignedBuf) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(async move {
            let passed = self.pass().await;
            let start = offset as usize;
            let len = buf.len();
            buf.copy_from_slice(&self.bytes()[start..start + len]);
            (passed, buf)
        })
    }

    fn write(
        &self,
        offset: u64,
        buf: AlignedBuf,
        durability: Durability,
    ) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(async move {
            let passed = self.pass().await;
            if passed.is_ok() {
                self.store(offset, &buf);
                self.count_stable(durability);
            }
            (passed, buf)
        })
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pass().await?;
            if mode.only_if_fast {
                return Err(Error::new(ErrorKind::Unsupported, "zeroes are not fast here"));
            }
            self.store(range.start(), &vec![0; range.len() as usize]);
            self.count_stable(durability);
            Ok(())
        })
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> DeviceFuture<'_, Result<()>> {
        self.write_zeroes(range, ZeroMode::UNMAP, durability)
    }

    fn flush(&self) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pass().await?;
            self.0.flushes.fetch_add(1, Ordering::SeqCst);
            Ok(())
        })
    }

    fn extents(&self, range: ByteRange, limit: usize) -> DeviceFuture<'_, Result<Vec<Extent>>> {
        self.0.extents.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            self.pass().await?;
            let bytes = self.bytes();
            let dirty = self.0.dirty.lock().expect("nobody panics with it");
            let mut extents: Vec<Extent> = Vec::new();
            for (number, part) in range.split(BLOCK) {
                let zero = bytes[part.start() as usize..part.end() as usize].iter().all(|byte| *byte == 0);
                let depth = u32::from(!zero);
                let state = ExtentState { hole: zero, zero, depth, dirty: dirty.contains(&number) };
                let full = extents.len() == limit;
                match extents.last_mut() {
                    Some(last) if last.state == state => {
                        last.range = ByteRange::from_bounds(last.range.start(), part.end());
                    }
                    _ if full => break,
                    _ => extents.push(Extent { range: part, state }),
                }
            }
            Ok(extents)
        })
    }

    fn prefetch(&self, range: ByteRange) -> DeviceFuture<'_, Result<()>> {
        self.0.prefetched.fetch_add(range.len() as usize, Ordering::SeqCst);
        Box::pin(self.pass())
    }
}
