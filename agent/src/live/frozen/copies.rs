//! What guests have overwritten of a view: in memory first, then on the spill device.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{AlignedBuf, Durability, Error, ErrorKind, Result};
use parking_lot::Mutex;

use super::FrozenOptions;

/// The copies of one view.
pub(super) struct Copies {
    options: FrozenOptions,
    /// By the chunk's place in the set.
    runs: Mutex<HashMap<usize, Vec<Copy>>>,
    in_memory: AtomicU64,
    spilled: AtomicU64,
    all: AtomicU64,
}

/// A run of blocks that was copied.
#[derive(Clone, Debug)]
pub(super) struct Copy {
    pub(super) blocks: Range<u64>,
    kept: Kept,
}

#[derive(Clone, Debug)]
enum Kept {
    Memory(Arc<AlignedBuf>),
    /// On the spill device, from this byte on.
    Spilled {
        at: u64,
        len: usize,
    },
}

impl Copies {
    pub(super) fn new(options: FrozenOptions) -> Self {
        let zero = || AtomicU64::new(0);
        Self { options, runs: Mutex::default(), in_memory: zero(), spilled: zero(), all: zero() }
    }

    /// All bytes that were ever copied.
    pub(super) fn bytes(&self) -> u64 {
        self.all.load(Ordering::Relaxed)
    }

    /// Keeps the bytes of `blocks`, of the chunk at `place`.
    ///
    /// # Errors
    /// `NoSpace` where neither memory nor the spill device has room for them.
    pub(super) async fn keep(&self, place: usize, blocks: Range<u64>, buf: AlignedBuf) -> Result<()> {
        let len = buf.len() as u64;
        let kept = if self.take_memory(len) { Kept::Memory(Arc::new(buf)) } else { self.spill(buf).await? };
        self.all.fetch_add(len, Ordering::Relaxed);
        self.runs.lock().entry(place).or_default().push(Copy { blocks, kept });
        Ok(())
    }

    fn take_memory(&self, len: u64) -> bool {
        let most = self.options.memory_bytes;
        let take = |used: u64| used.checked_add(len).filter(|used| *used <= most);
        self.in_memory.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    async fn spill(&self, buf: AlignedBuf) -> Result<Kept> {
        let none = || {
            Error::new(
                ErrorKind::NoSpace,
                "guests overwrote more, while it was read, than there is room to keep copies of",
            )
        };
        let device = self.options.spill.as_ref().ok_or_else(none)?.open()?;
        let len = buf.len();
        let room = device.geometry().size;
        let take = |used: u64| used.checked_add(len as u64).filter(|used| *used <= room);
        let at = self.spilled.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).map_err(|_| none())?;
        device.write(at, buf, Durability::Volatile).await.0?;
        Ok(Kept::Spilled { at, len })
    }

    /// Takes the copies of the chunk at `place` out.
    pub(super) fn take(&self, place: usize) -> Vec<Copy> {
        let copies = self.runs.lock().remove(&place).unwrap_or_default();
        for copy in &copies {
            if let Kept::Memory(buf) = &copy.kept {
                self.in_memory.fetch_sub(buf.len() as u64, Ordering::Relaxed);
            }
        }
        copies
    }

    /// The bytes of a copy.
    pub(super) async fn read(&self, copy: &Copy) -> Result<Arc<AlignedBuf>> {
        match &copy.kept {
            Kept::Memory(buf) => Ok(Arc::clone(buf)),
            Kept::Spilled { at, len } => {
                let device = self.options.spill.as_ref().expect("something was spilled").open()?;
                let (result, buf) = device.read(*at, AlignedBuf::zeroed(*len)).await;
                result.map(|()| Arc::new(buf))
            }
        }
    }

    /// Gives the memory back where nobody will read it.
    pub(super) fn forget_all(&self) {
        self.runs.lock().clear();
    }
}
