//! What outlives an agent: the target, the journal, the live file's memory, the repository, the boot.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::BLOCK_SIZE;
use block::sim::{Faults, Rng, SimDisk, SimOptions, yield_now};

use super::model::{Model, UNIT};
use super::source::SimSource;
use super::tally::{Kind, Tally};
use crate::live::journal::JournalLayout;
use crate::live::live_file::{BootId, LiveWords};
use crate::live::mistakes::Mistake;
use crate::live::parts::{Identity, SessionOptions, SessionParts, WrittenPast};
use crate::live::session::Session;
use crate::live::source::{ChunkSource, DiskLayout};

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
    pub(super) target_is_zero: bool,
    pub(super) tally: Tally,
    boot: u8,
    /// The boot in which a session was served last.
    last_boot: u8,
    /// A sync failed, and nobody has been served since.
    is_poisoned: bool,
    /// Nobody has started since the host went down or the live file was lost.
    pub(super) is_unsure: bool,
    /// A start came to its end once, and the session's record says so: from then on its journal is all there is.
    was_begun: bool,
    /// What the live file's pages held at some times before.
    old_pages: Vec<Vec<u64>>,
    log_pages: u32,
}

/// Time that passes only by being waited for.
struct SimClock(AtomicU64);

impl World {
    pub(super) fn new(seed: u64, mistake: Option<Mistake>) -> Self {
        let mut rng = Rng::new(seed);
        let tail = *rng.pick(&[0, UNIT, 512, BLOCK_SIZE, BLOCK_SIZE + 3 * UNIT]).expect("not empty");
        let disk = DiskLayout { size: CHUNKS * u64::from(CHUNK_SIZE) + tail, chunk_size: CHUNK_SIZE };
        let source = Arc::new(SimSource::new(disk, &mut rng, 0, mistake != Some(Mistake::ServedUnverified)));
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
            target_is_zero,
            tally: Tally::default(),
            boot: 1,
            last_boot: 0,
            is_poisoned: false,
            is_unsure: false,
            was_begun: false,
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
            last_boot: Some(BootId([self.last_boot; 16])),
            // What a guest wrote and did not flush cannot be told from another disk then.
            check: (!self.is_unsure).then(|| Arc::clone(&self.source) as _),
            written_past: WrittenPast::No,
            plan: plan(&mut self.rng, self.disk.chunk_count()),
            trace: (0..self.rng.below(6)).map(|_| self.rng.below(self.disk.chunk_count())).collect(),
            options,
        }
    }

    /// The power goes: both disks lose what they may, the live file's pages are of any age.
    pub(super) fn power_cut(&mut self) {
        self.target.power_cut(&mut self.rng);
        self.journal.power_cut(&mut self.rng);
        self.boot = self.boot.wrapping_add(1);
        self.is_unsure = true;
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

    pub(super) fn journal_layout(&self) -> JournalLayout {
        let layout = Session::journal_layout(&*self.source, self.target_is_zero);
        JournalLayout { log_pages: self.log_pages, ..layout }
    }

    /// Somebody removed the live file, or what it holds.
    pub(super) fn lose_live_file(&mut self) {
        self.live = LiveWords::in_memory(self.disk);
        self.is_unsure = true;
    }

    /// A session was given up after a failed sync.
    pub(super) fn was_poisoned(&mut self) {
        self.is_poisoned = true;
        self.target.drop_clean_cache();
        if self.rng.chance(500) {
            self.journal.drop_clean_cache();
        }
    }

    /// A start did not come to its end. If it was the first after a failed sync it has emptied the live file, and with
    /// it what was known of unflushed writes.
    pub(super) const fn was_not_started(&mut self) {
        self.is_unsure |= self.is_poisoned;
    }

    /// Whether the session was served once, so that it is resumed and never made anew.
    pub(super) const fn was_begun(&self) -> bool {
        self.was_begun
    }

    /// A session is served.
    pub(super) const fn is_served(&mut self) {
        self.is_unsure = false;
        self.is_poisoned = false;
        self.was_begun = true;
        self.last_boot = self.boot;
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
        let journal = Faults { sync: often(10, 250), write: often(14, 150), ..Faults::default() };
        let (away_per_mille, outage) = (often(5, 400), often(8, 60));
        self.target.set_faults(target);
        self.journal.set_faults(journal);
        self.source.set_away(away_per_mille, outage);
        let damaged = (0..self.rng.below(3)).map(|_| self.rng.below(self.disk.chunk_count())).collect();
        if self.rng.chance(150) {
            self.source.set_damaged(damaged);
        }
    }

    /// Sets what goes wrong while a session is made or resumed.
    pub(super) fn set_start_faults(&mut self) {
        let mut often = |one_in: u64, most: u64| {
            if self.rng.below(one_in) == 0 { self.rng.below(most) as u32 } else { 0 }
        };
        let target = Faults { read: often(3, 300), sync: often(4, 500), ..Faults::default() };
        let journal = Faults { read: often(6, 300), sync: often(2, 700), write: often(4, 400), no_space: 0 };
        self.target.set_faults(target);
        self.journal.set_faults(journal);
    }

    pub(super) fn clear_faults(&self) {
        self.target.set_faults(Faults::default());
        self.target.set_full(false);
        self.journal.set_faults(Faults::default());
        self.source.set_away(0, 0);
    }

    pub(super) fn repair_source(&self) {
        self.source.set_damaged(std::collections::BTreeSet::new());
    }

    /// What happened up to now.
    pub(super) fn take_tally(&mut self) -> Tally {
        let mut tally = std::mem::take(&mut self.tally);
        tally.add(&self.source.take_tally());
        let (target, journal) = (self.target.stats(), self.journal.stats());
        for (kind, times) in [
            (Kind::TargetReadError, target.failed_reads),
            (Kind::TargetWriteError, target.failed_writes),
            (Kind::TargetSyncError, target.failed_syncs),
            (Kind::TargetNoSpace, target.no_space),
            (Kind::JournalWriteError, journal.failed_writes),
            (Kind::JournalSyncError, journal.failed_syncs),
            (Kind::LostAtPowerCut, target.lost_sectors + journal.lost_sectors),
            (Kind::KeptAtPowerCut, target.kept_sectors + journal.kept_sectors),
            (Kind::TornAtPowerCut, target.torn_cuts + journal.torn_cuts),
            (Kind::LandedAfterKill, target.landed_late + journal.landed_late),
            (Kind::LostInFailedSync, target.unwritten_sectors + journal.unwritten_sectors),
        ] {
            tally.count(kind, times);
        }
        tally
    }
}

fn plan(rng: &mut Rng, chunks: u64) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> =
        (0..chunks).step_by(3).map(|start| start..(start + 3).min(chunks)).collect();
    rng.shuffle(&mut runs);
    runs.truncate(rng.below(6) as usize);
    runs
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
