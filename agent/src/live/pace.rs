//! How fast the background may go where guests' latency has a target (`--guest-p99`). Pure.
//!
//! What counts is what guests' requests take that need nothing of the source: those that wait for it are served by
//! the background, not hindered. Every [`INTERVAL`] the slowest hundredth is held against the target: above it the
//! background's rate is halved; below it, it may go a quarter faster, until nothing holds it back any more.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::limit::RateLimit;

/// How often the rate is looked at.
pub(super) const INTERVAL: Duration = Duration::from_millis(250);
/// Fewer requests than this say nothing.
const ENOUGH: u32 = 50;
/// The background is never slower than this, so that a restore ends.
const SLOWEST: f64 = 1_048_576.0;
/// A rate this many times as high as what is reached holds nothing back.
const FREE: f64 = 4.0;
/// Bucket `n` counts times from `2^(n/4)` to `2^((n+1)/4)` microseconds.
const BUCKETS: usize = 128;

/// Watches guests' requests and paces the background.
#[derive(Debug)]
pub(super) struct Pace {
    target: Option<Duration>,
    seen: [AtomicU32; BUCKETS],
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limit: RateLimit,
    /// Bytes a second; `None` where nothing holds the background back.
    rate: Option<f64>,
    looked_at: Duration,
    taken: u64,
    /// What had been taken and not begun when it was looked last.
    waiting: u64,
}

impl Pace {
    /// With this target; without one nothing is watched or paced.
    pub(super) fn new(target: Option<Duration>) -> Self {
        let (limit, looked_at) = (RateLimit::new(0), Duration::ZERO);
        let state = State { limit, rate: None, looked_at, taken: 0, waiting: 0 };
        Self { target, seen: std::array::from_fn(|_| AtomicU32::new(0)), state: Mutex::new(state) }
    }

    /// Whether requests are to be timed.
    pub(super) const fn is_watching(&self) -> bool {
        self.target.is_some()
    }

    /// A request that needed nothing of the source took so long.
    pub(super) fn took(&self, time: Duration) {
        if self.is_watching() {
            self.seen[bucket_of(time)].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Finds the rate anew where it is time for that; `waiting` says how much of what was taken has not begun. True where the
    /// background is to be slower than before: then that is taken back by whoever asks.
    pub(super) fn look(&self, now: Duration, waiting: impl FnOnce() -> u64) -> bool {
        let Some(target) = self.target else { return false };
        let mut state = self.state.lock();
        if now.saturating_sub(state.looked_at) < INTERVAL {
            return false;
        }
        let waiting = waiting();
        let is_slower = self.find_rate(&mut state, target, now, waiting);
        state.waiting = if is_slower { 0 } else { waiting };
        if is_slower {
            state.limit.put_back(waiting);
        }
        is_slower
    }

    /// Takes `bytes` for the background, or says how long to wait before asking again.
    pub(super) fn take(&self, now: Duration, bytes: u64) -> Result<(), Duration> {
        if !self.is_watching() {
            return Ok(());
        }
        let mut state = self.state.lock();
        state.limit.take(now, bytes)?;
        state.taken += bytes;
        Ok(())
    }

    /// Bytes a second that the background may take now; 0 is no limit.
    pub(super) fn rate(&self) -> u64 {
        self.state.lock().rate.map_or(0, |rate| rate as u64)
    }

    fn find_rate(&self, state: &mut State, target: Duration, now: Duration, waiting: u64) -> bool {
        let seconds = now.saturating_sub(state.looked_at).as_secs_f64();
        let reached = (state.taken + state.waiting).saturating_sub(waiting) as f64 / seconds;
        (state.looked_at, state.taken) = (now, 0);
        let counts: Vec<u32> = self.seen.iter().map(|count| count.swap(0, Ordering::Relaxed)).collect();
        let total: u32 = counts.iter().sum();
        let p99 = if total >= ENOUGH { p99_of(&counts, total) } else { Duration::ZERO };
        state.rate = if p99 > target {
            Some((state.rate.unwrap_or(reached).min(reached.max(SLOWEST)) / 2.0).max(SLOWEST))
        } else {
            state.rate.map(|rate| rate * 1.25).filter(|rate| *rate < (reached * FREE).max(SLOWEST * FREE))
        };
        state.limit.change_rate(now, state.rate.map_or(0, |rate| rate as u64))
    }
}

fn bucket_of(time: Duration) -> usize {
    let micros = (time.as_micros() as f64).max(1.0);
    ((micros.log2() * 4.0) as usize).min(BUCKETS - 1)
}

fn p99_of(counts: &[u32], total: u32) -> Duration {
    let mut above = total / 100;
    for (bucket, count) in counts.iter().enumerate().rev() {
        if *count > above {
            return Duration::from_secs_f64(((bucket + 1) as f64 / 4.0).exp2() / 1e6);
        }
        above -= count;
    }
    Duration::ZERO
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Duration = Duration::from_millis(2);

    /// A machine on which guests' slowest hundredth takes as long as the background is fast: 1 ms for 10 MB/s.
    fn run(pace: &Pace, seconds: u64) -> f64 {
        let mut bytes = 0.0;
        let mut last = 0.0_f64;
        let piece = 1 << 20;
        let (mut now, mut begun) = (Duration::ZERO, Duration::ZERO);
        while now < Duration::from_secs(seconds) {
            pace.look(now, || 0);
            match pace.take(now, piece) {
                Ok(()) => {
                    bytes += piece as f64;
                    now += Duration::from_millis(10);
                }
                Err(wait) => now += wait,
            }
            if now - begun >= Duration::from_millis(100) {
                last = bytes / (now - begun).as_secs_f64();
                (bytes, begun) = (0.0, now);
                for _ in 0..100 {
                    pace.took(Duration::from_secs_f64(last / 1e10));
                }
            }
        }
        last
    }

    #[test]
    fn the_background_steps_back_until_guests_meet_their_target() {
        let rate = run(&Pace::new(Some(TARGET)), 30);
        assert!(rate > 4e6 && rate < 40e6, "{rate}");
        let rate = run(&Pace::new(Some(Duration::from_secs(1))), 30);
        assert!(rate > 90e6, "{rate}");
    }

    #[test]
    fn without_a_target_nothing_is_held_back() {
        assert!(run(&Pace::new(None), 5) > 90e6);
    }

    #[test]
    fn what_was_taken_and_has_not_begun_does_not_count_as_a_rate_that_was_reached() {
        let pace = Pace::new(Some(TARGET));
        let slow = || (0..100).for_each(|_| pace.took(Duration::from_secs(1)));
        // 64 MiB are asked for at once of a source that begins 16 MiB in a second.
        let (mut now, mut waiting) = (INTERVAL, 60 << 20);
        assert!(!pace.look(now, || 0));
        pace.take(now, 64 << 20).unwrap();
        now += INTERVAL;
        assert!(!pace.look(now, || waiting), "no guest minds");
        waiting -= 4 << 20;
        (now, _) = (now + INTERVAL, slow());
        assert!(pace.look(now, || waiting), "it is taken back");
        assert_eq!(pace.rate(), 8 << 20, "half of what was reached");
        pace.take(now, 2 << 20).unwrap();
        (now, _) = (now + INTERVAL, slow());
        assert!(pace.look(now, || 0));
        assert_eq!(pace.rate(), 4 << 20);
    }

    #[test]
    fn the_slowest_rate_is_kept_with_pieces_as_large_as_it() {
        let pace = Pace::new(Some(TARGET));
        let (mut now, mut bytes) = (Duration::ZERO, 0.0);
        let end = Duration::from_secs(60);
        while now < end {
            (0..100).for_each(|_| pace.took(Duration::from_secs(1)));
            pace.look(now, || 0);
            match pace.take(now, 1 << 20) {
                Ok(()) if now > end / 2 => bytes += SLOWEST,
                _ => {}
            }
            now += Duration::from_millis(10);
        }
        let rate = bytes / 30.0;
        assert!(rate < 1.1 * SLOWEST, "{rate} bytes a second");
    }

    #[test]
    fn it_never_stops_and_comes_back_when_guests_are_quiet() {
        let pace = Pace::new(Some(TARGET));
        let mut now = Duration::ZERO;
        for _ in 0..200 {
            (0..100).for_each(|_| pace.took(Duration::from_secs(1)));
            now += INTERVAL;
            pace.look(now, || 0);
            let _ = pace.take(now, 1 << 20);
        }
        assert_eq!(pace.rate(), SLOWEST as u64);
        for _ in 0..100 {
            now += INTERVAL;
            pace.look(now, || 0);
            let _ = pace.take(now, 1 << 20);
        }
        assert_eq!(pace.rate(), 0);
    }

    #[test]
    fn the_slowest_hundredth_is_found() {
        let mut counts = vec![0; BUCKETS];
        counts[bucket_of(Duration::from_micros(50))] = 990;
        counts[bucket_of(Duration::from_millis(9))] = 10;
        let p99 = p99_of(&counts, 1000);
        assert!(p99 >= Duration::from_micros(50) && p99 < Duration::from_micros(70), "{p99:?}");
        counts[bucket_of(Duration::from_millis(9))] = 30;
        assert!(p99_of(&counts, 1000) >= Duration::from_millis(9));
    }
}
