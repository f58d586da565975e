//! What outlives an agent: the target, the journal, the live file's memory, the repository, the boot.

use std::collections::BTreeSet;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::sim::{Faults, Rng, SimDisk, SimOptions, yield_now};
use block::{AlignedBuf, BLOCK_SIZE};
use parking_lot::Mutex;

use super::model::{Model, UNIT, bytes_of};
use crate::live::journal::JournalLayout;
use crate::live::live_file::{BootId, LiveWords};
use crate::live::mistakes::Mistake;
use crate::live::parts::{ChunkCheck, Identity, SessionOptions, SessionParts};
use crate::live::source::{
    ChunkData, ChunkSource, DiskLayout, FetchFuture, SourceError, SourceErrorKind, Urgency,
};

pub(super) const CHUNK_SIZE: u32 = 4 * BLOCK_SIZE as u32;
const CHUNKS: u64 = 12;
/// Values of the backup are told from those that the guest writes by this bit.
pub(super) const BACKUP: u64 = 1 << 62;
const PAGE_WORDS: usize = 512;

/// Everything but the agent.
pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) disk: DiskLayout,
    pub(super) target: SimDisk,
    pub(super) journal: SimDisk,
    pub(super) live: LiveWords,
    pub(super) source: Arc<SimSource>,
    pub(super) model: Model,
    pub(super) mistake: Option<Mistake>,
    pub(super) target_is_zero: bool,
    boot: u8,
    /// Nobody has started since the host went down.
    pub(super) host_died: bool,
    /// What the live file's pages held at some times before.
    old_pages: Vec<Vec<u64>>,
    log_pages: u32,
}

/// A repository's disk in memory.
pub(super) struct SimSource {
    disk: DiskLayout,
    salt: u64,
    bytes: Vec<u8>,
    zero: Vec<bool>,
    verifies: bool,
    state: Mutex<SourceState>,
}

struct SourceState {
    rng: Rng,
    away_per_mille: u32,
    damaged: BTreeSet<u64>,
}

/// Time that passes only by being waited for.
struct SimClock(AtomicU64);

impl World {
    pub(super) fn new(seed: u64, mistake: Option<Mistake>) -> Self {
        let mut rng = Rng::new(seed);
        let tail = *rng.pick(&[0, UNIT, 512, BLOCK_SIZE, BLOCK_SIZE + 3 * UNIT]).expect("not empty");
        let disk = DiskLayout { size: CHUNKS * u64::from(CHUNK_SIZE) + tail, chunk_size: CHUNK_SIZE };
        let mut source = SimSource::new(disk, &mut rng, 0);
        source.verifies = mistake != Some(Mistake::ServedUnverified);
        let source = Arc::new(source);
        let values: Vec<u64> = (0..disk.size / UNIT).map(|unit| source.value(unit)).collect();
        let target_size = disk.size + rng.below(2) * 8192;
        let options = SimOptions {
            max_delay: 1 + rng.below(8) as u32,
            fast_paths: rng.chance(700),
            ..SimOptions::new(target_size, rng.next_u64())
        };
        let target_is_zero = rng.chance(500);
        let target = if target_is_zero {
            SimDisk::new(options)
        } else {
            SimDisk::holding(&vec![0xa5; target_size as usize], options)
        };
        let log_pages = 4 + rng.below(12) as u32;
        let layout = JournalLayout { log_pages, ..JournalLayout::for_disk(disk) };
        let journal = SimDisk::new(SimOptions::new(layout.len_bytes(), rng.next_u64()));
        Self {
            model: Model::new(&values),
            live: LiveWords::in_memory(disk),
            rng,
            disk,
            target,
            journal,
            source,
            mistake,
            target_is_zero,
            boot: 1,
            host_died: false,
            old_pages: Vec::new(),
            log_pages,
        }
    }

    /// What a session is made of, in this life.
    pub(super) fn parts(&mut self) -> SessionParts {
        let options = SessionOptions {
            source_timeout: Duration::from_secs(self.rng.below(3)),
            piece_bytes: (1 + self.rng.below(3)) * u64::from(CHUNK_SIZE),
            commit_bytes: (1 + self.rng.below(8)) * u64::from(CHUNK_SIZE),
            commit_interval: Duration::from_millis(200),
            decoded_bytes: self.rng.below(4) * u64::from(CHUNK_SIZE),
            limit: 0,
            background: true,
            guest_p99: None,
            log_pages: Some(self.log_pages),
        };
        SessionParts {
            identity: Identity { snapshot: "vm@now/disk0".to_owned(), target: "disk.raw".to_owned() },
            source: Arc::clone(&self.source) as Arc<dyn ChunkSource>,
            clock: Arc::new(SimClock(AtomicU64::new(0))),
            live: self.live.clone(),
            boot: BootId([self.boot; 16]),
            last_boot: None,
            // After the loss of the host what a guest wrote and did not flush cannot be told from another disk.
            check: (!self.host_died).then(|| Arc::clone(&self.source) as _),
            plan: plan(&mut self.rng, self.disk.chunk_count()),
            trace: (0..self.rng.below(6)).map(|_| self.rng.below(self.disk.chunk_count())).collect(),
            options,
        }
    }

    /// The power goes: both disks lose what they may, the live file's pages are of any age.
    pub(super) fn power_cut(&mut self) {
        self.target.power_cut(&mut self.rng);
        self.journal.power_cut(&mut self.rng);
        self.boot += 1;
        self.host_died = true;
        self.remember_live_file();
        let words: Vec<AtomicU64> = self
            .live
            .words()
            .chunks(PAGE_WORDS)
            .enumerate()
            .flat_map(|(page, _)| {
                let at = page * PAGE_WORDS;
                let old = self.rng.pick(&self.old_pages).expect("it was remembered just now");
                old[at..at + PAGE_WORDS].iter().map(|&word| AtomicU64::new(word)).collect::<Vec<_>>()
            })
            .collect();
        self.live = LiveWords::Memory(words.into());
        self.model.everybody_died();
    }

    /// The agent is killed: its executor must be gone. A successor gets the lock once nothing of it is in flight.
    pub(super) fn killed(&mut self, wait_for_the_lock: bool) {
        if wait_for_the_lock {
            self.target.drain(&mut self.rng);
            self.journal.drain(&mut self.rng);
        }
        self.model.everybody_died();
    }

    pub(super) fn remember_live_file(&mut self) {
        self.old_pages.push(self.live.words().iter().map(|word| word.load(Ordering::Relaxed)).collect());
        if self.old_pages.len() > 4 {
            self.old_pages.swap_remove(self.rng.below(4) as usize);
        }
    }

    /// Sets what goes wrong in this life.
    pub(super) fn set_faults(&mut self) {
        let mut often = |one_in: u64, most: u64| {
            if self.rng.below(one_in) == 0 { self.rng.below(most) as u32 } else { 0 }
        };
        let target = Faults {
            read: often(8, 100),
            write: often(8, 100),
            no_space: often(8, 200),
            sync: often(6, 300),
        };
        let journal = Faults { sync: often(12, 200), write: often(16, 100), ..Faults::default() };
        let away_per_mille = often(5, 400);
        self.target.set_faults(target);
        self.journal.set_faults(journal);
        let damaged = (0..self.rng.below(3)).map(|_| self.rng.below(self.disk.chunk_count())).collect();
        let mut state = self.source.state.lock();
        state.away_per_mille = away_per_mille;
        if self.rng.chance(150) {
            state.damaged = damaged;
        }
    }

    pub(super) fn clear_faults(&self) {
        self.target.set_faults(Faults::default());
        self.target.set_full(false);
        self.journal.set_faults(Faults::default());
        self.source.state.lock().away_per_mille = 0;
    }

    pub(super) fn repair_source(&self) {
        self.source.state.lock().damaged.clear();
    }
}

fn plan(rng: &mut Rng, chunks: u64) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> =
        (0..chunks).step_by(3).map(|start| start..(start + 3).min(chunks)).collect();
    rng.shuffle(&mut runs);
    runs.truncate(rng.below(6) as usize);
    runs
}

impl SimSource {
    /// A disk of which a third is zeroes. `salt` makes disks of one layout differ.
    pub(super) fn new(disk: DiskLayout, rng: &mut Rng, salt: u64) -> Self {
        let zero: Vec<bool> = (0..disk.chunk_count()).map(|_| rng.chance(330)).collect();
        let mut source = Self {
            disk,
            salt,
            bytes: Vec::new(),
            zero,
            verifies: true,
            state: Mutex::new(SourceState { rng: rng.fork(), away_per_mille: 0, damaged: BTreeSet::new() }),
        };
        source.bytes = vec![0; disk.size as usize];
        for unit in 0..disk.size / UNIT {
            let at = (unit * UNIT) as usize;
            let bytes = bytes_of(source.value(unit), UNIT);
            source.bytes[at..at + UNIT as usize].copy_from_slice(&bytes);
        }
        source
    }

    pub(super) fn value(&self, unit: u64) -> u64 {
        let chunk = unit * UNIT / u64::from(self.disk.chunk_size);
        if self.zero[chunk as usize] { 0 } else { BACKUP | self.salt << 40 | (unit + 1) }
    }

    pub(super) fn bytes(&self, range: Range<u64>) -> &[u8] {
        &self.bytes[range.start as usize..range.end as usize]
    }

    pub(super) fn is_damaged(&self, chunk: u64) -> bool {
        self.state.lock().damaged.contains(&chunk)
    }
}

impl ChunkCheck for SimSource {
    fn is_chunk(&self, chunk: u64, bytes: &[u8]) -> Option<bool> {
        let range = self.disk.chunk_range(chunk);
        Some(self.bytes(range.start()..range.end()) == bytes)
    }
}

impl ChunkSource for SimSource {
    fn layout(&self) -> DiskLayout {
        self.disk
    }

    fn is_zero(&self, chunk: u64) -> bool {
        self.zero[chunk as usize]
    }

    fn fetch(&self, chunk: u64, _urgency: Urgency) -> FetchFuture<'_, Result<ChunkData, SourceError>> {
        Box::pin(async move {
            let (polls, is_away, is_damaged) = {
                let mut state = self.state.lock();
                let away_per_mille = state.away_per_mille;
                (state.rng.below(12), state.rng.chance(away_per_mille), state.damaged.contains(&chunk))
            };
            for _ in 0..polls {
                yield_now().await;
            }
            assert!(!self.is_zero(chunk), "a zero chunk was fetched");
            if is_away {
                // Some of it, or all of it.
                let kinds = [SourceErrorKind::Missing, SourceErrorKind::Unavailable];
                return Err(SourceError::new(kinds[(polls % 2) as usize], "simulated: away"));
            }
            let range = self.disk.chunk_range(chunk);
            let chunk_bytes = self.bytes(range.start()..range.end());
            let mut decoded = AlignedBuf::from_slice(chunk_bytes);
            if is_damaged {
                decoded[(polls * 1000) as usize % range.len() as usize] ^= 0x40;
            }
            // The bytes stand for their own hash.
            if self.verifies && decoded[..] != *chunk_bytes {
                return Err(SourceError::new(SourceErrorKind::Damaged, "simulated: damaged"));
            }
            Ok(ChunkData::new(decoded))
        })
    }
}

impl crate::live::clock::Clock for SimClock {
    fn now(&self) -> Duration {
        Duration::from_micros(self.0.fetch_add(1, Ordering::Relaxed))
    }

    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()>>> {
        // Whoever waits longer steps aside for longer; the time passes at once.
        self.0.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
        let millis = time.as_millis().min(1000) as u32;
        let polls = 1 + 2 * millis.checked_ilog2().unwrap_or(0);
        Box::pin(async move {
            for _ in 0..polls {
                yield_now().await;
            }
        })
    }
}
