//! A byte rate that can be changed while it is obeyed. Pure: the time is passed in.

use std::time::Duration;

/// Bytes that may be taken at once after a pause, as time at the full rate.
const BURST: Duration = Duration::from_millis(100);

/// A bucket of bytes that fills at a rate.
#[derive(Clone, Debug)]
pub struct RateLimit {
    /// Bytes a second; 0 is no limit.
    rate: u64,
    /// What may be taken now; below zero, what was taken in advance.
    tokens: f64,
    filled_at: Duration,
}

impl RateLimit {
    /// A limit of `rate` bytes a second; 0 is none.
    #[must_use]
    pub const fn new(rate: u64) -> Self {
        Self { rate, tokens: 0.0, filled_at: Duration::ZERO }
    }

    /// Bytes a second; 0 is no limit.
    #[must_use]
    pub const fn rate(&self) -> u64 {
        self.rate
    }

    /// Changes the rate from `now` on. What was taken in advance is forgiven. True where the rate is lower than before.
    pub fn set_rate(&mut self, now: Duration, rate: u64) -> bool {
        let is_lower = self.change_rate(now, rate);
        self.tokens = self.tokens.max(0.0);
        is_lower
    }

    /// Changes the rate from `now` on, as somebody does who changes it all the time: what was taken in advance still counts,
    /// unless there is no limit any more. True where the rate is lower than before.
    pub fn change_rate(&mut self, now: Duration, rate: u64) -> bool {
        self.fill(now);
        let is_lower = rate > 0 && (self.rate == 0 || rate < self.rate);
        self.rate = rate;
        if rate == 0 {
            self.tokens = 0.0;
        }
        is_lower
    }

    /// Puts back what was taken and not used.
    pub fn put_back(&mut self, bytes: u64) {
        self.tokens += bytes as f64;
    }

    /// How many bytes to take at once where `most` could be: what the rate gives in a second.
    #[must_use]
    pub fn piece(&self, most: u64) -> u64 {
        if self.rate == 0 { most } else { most.min(self.rate) }
    }

    /// Takes `bytes`, or says how long to wait before asking again.
    ///
    /// A piece larger than the burst is taken in advance, and the next one waits for it.
    pub fn take(&mut self, now: Duration, bytes: u64) -> Result<(), Duration> {
        if self.rate == 0 {
            return Ok(());
        }
        self.fill(now);
        if self.tokens < 0.0 {
            return Err(Duration::from_secs_f64((-self.tokens / self.rate as f64).max(0.001)));
        }
        self.tokens -= bytes as f64;
        Ok(())
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.filled_at).as_secs_f64();
        self.filled_at = self.filled_at.max(now);
        let most = self.rate as f64 * BURST.as_secs_f64();
        self.tokens = (self.tokens + passed * self.rate as f64).min(most);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn taken_in(limit: &mut RateLimit, from: Duration, to: Duration, piece: u64) -> u64 {
        let (mut now, mut bytes) = (from, 0);
        while now < to {
            match limit.take(now, piece) {
                Ok(()) => bytes += piece,
                Err(wait) => now += wait,
            }
        }
        bytes
    }

    proptest! {
        #[test]
        fn over_any_time_the_rate_is_kept_within_a_piece_and_a_burst(
            rate in 1_000_u64..1_000_000_000, piece in 1_000_u64..4_000_000, seconds in 1_u64..100,
        ) {
            let mut limit = RateLimit::new(rate);
            let end = Duration::from_secs(seconds);
            let bytes = taken_in(&mut limit, Duration::ZERO, end, piece);
            let slack = rate / 10 + piece;
            prop_assert!(bytes <= rate * seconds + slack, "{} bytes", bytes);
            prop_assert!(bytes + slack + rate / 500 >= rate * seconds, "{} bytes", bytes);
        }
    }

    #[test]
    fn a_piece_is_no_more_than_a_second_gives() {
        assert_eq!(RateLimit::new(0).piece(1 << 20), 1 << 20);
        assert_eq!(RateLimit::new(20).piece(1 << 20), 20);
        assert_eq!(RateLimit::new(1 << 30).piece(1 << 20), 1 << 20);
    }

    #[test]
    fn a_rate_that_changes_all_the_time_is_kept_all_the_same() {
        let (rate, piece) = (1 << 20, 1 << 20);
        let mut limit = RateLimit::new(0);
        let mut bytes = 0;
        for tick in 0..400 {
            let now = Duration::from_millis(250) * tick;
            assert_eq!(limit.change_rate(now, rate), tick == 0, "lower than none, and then the same");
            bytes += taken_in(&mut limit, now, now + Duration::from_millis(250), piece);
        }
        assert!(bytes <= 100 * rate + piece, "{bytes} bytes in 100 s");
        let end = Duration::from_secs(100);
        assert!(limit.take(end, piece).is_ok() && limit.take(end, 1).is_err());
        limit.put_back(piece);
        assert!(limit.take(end, 1).is_ok(), "what was not used can be taken again");
    }

    #[test]
    fn a_new_rate_holds_at_once() {
        let mut limit = RateLimit::new(1000);
        assert_eq!(limit.take(Duration::ZERO, 1_000_000), Ok(()));
        assert!(limit.take(Duration::ZERO, 1).is_err());
        assert!(!limit.set_rate(Duration::ZERO, 1_000_000_000));
        assert_eq!(limit.take(Duration::ZERO, 1), Ok(()));
        assert!(!limit.set_rate(Duration::ZERO, 0));
        assert_eq!(limit.take(Duration::ZERO, u64::MAX), Ok(()));
        assert!(limit.set_rate(Duration::ZERO, 5));
    }
}
