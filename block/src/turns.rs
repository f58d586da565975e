//! How long a thread runs before the scheduler turns to another.
//!
//! A thread that answers requests needs the processor for moments, and at once; beside threads that compute, it waits for
//! their turn to end, for some milliseconds where processors are few. Since Linux 6.12 a thread of the usual policy may ask
//! for short turns: it then goes before those with longer ones, and gets no more time altogether.

use std::io;
use std::time::{Duration, Instant};

/// A turn of a thread that answers requests, in nanoseconds: the shortest that Linux grants.
const SHORT: u64 = 100_000;

/// Asks for short turns for the calling thread, and for those that it will start. Before Linux 6.12 it changes nothing;
/// neither does it where the thread has another policy than the usual one.
///
/// # Errors
/// What the operating system says.
pub fn short_turns() -> io::Result<()> {
    let mut attributes = attributes()?;
    if attributes.sched_policy != libc::SCHED_OTHER as u32 {
        return Ok(());
    }
    attributes.sched_runtime = SHORT;
    // SAFETY: the kernel reads as many bytes as `size` says, which are those of `attributes`.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A giving way that takes this long was not to somebody who needs a moment: it took a whole turn.
const TURN: Duration = Duration::from_micros(2500);
/// As many of those one after the other mean that somebody computes there.
const TURNS: u32 = 3;
/// For how long a thread then keeps its processor, at first and at most.
const KEEP: Duration = Duration::from_millis(16);
const LONGEST_KEEP: Duration = Duration::from_millis(512);

/// How a thread that computes makes way for those that need the processor for a moment.
///
/// Who gives way forgoes the rest of its turn. Beside others that compute all the time it would get next to nothing: where
/// giving way takes a whole turn several times in a row, it is left out for a while, which grows as long as that goes on.
#[derive(Debug, Default)]
pub struct GiveWay {
    /// How often in a row it took a whole turn.
    turns: u32,
    /// Not before this.
    next: Option<Instant>,
}

impl GiveWay {
    /// Lets others run, unless they are known to compute themselves. Meant to be called about every 0.1 ms of work.
    pub fn now(&mut self) {
        let before = Instant::now();
        if self.next.is_some_and(|next| before < next) {
            return;
        }
        std::thread::yield_now();
        let after = Instant::now();
        self.took(after, after - before);
    }

    /// Giving way took this long, until `now`.
    fn took(&mut self, now: Instant, time: Duration) {
        if time < TURN {
            *self = Self::default();
            return;
        }
        self.turns += 1;
        self.next = self.turns.checked_sub(TURNS).map(|more| {
            let keep = KEEP.saturating_mul(1_u32.checked_shl(more).unwrap_or(u32::MAX));
            now + keep.min(LONGEST_KEEP)
        });
    }
}

/// The scheduling attributes of the calling thread.
fn attributes() -> io::Result<libc::sched_attr> {
    // SAFETY: it consists of numbers alone.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>();
    // SAFETY: the kernel writes `size` bytes at most, which are those of `attributes`.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if got == 0 { Ok(attributes) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_become_short_and_nothing_else_changes() {
        let before = attributes().unwrap();
        short_turns().unwrap();
        let after = attributes().unwrap();
        assert_eq!((before.sched_policy, before.sched_nice), (after.sched_policy, after.sched_nice));
        // A kernel that knows no turns says nothing of them.
        assert!(after.sched_runtime == SHORT || before.sched_runtime == 0, "{}", after.sched_runtime);
    }

    #[test]
    fn beside_others_that_compute_a_thread_keeps_its_processor_longer_and_longer() {
        let mut way = GiveWay::default();
        let begin = Instant::now();
        let keeps: Vec<_> = (0..40)
            .map(|_| {
                way.took(begin, TURN);
                way.next.map(|next| (next - begin).as_millis())
            })
            .collect();
        assert_eq!(keeps[..6], [None, None, Some(16), Some(32), Some(64), Some(128)]);
        assert_eq!(keeps[39], Some(512));
        way.took(begin, Duration::from_micros(80));
        assert_eq!(way.next, None, "nobody computes there any more");
        way.took(begin, TURN);
        assert_eq!(way.next, None, "one long turn says nothing");
    }

    #[test]
    fn while_it_keeps_its_processor_it_does_not_give_way() {
        let mut way = GiveWay { turns: 9, next: Some(Instant::now() + Duration::from_secs(3600)) };
        way.now();
        assert_eq!(way.turns, 9, "a giving way would have been counted");
        way.next = None;
        way.now();
        assert!(way.turns == 0 || way.turns == 10, "{}", way.turns);
    }
}
