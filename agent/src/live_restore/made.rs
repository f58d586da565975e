//! What a start has made, and takes back where it fails: the target, if it made that, and the session's files.
//!
//! A target that was there is never removed; one of holes gets the length that it had. What `--force` emptied stays
//! empty. The lock is released last: until then nobody else can have begun to use what is removed.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::copied;
use super::state_dir::{JOURNAL, LIVE_FILE, RECORD, StateDir, remove_dirs};

/// What is to be done to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Undo {
    /// It was made.
    Remove,
    /// It was a file of holes, this many bytes long.
    Shorten(u64),
    /// It stays as it is.
    Nothing,
}

/// Takes back what was made when it is dropped, unless it is kept.
#[derive(Debug)]
pub(super) struct Made {
    path: PathBuf,
    undo: Undo,
    files: Vec<PathBuf>,
    dirs: Vec<PathBuf>,
    is_kept: bool,
    /// Shares the description that holds the lock. Fields go after `drop`.
    target: File,
}

impl Made {
    /// The start that holds the lock of `target`.
    ///
    /// # Errors
    /// Where there are too many open files.
    pub(super) fn new(target: &File, path: &Path, undo: Undo) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            undo,
            files: Vec::new(),
            dirs: Vec::new(),
            is_kept: false,
            target: target.try_clone()?,
        })
    }

    /// Makes the session's directory. What is in it belongs to a start that was cut short.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn create_dir(&mut self, state: &StateDir) -> anyhow::Result<()> {
        self.dirs = state.create()?;
        // Without its record a session is none; the record goes last, so that what is left says that it never began.
        self.files = vec![
            state.file(JOURNAL),
            state.file(LIVE_FILE),
            state.temporary(copied::FILE),
            state.file(copied::FILE),
            state.temporary(RECORD),
            state.file(RECORD),
        ];
        Ok(())
    }

    /// Another file that was made for the session.
    pub(super) fn add(&mut self, file: PathBuf) {
        self.files.insert(0, file);
    }

    /// Nothing is taken back.
    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }

    fn is_still_there(&self) -> io::Result<bool> {
        let (ours, there) = (self.target.metadata()?, std::fs::symlink_metadata(&self.path)?);
        Ok((ours.dev(), ours.ino()) == (there.dev(), there.ino()))
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        // What cannot be removed is found by the next start, which makes it anew.
        for file in &self.files {
            let _ = std::fs::remove_file(file);
        }
        remove_dirs(&self.dirs);
        let undone = match self.undo {
            Undo::Nothing => Ok(()),
            Undo::Shorten(len) => self.target.set_len(len),
            Undo::Remove => match self.is_still_there() {
                Ok(true) => std::fs::remove_file(&self.path),
                _ => Ok(()),
            },
        };
        if let Err(error) = undone {
            tracing::warn!(%error, target = %self.path.display(), "the target that was made could not be taken back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_taken_back_before_the_lock_is_released_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.raw");
        let file = File::create_new(&path).unwrap();
        file.lock().unwrap();
        let state = StateDir::of(&path, Some(&dir.path().join("new/root"))).unwrap();
        let mut made = Made::new(&file, &path, Undo::Remove).unwrap();
        made.create_dir(&state).unwrap();
        std::fs::write(state.file(JOURNAL), "x").unwrap();
        std::fs::write(dir.path().join("new/theirs"), "x").unwrap();
        let other = File::open(&path).unwrap();
        drop(file);
        assert!(other.try_lock().is_err(), "the guard holds the lock too");
        drop(made);
        assert!(other.try_lock().is_ok());
        assert!(!path.exists());
        assert!(!dir.path().join("new/root").exists());
        assert!(dir.path().join("new/theirs").exists());
    }

    #[test]
    fn a_target_that_was_there_or_took_the_place_stays_and_what_is_kept_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.raw");
        let file = File::create_new(&path).unwrap();
        file.set_len(100).unwrap();
        drop(Made::new(&file, &path, Undo::Shorten(7)).unwrap());
        assert_eq!(path.metadata().unwrap().len(), 7);
        drop(Made::new(&file, &path, Undo::Nothing).unwrap());
        Made::new(&file, &path, Undo::Remove).unwrap().keep();
        assert!(path.exists());
        std::fs::rename(&path, dir.path().join("moved")).unwrap();
        std::fs::write(&path, "another's").unwrap();
        drop(Made::new(&file, &path, Undo::Remove).unwrap());
        assert!(path.exists() && dir.path().join("moved").exists());
    }
}
