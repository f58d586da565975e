//! Whether a thread may write into the page cache itself.
//!
//! As a rule that only copies. But the kernel makes those wait who dirty pages faster than the disk takes them, and some file
//! systems make everybody wait, which on a thread that serves others holds them all up. So the waiting is
//! added up, and what is waited for too long goes to the queue for a while. That a thread had to give way to another one, as
//! on a busy machine, is no waiting; nor is a moment at a lock now and then.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// A write that took longer than this was made to wait, or its thread had to give way meanwhile.
const STALL: Duration = Duration::from_millis(1);
/// For how many writes after a stall it is found out which of the two the next one was.
const WATCHED_WRITES: u32 = 256;
/// How much of the waiting each write that does not stall makes up for.
const FORGIVEN: Duration = Duration::from_micros(500);
/// How much waiting is too much.
const WAITED_MAX: Duration = Duration::from_millis(8);
/// How many writes then go to the queue.
const DETOURS: u32 = 256;

/// How the writes of one handle went.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Writes that still go to the queue.
    detours: Cell<u32>,
    /// Writes that are still watched.
    watched: Cell<u32>,
    /// The waiting that nothing made up for.
    waited: Cell<Duration>,
}

impl Pace {
    /// Whether the next write goes to the queue.
    pub(super) fn takes_a_detour(&self) -> bool {
        let left = self.detours.get();
        self.detours.set(left.saturating_sub(1));
        left > 0
    }

    /// Does `write`, and notes how it went.
    pub(super) fn timed<T>(&self, write: impl FnOnce() -> T) -> T {
        // To ask it each time would cost as much as a small write.
        let before = (self.watched.get() > 0).then(times_waited);
        let begun = Instant::now();
        let written = write();
        self.wrote(begun.elapsed(), || before.is_some_and(|before| times_waited() > before));
        written
    }

    fn wrote(&self, took: Duration, waited: impl FnOnce() -> bool) {
        if took <= STALL {
            self.watched.set(self.watched.get().saturating_sub(1));
            self.waited.set(self.waited.get().saturating_sub(FORGIVEN));
            return;
        }
        self.watched.set(WATCHED_WRITES);
        if waited() {
            self.waited.set(self.waited.get() + took);
        }
        if self.waited.get() > WAITED_MAX {
            self.waited.set(Duration::ZERO);
            self.detours.set(DETOURS);
        }
    }
}

/// How often this thread gave its processor up because it had to wait, which is not so where another one took it.
fn times_waited() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills the structure, which is all zeroes where it fails; both are valid.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nvcsw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_micros(3);
    const SLOW: Duration = Duration::from_millis(4);
    const THROTTLED: Duration = Duration::from_millis(20);

    fn writes(pace: &Pace, took: Duration, waited: bool, count: u32) {
        for _ in 0..count {
            assert!(!pace.takes_a_detour());
            pace.wrote(took, || waited);
        }
    }

    #[test]
    fn a_wait_now_and_then_changes_nothing() {
        let pace = Pace::default();
        for _ in 0..100 {
            writes(&pace, SLOW, true, 1);
            writes(&pace, QUICK, true, 8);
        }
    }

    #[test]
    fn too_much_waiting_sends_the_next_ones_to_the_queue_and_then_it_is_tried_again() {
        let pace = Pace::default();
        for (took, count) in [(THROTTLED, 1), (SLOW, 3)] {
            writes(&pace, QUICK, false, 1);
            writes(&pace, took, true, count);
            assert!((0..DETOURS).all(|_| pace.takes_a_detour()));
        }
        writes(&pace, QUICK, false, 1);
    }

    #[test]
    fn who_only_had_to_give_way_goes_on_writing() {
        writes(&Pace::default(), THROTTLED, false, 100);
    }

    #[test]
    fn waiting_is_found_in_the_second_write_that_stalls() {
        let pace = Pace::default();
        let stall = || pace.timed(|| std::thread::sleep(THROTTLED));
        stall();
        assert!(!pace.takes_a_detour(), "it may have given way");
        stall();
        assert!(pace.takes_a_detour());
    }
}
