//! Whether a target was written to past us since its session was parked: `parked.json`.
//!
//! When a session is parked, and everything is on stable storage, the target's size, inode, and times of modification and change
//! are written down. As long as they are the same, nobody has written to the file, and `G` names all that differs from
//! the backup: then the first backup after the restore need not read the whole disk. Where the file is missing, older, or cannot be
//! understood, the whole disk is read.
//!
//! Where they are not the same, somebody has, such as a machine that was started from its disk once that was home. A session that is
//! saved or gone on with then counts all that is home as written by the guest: `G` alone would leave that machine's writes out of
//! every later backup. So does one that is wholly home and of which no stamp tells: its agent was killed since, it was moved, or it
//! is on a block device.
//!
//! # Order, and why
//! A start counts itself in `session.json` (`starts`) before anything is served, and the stamp carries that count. Parking syncs
//! the target, then writes the checkpoint that says so, and then the stamp. The target's own times are synced before they are read: a
//! power cut does not set them back.
//!
//! | a kill or a power cut | journal | stamp | a target that differs from it was |
//! |---|---|---|---|
//! | while nobody serves | parked | of the last start | written to past us |
//! | before a further start has counted itself | parked, or not | of the last start | written to past us: that start served nobody, and what it found of such writes is in `G` before it says that it is not parked |
//! | while it is served, or before the checkpoint | not parked | of an earlier start, or none | served: it says nothing |
//! | between the checkpoint and the stamp | parked | of an earlier start, or none | served: it says nothing |
//!
//! So only a stamp of the last start tells of somebody else's writes. That an earlier one is in the way is no reason to take it away
//! at each start: a target that is still as it says was written to by nobody since, us included.
//!
//! Times are as fine as the kernel's clock ticks. A write in the tick of our own last one would leave them as they are, so
//! that tick is waited out before they are read. A block device has no such times.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, StatxFlags, StatxTimestamp};
use serde::{Deserialize, Serialize};

use super::record::SessionRecord;
use super::state_dir::StateDir;
use crate::live::{Resumed, WrittenPast};

pub(super) const FILE: &str = "parked.json";
const VERSION: u32 = 2;
/// Longer than a tick of any kernel's clock.
const TICK: Duration = Duration::from_millis(20);

/// What a file that nobody writes to keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stamp {
    size: u64,
    inode: u64,
    /// Seconds and nanoseconds since 1970.
    modified: (i64, u32),
    changed: (i64, u32),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parked {
    version: u32,
    session: String,
    /// How many starts the session had had.
    starts: u64,
    target: Stamp,
}

impl Stamp {
    /// Of what is open; `None` for what has no such times.
    fn of(file: impl AsFd) -> io::Result<Option<Self>> {
        let flags = StatxFlags::BASIC_STATS;
        let statx = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, flags)?;
        if FileType::from_raw_mode(statx.stx_mode.into()) != FileType::RegularFile {
            return Ok(None);
        }
        let time = |time: StatxTimestamp| (time.tv_sec, time.tv_nsec);
        Ok(Some(Self {
            size: statx.stx_size,
            inode: statx.stx_ino,
            modified: time(statx.stx_mtime),
            changed: time(statx.stx_ctime),
        }))
    }

    /// How long ago the file was changed, as far as the clock tells.
    fn age(&self) -> Duration {
        let (seconds, nanoseconds) = self.modified.max(self.changed);
        let at = UNIX_EPOCH + Duration::new(u64::try_from(seconds).unwrap_or(0), nanoseconds);
        SystemTime::now().duration_since(at).unwrap_or_default()
    }
}

/// Writes down what the target of a session is like that was parked just now, its lock still held.
pub(super) fn keep(state: &StateDir, record: &SessionRecord) {
    let kept = (|| -> io::Result<()> {
        let target = std::fs::File::open(&record.target)?;
        target.sync_all()?;
        let Some(mut stamp) = Stamp::of(&target)? else { return Ok(()) };
        // The clock may have been set back: then this waits once, and the stamp is of no less use.
        let age = stamp.age();
        if age < TICK {
            std::thread::sleep(TICK.saturating_sub(age));
            stamp = Stamp::of(&target)?.unwrap_or(stamp);
        }
        let parked = Parked {
            version: VERSION,
            session: record.session.clone(),
            starts: record.starts,
            target: stamp,
        };
        state.replace(FILE, &parked)?;
        std::fs::File::open(state.path())?.sync_all()
    })();
    if let Err(error) = kept {
        tracing::warn!(%error, path = %state.file(FILE).display(), "the next backup will read the whole disk: cannot write");
    }
}

/// Why it is not known that nobody has written to the target since its session was parked; `None` where that is known.
pub(crate) fn changed_since_parked(
    state: &StateDir,
    record: &SessionRecord,
    target: &Path,
) -> Option<String> {
    let now = match std::fs::File::open(target).and_then(|file| Stamp::of(&file)) {
        Ok(Some(now)) => now,
        Ok(None) => return Some("a block device does not tell whether it was written to since".to_owned()),
        Err(error) => return Some(format!("the target cannot be looked at: {error}")),
    };
    let unknown = "there is no record of how it was when it was parked";
    let Some(parked) = parked(state, record) else { return Some(unknown.to_owned()) };
    let then = &parked.target;
    if now == *then {
        return None;
    }
    if !parked.is_of_last_start(record) {
        return Some(unknown.to_owned());
    }
    Some(if now.inode != then.inode {
        "it is another file than the one that was parked".to_owned()
    } else if now.size != then.size {
        format!("its size went from {} to {} bytes since it was parked", then.size, now.size)
    } else {
        "it was written to, or its owner or mode were changed, since it was parked".to_owned()
    })
}

/// What the stamp tells of writes past the session to the target, which may have been `moved`.
pub(super) fn written_past(
    state: &StateDir,
    record: &SessionRecord,
    target: &Path,
    moved: bool,
) -> WrittenPast {
    Look::at(state, record, target, moved).written_past(record)
}

/// How a target was before it was opened for writing, which changes it.
pub(super) struct Look {
    now: Option<Stamp>,
    parked: Option<Parked>,
    /// It may be a copy, or have been moved: then a stamp that it does not have is another file's.
    moved: bool,
}

impl Look {
    pub(super) fn at(state: &StateDir, record: &SessionRecord, target: &Path, moved: bool) -> Self {
        let now = std::fs::File::open(target).and_then(|file| Stamp::of(&file));
        Self { now: now.ok().flatten(), parked: parked(state, record), moved }
    }

    /// As [`written_past`], under the target's lock, with the record as it is there. Whoever served it until then has parked it
    /// meanwhile, and knows what was written.
    pub(super) fn under_lock(&self, state: &StateDir, record: &SessionRecord) -> WrittenPast {
        if self.moved || self.parked == parked(state, record) {
            self.written_past(record)
        } else {
            WrittenPast::No
        }
    }

    fn written_past(&self, record: &SessionRecord) -> WrittenPast {
        match (&self.now, &self.parked) {
            (Some(now), Some(parked)) if *now == parked.target => WrittenPast::No,
            (Some(_), Some(parked)) if parked.is_of_last_start(record) && !self.moved => WrittenPast::Yes,
            _ => WrittenPast::Unknown,
        }
    }
}

/// Tells of a session that goes on what follows from writes past it.
pub(super) fn tell(target: &Path, written_past: WrittenPast, ended: Resumed, is_whole: bool) {
    let target = target.display();
    match written_past {
        WrittenPast::No => {}
        WrittenPast::Yes if ended == Resumed::Parked && !is_whole => tracing::warn!(
            "{target} was written to, renamed, or given another owner or mode since its session was parked: what was written where \
             nothing was home yet is lost, what is home counts as written by the guest"
        ),
        WrittenPast::Yes | WrittenPast::Unknown if is_whole => tracing::warn!(
            "a machine may have written to {target} since its session was served last: all of it counts as written by the guest, and is \
             read by the next backup"
        ),
        WrittenPast::Yes | WrittenPast::Unknown => {}
    }
}

impl Parked {
    /// Whether nobody served the session since, so that any difference is somebody else's.
    const fn is_of_last_start(&self, record: &SessionRecord) -> bool {
        self.starts == record.starts
    }
}

/// How the target was when this session was parked last, as far as that was written down.
fn parked(state: &StateDir, record: &SessionRecord) -> Option<Parked> {
    let text = std::fs::read(state.file(FILE)).ok()?;
    let parked: Parked = serde_json::from_slice(&text).ok()?;
    (parked.version == VERSION && parked.session == record.session).then_some(parked)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::live_restore::record::tests::record;

    #[test]
    fn a_target_is_known_to_be_unchanged_until_somebody_writes_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.raw");
        std::fs::write(&path, [1; 8192]).unwrap();
        let state = StateDir::of(&path, None).unwrap();
        state.create().unwrap();
        let record = SessionRecord { target: path.clone(), ..record() };
        let changed = || changed_since_parked(&state, &record, &path);
        assert!(changed().unwrap().contains("no record"));
        let file = File::options().read(true).write(true).open(&path).unwrap();
        for _ in 0..20 {
            file.write_all_at(&[2; 100], 0).unwrap();
            keep(&state, &record);
            assert_eq!(changed(), None);
            // At once: in the same tick, were that not waited out.
            file.write_all_at(&[3; 100], 0).unwrap();
            assert!(changed().unwrap().contains("written to"));
        }
        keep(&state, &record);
        file.set_len(100).unwrap();
        assert!(changed().unwrap().contains("size"));
        std::fs::copy(&path, dir.path().join("copy")).unwrap();
        keep(&state, &record);
        std::fs::rename(dir.path().join("copy"), &path).unwrap();
        assert!(changed().unwrap().contains("another file"));
        let other = SessionRecord { session: "11".repeat(16), ..record };
        assert!(changed_since_parked(&state, &other, &path).unwrap().contains("no record"));
    }

    #[test]
    fn only_the_stamp_of_the_last_start_tells_of_somebody_elses_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.raw");
        std::fs::write(&path, [1; 8192]).unwrap();
        let state = StateDir::of(&path, None).unwrap();
        state.create().unwrap();
        let first = SessionRecord { target: path.clone(), starts: 1, ..record() };
        let write = || File::options().write(true).open(&path).unwrap().write_all_at(&[2; 100], 0).unwrap();
        let look = |record: &SessionRecord| {
            let look = Look::at(&state, record, &path, false);
            assert_eq!(look.under_lock(&state, record), written_past(&state, record, &path, false));
            look.under_lock(&state, record)
        };
        assert_eq!(look(&first), WrittenPast::Unknown, "killed before it was ever parked");
        keep(&state, &first);
        assert_eq!(look(&first), WrittenPast::No);
        let second = SessionRecord { starts: 2, ..first.clone() };
        assert_eq!(look(&second), WrittenPast::No, "killed before anything was written");
        write();
        assert_eq!(look(&first), WrittenPast::Yes, "nobody has served it since");
        assert_eq!(look(&second), WrittenPast::Unknown, "killed while it was served, or before the stamp");
        assert!(changed_since_parked(&state, &second, &path).unwrap().contains("no record"));
        keep(&state, &second);
        assert_eq!(look(&second), WrittenPast::No);
        write();
        assert_eq!(look(&second), WrittenPast::Yes);
        // Somebody served and parked it while its lock was waited for.
        let early = Look::at(&state, &second, &path, false);
        let third = SessionRecord { starts: 3, ..second };
        keep(&state, &third);
        assert_eq!(early.under_lock(&state, &third), WrittenPast::No);
        // Somebody served it meanwhile, and was killed.
        write();
        let early = Look::at(&state, &third, &path, false);
        let fourth = SessionRecord { starts: 4, ..third };
        assert_eq!(early.under_lock(&state, &fourth), WrittenPast::Unknown);
    }

    #[test]
    fn of_a_target_that_may_have_been_moved_only_the_same_stamp_tells() {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("t.raw"), dir.path().join("u.raw"));
        std::fs::write(&path, [1; 8192]).unwrap();
        let state = StateDir::of(&path, None).unwrap();
        state.create().unwrap();
        let record = SessionRecord { target: path.clone(), starts: 1, ..record() };
        let look = |path: &Path| {
            let look = Look::at(&state, &record, path, true);
            assert_eq!(look.under_lock(&state, &record), written_past(&state, &record, path, true));
            look.under_lock(&state, &record)
        };
        keep(&state, &record);
        assert_eq!(look(&path), WrittenPast::No, "it stayed where it was");
        let mut cp = std::process::Command::new("cp");
        assert!(cp.arg("-a").arg(&path).arg(&copy).status().unwrap().success());
        assert_eq!(look(&copy), WrittenPast::Unknown);
        let early = Look::at(&state, &record, &copy, true);
        File::options().write(true).open(&path).unwrap().write_all_at(&[2; 100], 0).unwrap();
        assert_eq!(look(&path), WrittenPast::Unknown, "written to: by whom is not known");
        keep(&state, &SessionRecord { starts: 2, ..record.clone() });
        assert_eq!(early.under_lock(&state, &record), WrittenPast::Unknown, "that was the original's");
    }
}
