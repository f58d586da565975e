//! How long a thread runs before the scheduler turns to another.
//!
//! A thread that answers requests needs the processor for moments, and at once; beside threads that compute, it waits for
//! their turn to end, for some milliseconds where processors are few. Since Linux 6.12 a thread of the usual policy may ask
//! for short turns: it then goes before those with longer ones, and gets no more time altogether.

use std::io;

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
}
