//! Waiting awake: for a moment the next request, or the rest of one, is looked for again and again, before the thread goes to sleep for
//! it.
//!
//! A client with one request in flight sends the next one as soon as it has its answer, and a large write in pieces, as it can copy
//! or encrypt them. To sleep and be woken in between costs more than all else that a read from memory takes (measured: 28 to 44 thousand a
//! second), or a write under TLS (7.0 to 9.8 thousand of 64 KiB). What it must not cost:
//!
//! - *Processors.* Where waiting awake was in vain, it is left out for a while, twice as long each time; and it is for those
//!   who have the machine to themselves: a processor for each connection and one for its client. Packets of a network, each with a
//!   little of a large write, are not worth it.
//! - *The client's processor.* The kernel may well have woken the client where this thread waits awake, and then it would wait for a
//!   client that waits for it. So it offers the processor to others each time it has looked (measured, on two processors: 4 KiB reads 45 to
//!   49 thousand a second over a unix socket and 30 to 40 over TCP, 64 KiB ones over TCP 16 to 27). Somebody who computes takes a whole
//!   turn then: a wait that such a turn ended was in vain, whatever had come meanwhile.
//! - *Others on the thread.* Nothing else is in flight on it meanwhile, and every [`LONGEST_STREAK`] it gives way: the event loop looks for
//!   whoever else has come. That hands nothing to the kernel: for that the thread goes to sleep in earnest, each time where others than
//!   connections work on it, else every [`LONGEST_AWAKE`], so rarely that one request in a hundred does not meet it.

use std::time::{Duration, Instant};

/// For how long a request is waited for awake.
const LONGEST_WAIT: Duration = Duration::from_micros(30);
/// Who has the processor for so long was no client that sends its next request.
const LONG_TURN: Duration = Duration::from_micros(500);
/// For how long a thread does nothing but this connection's work, as long as it finds requests.
const LONGEST_STREAK: Duration = Duration::from_micros(500);
/// For how long it does not sleep, where nobody but connections works on it.
const LONGEST_AWAKE: Duration = Duration::from_millis(20);
/// How often it is left out at most after it was in vain.
const MOST_LEFT_OUT: u32 = 1024;

/// What waiting awake came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Waited<T> {
    /// This was found.
    Found(T),
    /// It is the others' turn, and then it goes on.
    GiveWay,
    /// There is nothing, or it is not worth it now.
    Sleep,
}

/// One connection's waiting.
#[derive(Debug)]
pub(super) struct Spin {
    /// Others than connections work on the thread.
    has_company: bool,
    /// Since when the thread has not been asleep.
    awake_since: Option<Instant>,
    /// Since when it has not given way.
    streak_since: Option<Instant>,
    /// How often it is still left out.
    left_out: u32,
    /// How often it is left out after the next failure.
    penalty: u32,
}

impl Spin {
    pub(super) const fn new(has_company: bool) -> Self {
        Self { has_company, awake_since: None, streak_since: None, left_out: 0, penalty: 0 }
    }

    /// Calls `look` until it finds something, for a moment. What is not `enough` was waited for in vain.
    pub(super) fn wait<T>(
        &mut self,
        mut look: impl FnMut() -> Option<T>,
        enough: impl FnOnce(&T) -> bool,
    ) -> Waited<T> {
        let begun = Instant::now();
        if self.left_out > 0 {
            self.left_out -= 1;
            return self.sleep();
        }
        let awake_since = *self.awake_since.get_or_insert(begun);
        if begun.duration_since(*self.streak_since.get_or_insert(begun)) >= LONGEST_STREAK {
            if self.has_company || begun.duration_since(awake_since) >= LONGEST_AWAKE {
                return self.sleep();
            }
            self.streak_since = None;
            return Waited::GiveWay;
        }
        let mut waited_long = false;
        loop {
            if let Some(found) = look() {
                if enough(&found) && !waited_long {
                    self.penalty = 0;
                } else {
                    self.leave_out();
                }
                return Waited::Found(found);
            }
            let waited = begun.elapsed();
            if waited >= LONGEST_WAIT {
                self.leave_out();
                return self.sleep();
            }
            std::thread::yield_now();
            waited_long |= begun.elapsed() >= waited + LONG_TURN;
        }
    }

    /// After it was in vain.
    fn leave_out(&mut self) {
        self.penalty = (self.penalty * 2).clamp(1, MOST_LEFT_OUT);
        self.left_out = self.penalty;
    }

    const fn sleep<T>(&mut self) -> Waited<T> {
        (self.awake_since, self.streak_since) = (None, None);
        Waited::Sleep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often of `times` it was looked at all.
    fn looked(spin: &mut Spin, times: u32, finds: Option<()>, enough: bool) -> u32 {
        let mut looked = 0;
        for _ in 0..times {
            let mut here = 0;
            let look = || {
                here = 1;
                finds
            };
            spin.wait(look, |()| enough);
            looked += here;
        }
        looked
    }

    #[test]
    fn in_vain_it_is_done_less_and_less_and_one_success_brings_it_back() {
        let mut spin = Spin::new(false);
        let few = looked(&mut spin, 2000, None, true);
        assert!((2..=12).contains(&few), "{few}");
        while looked(&mut spin, 1, Some(()), true) == 0 {}
        assert_eq!(spin.penalty, 0);
        assert_eq!(looked(&mut spin, 3, None, true), 2, "after one failure it is left out once");
    }

    #[test]
    fn who_sends_little_at_a_time_is_seldom_waited_for() {
        let mut spin = Spin::new(false);
        let few = looked(&mut spin, 2000, Some(()), false);
        assert!((2..=12).contains(&few), "{few}");
    }

    /// What ends a streak of one who is served without end, and how long it took.
    fn end_of_streak(spin: &mut Spin) -> (Waited<()>, Duration) {
        let begun = Instant::now();
        let mut turns = 0;
        loop {
            match spin.wait(|| Some(()), |()| true) {
                Waited::Found(()) => turns += 1,
                end => {
                    assert!(turns > 0);
                    return (end, begun.elapsed());
                }
            }
        }
    }

    #[test]
    fn who_is_served_without_end_gives_way_and_lets_the_thread_sleep_now_and_then() {
        let mut spin = Spin::new(false);
        let begun = Instant::now();
        let (end, took) = end_of_streak(&mut spin);
        // A thread that was kept from running for so long may be due to sleep at once.
        assert!(end == Waited::GiveWay || took >= LONGEST_AWAKE);
        assert!(took >= LONGEST_STREAK);
        while end_of_streak(&mut spin).0 == Waited::GiveWay {}
        assert!(begun.elapsed() >= LONGEST_AWAKE);
        assert_eq!(spin.wait(|| Some(()), |()| true), Waited::Found(()), "and then it goes on");
    }

    #[test]
    fn beside_others_the_thread_sleeps_after_each_streak() {
        let mut spin = Spin::new(true);
        for _ in 0..3 {
            assert_eq!(end_of_streak(&mut spin).0, Waited::Sleep);
        }
    }
}
