//! A copy of a session, on the target of the original.
//!
//! A copy of a session's directory tells what was home when it was made, and what the original has served since it does not know: whoever
//! goes on with it on the same target restores over what the guest wrote since. Which of the two is the newer nobody can tell for certain, as
//! both may have been gone on with. So where the original is there, and that target's, its copies are refused on it. `place.json` tells of the
//! original of a copy, and what stands beside a file which of several directories its session is in.
//!
//! A copy whose original is not there any more, or is that of another target, is the session.

use std::path::{Path, PathBuf};

use super::advice::shell_line;
use super::identity::TargetIdentity;
use super::pointer;
use super::record::SessionRecord;
use super::state_dir::StateDir;
use crate::cli::Failure;

impl StateDir {
    /// Fails where the session here, found for `target`, [stands beside another](Self::stands_beside_another).
    pub(super) fn check_stands_alone(&self, record: &SessionRecord, target: &Path) -> anyhow::Result<()> {
        match self.stands_beside_another(record, target) {
            Some(refused) => Err(refused.into()),
            None => Ok(()),
        }
    }

    /// Why the session here, found for `target`, is not gone on with: another directory has it, and is this target's. `None` where nothing
    /// tells of one.
    pub(super) fn stands_beside_another(&self, record: &SessionRecord, target: &Path) -> Option<Failure> {
        let here = self.path().canonicalize().ok()?;
        Some(refused(&here, &self.original_beside(record, target)?, target))
    }

    /// The other directory that has the session here, and is that of the target that stands at `target`.
    pub(crate) fn original_beside(&self, record: &SessionRecord, target: &Path) -> Option<PathBuf> {
        let identity = TargetIdentity::at(target).ok().flatten()?;
        let here = self.path().canonicalize().ok()?;
        let has_it = |dir: &PathBuf| {
            let there = Self::at(dir.clone()).record().ok().flatten().filter(SessionRecord::was_begun);
            there.is_some_and(|there| there.session == record.session && identity.is_same(&there.identity))
        };
        let beside = Self::beside(target).ok().map(|state| state.path().to_owned());
        let candidates = self.original(record).into_iter().chain(beside);
        let mut others = candidates.filter_map(|dir| dir.canonicalize().ok()).filter(|dir| *dir != here);
        others.find(has_it)
    }
}

/// That the session in `state`, found for `path`, is of a target that is there under the name that its record has: `path` has another
/// one, or none. A copy of that session may be meant for a copy.
pub(crate) fn check_not_anothers(
    state: &StateDir,
    record: &SessionRecord,
    path: &Path,
) -> anyhow::Result<()> {
    let is_its = |path: &Path| record.identity.is_at(path) == Some(true);
    if record.target == path || is_its(path) || !is_its(&record.target) || state.original(record).is_some() {
        return Ok(());
    }
    let (target, dir) = (record.target.display(), state.path().display());
    Err(Failure::new(
        format!("the session in {dir} is that of {target}, which is there, and not of {}", path.display()),
        format!("name {target}"),
    )
    .into())
}

fn refused(here: &Path, other: &Path, target: &Path) -> Failure {
    let is_found = StateDir::beside(target)
        .is_ok_and(|beside| beside.path().canonicalize().is_ok_and(|beside| beside == other));
    let name = |dir: &Path| shell_line(&["--state".to_owned(), dir.display().to_string()]);
    let naming = if pointer::beside(target) == here || !is_found {
        format!("name it instead: `{}`", name(other))
    } else {
        "leave --state out, so that it is used".to_owned()
    };
    let (here, other, target) = (here.display(), other.display(), target.display());
    Failure::new(
        format!(
            "the session in {here} is a copy of the one in {other}, which is still there, and is that of {target}: the copy does not \
             know what was written since it was made, and would restore over it"
        ),
        format!(
            "{naming}; only if the copy is the one that is wanted, and what only the other one knows of may be lost, move {other} \
             away, and run the same command again"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_restore::record::tests::record;

    fn copy(from: &Path, to: &Path) {
        assert!(std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
    }

    /// A target with a session in the state directory `st`, and a copy of that: `st2`.
    fn copied(dir: &Path) -> (PathBuf, StateDir, StateDir, SessionRecord) {
        let target = dir.join("t.raw");
        std::fs::write(&target, "part of a disk").unwrap();
        let target = target.canonicalize().unwrap();
        let state = StateDir::of(&target, Some(&dir.join("st"))).unwrap();
        let identity = TargetIdentity::at(&target).unwrap().unwrap();
        let record = SessionRecord { target: target.clone(), identity, ..record() };
        state.create().unwrap();
        state.keep(&record).unwrap();
        state.keep_place(&record).unwrap();
        copy(&dir.join("st"), &dir.join("st2"));
        let stale = StateDir::of(&target, Some(&dir.join("st2"))).unwrap();
        (target, state, stale, record)
    }

    fn why(state: &StateDir, record: &SessionRecord, target: &Path) -> Option<String> {
        let failure = state.stands_beside_another(record, target)?;
        let (what, advice) = crate::cli::told(&failure.into());
        Some(format!("{what}\n{}", advice.unwrap()))
    }

    #[test]
    fn a_copy_is_refused_on_the_target_of_its_original_as_long_as_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let (target, state, stale, record) = copied(dir.path());
        let said = why(&stale, &record, &target).unwrap();
        let original = state.path().canonicalize().unwrap();
        assert!(said.contains(&format!("--state {}", original.display())), "{said}");
        assert_eq!(why(&state, &record, &target), None, "the original itself");
        // Another target goes on with a copy of its own.
        let other = dir.path().join("u.raw");
        std::fs::copy(&target, &other).unwrap();
        assert_eq!(why(&stale, &record, &other), None);
        // The original was given up, or has become another target's.
        state.keep(&SessionRecord { boot: None, ..record.clone() }).unwrap();
        assert_eq!(why(&stale, &record, &target), None);
        let identity = TargetIdentity::at(&other).unwrap().unwrap();
        state.keep(&SessionRecord { identity, ..record.clone() }).unwrap();
        assert_eq!(why(&stale, &record, &target), None);
        state.keep(&record).unwrap();
        assert!(why(&stale, &record, &target).is_some());
        std::fs::rename(dir.path().join("st"), dir.path().join("away")).unwrap();
        assert_eq!(why(&stale, &record, &target), None);
        let moved = StateDir::of(&target, Some(&dir.path().join("away"))).unwrap();
        assert_eq!(why(&moved, &record, &target), None);
    }

    #[test]
    fn what_stands_beside_a_file_tells_which_of_two_directories_its_session_is_in() {
        let dir = tempfile::tempdir().unwrap();
        let (target, state, stale, record) = copied(dir.path());
        // Nothing tells of either that it is a copy.
        for state in [&state, &stale] {
            std::fs::remove_file(state.file("place.json")).unwrap();
        }
        assert_eq!(why(&stale, &record, &target), None);
        state.keep_pointer(&record).unwrap();
        let said = why(&stale, &record, &target).unwrap();
        assert!(said.contains("leave --state out"), "{said}");
        assert_eq!(why(&state, &record, &target), None);
        std::fs::remove_dir_all(state.path()).unwrap();
        assert_eq!(why(&stale, &record, &target), None);
    }
}
