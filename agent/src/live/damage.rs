//! Which chunks could not be had, and why. Pure: moments are given.
//!
//! A chunk is damaged *for good* where its bytes came and are wrong (CRC, decoding, hash): the background does not ask
//! for it again while the session runs. One that is only *missing* (its pack is gone, or cut short) may be put back: the
//! background asks again now and then, more and more seldom, and at once when another missing chunk was had. A guest's
//! read always asks, whatever stands here. A chunk that was had leaves, and so does one that the guest wrote over.
//!
//! | bit | says |
//! |---|---|
//! | damaged | it could not be had when it was asked for last |
//! | for good | its bytes are wrong |
//! | due | the background is to ask again: it is missing, or a former agent could not have it |
//!
//! The bits take three bits a chunk however much is damaged, so that all of it is counted. Neighbours with one reason are
//! one run; only [`RUNS_LISTED`] runs keep their reasons, what is beyond them is counted only.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use block::AtomicBitmap;

/// Runs that are listed with their reasons; more are only counted.
const RUNS_LISTED: usize = 1000;
/// When a missing chunk is asked for again; each time after it waits twice as long.
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(120);

/// Neighbouring chunks that could not be had, all for the same reason.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DamagedRun {
    /// Their numbers.
    pub chunks: Range<u64>,
    /// What is wrong with them.
    pub reason: String,
}

/// Whether asking again may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lasting {
    /// The bytes are wrong.
    ForGood,
    /// Something is not there.
    Missing,
}

/// All damage of one disk.
#[derive(Debug)]
pub(super) struct Damage {
    damaged: AtomicBitmap,
    for_good: AtomicBitmap,
    due: AtomicBitmap,
    count: Count,
    /// By their first chunk.
    runs: BTreeMap<u64, Run>,
    /// Reasons that were told already.
    told: HashSet<Arc<str>>,
    retry_at: Option<Duration>,
    retry_after: Duration,
}

/// How many bits are set.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    damaged: u64,
    for_good: u64,
    due: u64,
}

#[derive(Debug)]
struct Run {
    end: u64,
    reason: Arc<str>,
}

/// The damage as it is at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Summary {
    /// Bytes of damaged chunks that are not home.
    pub(super) bytes: u64,
    /// Those among them that the background is to ask for again.
    pub(super) due_bytes: u64,
    /// The runs that are listed.
    pub(super) runs: Vec<DamagedRun>,
}

impl Damage {
    pub(super) fn new(chunk_count: u64) -> Self {
        Self {
            damaged: AtomicBitmap::new(chunk_count),
            for_good: AtomicBitmap::new(chunk_count),
            due: AtomicBitmap::new(chunk_count),
            count: Count::default(),
            runs: BTreeMap::new(),
            told: HashSet::new(),
            retry_at: None,
            retry_after: FIRST_RETRY,
        }
    }

    /// A chunk could not be had. True where this reason was not told yet.
    pub(super) fn found(&mut self, chunk: u64, reason: &str, lasting: Lasting, now: Duration) -> bool {
        let one = chunk..chunk + 1;
        self.count.damaged += self.damaged.set_range(one.clone());
        self.count.due -= self.due.clear_range(one.clone());
        match lasting {
            Lasting::ForGood => self.count.for_good += self.for_good.set_range(one.clone()),
            Lasting::Missing => {
                self.count.for_good -= self.for_good.clear_range(one.clone());
                self.retry_at.get_or_insert(now + self.retry_after);
            }
        }
        let reason = self.name(one, reason);
        self.told.len() < RUNS_LISTED && self.told.insert(reason)
    }

    /// A former agent could not have these chunks: they are damaged until they were asked for once more.
    pub(super) fn recall(&mut self, chunks: Range<u64>, reason: &str) {
        let chunks = chunks.start..chunks.end.min(self.damaged.len());
        if chunks.is_empty() {
            return;
        }
        self.count.damaged += self.damaged.set_range(chunks.clone());
        self.count.due += self.due.set_range(chunks.clone());
        self.name(chunks, reason);
    }

    /// A chunk was had. True where it had been damaged; then those that are missing are asked for again at once.
    pub(super) fn was_had(&mut self, chunk: u64, now: Duration) -> bool {
        if self.count.damaged == 0 || !self.damaged.get(chunk) {
            return false;
        }
        self.forget(chunk);
        self.retry_after = FIRST_RETRY;
        if self.count.damaged > self.count.for_good + self.count.due {
            self.retry_at = Some(now);
        }
        true
    }

    /// Whether the background leaves this chunk out.
    pub(super) fn is_left_out(&self, chunk: u64) -> bool {
        self.count.damaged > 0 && self.damaged.get(chunk) && !self.due.get(chunk)
    }

    /// Where it is time for that, makes everything missing due; true where something is.
    pub(super) fn ask_again(&mut self, now: Duration) -> bool {
        if self.retry_at.is_none_or(|at| now < at) {
            return false;
        }
        self.retry_at = None;
        self.retry_after = (self.retry_after * 2).min(LONGEST_RETRY);
        for (run, _) in self.damaged.runs(0..self.damaged.len()).filter(|(_, is_damaged)| *is_damaged) {
            for (missing, _) in self.for_good.runs(run).filter(|(_, is_for_good)| !is_for_good) {
                self.count.due += self.due.set_range(missing);
            }
        }
        self.count.due > 0
    }

    /// What is damaged now; `absent_bytes` says how much of a chunk is not home. Chunks that came home leave.
    pub(super) fn summary(&mut self, absent_bytes: impl Fn(u64) -> u64) -> Summary {
        let mut summary = Summary::default();
        let mut next = 0;
        while self.count.damaged > 0
            && let Some(chunk) = self.damaged.first_set(next)
        {
            next = chunk + 1;
            match absent_bytes(chunk) {
                0 => self.forget(chunk),
                bytes => {
                    summary.bytes += bytes;
                    summary.due_bytes += if self.due.get(chunk) { bytes } else { 0 };
                }
            }
        }
        let listed = |(&start, run): (&u64, &Run)| DamagedRun {
            chunks: start..run.end,
            reason: run.reason.to_string(),
        };
        summary.runs = self.runs.iter().map(listed).collect();
        summary
    }

    fn forget(&mut self, chunk: u64) {
        let one = chunk..chunk + 1;
        self.count.damaged -= self.damaged.clear_range(one.clone());
        self.count.for_good -= self.for_good.clear_range(one.clone());
        self.count.due -= self.due.clear_range(one.clone());
        self.unname(&one);
    }

    /// Lists chunks with a reason, joined to neighbours that have the same.
    fn name(&mut self, chunks: Range<u64>, reason: &str) -> Arc<str> {
        self.unname(&chunks);
        let Range { mut start, mut end } = chunks;
        let mut reason = self.told.get(reason).map_or_else(|| Arc::from(reason), Arc::clone);
        if let Some((&before, run)) = self.runs.range(..start).next_back()
            && run.end == start
            && run.reason == reason
        {
            start = before;
        }
        if let Some(after) = self.runs.get(&end)
            && after.reason == reason
        {
            reason = Arc::clone(&after.reason);
            let after = self.runs.remove(&end).expect("it was found there");
            end = after.end;
        }
        self.list(start, Run { end, reason: Arc::clone(&reason) });
        reason
    }

    /// Takes chunks out of the runs that hold them.
    fn unname(&mut self, chunks: &Range<u64>) {
        if let Some((_, before)) = self.runs.range_mut(..chunks.start).next_back()
            && before.end > chunks.start
        {
            let (end, reason) = (before.end, Arc::clone(&before.reason));
            before.end = chunks.start;
            if end > chunks.end {
                self.list(chunks.end, Run { end, reason });
            }
        }
        while let Some((&start, _)) = self.runs.range(chunks.clone()).next() {
            let run = self.runs.remove(&start).expect("it was found there");
            if run.end > chunks.end {
                self.list(chunks.end, run);
            }
        }
    }

    fn list(&mut self, start: u64, run: Run) {
        if self.runs.len() < RUNS_LISTED || self.runs.contains_key(&start) {
            self.runs.insert(start, run);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHUNKS: u64 = 100_000;
    const BYTES: u64 = 4096;

    fn runs(damage: &mut Damage) -> Vec<(Range<u64>, String)> {
        damage.summary(|_| BYTES).runs.into_iter().map(|run| (run.chunks, run.reason)).collect()
    }

    #[test]
    fn all_that_is_damaged_is_counted_however_much_it_is() {
        let mut damage = Damage::new(CHUNKS);
        for chunk in (0..CHUNKS).step_by(2) {
            damage.found(chunk, &format!("chunk {chunk}"), Lasting::ForGood, Duration::ZERO);
        }
        let summary = damage.summary(|_| BYTES);
        assert_eq!((summary.bytes, summary.runs.len()), (CHUNKS / 2 * BYTES, RUNS_LISTED));
        assert!(damage.is_left_out(CHUNKS - 2) && !damage.is_left_out(CHUNKS - 1));
    }

    #[test]
    fn neighbours_with_one_reason_are_one_run_and_told_once() {
        let mut damage = Damage::new(CHUNKS);
        let told = [5, 3, 4, 7, 6, 8].map(|chunk| {
            let reason = if chunk == 8 { "its CRC" } else { "its pack" };
            damage.found(chunk, reason, Lasting::ForGood, Duration::ZERO)
        });
        assert_eq!(told, [true, false, false, false, false, true]);
        assert_eq!(runs(&mut damage), [(3..8, "its pack".to_owned()), (8..9, "its CRC".to_owned())]);
        damage.found(5, "its CRC", Lasting::ForGood, Duration::ZERO);
        let (pack, crc) = ("its pack".to_owned(), "its CRC".to_owned());
        assert_eq!(runs(&mut damage), [(3..5, pack.clone()), (5..6, crc.clone()), (6..8, pack), (8..9, crc)]);
    }

    #[test]
    fn what_is_missing_is_asked_for_again_more_and_more_seldom_and_what_is_wrong_never() {
        let mut damage = Damage::new(CHUNKS);
        let mut now = Duration::ZERO;
        damage.found(1, "wrong", Lasting::ForGood, now);
        assert!(!damage.ask_again(now + LONGEST_RETRY));
        let mut waits = Vec::new();
        for _ in 0..10 {
            damage.found(2, "missing", Lasting::Missing, now);
            let found = now;
            while !damage.ask_again(now) {
                assert!(damage.is_left_out(2));
                now += Duration::from_millis(500);
            }
            assert!(damage.is_left_out(1) && !damage.is_left_out(2));
            waits.push(now - found);
        }
        assert_eq!((waits[0], waits[1], waits[9]), (FIRST_RETRY, 2 * FIRST_RETRY, LONGEST_RETRY));
    }

    #[test]
    fn when_one_missing_chunk_is_had_the_others_are_asked_for_at_once() {
        let mut damage = Damage::new(CHUNKS);
        for chunk in 0..3 {
            damage.found(chunk, "missing", Lasting::Missing, Duration::ZERO);
        }
        assert!(damage.was_had(1, Duration::from_millis(1)));
        assert!(!damage.was_had(1, Duration::from_millis(1)), "it has left");
        assert!(damage.ask_again(Duration::from_millis(1)));
        assert_eq!(runs(&mut damage), [(0..1, "missing".to_owned()), (2..3, "missing".to_owned())]);
    }

    #[test]
    fn what_a_former_agent_could_not_have_is_listed_and_asked_for_again() {
        let mut damage = Damage::new(CHUNKS);
        damage.recall(CHUNKS - 2..CHUNKS + 5, "missing");
        assert_eq!(runs(&mut damage), [(CHUNKS - 2..CHUNKS, "missing".to_owned())]);
        assert!(!damage.is_left_out(CHUNKS - 1));
        let summary = damage.summary(|_| BYTES);
        assert_eq!((summary.bytes, summary.due_bytes), (2 * BYTES, 2 * BYTES));
        assert!(damage.found(CHUNKS - 1, "missing", Lasting::Missing, Duration::ZERO), "it is news again");
        assert_eq!(damage.summary(|_| BYTES).due_bytes, BYTES);
    }

    proptest! {
        #[test]
        fn runs_are_what_was_found_and_not_had_since(
            steps in prop::collection::vec((0_u64..30, 0_u8..4, any::<bool>()), 0..200)
        ) {
            let mut damage = Damage::new(30);
            let mut expected: BTreeMap<u64, &str> = BTreeMap::new();
            for (chunk, what, for_good) in steps {
                let lasting = if for_good { Lasting::ForGood } else { Lasting::Missing };
                match what {
                    0 | 1 => {
                        let reason = if what == 0 { "a" } else { "b" };
                        damage.found(chunk, reason, lasting, Duration::ZERO);
                        expected.insert(chunk, reason);
                    }
                    2 => {
                        let had = damage.was_had(chunk, Duration::ZERO);
                        prop_assert_eq!(had, expected.remove(&chunk).is_some());
                    }
                    _ => drop(damage.ask_again(LONGEST_RETRY)),
                }
            }
            let summary = damage.summary(|_| BYTES);
            prop_assert_eq!(summary.bytes, expected.len() as u64 * BYTES);
            let mut listed = BTreeMap::new();
            for pair in summary.runs.windows(2) {
                let joined = pair[0].chunks.end == pair[1].chunks.start && pair[0].reason == pair[1].reason;
                prop_assert!(!joined, "{:?} could be one", pair);
            }
            for run in &summary.runs {
                listed.extend(run.chunks.clone().map(|chunk| (chunk, run.reason.as_str())));
            }
            prop_assert_eq!(listed, expected);
            let gone = damage.summary(|_| 0);
            prop_assert_eq!(gone, Summary::default());
            prop_assert!(!damage.is_left_out(0));
        }
    }
}
