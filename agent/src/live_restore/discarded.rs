//! Removing a session's files, in an order in which a kill leaves the session as it was or none: see `discard`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::record::SessionRecord;
use super::state_dir::{JOURNAL, LIVE_FILE, RECORD, StateDir};
use super::{control, copied, damage, distrust, lease, moved, pointer, stamp};
use crate::boot::MACHINE_NOTE;

impl StateDir {
    /// Removes the session that is kept here. `record` is what it is, where that can be told. The caller holds the target's
    /// lock, where there is a target.
    ///
    /// # Errors
    /// What the operating system says; the same again goes on.
    pub(crate) fn discard(&self, record: Option<&SessionRecord>) -> anyhow::Result<()> {
        if let Some(record) = record.filter(|record| record.was_begun()) {
            // From here on there is no session.
            self.keep(&SessionRecord { boot: None, ..record.clone() })?;
        }
        // Beside what it was looked for by, which may be a copy, or have been renamed since it was started last.
        let sought = self.sought.as_ref().map(|sought| &sought.target);
        for target in sought.into_iter().chain(record.map(|record| &record.target)) {
            pointer::remove_to(target, self.path())?;
        }
        // While it is known where that is.
        lease::release(self.path());
        let replaced = [damage::FILE, stamp::FILE, moved::FILE, copied::FILE, lease::FILE, MACHINE_NOTE];
        let others = [JOURNAL, LIVE_FILE, control::SOCKET, "status.sock"];
        let names = others.into_iter().chain(replaced);
        let temporary = replaced.into_iter().chain([RECORD]).map(|name| self.temporary(name));
        for path in names.map(|name| self.file(name)).chain(temporary) {
            remove(&path)?;
        }
        // Where the record could not be replaced, it is the journal's end that must not come after the record's.
        let synced = File::open(self.path()).and_then(|dir| dir.sync_all());
        synced.with_context(|| format!("cannot sync {}", self.path().display()))?;
        remove(&self.file(RECORD))?;
        record.into_iter().for_each(distrust::forget);
        self.remove_if_empty();
        if self.path().exists() {
            tracing::warn!(path = %self.path().display(), "the session's directory holds something else, and stays");
        }
        Ok(())
    }

    /// The directories that giving this session up changes, of a target at this path.
    pub(crate) fn changed_by_discard(&self, target: &Path) -> Vec<PathBuf> {
        let beside = pointer::read(target).ok().flatten().and(target.parent());
        std::iter::once(self.path()).chain(beside).map(Path::to_owned).collect()
    }

    /// Removes the session's directory if nothing is in it.
    pub(crate) fn remove_if_empty(&self) {
        if std::fs::remove_dir(self.path()).is_ok()
            && let Some(parent) = self.path().parent()
        {
            // A directory that comes back after a power cut is empty.
            let _ = File::open(parent).and_then(|parent| parent.sync_all());
        }
    }
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_restore::record::tests::record;

    fn session(dir: &Path) -> StateDir {
        let state = StateDir::of(&dir.join("t.raw"), None).unwrap();
        state.create().unwrap();
        state.keep(&record()).unwrap();
        for name in [JOURNAL, LIVE_FILE, damage::FILE, stamp::FILE, moved::FILE, copied::FILE, MACHINE_NOTE] {
            std::fs::write(state.file(name), "x").unwrap();
        }
        // What a kill in the middle of its writing leaves.
        std::fs::write(state.temporary(MACHINE_NOTE), "x").unwrap();
        state
    }

    #[test]
    fn a_discard_that_stops_anywhere_leaves_a_session_or_none_and_the_next_one_finishes() {
        // What is in the way stands for a kill: a directory cannot be removed as a file.
        let files = [JOURNAL, LIVE_FILE, damage::FILE, stamp::FILE, moved::FILE, copied::FILE, MACHINE_NOTE];
        for name in files.into_iter().chain([control::SOCKET]) {
            let dir = tempfile::tempdir().unwrap();
            let state = session(dir.path());
            let _ = std::fs::remove_file(state.file(name));
            std::fs::create_dir(state.file(name)).unwrap();
            assert!(state.discard(Some(&record())).is_err(), "{name}");
            let left = state.record().unwrap().expect("the record goes last");
            assert!(!left.was_begun(), "{name}: there is no session any more");
            std::fs::remove_dir(state.file(name)).unwrap();
            state.discard(Some(&left)).unwrap();
            assert!(!state.path().exists());
        }
    }

    #[test]
    fn of_a_session_that_is_not_understood_the_journal_goes_before_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let state = session(dir.path());
        std::fs::write(state.file(RECORD), "{").unwrap();
        std::fs::remove_file(state.file(LIVE_FILE)).unwrap();
        std::fs::create_dir(state.file(LIVE_FILE)).unwrap();
        assert!(state.discard(None).is_err());
        assert!(state.file(RECORD).exists() && !state.file(JOURNAL).exists());
        std::fs::remove_dir(state.file(LIVE_FILE)).unwrap();
        state.discard(None).unwrap();
        assert!(!state.path().exists());
    }
}
