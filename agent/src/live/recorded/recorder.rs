//! The recorder: what reached two files, and what guests were told, in one order.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{
    AlignedBuf, Attempt, BlockDevice, ByteRange, DeviceFuture, Durability, Extent, FileDisk, Geometry,
    OpenDevice, Result, ZeroMode,
};
use parking_lot::Mutex;

use super::Handle;

/// Which file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    Target,
    Journal,
}

/// What happened. Whatever begins has a number by which its end is known.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Write {
        place: Place,
        number: u64,
        offset: u64,
        data: Arc<[u8]>,
    },
    Written {
        number: u64,
        is_stable: bool,
    },
    Sync {
        place: Place,
        number: u64,
    },
    Synced {
        number: u64,
    },
    /// A guest asks for a block to hold a value.
    GuestWrites {
        block: u64,
        value: u64,
    },
    /// It is told that the block does.
    GuestWrote {
        block: u64,
        value: u64,
    },
    GuestFlushes {
        guest: u64,
    },
    GuestFlushed {
        guest: u64,
    },
}

/// The log that everybody appends to. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Log {
    events: Arc<Mutex<Vec<Event>>>,
    /// How many events belong to the making of the session.
    begun: Arc<AtomicU64>,
    next: Arc<AtomicU64>,
}

/// A log that is complete.
pub(super) struct Recorded {
    pub(super) events: Vec<Event>,
    /// From here on the session is served.
    pub(super) served_from: usize,
}

/// A file with the recorder before it.
pub(super) struct Recording {
    file: FileDisk,
    place: Place,
    log: Log,
}

struct Recorder {
    inner: Handle,
    place: Place,
    log: Log,
}

impl Log {
    pub(super) fn push(&self, event: Event) {
        self.events.lock().push(event);
    }

    pub(super) fn begin(&self) {
        self.begun.store(self.events.lock().len() as u64, Ordering::Relaxed);
    }

    pub(super) fn take(&self) -> Recorded {
        let served_from = self.begun.load(Ordering::Relaxed) as usize;
        Recorded { events: std::mem::take(&mut *self.events.lock()), served_from }
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

impl Recorded {
    pub(super) fn syncs(&self) -> usize {
        self.events.iter().filter(|event| matches!(event, Event::Synced { .. })).count()
    }

    /// As if the syncs of one file had never been asked for.
    pub(super) fn forget_syncs_of(&mut self, of: Place) {
        self.events.retain(|event| !matches!(event, Event::Sync { place, .. } if *place == of));
    }
}

impl Recording {
    pub(super) const fn new(file: FileDisk, place: Place, log: Log) -> Self {
        Self { file, place, log }
    }
}

impl OpenDevice for Recording {
    fn open(&self) -> Result<Handle> {
        Ok(Rc::new(Recorder { inner: self.file.open()?, place: self.place, log: self.log.clone() }))
    }
}

impl Recorder {
    fn writes(&self, offset: u64, data: &[u8]) -> u64 {
        let number = self.log.number();
        self.log.push(Event::Write { place: self.place, number, offset, data: data.into() });
        number
    }

    /// A change that failed, or was not done, is one that never ended: some of it may be there.
    fn wrote(&self, number: u64, is_done: bool, durability: Durability) {
        if is_done {
            self.log.push(Event::Written { number, is_stable: durability == Durability::Stable });
        }
    }
}

impl BlockDevice for Recorder {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<Attempt> {
        self.inner.try_read(offset, buf)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<Attempt> {
        let number = self.writes(offset, data);
        let result = self.inner.try_write(offset, data);
        self.wrote(number, matches!(result, Ok(Attempt::Done)), Durability::Volatile);
        result
    }

    fn read(&self, offset: u64, buf: AlignedBuf) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        self.inner.read(offset, buf)
    }

    fn write(
        &self,
        offset: u64,
        buf: AlignedBuf,
        durability: Durability,
    ) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(async move {
            let number = self.writes(offset, &buf);
            let (result, buf) = self.inner.write(offset, buf, durability).await;
            self.wrote(number, result.is_ok(), durability);
            (result, buf)
        })
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            let number = self.writes(range.start(), &vec![0; range.len() as usize]);
            let result = self.inner.write_zeroes(range, mode, durability).await;
            self.wrote(number, result.is_ok(), durability);
            result
        })
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> DeviceFuture<'_, Result<()>> {
        // Whether it does anything is the file system's affair, so it never ended.
        self.writes(range.start(), &vec![0; range.len() as usize]);
        self.inner.trim(range, durability)
    }

    fn flush(&self) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            let number = self.log.number();
            self.log.push(Event::Sync { place: self.place, number });
            let result = self.inner.flush().await;
            if result.is_ok() {
                self.log.push(Event::Synced { number });
            }
            result
        })
    }

    fn extents(&self, range: ByteRange, limit: usize) -> DeviceFuture<'_, Result<Vec<Extent>>> {
        self.inner.extents(range, limit)
    }
}
