//! Bringing chunks home: those that guests asked for, and all others behind them.
//!
//! Order of a fill: fetch, decode, verify, with no hold; hold the chunks, alone; write the blocks that
//! are not home, and no others; `V`; the holds end.
//!
//! Chunks that cannot be had are left out; those that are only missing come again (see `damage`).
//!
//! A full target is one *episode*, said once: several fills are under way, and on a target that is nearly full some
//! succeed while others fail. So a success ends it only when none has failed for [`FULL_QUIET`] after the background
//! went on; until then the background waits longer and longer between its attempts. An attempt after one that failed, for whatever
//! reason, is a single chunk: what is fetched and cannot be written is fetched again.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{AlignedBuf, Durability, ErrorKind, Result};

use super::damage::Lasting;
use super::device::LiveDevice;
use super::holds::Hold;
use super::join::first_of;
use super::mistakes::{Mistake, catch_up, makes};
use super::plan::{Chunk, Lane, Piece, Sizes};
use super::session::{Fills, Session};
use super::source::{ChunkData, RunData, SourceErrorKind, Urgency};
use super::stats::{Phase, Stats};
use super::streams::Streams;

/// How long a worker that found nothing to do sleeps before it looks again unasked.
const IDLE: Duration = Duration::from_secs(1);
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// For how long no write may fail for want of room before the target counts as full no longer.
const FULL_QUIET: Duration = Duration::from_secs(5);
/// Zero chunks are made zero in pieces of this size.
const ZERO_PIECE_BYTES: u64 = 256 << 20;
/// What is wanted before the sweep is brought home in pieces of this size.
const WANTED_PIECE_BYTES: u64 = 512 << 10;
/// This much on either side of what a guest asked for is wanted before the sweep. Replaying a boot over 5 and 20 ms, twice
/// and half as much were slower.
const NEAR_BYTES: u64 = 2 << 20;

enum Work {
    /// A chunk that a guest asked for is decoded.
    Offer(u64, ChunkData),
    Piece(Piece),
    Wait(Duration),
    Complete,
    End,
}

impl LiveDevice {
    /// Brings chunks home until all are, or the workers are stopped; then makes the session complete.
    ///
    /// Several run at once, on any shards: four on each keep several fetches and writes in flight.
    pub async fn fill_worker(self) {
        let session = &*self.session;
        let _present = Present::new(session);
        loop {
            match session.next_work() {
                Work::Offer(chunk, data) => {
                    let result = self.fill_offered(chunk, data).await;
                    session.after_fill(result);
                }
                Work::Piece(piece) => {
                    let (again, withdrawn) = if piece.is_zero {
                        (session.after_fill(self.zero_fill(&piece.chunks).await), Vec::new())
                    } else {
                        self.fill_piece(&piece).await
                    };
                    let mut fills = session.fills.lock();
                    fills.plan.ended(&piece.chunks, again);
                    fills.plan.withdrawn(piece.lane, withdrawn);
                    drop(fills);
                    session.piece_ended.notify_waiters();
                    session.work.notify_one();
                }
                Work::Wait(time) => first_of(session.clock.sleep(time), session.work.notified()).await,
                Work::Complete => {
                    // A failure has poisoned the session, which ends the worker.
                    let _ = self.complete().await;
                }
                Work::End => return,
            }
            if session.map.uncommitted_bytes() >= session.options.commit_bytes && self.commit().await.is_err()
            {
                return;
            }
        }
    }

    /// Whether some of it must be tried again; and what was not fetched, because the background is to be slower.
    async fn fill_piece(&self, Piece { chunks, lane, .. }: &Piece) -> (bool, Vec<Range<u64>>) {
        let session = &*self.session;
        let urgency = lane.urgency();
        let RunData { bytes, failed, withdrawn } = session.fetch_run(chunks, urgency).await;
        let mut again = false;
        for (chunk, error) in &failed {
            match error.kind() {
                SourceErrorKind::Damaged => {
                    drop(session.damaged(*chunk, &error.to_string(), Lasting::ForGood));
                }
                SourceErrorKind::Missing => {
                    drop(session.damaged(*chunk, &error.to_string(), Lasting::Missing));
                }
                kind @ (SourceErrorKind::Unavailable | SourceErrorKind::Closed) => {
                    if kind == SourceErrorKind::Unavailable {
                        session.source_is_away(error);
                    }
                    session.back_off();
                    again = true;
                }
            }
        }
        let whole = session.map.disk().run_range(chunks);
        if bytes.len() as u64 != whole.len() {
            tracing::error!(?chunks, len = bytes.len(), "the source gave a run of a wrong length");
            let wrong = |chunk| drop(session.damaged(chunk, "its run has a wrong length", Lasting::ForGood));
            chunks.clone().for_each(wrong);
            return (false, Vec::new());
        }
        let is_fetched = |chunk: u64| !withdrawn.contains(&chunk);
        let withdrawn_runs = runs_of(chunks, |chunk| !is_fetched(chunk));
        if withdrawn_runs.as_slice() == std::slice::from_ref(chunks) {
            return (false, withdrawn_runs);
        }
        let is_filled_all_the_same = makes(Mistake::FailedFetchFilled);
        let is_good = |chunk: u64| {
            is_fetched(chunk) && (is_filled_all_the_same || failed.iter().all(|(bad, _)| *bad != chunk))
        };
        chunks.clone().filter(|&chunk| is_good(chunk)).for_each(|chunk| session.was_had(chunk));
        if failed.is_empty() {
            session.source_answered();
        }
        if failed.is_empty() && withdrawn.is_empty() {
            return (
                session.after_fill(self.fill(chunks.clone(), bytes, urgency).await) || again,
                Vec::new(),
            );
        }
        for run in runs_of(chunks, is_good) {
            let range = session.map.disk().run_range(&run);
            let at = (range.start() - whole.start()) as usize;
            let part = AlignedBuf::from_slice(&bytes[at..at + range.len() as usize]);
            again |= session.after_fill(self.fill(run, part, urgency).await);
        }
        (again, withdrawn_runs)
    }

    /// Brings one chunk home now.
    pub(super) async fn bring_home(&self, chunk: u64, urgency: Urgency) -> Result<()> {
        let session = &*self.session;
        session.check_open()?;
        if session.source.is_zero(chunk) {
            return self.zero_fill(&(chunk..chunk + 1)).await;
        }
        let data = if urgency == Urgency::Demand {
            let Some((data, _)) = session.fetch_for_guest(chunk).await? else { return Ok(()) };
            data
        } else if let Some(data) = session.decoded(chunk) {
            data
        } else if session.map.is_whole(chunk) {
            return Ok(());
        } else {
            session.fetch(chunk, urgency).await?
        };
        self.fill(chunk..chunk + 1, data.into_buf(), urgency).await
    }

    /// Leaves a chunk that a guest asked for to the workers; where too many wait for them, or there
    /// is no worker, writes it home here. Whether it got there is not the guest's concern.
    pub(super) async fn offer(&self, chunk: u64, data: &ChunkData) {
        let session = &*self.session;
        if session.map.is_whole(chunk) || session.accept_offer(chunk, data) {
            return;
        }
        let buf = AlignedBuf::from_slice(data);
        session.after_fill(self.fill(chunk..chunk + 1, buf, Urgency::Demand).await);
    }

    async fn fill_offered(&self, chunk: u64, data: ChunkData) -> Result<()> {
        let result = self.fill(chunk..chunk + 1, AlignedBuf::from_slice(&data), Urgency::Demand).await;
        self.session.decoded.lock().remove(&chunk);
        if result.is_err() {
            self.session.fills.lock().plan.begin_again();
        }
        result
    }

    /// Writes the blocks of `chunks` that are not home. `buf` holds the chunks' bytes.
    async fn fill(&self, chunks: Range<u64>, buf: AlignedBuf, urgency: Urgency) -> Result<()> {
        let session = &*self.session;
        let map = &session.map;
        let _change = session.begin_change().await?;
        catch_up(map);
        let blocks = map.blocks_of_chunks(&chunks);
        let absent_now = || -> Vec<Range<u64>> {
            map.v().runs(blocks.clone()).filter(|(_, is_home)| !is_home).map(|(run, _)| run).collect()
        };
        let looked_before = makes(Mistake::LookBeforeHold).then(absent_now);
        let _holds =
            if makes(Mistake::FillWithoutHold) { Vec::new() } else { self.hold_exclusive(&chunks).await };
        let mut absent = looked_before.unwrap_or_else(absent_now);
        if makes(Mistake::FillOverHome) {
            absent = vec![blocks.clone()];
        }
        let whole = map.bytes(&blocks);
        let mut written = 0;
        if absent.as_slice() == [blocks.clone()] {
            self.target.write(whole.start(), buf, Durability::Volatile).await.0?;
            map.mark_home(blocks);
            written = whole.len();
        } else {
            for run in absent {
                let bytes = map.bytes(&run);
                let at = (bytes.start() - whole.start()) as usize;
                let part = AlignedBuf::from_slice(&buf[at..at + bytes.len() as usize]);
                self.target.write(bytes.start(), part, Durability::Volatile).await.0?;
                map.mark_home(run);
                written += bytes.len();
            }
        }
        if makes(Mistake::MappedJournal) {
            self.leak_to_journal().await;
        }
        let counter = match urgency {
            Urgency::Background | Urgency::Expected => &session.stats.filled_in_background,
            Urgency::Readahead | Urgency::Demand => &session.stats.filled_on_demand,
        };
        Stats::add(counter, written);
        Ok(())
    }

    /// Holds those of `chunks` that are not whole, alone, in ascending order.
    pub(super) async fn hold_exclusive(&self, chunks: &Range<u64>) -> Vec<Hold> {
        let mut holds = Vec::new();
        let mut in_order: Vec<u64> = chunks.clone().collect();
        if makes(Mistake::HoldsDescending) {
            in_order.reverse();
        }
        for chunk in in_order {
            if !self.session.map.is_whole(chunk) {
                holds.push(self.session.holds.exclusive(chunk).await);
            }
        }
        holds
    }
}

impl Session {
    fn next_work(&self) -> Work {
        if self.stopping.load(Ordering::Acquire) || self.phase() != Phase::Filling {
            return Work::End;
        }
        self.look_at_pace();
        let now = self.clock.now();
        let mut fills = self.fills.lock();
        if now >= fills.not_before
            && let Some(chunk) = fills.offers.pop_front()
            && let Some(data) = self.decoded(chunk)
        {
            return Work::Offer(chunk, data);
        }
        if self.map.is_all_home() {
            return Work::Complete;
        }
        if now < fills.not_before {
            return Work::Wait(fills.not_before - now);
        }
        self.next_piece(&mut fills, now)
    }

    fn next_piece(&self, fills: &mut Fills, now: Duration) -> Work {
        if self.stats.damage.lock().ask_again(now) {
            fills.plan.begin_again();
        }
        let chunk_size = u64::from(self.map.disk().chunk_size);
        // What lies ahead of a guest's stream is the guest's: no limit holds it back.
        let held_back = fills.limit.take(now, 0).and_then(|()| self.pace.take(now, 0));
        let fetching = fills.plan.fetching() * chunk_size;
        let most = self.source.prefetch_bytes().max(chunk_size);
        let least = if !fills.background || held_back.is_err() {
            Lane::Stream
        } else if fetching >= most {
            Lane::Near
        } else {
            Lane::Sweep
        };
        if fetching >= if fills.failed { 1 } else { 2 * most } {
            return Work::Wait(IDLE);
        }
        let in_chunks = |bytes: u64| if fills.failed { 1 } else { (bytes / chunk_size).max(1) };
        let sizes = Sizes {
            sweep: in_chunks(fills.limit.piece(self.options.piece_bytes)),
            wanted: in_chunks(fills.limit.piece(WANTED_PIECE_BYTES)),
            zero: in_chunks(ZERO_PIECE_BYTES),
        };
        let Some(piece) = fills.plan.next(least, sizes, |chunk| self.chunk_state(chunk)) else {
            return Work::Wait(held_back.err().unwrap_or(IDLE).min(IDLE));
        };
        if !piece.is_zero && piece.lane != Lane::Stream {
            let bytes = self.map.disk().run_range(&piece.chunks).len();
            // They were asked with nothing just above, so this takes in advance.
            let _ = fills.limit.take(now, bytes);
            let _ = self.pace.take(now, bytes);
        }
        // There may be more: the next worker looks.
        self.work.notify_one();
        Work::Piece(piece)
    }

    /// A guest reads `chunks`: what it will probably read next is wanted.
    pub(super) fn is_asked_for(&self, chunks: Range<u64>, streams: &RefCell<Streams>) {
        // Zeroes need no fetch, so nobody has to expect them.
        let is_new =
            |chunk: &u64| !self.source.is_zero(*chunk) && self.asked.is_new(*chunk, || self.clock.now());
        let new: Vec<u64> = chunks.clone().filter(is_new).collect();
        if self.phase() != Phase::Filling {
            return;
        }
        let disk = self.map.disk();
        let ahead: Vec<Range<u64>> = {
            let mut streams = streams.borrow_mut();
            chunks.flat_map(|chunk| streams.saw(chunk, disk.chunk_count())).collect()
        };
        if new.is_empty() && ahead.is_empty() {
            return;
        }
        let mut fills = self.fills.lock();
        fills.plan.want_ahead(ahead);
        if fills.background {
            let within = NEAR_BYTES / u64::from(disk.chunk_size);
            new.into_iter().for_each(|chunk| fills.plan.want_near(chunk, within));
        }
        drop(fills);
        self.work.notify_one();
    }

    fn chunk_state(&self, chunk: u64) -> Chunk {
        if self.map.is_whole(chunk) {
            Chunk::Skip
        } else if self.source.is_zero(chunk) {
            Chunk::Zero
        } else if self.stats.damage.lock().is_left_out(chunk) || self.decoded.lock().contains_key(&chunk) {
            Chunk::Skip
        } else {
            Chunk::Data
        }
    }

    fn accept_offer(&self, chunk: u64, data: &ChunkData) -> bool {
        let mut fills = self.fills.lock();
        let mut decoded = self.decoded.lock();
        if decoded.contains_key(&chunk) {
            return true;
        }
        let room = (self.options.decoded_bytes / u64::from(self.map.disk().chunk_size)) as usize;
        let is_working = fills.workers > 0 && self.clock.now() >= fills.not_before;
        if !is_working || decoded.len() >= room {
            return false;
        }
        decoded.insert(chunk, data.clone());
        fills.offers.push_back(chunk);
        drop((fills, decoded));
        self.work.notify_one();
        true
    }

    /// Looks at how a fill went; true where it must be tried again.
    pub(super) fn after_fill(&self, result: Result<()>) -> bool {
        let now = self.clock.now();
        let mut fills = self.fills.lock();
        let Err(error) = result else {
            fills.failed = false;
            if fills.full_until.is_none_or(|until| now >= until) {
                fills.full_until = None;
                fills.backoff = Duration::ZERO;
            }
            return false;
        };
        match error.kind() {
            ErrorKind::Poisoned | ErrorKind::Shutdown => return true,
            ErrorKind::NoSpace => {
                fills.back_off(now);
                let quiet_from = fills.not_before + FULL_QUIET;
                if fills.full_until.replace(quiet_from).is_none() {
                    Stats::add(&self.stats.full_episodes, 1);
                    tracing::warn!("the target is full: the background waits for room");
                }
            }
            _ => {
                fills.back_off(now);
                self.stats.target_failed();
                let error = &error as &dyn std::error::Error;
                match fills.failed_told.admit(now) {
                    Some(left_out) => tracing::error!(error, left_out, "writing to the target failed"),
                    None => tracing::debug!(error, "writing to the target failed"),
                }
            }
        }
        true
    }

    fn back_off(&self) {
        let now = self.clock.now();
        self.fills.lock().back_off(now);
    }
}

/// The runs of those of `chunks` that are wanted.
fn runs_of(chunks: &Range<u64>, is_wanted: impl Fn(u64) -> bool) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for chunk in chunks.clone().filter(|&chunk| is_wanted(chunk)) {
        match runs.last_mut() {
            Some(last) if last.end == chunk => last.end += 1,
            _ => runs.push(chunk..chunk + 1),
        }
    }
    runs
}

impl Lane {
    const fn urgency(self) -> Urgency {
        match self {
            Self::Stream => Urgency::Readahead,
            Self::Trace | Self::Near => Urgency::Expected,
            Self::Sweep => Urgency::Background,
        }
    }
}

impl Fills {
    fn back_off(&mut self, now: Duration) {
        // Those that were under way together fail together: that is one attempt.
        if now >= self.not_before {
            self.backoff = (self.backoff * 2).clamp(FIRST_BACKOFF, LONGEST_BACKOFF);
        }
        self.not_before = now + self.backoff;
        self.failed = true;
    }
}

/// A worker that is running.
struct Present<'a>(&'a Session);

impl<'a> Present<'a> {
    fn new(session: &'a Session) -> Self {
        session.fills.lock().workers += 1;
        Self(session)
    }
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.0.fills.lock().workers -= 1;
    }
}
