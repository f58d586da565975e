//! A disk too large for memory: it holds zeroes, notes what is asked of it, and is damaged where a test says so.

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use block::{
    AlignedBuf, Attempt, BlockDevice, ByteRange, DeviceFuture, Durability, Error, ErrorKind, Extent,
    ExtentState, Geometry, OpenDevice, Result, ZeroMode,
};
use tokio::sync::Semaphore;

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Trim(ByteRange, Durability),
    Zero(ByteRange, Durability),
    Prefetch(ByteRange),
    Flush,
}

/// The disk. Clones are one.
#[derive(Clone)]
pub(crate) struct VastDisk(Arc<State>);

struct State {
    size: u64,
    asked: Mutex<Vec<Asked>>,
    damaged: ByteRange,
    /// The most bytes that one answer about extents covers.
    extents_at_once: u64,
    gate: Semaphore,
    gate_closed: AtomicBool,
    waiting: AtomicUsize,
}

impl VastDisk {
    pub(crate) fn new(size: u64) -> Self {
        let none = ByteRange::from_bounds(0, 0);
        Self::with(size, none, u64::MAX)
    }

    /// Of `size` bytes, with `damaged` bytes, of which extents are told at most `extents_at_once` at a time.
    pub(crate) fn with(size: u64, damaged: ByteRange, extents_at_once: u64) -> Self {
        Self(Arc::new(State {
            size,
            asked: Mutex::default(),
            damaged,
            extents_at_once,
            gate: Semaphore::new(0),
            gate_closed: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        }))
    }

    pub(crate) fn take_asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.0.asked.lock().expect("nobody panics with it"))
    }

    /// Each operation that is noted waits from now on until it is let through.
    pub(crate) fn close_gate(&self) {
        self.0.gate_closed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn let_through(&self, count: usize) {
        self.0.gate.add_permits(count);
    }

    pub(crate) fn wait_for_waiting(&self) {
        while self.0.waiting.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
    }
}

impl OpenDevice for VastDisk {
    fn open(&self) -> Result<Rc<dyn BlockDevice>> {
        Ok(Rc::new(Handle(Arc::clone(&self.0))))
    }
}

struct Handle(Arc<State>);

impl Handle {
    fn note(&self, asked: Asked) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            self.0.asked.lock().expect("nobody panics with it").push(asked);
            if self.0.gate_closed.load(Ordering::SeqCst) {
                self.0.waiting.fetch_add(1, Ordering::SeqCst);
                self.0.gate.acquire().await.expect("the gate is never removed").forget();
                self.0.waiting.fetch_sub(1, Ordering::SeqCst);
            }
            Ok(())
        })
    }

    fn is_damaged(&self, range: ByteRange) -> bool {
        !range.intersection(self.0.damaged).is_empty()
    }

    fn damage(&self) -> Error {
        let damaged = self.0.damaged;
        Error::new(ErrorKind::Damaged, format_args!("chunk 7\n({damaged}) is damaged: its hash is wrong"))
            .at(damaged)
    }
}

impl BlockDevice for Handle {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.0.size,
            minimum_io: 1,
            preferred_io: 4096,
            read_only: false,
            can_trim: true,
            fast_zero: true,
            shared_flush: true,
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<Attempt> {
        // Whoever sends these on has looked at the wrong thing.
        buf.fill(0xee);
        let range = ByteRange::from_bounds(offset, offset + buf.len() as u64);
        Ok(if self.is_damaged(range) { Attempt::WouldWait } else { Attempt::Zeroes })
    }

    fn read(&self, offset: u64, mut buf: AlignedBuf) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(async move {
            let range = ByteRange::from_bounds(offset, offset + buf.len() as u64);
            if self.is_damaged(range) {
                return (Err(self.damage()), buf);
            }
            buf.fill(0);
            (Ok(()), buf)
        })
    }

    fn write(&self, _: u64, buf: AlignedBuf, _: Durability) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(std::future::ready((Ok(()), buf)))
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        _: ZeroMode,
        durability: Durability,
    ) -> DeviceFuture<'_, Result<()>> {
        self.note(Asked::Zero(range, durability))
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> DeviceFuture<'_, Result<()>> {
        self.note(Asked::Trim(range, durability))
    }

    fn flush(&self) -> DeviceFuture<'_, Result<()>> {
        self.note(Asked::Flush)
    }

    /// The lower half is zeroes, the upper half is not.
    fn extents(&self, range: ByteRange, limit: usize) -> DeviceFuture<'_, Result<Vec<Extent>>> {
        let end = range.end().min(range.start().saturating_add(self.0.extents_at_once));
        let (told, middle) = (ByteRange::from_bounds(range.start(), end), self.0.size / 2);
        let zero = ExtentState { hole: true, zero: true, ..ExtentState::default() };
        let data = ExtentState { depth: 1, ..ExtentState::default() };
        let halves =
            [(ByteRange::from_bounds(0, middle), zero), (ByteRange::from_bounds(middle, self.0.size), data)];
        let extents = halves
            .into_iter()
            .map(|(half, state)| Extent { range: half.intersection(told), state })
            .filter(|extent| !extent.range.is_empty())
            .take(limit)
            .collect();
        Box::pin(std::future::ready(Ok(extents)))
    }

    fn prefetch(&self, range: ByteRange) -> DeviceFuture<'_, Result<()>> {
        self.note(Asked::Prefetch(range))
    }
}
