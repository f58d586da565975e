//! The engine's behaviour, one contract at a time, on simulated disks and on files.

mod files;
mod filling;
mod frozen;
mod lasting;
mod order;
mod serving;

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::sim::{Executor, SimDisk, SimOptions, yield_now};
use block::{AlignedBuf, BlockDevice, ByteRange, Durability};
use parking_lot::Mutex;

use super::clock::Clock;
use super::device::LiveDevice;
use super::error::Result;
use super::journal::{JournalLayout, SessionId};
use super::live_file::{BootId, LiveWords};
use super::parts::{ChunkCheck, Identity, Resumed, SessionOptions, SessionParts, WrittenPast};
use super::session::Session;
use super::source::{
    ChunkData, ChunkSource, DiskLayout, FetchFuture, RunData, SourceError, SourceErrorKind, Urgency,
};

const STEPS: u64 = 5_000_000;
const CHUNK: u64 = 16384;
const CHUNKS: u64 = 16;
const DISK: DiskLayout = DiskLayout { size: CHUNK * CHUNKS, chunk_size: CHUNK as u32 };
/// Chunks that are zero in the backup.
const ZERO: [u64; 3] = [3, 4, 9];

/// A repository's disk: chunk `n` is full of `n + 1`, but for the zero ones.
struct TestSource {
    disk: DiskLayout,
    state: Mutex<SourceState>,
}

#[derive(Default)]
struct SourceState {
    fetched: Vec<u64>,
    damaged: BTreeSet<u64>,
    missing: BTreeSet<u64>,
    /// So many fetches fail before the source is back.
    away: u64,
    /// So many chunks of runs may begin; any, where this is not said.
    room: Option<u64>,
    /// How often what had not begun was taken back.
    withdrawals: u64,
}

impl TestSource {
    fn new(disk: DiskLayout) -> Arc<Self> {
        Arc::new(Self { disk, state: Mutex::default() })
    }

    fn bytes(&self, chunk: u64) -> Vec<u8> {
        let len = self.disk.chunk_range(chunk).len() as usize;
        vec![if self.is_zero(chunk) { 0 } else { (chunk + 1) as u8 }; len]
    }

    fn all(&self) -> Vec<u8> {
        (0..self.disk.chunk_count()).flat_map(|chunk| self.bytes(chunk)).collect()
    }

    fn fetched(&self) -> usize {
        self.state.lock().fetched.len()
    }

    /// Waits until a chunk may begin: false where it was taken back before.
    async fn begins(&self, withdrawals: u64) -> bool {
        loop {
            let begins = {
                let mut state = self.state.lock();
                let is_taken_back = state.withdrawals != withdrawals;
                match &mut state.room {
                    _ if is_taken_back => Some(false),
                    Some(0) => None,
                    Some(room) => {
                        *room -= 1;
                        Some(true)
                    }
                    None => Some(true),
                }
            };
            match begins {
                Some(begins) => return begins,
                None => yield_now().await,
            }
        }
    }
}

impl ChunkCheck for TestSource {
    fn is_chunk(&self, chunk: u64, bytes: &[u8]) -> Option<bool> {
        Some(self.bytes(chunk) == bytes)
    }
}

impl ChunkSource for TestSource {
    fn layout(&self) -> DiskLayout {
        self.disk
    }

    fn is_zero(&self, chunk: u64) -> bool {
        ZERO.contains(&chunk)
    }

    fn fetch(
        &self,
        chunk: u64,
        _urgency: Urgency,
    ) -> FetchFuture<'_, std::result::Result<ChunkData, SourceError>> {
        Box::pin(async move {
            yield_now().await;
            let mut state = self.state.lock();
            if state.away > 0 {
                state.away -= 1;
                return Err(SourceError::new(SourceErrorKind::Unavailable, "away"));
            }
            if state.damaged.contains(&chunk) {
                return Err(SourceError::new(SourceErrorKind::Damaged, "damaged"));
            }
            if state.missing.contains(&chunk) {
                return Err(SourceError::new(SourceErrorKind::Missing, "missing"));
            }
            state.fetched.push(chunk);
            Ok(ChunkData::new(AlignedBuf::from_slice(&self.bytes(chunk))))
        })
    }

    /// One chunk after another, as over a slow wire.
    fn fetch_run(&self, chunks: std::ops::Range<u64>, urgency: Urgency) -> FetchFuture<'_, RunData> {
        Box::pin(async move {
            let withdrawals = self.state.lock().withdrawals;
            let (mut bytes, mut failed, mut withdrawn) = (Vec::new(), Vec::new(), Vec::new());
            for chunk in chunks {
                let len = self.disk.chunk_range(chunk).len() as usize;
                if !self.begins(withdrawals).await {
                    withdrawn.push(chunk);
                    bytes.extend(std::iter::repeat_n(0xdd, len));
                    continue;
                }
                match self.fetch(chunk, urgency).await {
                    Ok(data) => bytes.extend_from_slice(&data),
                    Err(error) => {
                        failed.push((chunk, error));
                        bytes.extend(std::iter::repeat_n(0xee, len));
                    }
                }
            }
            RunData { bytes: AlignedBuf::from_slice(&bytes), failed, withdrawn }
        })
    }

    fn join(
        &self,
        _: u64,
        _: Urgency,
    ) -> Option<FetchFuture<'_, std::result::Result<ChunkData, SourceError>>> {
        // What a run has begun is the run's here.
        None
    }

    fn withdraw(&self) {
        self.state.lock().withdrawals += 1;
    }
}

/// Time that passes by being waited for, in microseconds.
#[derive(Default)]
struct TestClock(AtomicU64);

impl Clock for TestClock {
    fn now(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }

    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()>>> {
        self.0.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
        Box::pin(yield_now())
    }
}

/// A session's surroundings.
struct Rig {
    executor: Executor,
    target: SimDisk,
    journal: SimDisk,
    source: Arc<TestSource>,
    clock: Arc<TestClock>,
    live: LiveWords,
    boot: BootId,
    last_boot: Option<BootId>,
    id: SessionId,
    identity: Identity,
    options: SessionOptions,
    target_is_zero: bool,
    trace: Vec<u64>,
}

impl Rig {
    fn new() -> Self {
        let mut journal = JournalLayout::for_disk(DISK);
        journal.log_pages = 16;
        Self {
            executor: Executor::new(1),
            target: SimDisk::new(SimOptions::new(DISK.size, 2)),
            journal: SimDisk::new(SimOptions::new(journal.len_bytes(), 3)),
            source: TestSource::new(DISK),
            clock: Arc::default(),
            live: LiveWords::in_memory(DISK),
            boot: BootId([1; 16]),
            last_boot: None,
            id: SessionId([5; 16]),
            identity: Identity { snapshot: "vm@now".into(), target: "disk.raw".into() },
            options: SessionOptions { log_pages: Some(16), ..SessionOptions::default() },
            target_is_zero: true,
            trace: Vec::new(),
        }
    }

    fn parts(&self) -> SessionParts {
        SessionParts {
            identity: self.identity.clone(),
            source: Arc::clone(&self.source) as Arc<dyn ChunkSource>,
            clock: Arc::clone(&self.clock) as Arc<dyn Clock>,
            live: self.live.clone(),
            boot: self.boot,
            last_boot: self.last_boot,
            check: Some(Arc::clone(&self.source) as _),
            written_past: WrittenPast::No,
            plan: Vec::new(),
            trace: self.trace.clone(),
            options: self.options,
        }
    }

    fn try_create(&mut self) -> Result<LiveDevice> {
        let (parts, target, journal) = (self.parts(), self.target.clone(), self.journal.clone());
        let (id, is_zero) = (self.id, self.target_is_zero);
        let create = async move { Session::create(parts, id, is_zero, &target, &journal).await };
        let session = self.executor.block_on(STEPS, create)?;
        self.last_boot = Some(self.boot);
        session.device(Rc::new(self.target.clone()), Rc::new(self.journal.clone()))
    }

    fn create(&mut self) -> LiveDevice {
        self.try_create().expect("the session can be made")
    }

    fn try_resume(&mut self) -> Result<(LiveDevice, Resumed)> {
        let (parts, target, journal) = (self.parts(), self.target.clone(), self.journal.clone());
        let id = self.id;
        let resume = async move { Session::resume(parts, id, &target, &journal).await };
        let (session, resumed) = self.executor.block_on(STEPS, resume)?;
        self.last_boot = Some(self.boot);
        let device = session.device(Rc::new(self.target.clone()), Rc::new(self.journal.clone()))?;
        Ok((device, resumed))
    }

    fn resume(&mut self) -> (LiveDevice, Resumed) {
        self.try_resume().expect("the session can be resumed")
    }

    fn reboot(&mut self) {
        self.boot = BootId([self.boot.0[0] + 1; 16]);
    }

    fn run<T: 'static>(&mut self, future: impl Future<Output = T> + 'static) -> T {
        self.executor.block_on(STEPS, future)
    }

    fn read(&mut self, device: &LiveDevice, range: ByteRange) -> block::Result<Vec<u8>> {
        let device = device.clone();
        self.run(async move {
            let (result, buf) = device.read(range.start(), AlignedBuf::zeroed(range.len() as usize)).await;
            result.map(|()| buf.to_vec())
        })
    }

    fn write(&mut self, device: &LiveDevice, range: ByteRange, byte: u8) -> block::Result<()> {
        let device = device.clone();
        let buf = AlignedBuf::from_slice(&vec![byte; range.len() as usize]);
        self.run(async move { device.write(range.start(), buf, Durability::Volatile).await.0 })
    }

    fn flush(&mut self, device: &LiveDevice) -> block::Result<()> {
        let device = device.clone();
        self.run(async move { device.flush().await })
    }

    /// Runs until the session is complete, or nothing more happens for long.
    fn run_until(&mut self, device: &LiveDevice, done: impl Fn(&LiveDevice) -> bool) -> bool {
        for _ in 0..STEPS {
            if done(device) {
                return true;
            }
            if !self.executor.step() {
                return done(device);
            }
        }
        false
    }
}

const fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::from_bounds(start, start + len)
}

const fn chunk(number: u64) -> ByteRange {
    DISK.chunk_range(number)
}
