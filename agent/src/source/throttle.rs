//! A source made slow on purpose, for rehearsals and benchmarks: `--source-rate`, `--source-delay`.
//!
//! The model is a link with a latency and a bandwidth: each fetch waits for the delay, others being
//! in flight meanwhile, and then its bytes pass one after another over a wire of the given rate.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How slow the source is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourcePace {
    /// Bytes a second that the wire carries; 0 is no limit.
    pub bytes_per_second: u64,
    /// What each fetch waits before its first byte.
    pub delay: Duration,
}

/// The link itself: knows until when its wire is taken.
#[derive(Debug)]
pub struct Throttle {
    pace: SourcePace,
    wire_free: Mutex<Option<Instant>>,
}

impl Throttle {
    /// A link of this pace, idle.
    #[must_use]
    pub const fn new(pace: SourcePace) -> Self {
        Self { pace, wire_free: Mutex::new(None) }
    }

    /// When the last byte of a fetch of `len` bytes arrives that begins at `now`. The wire is taken
    /// until then; `None` where this source is not slowed at all.
    pub fn reserve(&self, now: Instant, len: u64) -> Option<Instant> {
        if self.pace == SourcePace::default() {
            return None;
        }
        let first_byte = now + self.pace.delay;
        if self.pace.bytes_per_second == 0 {
            return Some(first_byte);
        }
        let transfer = Duration::from_secs_f64(len as f64 / self.pace.bytes_per_second as f64);
        let mut wire_free = self.wire_free.lock();
        let begin = wire_free.map_or(first_byte, |free| free.max(first_byte));
        let arrived = begin + transfer;
        *wire_free = Some(arrived);
        Some(arrived)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_overlap_and_transfers_do_not() {
        let throttle =
            Throttle::new(SourcePace { bytes_per_second: 1000, delay: Duration::from_millis(500) });
        let now = Instant::now();
        assert_eq!(throttle.reserve(now, 1000), Some(now + Duration::from_millis(1500)));
        assert_eq!(throttle.reserve(now, 1000), Some(now + Duration::from_millis(2500)));
        let later = now + Duration::from_secs(10);
        assert_eq!(throttle.reserve(later, 500), Some(later + Duration::from_secs(1)));
    }

    #[test]
    fn an_unlimited_source_is_not_slowed() {
        assert_eq!(Throttle::new(SourcePace::default()).reserve(Instant::now(), 1 << 30), None);
        let delayed = Throttle::new(SourcePace { bytes_per_second: 0, delay: Duration::from_secs(1) });
        let now = Instant::now();
        assert_eq!(delayed.reserve(now, 1 << 40), Some(now + Duration::from_secs(1)));
    }
}
