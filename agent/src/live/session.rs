//! One restore, from its first start to its completion: what all shards share.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block::{BLOCK_SIZE, BlockDevice};
use tokio::sync::Notify;

use super::asked::{Asked, Recorded};
use super::begin::check_target;
use super::clock::Clock;
use super::device::LiveDevice;
use super::error::Result;
use super::frozen::Views;
use super::holds::Holds;
use super::journal::{Journal, SessionId};
use super::limit::RateLimit;
use super::map::BlockMap;
use super::pace::Pace;
use super::parts::{SessionOptions, SessionParts};
use super::plan::FillPlan;
use super::source::{ChunkData, ChunkSource};
use super::stats::{Phase, Stats, StatsSnapshot};
use super::sync::{AtomicU8, AtomicU64, Mutex};
use super::told::Told;

/// A restore in progress, shared by all shards.
pub struct Session {
    pub(super) id: SessionId,
    pub(super) map: BlockMap,
    pub(super) holds: Holds,
    pub(super) source: Arc<dyn ChunkSource>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) options: SessionOptions,
    data_chunks: u64,
    pub(super) stats: Stats,
    /// The flushes that have arrived, by number.
    pub(super) flushes: AtomicU64,
    pub(super) committer: tokio::sync::Mutex<Committer>,
    pub(super) fills: Mutex<Fills>,
    /// Chunks that were fetched for a guest and are not home yet.
    pub(super) decoded: Mutex<HashMap<u64, ChunkData>>,
    /// Wakes workers that have nothing to do, and whoever waits for the last change to end.
    pub(super) work: Notify,
    /// Wakes whoever waits for another phase, or for the workers' end.
    pub(super) ending: Notify,
    pub(super) idle: Notify,
    /// Wakes whoever waits for a piece that is on its way home.
    pub(super) piece_ended: Notify,
    /// What guests asked for.
    pub(super) asked: Asked,
    /// Holds the background back where guests' latency has a target.
    pub(super) pace: Pace,
    pub(super) waiting: AtomicU64,
    pub(super) changes: AtomicU64,
    pub(super) stopping: AtomicBool,
    pub(super) views: Views,
    phase: AtomicU8,
}

/// Whoever holds this syncs and writes the journal, for all.
#[derive(Debug)]
pub(super) struct Committer {
    pub(super) journal: Journal,
    /// Every flush up to this number is covered by a sync that succeeded.
    pub(super) covered: u64,
}

/// What the fill workers share.
#[derive(Debug)]
pub(super) struct Fills {
    pub(super) plan: FillPlan,
    pub(super) offers: VecDeque<u64>,
    pub(super) limit: RateLimit,
    pub(super) background: bool,
    pub(super) workers: usize,
    /// Nothing is begun before this: the target was full, or the source away.
    pub(super) not_before: Duration,
    pub(super) backoff: Duration,
    /// Nothing has come home since the last attempt that failed.
    pub(super) failed: bool,
    pub(super) source_away_since: Option<Duration>,
    /// That it is away was told, and that it is back will be.
    pub(super) away_is_told: bool,
    /// A source of which some can be had and some cannot is away and back with every read.
    pub(super) away_told: Told,
    /// A target that fails in some places does so with every write there.
    pub(super) failed_told: Told,
    /// The target is full, at least until no write failed for want of room up to then.
    pub(super) full_until: Option<Duration>,
}

impl Session {
    /// Puts the parts together.
    pub(super) fn assemble(parts: SessionParts, map: BlockMap, journal: Journal, phase: Phase) -> Arc<Self> {
        let data_chunks = parts.plan.iter().map(|run| run.end - run.start).sum();
        let plan = FillPlan::new(parts.plan, &parts.trace, map.disk().chunk_count());
        Arc::new(Self {
            id: journal.header().session,
            holds: Holds::new(),
            source: parts.source,
            clock: parts.clock,
            options: parts.options,
            data_chunks,
            stats: Stats::new(map.disk().chunk_count()),
            flushes: AtomicU64::new(0),
            committer: tokio::sync::Mutex::new(Committer { journal, covered: 0 }),
            fills: Mutex::new(Fills {
                plan,
                offers: VecDeque::new(),
                limit: RateLimit::new(parts.options.limit),
                background: parts.options.background,
                workers: 0,
                not_before: Duration::ZERO,
                backoff: Duration::ZERO,
                failed: false,
                source_away_since: None,
                away_is_told: false,
                away_told: Told::default(),
                failed_told: Told::default(),
                full_until: None,
            }),
            decoded: Mutex::new(HashMap::new()),
            work: Notify::new(),
            ending: Notify::new(),
            idle: Notify::new(),
            piece_ended: Notify::new(),
            asked: Asked::new(map.disk().chunk_count()),
            pace: Pace::new(parts.options.guest_p99),
            waiting: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            views: Views::default(),
            phase: AtomicU8::new(phase as u8),
            map,
        })
    }

    /// A handle for the calling shard, over its own handles of the target and of the journal.
    ///
    /// # Errors
    /// `Unsuitable` where a sync through one handle of the target does not cover writes through another.
    pub fn device(
        self: &Arc<Self>,
        target: Rc<dyn BlockDevice>,
        journal: Rc<dyn BlockDevice>,
    ) -> Result<LiveDevice> {
        check_target(&*target, self.map.disk())?;
        Ok(LiveDevice::new(Arc::clone(self), target, journal))
    }

    /// The session's name.
    #[must_use]
    pub const fn id(&self) -> SessionId {
        self.id
    }

    /// Where the session stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            phase if phase == Phase::Filling as u8 => Phase::Filling,
            phase if phase == Phase::Complete as u8 => Phase::Complete,
            phase if phase == Phase::Poisoned as u8 => Phase::Poisoned,
            _ => Phase::Parked,
        }
    }

    /// Whether the whole disk is home on stable storage, and the journal says so: nothing is needed of the backup any more.
    #[must_use]
    pub fn is_all_stable(&self) -> bool {
        self.map.is_all_stable()
    }

    /// Ends once the session is no longer in `phase`: at once, where it is not.
    pub async fn has_left(&self, phase: Phase) {
        loop {
            let changed = self.ending.notified();
            if self.phase() != phase {
                return;
            }
            changed.await;
        }
    }

    /// Goes from `Filling` or `Complete` on to `phase`, and from `Parked` to `Poisoned`, where parking itself fails.
    pub(super) fn enter(&self, phase: Phase) -> bool {
        // Sequentially consistent with the count of changes: either parking sees a change, or it sees parking.
        let changed = self.phase.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |from| {
            let is_open = from == Phase::Filling as u8 || from == Phase::Complete as u8;
            let parking_fails = from == Phase::Parked as u8 && phase == Phase::Poisoned;
            (is_open || parking_fails).then_some(phase as u8)
        });
        self.work.notify_waiters();
        self.ending.notify_waiters();
        changed.is_ok()
    }

    /// Changes the background's byte rate; 0 is no limit. A lower one holds for what was asked for at the old one, too, unless
    /// it is on the wire.
    pub fn set_limit(&self, bytes_per_second: u64) {
        let now = self.clock.now();
        let is_lower = self.fills.lock().limit.set_rate(now, bytes_per_second);
        if is_lower {
            self.source.withdraw();
        }
        self.work.notify_waiters();
    }

    /// Finds out whether guests want the background slower, where it is time for that.
    pub(super) fn look_at_pace(&self) {
        if self.pace.look(self.clock.now(), || self.source.waiting_bytes()) {
            self.source.withdraw();
        }
    }

    /// Begins or ends bringing home what nobody asked for.
    #[cfg(test)]
    pub(super) fn set_background(&self, is_on: bool) {
        self.fills.lock().background = is_on;
        self.work.notify_waiters();
    }

    /// Whether what guests read tells anything: what they may read next, or what a start reads.
    pub(super) fn is_watching(&self) -> bool {
        self.phase() == Phase::Filling || self.asked.is_recording()
    }

    /// What guests asked for since the session's start: the boot trace, once it has settled.
    #[must_use]
    pub fn recorded(&self) -> Recorded {
        self.asked.recorded(self.clock.now())
    }

    /// How many chunks the order of the background has: those of the snapshot's disk that are not zeroes.
    #[must_use]
    pub const fn data_chunks(&self) -> u64 {
        self.data_chunks
    }

    /// Begins to record anew: what guests ask for from now on is the trace.
    pub fn begin_recording(&self) {
        self.asked.begin();
    }

    /// Ends the recording: what guests asked for until now is the trace.
    pub fn end_recording(&self) {
        self.asked.end();
    }

    /// Tells the fill and commit workers to end after the piece in hand.
    pub fn stop_workers(&self) {
        self.stopping.store(true, Ordering::Release);
        self.work.notify_waiters();
        self.ending.notify_waiters();
    }

    /// Says that a former agent could not have these chunks: they are damaged until they were asked for once more.
    pub fn recall_damage(&self, chunks: std::ops::Range<u64>, reason: &str) {
        self.stats.damage.lock().recall(chunks, reason);
    }

    /// How far the restore is.
    #[must_use]
    pub fn stats(&self) -> StatsSnapshot {
        let (misses, miss_p50_us, miss_p99_us, miss_max_us) = self.stats.waits();
        let size = self.map.disk().size;
        let bytes = |blocks: u64| (blocks * BLOCK_SIZE).min(size);
        let damage = self.stats.damage.lock().summary(|chunk| self.map.absent_bytes(chunk));
        let fills = self.fills.lock();
        let now = self.clock.now();
        StatsSnapshot {
            phase: self.phase(),
            disk_bytes: size,
            home_bytes: bytes(self.map.home()),
            stable_bytes: bytes(self.map.p().count()),
            guest_bytes: bytes(self.map.g().count()),
            filled_on_demand_bytes: Stats::read(&self.stats.filled_on_demand),
            filled_in_background_bytes: Stats::read(&self.stats.filled_in_background),
            zeroed_bytes: Stats::read(&self.stats.zeroed),
            fetched_bytes: Stats::read(&self.stats.fetched),
            missed_bytes: Stats::read(&self.stats.missed),
            misses,
            miss_p50_us,
            miss_p99_us,
            miss_max_us,
            waiting: self.waiting.load(Ordering::Relaxed),
            source_away: fills.source_away_since.map(|since| now.saturating_sub(since)),
            target_full: fills.full_until.is_some() && self.phase() == Phase::Filling,
            target_full_episodes: Stats::read(&self.stats.full_episodes),
            target_errors: Stats::read(&self.stats.target_errors),
            commits: Stats::read(&self.stats.commits),
            background: fills.background,
            limit: fills.limit.rate(),
            paced_to: self.pace.rate(),
            trace_left: fills.plan.trace_left(),
            damaged_bytes: damage.bytes,
            damaged_due_bytes: damage.due_bytes,
            damaged: damage.runs,
        }
    }

    /// How many of guests' misses waited no longer than each of these times; and how long all waited together.
    #[must_use]
    pub fn misses_within(&self, bounds: &[Duration]) -> (Vec<u64>, Duration) {
        self.stats.waits_within(bounds)
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("id", &self.id).field("phase", &self.phase()).finish_non_exhaustive()
    }
}
