//! Which chunks guests asked for, in the order in which they first did: the boot trace.
//!
//! It is recorded from the session's start until guests *settle*: until they have asked for nothing new for a while,
//! or for as much as a trace may hold. What was asked for when they settled is the trace; what they ask for after
//! that is their work, and no start. A recording that somebody began by hand lasts until somebody ends it, or as much was asked for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::bits::{Bits, words_for, zeroed_words};
use super::sync::Mutex;

/// Guests that ask for nothing new for so long have settled.
const SETTLED_AFTER: Duration = Duration::from_secs(20);
/// A trace is no longer than this.
const LONGEST: Duration = Duration::from_secs(600);
/// A trace holds no more chunks than this.
const MOST_CHUNKS: usize = 65_536;

/// What guests asked for.
#[derive(Debug)]
pub(super) struct Asked {
    /// The chunks that were asked for since the recording began.
    seen: Box<[std::sync::atomic::AtomicU64]>,
    chunk_count: u64,
    is_recording: AtomicBool,
    recording: Mutex<Recording>,
}

#[derive(Debug, Default)]
struct Recording {
    order: Vec<u64>,
    begun: Option<Duration>,
    last: Duration,
    /// Somebody began it by hand, and ends it.
    by_hand: bool,
}

/// What was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// The chunks, in the order in which they were first asked for.
    pub chunks: Vec<u64>,
    /// From the first to the last of them.
    pub time: Duration,
    /// Whether the recording has ended: guests settled, or it was ended.
    pub is_settled: bool,
}

impl Asked {
    pub(super) fn new(chunk_count: u64) -> Self {
        Self {
            seen: zeroed_words(words_for(chunk_count)),
            chunk_count,
            is_recording: AtomicBool::new(true),
            recording: Mutex::default(),
        }
    }

    fn bits(&self) -> Bits<'_> {
        Bits::new(&self.seen, self.chunk_count)
    }

    /// Whether the recording goes on, as far as is known: it also ends with time, unnoticed until something is asked.
    pub(super) fn is_recording(&self) -> bool {
        self.is_recording.load(Ordering::Relaxed)
    }

    /// Whether this chunk is asked for the first time; `now` is called only then.
    pub(super) fn is_new(&self, chunk: u64, now: impl FnOnce() -> Duration) -> bool {
        if self.bits().contains(chunk) {
            return false;
        }
        let mut recording = self.recording.lock();
        if self.bits().set(chunk..chunk + 1) == 0 {
            return false;
        }
        if self.is_recording.load(Ordering::Relaxed) {
            let now = now();
            recording.begun.get_or_insert(now);
            recording.settle(now, &self.is_recording);
            if self.is_recording.load(Ordering::Relaxed) {
                recording.order.push(chunk);
                recording.last = now;
            }
        }
        true
    }

    /// What was recorded until now.
    pub(super) fn recorded(&self, now: Duration) -> Recorded {
        let recording = self.recording.lock();
        recording.settle(now, &self.is_recording);
        Recorded {
            chunks: recording.order.clone(),
            time: recording.begun.map_or(Duration::ZERO, |begun| recording.last.saturating_sub(begun)),
            is_settled: !self.is_recording.load(Ordering::Relaxed),
        }
    }

    /// Begins anew, by hand: what is asked for from now on until [`Self::end`] is the trace.
    pub(super) fn begin(&self) {
        let mut recording = self.recording.lock();
        *recording = Recording { by_hand: true, ..Recording::default() };
        self.bits().clear_all();
        self.is_recording.store(true, Ordering::Relaxed);
    }

    /// Ends the recording: what was asked for until now is the trace.
    pub(super) fn end(&self) {
        let _recording = self.recording.lock();
        self.is_recording.store(false, Ordering::Relaxed);
    }
}

impl Recording {
    fn settle(&self, now: Duration, is_recording: &AtomicBool) {
        let Some(begun) = self.begun else { return };
        if self.by_hand && self.order.len() < MOST_CHUNKS {
            return;
        }
        let is_quiet = !self.order.is_empty() && now.saturating_sub(self.last) >= SETTLED_AFTER;
        if is_quiet || now.saturating_sub(begun) >= LONGEST || self.order.len() >= MOST_CHUNKS {
            is_recording.store(false, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn chunks_are_recorded_once_in_their_order_until_the_guest_settles() {
        let asked = Asked::new(100);
        for (at, chunk, is_new) in [(5, 7, true), (6, 3, true), (6, 7, false), (9, 90, true)] {
            assert_eq!(asked.is_new(chunk, || seconds(at)), is_new);
        }
        let recorded = asked.recorded(seconds(10));
        assert_eq!(recorded, Recorded { chunks: vec![7, 3, 90], time: seconds(4), is_settled: false });
        assert!(asked.is_new(50, || seconds(9) + SETTLED_AFTER), "it is new, and no longer of the start");
        let recorded = asked.recorded(seconds(60));
        assert_eq!(recorded, Recorded { chunks: vec![7, 3, 90], time: seconds(4), is_settled: true });
    }

    #[test]
    fn a_session_that_nobody_uses_does_not_settle() {
        let asked = Asked::new(10);
        assert!(!asked.recorded(seconds(100_000)).is_settled);
        asked.is_new(1, || seconds(100_000));
        assert!(!asked.recorded(seconds(100_000)).is_settled);
        assert!(asked.recorded(seconds(100_000) + SETTLED_AFTER).is_settled);
    }

    #[test]
    fn a_recording_can_be_begun_anew_and_ended_by_hand() {
        let asked = Asked::new(10);
        asked.is_new(1, || seconds(1));
        asked.begin();
        asked.is_new(2, || seconds(2));
        asked.end();
        asked.is_new(3, || seconds(3));
        assert_eq!(asked.recorded(seconds(4)).chunks, [2]);
    }

    #[test]
    fn a_recording_by_hand_lasts_until_it_is_ended_or_holds_as_much_as_a_trace_may() {
        let asked = Asked::new(MOST_CHUNKS as u64 + 10);
        asked.begin();
        asked.is_new(1, || seconds(1));
        asked.is_new(2, || seconds(1) + SETTLED_AFTER);
        asked.is_new(3, || seconds(1) + LONGEST + LONGEST);
        let recorded = asked.recorded(seconds(100_000));
        assert_eq!((recorded.chunks, recorded.is_settled), (vec![1, 2, 3], false));
        for chunk in 0..MOST_CHUNKS as u64 + 10 {
            asked.is_new(chunk, || seconds(100_000));
        }
        let recorded = asked.recorded(seconds(100_000));
        assert_eq!((recorded.chunks.len(), recorded.is_settled), (MOST_CHUNKS, true));
    }
}
