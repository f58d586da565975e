//! A small session, and disks that watch what is done to them.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::sim::{Rng, SECTOR, SimDisk, SimOptions, yield_now};
use block::{
    AlignedBuf, BLOCK_SIZE, BlockDevice, ByteRange, DeviceFuture, Durability, Extent, Geometry, Result,
    ZeroMode,
};
use shuttle::rand::Rng as _;

use crate::live::clock::Clock;
use crate::live::device::LiveDevice;
use crate::live::journal::{JournalLayout, SessionId};
use crate::live::live_file::{BootId, LiveWords};
use crate::live::parts::{Identity, Resumed, SessionOptions, SessionParts, WrittenPast};
use crate::live::session::Session;
use crate::live::source::{ChunkData, ChunkSource, DiskLayout, FetchFuture, SourceError, Urgency};

pub(super) const DISK: DiskLayout = DiskLayout { size: 4 * BLOCK_SIZE, chunk_size: 2 * BLOCK_SIZE as u32 };
const LOG_PAGES: u32 = 8;
const ID: SessionId = SessionId([3; 16]);

/// What is done to the target, in numbers.
#[derive(Debug, Default)]
pub(super) struct Watch {
    pub(super) syncs_begun: AtomicU64,
    /// One more than the number of the latest sync that ended well.
    pub(super) synced: AtomicU64,
    pub(super) changes: AtomicU64,
    /// Nobody may change it: the session is parked, or held still.
    pub(super) is_closed: AtomicU64,
}

/// A session's storage.
#[derive(Clone)]
pub(super) struct Rig {
    pub(super) target: SimDisk,
    journal: SimDisk,
    live: LiveWords,
    pub(super) watch: Arc<Watch>,
}

impl Rig {
    pub(super) fn new() -> Self {
        let seed = shuttle::rand::thread_rng().r#gen();
        let layout = JournalLayout { log_pages: LOG_PAGES, ..JournalLayout::for_disk(DISK) };
        let disk = |size, seed| SimDisk::new(SimOptions { max_delay: 4, ..SimOptions::new(size, seed) });
        Self {
            target: disk(DISK.size, seed),
            journal: disk(layout.len_bytes(), seed ^ 1),
            live: LiveWords::in_memory(DISK),
            watch: Arc::default(),
        }
    }

    fn parts(&self, boot: u8) -> SessionParts {
        SessionParts {
            identity: Identity { snapshot: "vm@now/disk0".to_owned(), target: "disk.raw".to_owned() },
            source: Arc::new(ModelSource),
            clock: Arc::new(StillClock),
            live: self.live.clone(),
            boot: BootId([boot; 16]),
            last_boot: None,
            check: None,
            written_past: WrittenPast::No,
            plan: Vec::new(),
            trace: Vec::new(),
            options: SessionOptions { log_pages: Some(LOG_PAGES), ..SessionOptions::default() },
        }
    }

    pub(super) fn create(&self) -> Arc<Session> {
        let session = Session::create(self.parts(1), ID, false, &self.target, &self.journal);
        shuttle::future::block_on(session).expect("nothing fails")
    }

    /// The power goes, and the session is resumed after it.
    pub(super) fn lose_power(&self) -> (Arc<Session>, Resumed) {
        let mut rng = Rng::new(shuttle::rand::thread_rng().r#gen());
        self.target.power_cut(&mut rng);
        self.journal.power_cut(&mut rng);
        let resumed = Session::resume(self.parts(2), ID, &self.target, &self.journal);
        shuttle::future::block_on(resumed).expect("the journal holds")
    }

    /// The calling thread's handle.
    pub(super) fn device(&self, session: &Arc<Session>) -> LiveDevice {
        let target = Watched { disk: self.target.clone(), watch: Arc::clone(&self.watch) };
        session.device(Rc::new(target), Rc::new(self.journal.clone())).expect("the disks are fit")
    }
}

/// Runs `work` on a thread of its own, with its own handle.
pub(super) fn spawn<F: Future<Output = ()>>(
    rig: &Rig,
    session: &Arc<Session>,
    work: impl FnOnce(LiveDevice) -> F + Send + 'static,
) -> shuttle::thread::JoinHandle<()> {
    let (rig, session) = (rig.clone(), Arc::clone(session));
    shuttle::thread::spawn(move || {
        let device = rig.device(&session);
        drop((rig, session));
        shuttle::future::block_on(work(device));
    })
}

pub(super) fn block(block: u64) -> ByteRange {
    ByteRange::from_bounds(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
}

pub(super) async fn write(device: &LiveDevice, at: u64, byte: u8) -> Result<()> {
    let buf = AlignedBuf::from_slice(&[byte; BLOCK_SIZE as usize]);
    device.write(block(at).start(), buf, Durability::Volatile).await.0
}

/// The byte of each sector of a block.
pub(super) async fn read(device: &LiveDevice, at: u64) -> Result<Vec<u8>> {
    let (result, buf) = device.read(block(at).start(), AlignedBuf::zeroed(BLOCK_SIZE as usize)).await;
    let byte = |sector: &[u8]| {
        assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is torn");
        sector[0]
    };
    result.map(|()| buf.chunks(SECTOR as usize).map(byte).collect())
}

/// What the backup holds in a block.
pub(super) const fn backup(block: u64) -> u8 {
    0xb0 + (block / 2) as u8
}

struct ModelSource;

impl ChunkSource for ModelSource {
    fn layout(&self) -> DiskLayout {
        DISK
    }

    fn is_zero(&self, _chunk: u64) -> bool {
        false
    }

    fn fetch(
        &self,
        chunk: u64,
        _urgency: Urgency,
    ) -> FetchFuture<'_, std::result::Result<ChunkData, SourceError>> {
        Box::pin(async move {
            yield_now().await;
            let len = DISK.chunk_range(chunk).len() as usize;
            Ok(ChunkData::new(AlignedBuf::from_slice(&vec![backup(2 * chunk); len])))
        })
    }
}

struct StillClock;

impl Clock for StillClock {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn sleep(&self, _time: Duration) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(yield_now())
    }
}

/// The target as a session sees it.
struct Watched {
    disk: SimDisk,
    watch: Arc<Watch>,
}

/// A change of the target, until it ends.
struct Changing<'a>(&'a Watch);

impl<'a> Changing<'a> {
    fn new(watch: &'a Watch) -> Self {
        assert_eq!(
            watch.is_closed.load(Ordering::SeqCst),
            0,
            "the target is changed although it must not be"
        );
        watch.changes.fetch_add(1, Ordering::SeqCst);
        Self(watch)
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.changes.fetch_sub(1, Ordering::SeqCst);
    }
}

impl BlockDevice for Watched {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn read(&self, offset: u64, buf: AlignedBuf) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        self.disk.read(offset, buf)
    }

    fn write(
        &self,
        offset: u64,
        buf: AlignedBuf,
        durability: Durability,
    ) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(async move {
            let _changing = Changing::new(&self.watch);
            self.disk.write(offset, buf, durability).await
        })
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            let _changing = Changing::new(&self.watch);
            self.disk.write_zeroes(range, mode, durability).await
        })
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            let _changing = Changing::new(&self.watch);
            self.disk.trim(range, durability).await
        })
    }

    fn flush(&self) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            let number = self.watch.syncs_begun.fetch_add(1, Ordering::SeqCst);
            let result = self.disk.flush().await;
            if result.is_ok() {
                self.watch.synced.fetch_max(number + 1, Ordering::SeqCst);
            }
            result
        })
    }

    fn extents(&self, range: ByteRange, limit: usize) -> DeviceFuture<'_, Result<Vec<Extent>>> {
        self.disk.extents(range, limit)
    }
}
