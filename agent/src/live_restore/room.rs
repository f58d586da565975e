//! Whether there is room on a target for what guests write.
//!
//! A session knows only whether its own fills found room. A disk that is home has none, and a file system that is full then is
//! met by guests alone: their failed requests are counted by the server, and looked at here.

use std::path::Path;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long a write that failed tells of a lack of room.
const LATELY: Duration = Duration::from_secs(60);
/// A file system with less is full: a guest's write may be as large.
const LEAST_ROOM_BYTES: u64 = 1 << 20;

/// What is known of the room on one target. Moments are given.
#[derive(Debug, Default)]
pub(super) struct Room {
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    failed: u64,
    last: Option<Instant>,
    /// That it began was not told yet.
    is_news: bool,
}

/// What to say of a target without room, and what to do.
pub(super) fn advice(target: &Path) -> String {
    format!(
        "there is no room for what the guest writes on {}: make room there; where QEMU paused the guest for it, `cont` in QEMU's \
         monitor lets it go on",
        target.display()
    )
}

impl Room {
    /// So many of a guest's writes have failed until `now` because there was no room.
    pub(super) fn look(&self, failed: u64, now: Instant) {
        let mut seen = self.seen.lock();
        if failed == seen.failed {
            return;
        }
        seen.failed = failed;
        let before = seen.last.replace(now);
        seen.is_news |= before.is_none_or(|before| now.duration_since(before) >= LATELY);
    }

    /// Whether it began to lack, for the first time in a while; true once.
    pub(super) fn take_news(&self) -> bool {
        std::mem::take(&mut self.seen.lock().is_news)
    }

    /// Whether it lacks: a write failed lately, or one did once and there is none on the target's file system now.
    pub(super) fn is_lacking(&self, target: &Path, now: Instant) -> bool {
        let last = self.seen.lock().last;
        // Where none has failed the file system is not asked: it may be one that does not answer.
        last.is_some_and(|last| now.duration_since(last) < LATELY || is_full(target))
    }
}

fn is_full(target: &Path) -> bool {
    if !target.is_file() {
        return false;
    }
    rustix::fs::statvfs(target).is_ok_and(|system| {
        let blocks = if rustix::process::geteuid().is_root() { system.f_bfree } else { system.f_bavail };
        blocks.saturating_mul(system.f_frsize) < LEAST_ROOM_BYTES
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_room_is_told_once_and_anew_when_it_had_passed() {
        let target = tempfile::NamedTempFile::new().unwrap();
        let room = Room::default();
        let begun = Instant::now();
        let look = |failed, now| {
            room.look(failed, now);
            room.take_news()
        };
        assert!(!look(0, begun) && !room.is_lacking(target.path(), begun));
        assert!(look(1, begun), "the first");
        assert!(!look(1, begun) && !look(7, begun + LATELY / 2), "it is known");
        assert!(room.is_lacking(target.path(), begun + LATELY), "after the last that failed");
        let later = begun + 2 * LATELY;
        assert!(!room.is_lacking(target.path(), later), "there is room on it again");
        assert!(look(8, later));
    }
}
