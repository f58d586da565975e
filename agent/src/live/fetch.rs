//! Getting runs for the background; and a chunk that a guest waits for: from what was decoded already, or from the source, with backoff.
//!
//! A guest's read waits for a source that is away, and fails at once for a chunk that is damaged or missing: the next
//! read asks again. What is damaged is kept in `damage`; a reason is logged once, however many chunks it concerns.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{Error, ErrorKind, Result};

use super::damage::Lasting;
use super::join::{before, first_of};
use super::pace;
use super::session::Session;
use super::source::{ChunkData, RunData, SourceError, SourceErrorKind, Urgency};
use super::stats::Stats;

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// How long a piece may be about to be asked for.
const ABOUT_TO: Duration = Duration::from_millis(1);
/// How often a read looks whether a piece with its chunk has come home before it fetches the chunk itself.
const MOST_LOOKS: u32 = 2;

impl Session {
    /// The chunk's bytes, if they were fetched and are on their way home.
    pub(super) fn decoded(&self, chunk: u64) -> Option<ChunkData> {
        self.decoded.lock().get(&chunk).cloned()
    }

    /// A chunk that a guest waits for. Where it is on its way home already, that fetch becomes the guest's; `None` where
    /// it came home meanwhile. The flag says whether somebody brings it home.
    pub(super) async fn fetch_for_guest(&self, chunk: u64) -> Result<Option<(ChunkData, bool)>> {
        let _waiting = Waiting::new(self);
        let mut looks = 0;
        loop {
            if let Some(data) = self.decoded(chunk) {
                return Ok(Some((data, true)));
            }
            if self.map.is_whole(chunk) {
                return Ok(None);
            }
            let ended = self.piece_ended.notified();
            if looks == MOST_LOOKS || !self.fills.lock().plan.is_in_flight(chunk) {
                return Ok(Some((self.fetch(chunk, Urgency::Demand).await?, false)));
            }
            match self.source.join(chunk, Urgency::Demand) {
                Some(fetch) => match fetch.await {
                    Ok(data) if data.len() as u64 == self.map.disk().chunk_range(chunk).len() => {
                        Stats::add(&self.stats.fetched, data.len() as u64);
                        return Ok(Some((data, true)));
                    }
                    // Whoever brings it home deals with that; this asks once more by itself.
                    _ => return Ok(Some((self.fetch(chunk, Urgency::Demand).await?, false))),
                },
                // It was fetched and is being written, or is about to be asked for. Or it waits for its neighbours, which may take
                // long where more urgent ones go before them: then one more fetch is the sooner way.
                None => {
                    looks += 1;
                    first_of(self.clock.sleep(ABOUT_TO), ended).await;
                }
            }
            self.check_open()?;
        }
    }

    /// Fetches a chunk. While the source is out of reach this waits and tries again, up to
    /// [`super::SessionOptions::source_timeout`]. A chunk that cannot be had is an error, never zeroes.
    pub(super) async fn fetch(&self, chunk: u64, urgency: Urgency) -> Result<ChunkData> {
        let start = self.clock.now();
        let mut backoff = FIRST_BACKOFF;
        loop {
            // From before it is looked whether the session ends.
            let ended = self.ending.notified();
            match self.source.fetch(chunk, urgency).await {
                Ok(data) => {
                    let expected = self.map.disk().chunk_range(chunk).len();
                    if data.len() as u64 != expected {
                        let why = format!("chunk {chunk} has {} bytes, not {expected}", data.len());
                        return Err(self.damaged(chunk, &why, Lasting::ForGood));
                    }
                    self.source_answered();
                    self.was_had(chunk);
                    Stats::add(&self.stats.fetched, expected);
                    return Ok(data);
                }
                Err(error) => self.may_retry(chunk, &error)?,
            }
            self.check_open()?;
            if self.stopping.load(Ordering::Acquire) {
                return Err(Error::new(
                    ErrorKind::Shutdown,
                    format_args!("chunk {chunk}: the session is ending"),
                ));
            }
            let left = (start + self.options.source_timeout).saturating_sub(self.clock.now());
            if left.is_zero() {
                let waited = self.options.source_timeout.as_secs();
                return Err(Error::new(
                    ErrorKind::Io,
                    format_args!("chunk {chunk}: the source was out of reach for {waited} s"),
                ));
            }
            first_of(self.clock.sleep(backoff.min(left)), ended).await;
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    }

    /// A run of the source. Where guests' latency has a target that is looked after meanwhile: all workers may wait for a slow
    /// source.
    pub(super) async fn fetch_run(&self, chunks: &Range<u64>, urgency: Urgency) -> RunData {
        let mut fetch = self.source.fetch_run(chunks.clone(), urgency);
        if !self.pace.is_watching() {
            return fetch.await;
        }
        loop {
            match before(&mut fetch, self.clock.sleep(pace::INTERVAL)).await {
                Some(run) => return run,
                None => self.look_at_pace(),
            }
        }
    }

    fn may_retry(&self, chunk: u64, error: &SourceError) -> Result<()> {
        match error.kind() {
            SourceErrorKind::Damaged => Err(self.damaged(chunk, &error.to_string(), Lasting::ForGood)),
            SourceErrorKind::Missing => Err(self.damaged(chunk, &error.to_string(), Lasting::Missing)),
            SourceErrorKind::Closed => Err(Error::new(ErrorKind::Shutdown, error)),
            SourceErrorKind::Unavailable => {
                self.source_is_away(error);
                Ok(())
            }
        }
    }

    pub(super) fn damaged(&self, chunk: u64, why: &str, lasting: Lasting) -> Error {
        let is_news = self.stats.damage.lock().found(chunk, why, lasting, self.clock.now());
        let range = self.map.disk().chunk_range(chunk);
        let start = range.start();
        match lasting {
            Lasting::ForGood if is_news => {
                tracing::error!(
                    chunk,
                    start,
                    why,
                    "a chunk is damaged; of more like it only `lifeboot status` tells"
                );
            }
            Lasting::Missing if is_news => tracing::error!(
                chunk,
                start,
                why,
                "a chunk is missing, and asked for again now and then; of more like it only `lifeboot status` tells"
            ),
            _ => tracing::debug!(chunk, start, why, "a chunk is damaged"),
        }
        Error::new(ErrorKind::Damaged, format_args!("chunk {chunk} ({range}) is damaged: {why}")).at(range)
    }

    /// A chunk came from the source: if it was damaged, it is so no longer, and the others may be back too.
    pub(super) fn was_had(&self, chunk: u64) {
        if self.stats.damage.lock().was_had(chunk, self.clock.now()) {
            tracing::info!(chunk, "a chunk that was damaged or missing can be had again");
            self.fills.lock().plan.begin_again();
            self.work.notify_one();
        }
    }

    pub(super) fn source_is_away(&self, why: &SourceError) {
        let mut fills = self.fills.lock();
        let now = self.clock.now();
        fills.source_away_since.get_or_insert(now);
        if fills.away_is_told {
            return;
        }
        let error = why as &dyn std::error::Error;
        match fills.away_told.admit(now) {
            Some(left_out) => {
                fills.away_is_told = true;
                tracing::warn!(error, left_out, "the source is out of reach; waiting for it");
            }
            None => tracing::debug!(error, "the source is out of reach; waiting for it"),
        }
    }

    pub(super) fn source_answered(&self) {
        let mut fills = self.fills.lock();
        if fills.source_away_since.take().is_none() {
            return;
        }
        if std::mem::take(&mut fills.away_is_told) {
            tracing::info!("the source is back");
        } else {
            tracing::debug!("the source is back");
        }
    }
}

/// A guest that waits for the source; its wait is recorded at its end.
#[derive(Debug)]
struct Waiting<'a> {
    session: &'a Session,
    since: Duration,
}

impl<'a> Waiting<'a> {
    fn new(session: &'a Session) -> Self {
        session.waiting.fetch_add(1, Ordering::Relaxed);
        Self { session, since: session.clock.now() }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let now = self.session.clock.now();
        self.session.stats.waited(now.saturating_sub(self.since));
        self.session.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
