//! Which session is that of a target that was copied or moved as a whole (`--moved`), where sessions are kept below a state
//! directory.
//!
//! Such a target has another name than its session's record, and mostly another path, so nothing finds its session. Where nothing
//! does, it is the only one below that directory that can be: of a disk that fits, and nobody else's.
//!
//! # Nobody else's
//! A session that an agent serves is that agent's. One whose recorded target is still there is that target's, unless its directory is a
//! copy: `place.json` names the directory that it was written in (its inode and time of birth, and its path), and a copy is another at
//! another path. Each start brings it up to date, after the record and before anything is served: so a record and a place that do
//! not fit together only ever tell of a copy that has a target of its own already. A session without that file is not known to be a copy.
//!
//! Two starts, for two copies of a target, may find one directory. Both lock it until the record names the target ([`lock`]), and
//! whoever comes second finds a record that has changed, and fails.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::advice::shell_line;
use super::control;
use super::identity::{TargetIdentity, name_of_directory};
use super::record::SessionRecord;
use super::state_dir::{DEFAULT_STATE_ROOT, Sought, StateDir, sessions_below};
use crate::cli::Failure;
use crate::output::human_size;

pub(super) const FILE: &str = "place.json";
const VERSION: u32 = 1;

/// Where a session was served last.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    version: u32,
    session: String,
    /// What its directory was, by whatever name.
    directory: String,
    /// Its path: another directory at the same one stands in for it, as after a backup was restored.
    path: PathBuf,
}

impl StateDir {
    /// Where the session of `target` is kept, as [`StateDir::of`] has it; where there is none, and the target was `moved`, the
    /// session below the state directory that can be its own. That of a device which had this device's path is its own where no
    /// other can be: paths of devices are given out anew by each host.
    ///
    /// # Errors
    /// As there; where none of the sessions that are there can be, or several.
    pub(crate) fn of_moved(target: &Path, state_root: Option<&Path>, moved: bool) -> anyhow::Result<Self> {
        let state = Self::of(target, state_root)?;
        if !moved {
            return Ok(state);
        }
        let Some(sought) = state.sought.clone() else { return Ok(state) };
        let is_file = std::fs::metadata(&sought.target).is_ok_and(|metadata| metadata.is_file());
        let record = state.record().ok().flatten().filter(SessionRecord::was_begun);
        if is_file && (record.is_some() || sought.root.is_none()) {
            return Ok(state);
        }
        let Some(identity) = TargetIdentity::at(&sought.target)? else { return Ok(state) };
        if record.as_ref().is_some_and(|record| identity.name.is_some() && identity.is_same(&record.identity))
        {
            return Ok(state);
        }
        let by_path = record.and_then(|_| state.path().canonicalize().ok());
        let chosen = choose(&sought, &identity, by_path.as_deref())?;
        Ok(chosen.map_or(state, |path| Self::at(path).sought_as(sought)))
    }

    /// Notes which directory the session is served from.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn keep_place(&self, record: &SessionRecord) -> anyhow::Result<()> {
        let Some(directory) = name_of_directory(self.path()) else { return Ok(()) };
        let path = std::fs::canonicalize(self.path()).unwrap_or_else(|_| self.path().to_owned());
        let place = Place { version: VERSION, session: record.session.clone(), directory, path };
        if self.place().as_ref() == Some(&place) {
            return Ok(());
        }
        let kept = self.replace(FILE, &place).and_then(|()| File::open(self.path())?.sync_all());
        kept.with_context(|| format!("cannot write {}", self.file(FILE).display()))
    }

    fn place(&self) -> Option<Place> {
        let place: Place = serde_json::from_slice(&std::fs::read(self.file(FILE)).ok()?).ok()?;
        (place.version == VERSION).then_some(place)
    }

    /// Where the session was served from, if this directory is known to be a copy of that one.
    pub(super) fn original(&self, record: &SessionRecord) -> Option<PathBuf> {
        let place = self.place().filter(|place| place.session == record.session)?;
        let is_here = std::fs::canonicalize(self.path()).is_ok_and(|path| path == place.path);
        let is_copy = !is_here && Some(place.directory) != name_of_directory(self.path());
        is_copy.then_some(place.path)
    }

    /// Why this session cannot be that of another target, called `identity`.
    fn hindrance(&self, record: &SessionRecord, identity: &TargetIdentity) -> Option<String> {
        if identity.size < record.size {
            return Some(format!("is of a disk of {} bytes", record.size));
        }
        if record.handed_over {
            return Some("was handed over to a machine that runs from its target".to_owned());
        }
        match control::ask_status(self.path()) {
            Ok(None) => {}
            Ok(Some(by)) => {
                return Some(format!(
                    "is served by the process {}, to {}",
                    by.pid.unwrap_or_default(),
                    by.target.display()
                ));
            }
            Err(error) => return Some(format!("has an agent that does not answer ({error:#})")),
        }
        let is_there = record.identity.is_at(&record.target) == Some(true);
        (is_there && self.original(record).is_none())
            .then(|| format!("is that of {}, which is still there", record.target.display()))
    }
}

/// The only session below the state directory that can be that of this target; `None` where there is none at all. The one in
/// the directory `by_path`, whose target had the same path, can be, whatever became of it.
fn choose(
    sought: &Sought,
    identity: &TargetIdentity,
    by_path: Option<&Path>,
) -> anyhow::Result<Option<PathBuf>> {
    let root = sought.root.as_deref().unwrap_or(Path::new(DEFAULT_STATE_ROOT));
    let sessions = sessions_below(root);
    if sessions.is_empty() {
        return Ok(None);
    }
    let target = sought.target.display();
    let (mut fitting, mut others) = (Vec::new(), Vec::new());
    for (path, record) in &sessions {
        let is_by_path = by_path.is_some() && path.canonicalize().ok().as_deref() == by_path;
        let hindrance = || StateDir::at(path.clone()).hindrance(record, identity);
        match if is_by_path { None } else { hindrance() } {
            None => fitting.push((path, record)),
            Some(why) => others.push(format!("{} {why}", path.display())),
        }
    }
    // A disk may have been copied to a larger device: but not where another one fits as it is, and no path speaks for either.
    if by_path.is_none() && fitting.iter().any(|(_, record)| record.size == identity.size) {
        fitting.retain(|(_, record)| record.size == identity.size);
    }
    match fitting.as_slice() {
        [(path, _)] => Ok(Some((*path).clone())),
        [] if sessions.iter().all(|(_, record)| identity.size < record.size) => {
            let least = sessions.iter().map(|(_, record)| record.size).min().unwrap_or_default();
            Err(Failure::new(
                format!(
                    "no session below {} can be that of {target} ({} bytes), which is too small: {}",
                    root.display(),
                    identity.size,
                    others.join("; ")
                ),
                format!("copy the disk to a target of at least {least} bytes, and name that"),
            )
            .into())
        }
        [] => {
            let copy = PathBuf::from(format!("{}-copy", root.display()));
            let words = |words: &[&Path]| {
                let words = words.iter().map(|word| word.display().to_string());
                words.collect::<Vec<_>>()
            };
            let mut like = sessions.iter().filter(|(_, record)| record.size == identity.size);
            let dir = match (like.next(), like.next()) {
                (Some((dir, _)), None) => dir.as_path(),
                _ => Path::new("DIRECTORY"),
            };
            let copying = shell_line(&words(&[Path::new("cp"), Path::new("-a"), dir, &copy]));
            Err(Failure::new(
                format!(
                    "no session below {} can be that of {target} ({} bytes): {}",
                    root.display(),
                    identity.size,
                    others.join("; ")
                ),
                format!(
                    "copy the directory of its session as well, while no agent serves that, and name the copy with --state: like \
                     `{copying}`, then `{}`",
                    shell_line(&words(&[Path::new("--state"), &copy]))
                ),
            )
            .into())
        }
        several => {
            let tell = |(path, record): &(&PathBuf, &SessionRecord)| {
                format!(
                    "{} ({} of {}/{}, which was restored to {})",
                    path.display(),
                    human_size(record.size),
                    record.snapshot,
                    record.disk,
                    record.target.display()
                )
            };
            Err(Failure::new(
                format!(
                    "several sessions below {} can be that of {target}: {}",
                    root.display(),
                    several.iter().map(tell).collect::<Vec<_>>().join("; ")
                ),
                "name the directory of the one that was copied with it, in a command for this target alone: `--state DIRECTORY`; which one \
                 that is only whoever copied it knows, and what a wrong one lacks of the guest's writes is restored over",
            )
            .into())
        }
    }
}

/// Keeps other starts from taking the session in `state` for that of another target, for as long as what is returned lives.
///
/// # Errors
/// Where another start has it.
pub(super) fn lock(state: &StateDir) -> anyhow::Result<File> {
    let path = state.path();
    let dir = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    match dir.try_lock() {
        Err(TryLockError::WouldBlock) => Err(taken(state)),
        // Where directories cannot be locked, one start at a time is up to whoever starts them.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(dir),
    }
}

/// Fails where the session has another target than it was `found` with.
pub(super) fn check_not_taken(
    state: &StateDir,
    found: &SessionRecord,
    record: &SessionRecord,
) -> anyhow::Result<()> {
    if record.target == found.target && record.identity == found.identity {
        return Ok(());
    }
    Err(taken(state))
}

fn taken(state: &StateDir) -> anyhow::Error {
    Failure::new(
        format!("the session in {} was taken by another live-restore just now", state.path().display()),
        "each copy of a target goes on with a copy of that directory of its own",
    )
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_restore::record::tests::record;

    const SIZE: u64 = 1 << 20;

    struct Scratch(tempfile::TempDir);

    impl Scratch {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn target(&self, name: &str, size: u64) -> PathBuf {
            let path = self.path(name);
            File::create(&path).unwrap().set_len(size).unwrap();
            path.canonicalize().unwrap()
        }

        /// A session of a target that is there, parked.
        fn session(&self, state: &str, target: &str, size: u64) -> (PathBuf, SessionRecord) {
            let target = self.target(target, size);
            let identity = TargetIdentity::at(&target).unwrap().unwrap();
            let state = StateDir::of(&target, Some(&self.path(state))).unwrap();
            let record = SessionRecord { target, identity, size, ..record() };
            state.create().unwrap();
            state.keep(&record).unwrap();
            state.keep_place(&record).unwrap();
            (state.path().to_owned(), record)
        }

        fn copy(&self, from: &str, to: &str) {
            let mut cp = std::process::Command::new("cp");
            assert!(cp.arg("-a").arg(self.path(from)).arg(self.path(to)).status().unwrap().success());
        }

        fn found(&self, target: &Path, state: &str) -> anyhow::Result<PathBuf> {
            StateDir::of_moved(target, Some(&self.path(state)), true).map(|state| state.path().to_owned())
        }

        #[track_caller]
        fn refused(&self, target: &Path, state: &str, words: &[&str]) {
            let (what, advice) = crate::cli::told(&self.found(target, state).unwrap_err());
            let said = format!("{what}\n{}", advice.unwrap());
            assert!(words.iter().all(|word| said.contains(word)), "it lacks one of {words:?}: {said}");
        }
    }

    #[test]
    fn the_only_copied_session_that_fits_is_that_of_a_copied_target() {
        let scratch = Scratch::new();
        let (dir, _) = scratch.session("st", "t.raw", SIZE);
        let copy = scratch.target("u.raw", SIZE);
        let in_copy = scratch.path("st2").join(dir.file_name().unwrap());
        scratch.copy("st", "st2");
        assert_eq!(scratch.found(&copy, "st2").unwrap(), in_copy);
        // Not without being told so.
        let untold = StateDir::of_moved(&copy, Some(&scratch.path("st2")), false).unwrap();
        assert_eq!(untold.record().unwrap(), None);
        // The session's own directory may be named.
        let name = format!("st2/{}", dir.file_name().unwrap().to_str().unwrap());
        assert_eq!(scratch.found(&copy, &name).unwrap(), in_copy);
        let found = StateDir::of(&scratch.path("t.raw"), Some(&in_copy)).unwrap();
        assert_eq!(found.path(), in_copy, "by its identity");
        // Nothing at all is there.
        let nothing = StateDir::of_moved(&copy, Some(&scratch.path("nowhere")), true).unwrap();
        assert_eq!(nothing.record().unwrap(), None);
    }

    #[test]
    fn a_session_is_not_taken_from_a_target_that_is_still_there() {
        let scratch = Scratch::new();
        let (dir, record) = scratch.session("st", "t.raw", SIZE);
        let copy = scratch.target("u.raw", SIZE);
        let command = format!("`cp -a {} {}-copy`", dir.display(), scratch.path("st").display());
        scratch.refused(&copy, "st", &["t.raw, which is still there", &command]);
        // A copy that stands in for it.
        scratch.copy("st", "again");
        std::fs::remove_dir_all(scratch.path("st")).unwrap();
        std::fs::rename(scratch.path("again"), scratch.path("st")).unwrap();
        scratch.refused(&copy, "st", &["t.raw, which is still there"]);
        StateDir::at(dir.clone()).keep_place(&record).unwrap();
        std::fs::rename(scratch.path("st"), scratch.path("renamed")).unwrap();
        scratch.refused(&copy, "renamed", &["t.raw, which is still there"]);
        // It has a copy that goes on with it, and another copy is none of its business.
        scratch.copy("renamed", "st2");
        let taken = scratch.found(&copy, "st2").unwrap();
        let state = StateDir::at(taken.clone());
        let identity = TargetIdentity::at(&copy).unwrap().unwrap();
        let theirs = SessionRecord { target: copy.clone(), identity, ..record.clone() };
        state.keep(&theirs).unwrap();
        assert_eq!(scratch.found(&copy, "st2").unwrap(), taken, "cut short before the place was noted");
        state.keep_place(&theirs).unwrap();
        assert_eq!(scratch.found(&copy, "st2").unwrap(), taken);
        scratch.refused(&scratch.target("v.raw", SIZE), "st2", &["u.raw, which is still there"]);
        assert!(check_not_taken(&state, &record, &theirs).is_err());
        check_not_taken(&state, &theirs, &theirs).unwrap();
        // Nothing tells that it is a copy.
        scratch.copy("renamed", "st3");
        std::fs::remove_file(scratch.path("st3").join(dir.file_name().unwrap()).join(FILE)).unwrap();
        scratch.refused(&scratch.path("v.raw"), "st3", &["t.raw, which is still there"]);
        // The target was moved, and the session stayed where it was.
        std::fs::remove_file(scratch.path("t.raw")).unwrap();
        let stayed = scratch.path("renamed").join(dir.file_name().unwrap());
        assert_eq!(scratch.found(&scratch.path("v.raw"), "renamed").unwrap(), stayed);
    }

    #[test]
    fn one_of_several_sessions_is_chosen_by_its_size_or_named() {
        let scratch = Scratch::new();
        let (a, _) = scratch.session("st", "a.raw", SIZE);
        let (b, _) = scratch.session("st", "b.raw", 2 * SIZE);
        let (c, _) = scratch.session("st", "c.raw", 2 * SIZE);
        scratch.copy("st", "st2");
        let copy_of = |dir: &Path| scratch.path("st2").join(dir.file_name().unwrap());
        assert_eq!(scratch.found(&scratch.target("u.raw", SIZE), "st2").unwrap(), copy_of(&a));
        let two = scratch.target("v.raw", 2 * SIZE);
        let (b, c) = (copy_of(&b), copy_of(&c));
        let words = ["several sessions", b.to_str().unwrap(), c.to_str().unwrap(), "b.raw", "--state"];
        scratch.refused(&two, "st2", &words);
        // None is as good as another: a command with any would be run as it stands.
        scratch.refused(&two, "st2", &["`--state DIRECTORY`"]);
        assert_eq!(scratch.found(&two, c.to_str().unwrap()).unwrap(), c);
        let small = scratch.target("w.raw", SIZE / 2);
        scratch.refused(&small, "st2", &["of a disk of 1048576 bytes", "at least 1048576 bytes"]);
        assert!(!format!("{:#}", scratch.found(&small, "st2").unwrap_err()).contains("cp -a"));
        // A larger one fits any of them.
        scratch.refused(&scratch.target("x.raw", 3 * SIZE), "st2", &["several sessions"]);
    }

    #[test]
    fn two_starts_do_not_take_one_session() {
        let scratch = Scratch::new();
        let (dir, _) = scratch.session("st", "t.raw", SIZE);
        let state = StateDir::at(dir);
        let first = lock(&state).unwrap();
        assert!(lock(&state).unwrap_err().to_string().contains("was taken"));
        drop(first);
        lock(&state).unwrap();
    }
}
