//! One restore, from its first start to its completion: what all shards share.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block::{BLOCK_SIZE, BlockDevice};
use tokio::sync::Notify;

use super::asked::{Asked, Recorded};
use super::bits::{Bits, words_for, zeroed_words};
use super::clock::Clock;
use super::device::LiveDevice;
use super::error::{Error, ErrorKind, Result};
use super::fingerprint::{Evidence, check_contents};
use super::frozen::Views;
use super::holds::Holds;
use super::journal::{Header, Journal, JournalLayout, SessionId};
use super::limit::RateLimit;
use super::live_file::LiveFile;
use super::map::BlockMap;
use super::mistakes::{Mistake, makes};
use super::pace::Pace;
use super::parts::{Identity, Resumed, SessionOptions, SessionParts};
use super::plan::FillPlan;
use super::source::{ChunkData, ChunkSource, DiskLayout};
use super::stats::{Phase, Stats, StatsSnapshot};
use super::sync::{AtomicU8, AtomicU64, Mutex};

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
    /// The target is full, at least until no write failed for want of room up to then.
    pub(super) full_until: Option<Duration>,
}

impl Session {
    /// Begins a restore: makes the journal and the first checkpoint.
    ///
    /// `target_is_zero` where the target is known to read as zeroes from its start to its end, and its own
    /// making is on stable storage: then zero chunks are home from the start. The caller holds the
    /// target's lock.
    pub async fn create(
        parts: SessionParts,
        id: SessionId,
        target_is_zero: bool,
        target: &dyn BlockDevice,
        journal: &dyn BlockDevice,
    ) -> Result<Arc<Self>> {
        let disk = parts.source.layout();
        check_target(target, disk)?;
        let map = BlockMap::new(disk, LiveFile::new(parts.live.clone(), disk));
        map.live().reset();
        if target_is_zero || makes(Mistake::ZeroAssumedOnCreate) {
            target.flush().await?;
            mark_zero_chunks(&map, &*parts.source);
        }
        let mut layout = Self::journal_layout(&*parts.source, target_is_zero);
        layout.log_pages = parts.options.log_pages.unwrap_or(layout.log_pages);
        let Identity { snapshot, target } = parts.identity.clone();
        let header = Header { session: id, disk, journal: layout, snapshot, target };
        let journal = Journal::create(journal, header, &map.p(), &map.g()).await?;
        map.live().begin(id, parts.boot, disk);
        map.recount(&map.g());
        Ok(Self::assemble(parts, map, journal, Phase::Filling))
    }

    /// The layout of a new session's journal, whose room is to be taken beforehand.
    ///
    /// Zero chunks are whole from the start where the target is known to be zero; a bit of `P` is never cleared, so only
    /// the others can ever be home in part.
    pub fn journal_layout(source: &dyn ChunkSource, target_is_zero: bool) -> JournalLayout {
        let disk = source.layout();
        let chunks = 0..disk.chunk_count();
        let partial_max = chunks.filter(|&chunk| !target_is_zero || !source.is_zero(chunk)).count();
        JournalLayout::with_partial(disk, partial_max as u64)
    }

    /// Goes on with a restore: from the live file where that may be believed, else from the journal.
    ///
    /// The caller holds the target's lock, so that nothing of a predecessor is in flight any more. On failure
    /// nothing was written, unless it is one of `Device`.
    ///
    /// # Errors
    /// `NotAJournal` where the journal does not begin as one does: its creation was cut short, or it is damaged.
    /// `Elsewhere` where the journal belongs to another session, snapshot or disk, `WrongTarget` where the
    /// target does not hold what the journal says; `Damaged` and `NewerFormat`.
    pub async fn resume(
        parts: SessionParts,
        id: SessionId,
        target: &dyn BlockDevice,
        journal: &dyn BlockDevice,
    ) -> Result<(Arc<Self>, Resumed)> {
        Self::resume_telling(parts, id, target, journal, |_| Ok(())).await
    }

    /// As [`Session::resume`]; `tell` is told how the session had ended before the live file is believed again. What
    /// follows from a loss of writes it puts on stable storage: after another crash nothing else remembers it.
    ///
    /// # Errors
    /// As there; and what `tell` says.
    pub async fn resume_telling(
        parts: SessionParts,
        id: SessionId,
        target: &dyn BlockDevice,
        journal_device: &dyn BlockDevice,
        tell: impl FnOnce(Resumed) -> block::Result<()>,
    ) -> Result<(Arc<Self>, Resumed)> {
        let disk = parts.source.layout();
        check_target(target, disk)?;
        let header = Journal::read_header(journal_device).await?;
        if !makes(Mistake::ForeignJournal) {
            check_identity(&header, id, &parts.identity, disk)?;
        }
        let map = BlockMap::new(disk, LiveFile::new(parts.live.clone(), disk));
        let guest_words = zeroed_words(words_for(map.block_count()));
        let guest = Bits::new(&guest_words, map.block_count());
        let (mut journal, replayed) = Journal::open(journal_device, header, &map.p(), &guest).await?;
        let believes_live_file = map.live().is_believable(id, parts.boot, disk);
        let is_poisoned = map.live().is_poisoned(id, parts.boot, disk);
        let resumed =
            Resumed::told_by(replayed.parked, believes_live_file, is_poisoned, parts.last_boot, parts.boot);
        if let Some(check) = &parts.check {
            // On the boot that they were set in, the live file's bits of `G` leave nothing out, poisoned or not.
            let live_guest = (believes_live_file || is_poisoned).then(|| map.g());
            let evidence = Evidence {
                home: map.p(),
                guest: std::iter::once(guest).chain(live_guest).collect(),
                is_exact: replayed.parked || live_guest.is_some(),
            };
            check_contents(&**check, &*parts.source, target, &evidence).await?;
        }
        tell(resumed)?;
        if !believes_live_file && !makes(Mistake::LiveFileNotEmptied) {
            map.live().reset();
        }
        let begins_too_soon = makes(Mistake::LiveFileBegunTooSoon);
        if !believes_live_file && begins_too_soon {
            map.live().begin(id, parts.boot, disk);
            for _ in 0..8 {
                target.read(0, block::AlignedBuf::zeroed(0)).await.0?;
            }
        }
        let (p, v, g) = (map.p(), map.v(), map.g());
        for word in 0..p.word_count() {
            let is_unflushed = resumed.is_from_journal_alone() && !makes(Mistake::UnflushedWritesForgotten);
            let unflushed_writes = if is_unflushed { p.word(word) } else { 0 };
            if !believes_live_file && !makes(Mistake::GuestForgottenOnResume) {
                g.or_word(word, guest.word(word) | unflushed_writes);
            }
            v.or_word(word, p.word(word));
            if makes(Mistake::StableFromLiveFile) {
                p.or_word(word, v.word(word));
            }
        }
        let is_whole = v.count() == v.len();
        if parts.written_past.counts(resumed, is_whole) {
            g.or(&v);
        }
        if makes(Mistake::ZeroAssumedOnResume) {
            mark_zero_chunks(&map, &*parts.source);
        }
        if !makes(Mistake::ParkedForEver) {
            journal.checkpoint(journal_device, false, &p, &g).await?;
        }
        if !believes_live_file && !begins_too_soon {
            map.live().begin(id, parts.boot, disk);
        }
        map.recount(&g);
        if makes(Mistake::ResumeForgetsUncommitted) {
            drop(map.note());
        }
        let phase = if replayed.complete && map.is_all_home() { Phase::Complete } else { Phase::Filling };
        if replayed.mended > 0 {
            tracing::warn!(
                records = replayed.mended,
                "records of the journal were damaged; their copies were used"
            );
        }
        tracing::info!(session = %id, ?resumed, records = replayed.records, home = map.home(), "resumed");
        let session = Self::assemble(parts, map, journal, phase);
        Ok((session, resumed))
    }

    fn assemble(parts: SessionParts, map: BlockMap, journal: Journal, phase: Phase) -> Arc<Self> {
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

fn check_target(target: &dyn BlockDevice, disk: DiskLayout) -> Result<()> {
    let geometry = target.geometry();
    let problem = if geometry.size < disk.size {
        format!("the target has {} bytes, the disk {}", geometry.size, disk.size)
    } else if geometry.read_only {
        "the target is read-only".to_owned()
    } else if u64::from(geometry.minimum_io) > BLOCK_SIZE {
        format!("the target's smallest write is {} bytes; at most {BLOCK_SIZE} will do", geometry.minimum_io)
    } else if !geometry.shared_flush {
        "a flush of the target covers only one of its handles".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Unsuitable, problem))
}

pub(super) fn check_identity(
    header: &Header,
    id: SessionId,
    identity: &Identity,
    disk: DiskLayout,
) -> Result<()> {
    let problem = if header.session != id {
        format!(
            "the journal here is that of session {}, begun on {}, not of {id}",
            header.session, header.target
        )
    } else if header.snapshot != identity.snapshot {
        format!("the session here restores {}, not {}", header.snapshot, identity.snapshot)
    } else if header.disk != disk {
        format!("the session here is of a disk of {} bytes, not {}", header.disk.size, disk.size)
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Elsewhere, problem))
}

/// Marks zero chunks as home, a run of them at a time: most of a large disk is zeroes.
fn mark_zero_chunks(map: &BlockMap, source: &dyn ChunkSource) {
    let count = map.disk().chunk_count();
    let end_of_run =
        |start, zero| (start..count).find(|&chunk| source.is_zero(chunk) != zero).unwrap_or(count);
    let mut end = 0;
    while end < count {
        let start = end_of_run(end, false);
        if start == count {
            return;
        }
        end = end_of_run(start, true);
        let blocks = map.blocks_of_chunks(&(start..end));
        map.p().set(blocks.clone());
        map.v().set(blocks);
    }
}
