//! Waiting awake: for a moment the next request is looked for again and again, before the thread goes to sleep for it.
//!
//! A client with one request in flight sends the next one as soon as it has its answer. To sleep and be woken in between costs more than
//! all else that a read from memory takes (measured: 28 to 44 thousand a second). What it must not cost:
//!
//! - *Processors.* Where waiting awake was in vain, it is left out for a while, twice as long each time; and it is for those
//!   who have the machine to themselves: a processor for each connection and one for its client.
//! - *Others on the thread.* Nothing is in flight on it meanwhile, and it goes to sleep in earnest, as it does to hand
//!   operations to the kernel, every [`LONGEST_STREAK`].

use std::time::{Duration, Instant};

/// For how long a request is waited for awake.
const LONGEST_WAIT: Duration = Duration::from_micros(30);
/// For how long a thread does nothing but this connection's work, as long as it finds requests.
const LONGEST_STREAK: Duration = Duration::from_micros(500);
/// How often it is left out at most after it was in vain.
const MOST_LEFT_OUT: u32 = 1024;

/// One connection's waiting.
#[derive(Debug, Default)]
pub(super) struct Spin {
    /// Since when the thread has not been asleep.
    awake_since: Option<Instant>,
    /// How often it is still left out.
    left_out: u32,
    /// How often it is left out after the next failure.
    penalty: u32,
}

impl Spin {
    /// Calls `look` until it finds something, for a moment; `None` where there is nothing, or it is not worth it now. The
    /// caller goes to sleep then.
    pub(super) fn wait<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let begun = Instant::now();
        if !self.is_worth_it(begun) {
            return None;
        }
        loop {
            if let Some(found) = look() {
                self.penalty = 0;
                return Some(found);
            }
            if begun.elapsed() >= LONGEST_WAIT {
                self.was_in_vain();
                return None;
            }
            std::hint::spin_loop();
        }
    }

    fn is_worth_it(&mut self, now: Instant) -> bool {
        if self.left_out > 0 {
            self.left_out -= 1;
            return false;
        }
        let since = *self.awake_since.get_or_insert(now);
        if now.duration_since(since) < LONGEST_STREAK {
            return true;
        }
        self.awake_since = None;
        false
    }

    fn was_in_vain(&mut self) {
        self.awake_since = None;
        self.penalty = (self.penalty * 2).clamp(1, MOST_LEFT_OUT);
        self.left_out = self.penalty;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often of `times` it was looked at all.
    fn looked(spin: &mut Spin, times: u32, finds: bool) -> u32 {
        let mut looked = 0;
        for _ in 0..times {
            let mut here = 0;
            let _ = spin.wait(|| {
                here = 1;
                finds.then_some(())
            });
            looked += here;
        }
        looked
    }

    #[test]
    fn in_vain_it_is_done_less_and_less_and_one_success_brings_it_back() {
        let mut spin = Spin::default();
        let few = looked(&mut spin, 2000, false);
        assert!((2..=12).contains(&few), "{few}");
        while looked(&mut spin, 1, true) == 0 {}
        assert_eq!(spin.penalty, 0);
        assert_eq!(looked(&mut spin, 3, false), 2, "after one failure it is left out once");
    }

    #[test]
    fn who_is_served_without_end_lets_the_thread_sleep_now_and_then() {
        let mut spin = Spin::default();
        let begun = Instant::now();
        let mut turns = 0;
        while spin.wait(|| Some(())).is_some() {
            turns += 1;
        }
        assert!(turns > 0 && begun.elapsed() >= LONGEST_STREAK);
        assert!(spin.wait(|| Some(())).is_some(), "and then it goes on");
    }
}
