//! Beside a file whose session is kept elsewhere (`--state DIR`): `TARGET.lifeboot` is a file that says where.
//!
//! A target that is not wholly home is no disk. Whoever finds no session beside it would take it for one: so whoever looks
//! there finds this file, in the place where the session would be. It is there before anything of the target is changed, and
//! goes when the agent ends that has brought all of the disk home, or the session is given up. Until then who asks about the target, or
//! captures it, finds its agent. A block device has no "beside".

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::identity::TargetIdentity;
use super::record::SessionRecord;
use super::state_dir::{self, StateDir};
use crate::cli::Failure;

const VERSION: u32 = 1;
/// A longer one is none of ours.
const MAX_BYTES: u64 = 16 << 10;

/// Where a session is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pointer {
    version: u32,
    /// The session's id.
    pub(super) session: String,
    /// Its directory, as an absolute path.
    pub(super) state: PathBuf,
}

/// Where a target's session is if not elsewhere, and the file that says where else.
pub(super) fn beside(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".lifeboot");
    PathBuf::from(name)
}

/// What stands beside a target; `None` where there is no such file.
///
/// # Errors
/// Where it cannot be read, or is not understood.
pub(super) fn read(target: &Path) -> anyhow::Result<Option<Pointer>> {
    let path = beside(target);
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
    }
    let mut text = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut text));
    read.with_context(|| format!("cannot read {}", path.display()))?;
    let pointer: Option<Pointer> = serde_json::from_slice(&text).ok();
    match pointer.filter(|pointer| pointer.version == VERSION && pointer.state.is_absolute()) {
        Some(pointer) => Ok(Some(pointer)),
        None => Err(Failure::new(
            format!(
                "{} should say where the live-restore of {} is kept, and is not understood",
                path.display(),
                target.display()
            ),
            "name that place with --state; a file that has nothing to do with it must have another name",
        )
        .into()),
    }
}

/// Says beside the target of `record` that its session is kept in `state`: on stable storage when it returns. Returns the file
/// that says so.
///
/// # Errors
/// What the operating system says, and where something else has that name.
pub(super) fn keep(record: &SessionRecord, state: &Path) -> anyhow::Result<PathBuf> {
    let path = beside(&record.target);
    let pointer = Pointer { version: VERSION, session: record.session.clone(), state: state.to_owned() };
    if read(&record.target).is_ok_and(|there| there.as_ref() == Some(&pointer)) {
        return Ok(path);
    }
    let write = || -> io::Result<()> {
        // A directory that an earlier session has left, with nothing in it.
        let _ = std::fs::remove_dir(&path);
        state_dir::replace(&path, &pointer).inspect_err(|_| {
            let _ = std::fs::remove_file(state_dir::temporary(&path));
        })?;
        sync_parent(&path)
    };
    write().map_err(|error| {
        Failure::new(
            format!("cannot say in {} where the session of {} is kept", path.display(), record.target.display()),
            "let it be written there, and remove what has that name; whoever takes the target for a disk looks there",
        )
        .because(error)
    })?;
    Ok(path)
}

/// Removes what was said of this session, if it was.
///
/// # Errors
/// What the operating system says.
pub(super) fn remove(target: &Path, session: &str) -> anyhow::Result<()> {
    remove_if(target, |pointer| pointer.session == session)
}

/// Removes what was said of the session in `state`, if it was.
///
/// # Errors
/// What the operating system says.
pub(super) fn remove_to(target: &Path, state: &Path) -> anyhow::Result<()> {
    let is_same =
        |path: &Path| matches!((path.canonicalize(), state.canonicalize()), (Ok(a), Ok(b)) if a == b);
    remove_if(target, |pointer| is_same(&pointer.state))
}

fn remove_if(target: &Path, is_of_it: impl Fn(&Pointer) -> bool) -> anyhow::Result<()> {
    if !read(target).ok().flatten().is_some_and(|pointer| is_of_it(&pointer)) {
        return Ok(());
    }
    let path = beside(target);
    std::fs::remove_file(&path)
        .and_then(|()| sync_parent(&path))
        .with_context(|| format!("cannot remove {}", path.display()))
}

/// Whether the file at `target` is another than the session's, and that one is where it was.
fn is_copied(target: &Path, record: &SessionRecord) -> bool {
    let identity = &record.identity;
    record.was_begun()
        && identity.is_at(target) == Some(false)
        && identity.is_at(&record.target) == Some(true)
}

impl StateDir {
    /// Of a file whose session is beside it, or where a file beside it says; or, where nothing is, beside another name that the file has in
    /// its directory, or had: it may have been renamed without its session.
    pub(super) fn beside_any_name(target: &Path) -> anyhow::Result<Self> {
        let state = Self::beside(target)?;
        if state.path().exists() {
            return Ok(state);
        }
        Ok(Self::of_other_name(target).unwrap_or(state))
    }

    /// Of a file whose session is beside it, or where a file beside it says.
    pub(super) fn beside(target: &Path) -> anyhow::Result<Self> {
        if let Some(Pointer { session, state, .. }) = read(target)? {
            let state = Self::at(state);
            if state.is_without(&session) {
                return Err(Failure::new(
                    format!(
                        "{} is the target of a live-restore that is kept in {}, and is not there",
                        target.display(),
                        state.path().display()
                    ),
                    format!(
                        "put it back (is its file system mounted?); if that session was given up, `{}` removes {}, which only says \
                         where it was",
                        state.command("discard", target),
                        beside(target).display()
                    ),
                )
                .into());
            }
            if let Ok(Some(record)) = state.record()
                && is_copied(target, &record)
            {
                return Err(Failure::new(
                    format!(
                        "{} is a copy of {}, and no session's target: the live-restore that is kept in {} is that one's",
                        target.display(),
                        record.target.display(),
                        state.path().display()
                    ),
                    format!(
                        "name {}; a copy goes on by itself only with a copy of that directory; what says where it is, {}, was copied \
                         along: remove it together with the copy",
                        record.target.display(),
                        beside(target).display()
                    ),
                )
                .into());
            }
            return Ok(state);
        }
        Ok(Self::at(beside(target)))
    }

    /// Whether this session is not kept here. One that is damaged is told of by whoever looks.
    fn is_without(&self, session: &str) -> bool {
        self.record().ok().is_some_and(|record| record.is_none_or(|record| record.session != session))
    }

    /// Of a file that has several names in its directory, or had another one, beside that.
    fn of_other_name(target: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(target).ok().filter(std::fs::Metadata::is_file)?;
        // The number of a file that was removed is given out anew.
        if metadata.nlink() == 1 && metadata.created().is_err() {
            return None;
        }
        let identity = TargetIdentity::at(target).ok().flatten()?;
        let entries = std::fs::read_dir(target.parent()?).ok()?.flatten();
        let mut names: Vec<PathBuf> = entries
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "lifeboot"))
            .map(|path| path.with_extension(""))
            .collect();
        names.sort();
        let states = names.into_iter().filter_map(|name| Self::beside(&name).ok());
        let is_same = |record: &SessionRecord| record.was_begun() && identity.is_same(&record.identity);
        states.into_iter().find(|state| state.record().ok().flatten().is_some_and(|record| is_same(&record)))
    }

    /// Says beside the target of `record` that its session is kept here, where that is elsewhere. Returns the file that says
    /// so.
    ///
    /// # Errors
    /// As [`keep`].
    pub(super) fn keep_pointer(&self, record: &SessionRecord) -> anyhow::Result<Option<PathBuf>> {
        let is_file = std::fs::metadata(&record.target).is_ok_and(|metadata| metadata.is_file());
        if !is_file || self.path() == beside(&record.target) {
            return Ok(None);
        }
        keep(record, &self.absolute_path()?).map(Some)
    }

    fn absolute_path(&self) -> anyhow::Result<PathBuf> {
        self.path().canonicalize().with_context(|| format!("cannot find {}", self.path().display()))
    }
}

/// What says beside a target where a session is kept that is not there.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LeftBehind {
    target: PathBuf,
    pointer: Pointer,
}

impl LeftBehind {
    /// Beside this target, if it is.
    ///
    /// # Errors
    /// As [`read`].
    pub(crate) fn find(target: &Path) -> anyhow::Result<Option<Self>> {
        let pointer = read(target)?.filter(|pointer| {
            let state = StateDir::at(pointer.state.clone());
            state.is_without(&pointer.session)
        });
        Ok(pointer.map(|pointer| Self { target: target.to_owned(), pointer }))
    }

    /// The file that says so.
    pub(crate) fn path(&self) -> PathBuf {
        beside(&self.target)
    }

    /// The session's id.
    pub(crate) fn session(&self) -> &str {
        &self.pointer.session
    }

    /// Where the session should be.
    pub(crate) fn state(&self) -> StateDir {
        StateDir::at(self.pointer.state.clone())
    }

    /// Removes it, unless it says something else by now, or what it says is true again.
    ///
    /// # Errors
    /// What the operating system says. Returns whether it was removed.
    pub(crate) fn remove(&self) -> anyhow::Result<bool> {
        if Self::find(&self.target)?.as_ref() != Some(self) {
            return Ok(false);
        }
        remove_if(&self.target, |pointer| *pointer == self.pointer)?;
        Ok(true)
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_restore::record::tests::record;

    /// A target with a session in a state directory.
    fn session(dir: &Path) -> (PathBuf, PathBuf, SessionRecord, StateDir) {
        let target = dir.join("t.raw");
        std::fs::write(&target, "part of a disk").unwrap();
        let root = dir.join("state");
        let state = StateDir::of(&target, Some(&root)).unwrap();
        state.create().unwrap();
        let record = SessionRecord { target: target.clone(), ..record() };
        state.keep(&record).unwrap();
        (target, root, record, state)
    }

    #[test]
    fn a_session_that_is_kept_elsewhere_is_found_from_beside_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let (target, root, record, state) = session(dir.path());
        assert_eq!(StateDir::of(&target, None).unwrap().record().unwrap(), None);
        std::fs::create_dir(beside(&target)).unwrap();
        keep(&record, state.path()).unwrap();
        keep(&record, state.path()).unwrap();
        let found = StateDir::of(&target, None).unwrap();
        assert_eq!(found.path(), state.path());
        assert_eq!(found.record().unwrap(), Some(record.clone()));
        assert_eq!(StateDir::of(&target, Some(&root)).unwrap().path(), state.path());
        // Another place than that where it is.
        let refused = StateDir::of(&target, Some(&dir.path().join("other"))).unwrap_err().to_string();
        assert!(refused.contains(state.path().to_str().unwrap()), "{refused}");
        remove(&target, "another's").unwrap();
        assert!(beside(&target).exists());
        state.discard(Some(&record)).unwrap();
        assert!(!beside(&target).exists() && !state.path().exists());
        assert_eq!(StateDir::of(&target, None).unwrap().record().unwrap(), None);
    }

    #[test]
    fn only_what_speaks_of_the_session_that_is_given_up_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (target, root, record, state) = session(dir.path());
        let identity = TargetIdentity::at(&target).unwrap().unwrap();
        let record = SessionRecord { identity, ..record };
        state.keep(&record).unwrap();
        keep(&record, state.path()).unwrap();
        // A copy of the state directory has a session of the same id.
        let copied = dir.path().join("copied");
        let copy = StateDir::at(copied.join(state.path().file_name().unwrap()));
        copy.create().unwrap();
        copy.keep(&record).unwrap();
        let found = StateDir::of(&target, Some(&copied)).unwrap();
        assert_eq!(found.path(), copy.path());
        found.discard(Some(&record)).unwrap();
        assert!(beside(&target).exists() && !copy.path().exists());
        // The target was renamed, with what stands beside it.
        let renamed = dir.path().join("renamed.raw");
        std::fs::rename(&target, &renamed).unwrap();
        std::fs::rename(beside(&target), beside(&renamed)).unwrap();
        let found = StateDir::of(&renamed, Some(&root)).unwrap();
        found.discard(Some(&record)).unwrap();
        assert!(!beside(&renamed).exists() && !state.path().exists());
    }

    #[test]
    fn a_session_that_is_not_where_it_is_said_to_be_is_not_taken_for_none() {
        let dir = tempfile::tempdir().unwrap();
        let (target, _, record, state) = session(dir.path());
        keep(&record, state.path()).unwrap();
        std::fs::rename(dir.path().join("state"), dir.path().join("unmounted")).unwrap();
        let refused = StateDir::of(&target, None).unwrap_err().to_string();
        assert!(refused.contains("is not there"), "{refused}");
        let left = LeftBehind::find(&target).unwrap().unwrap();
        assert_eq!(left.session(), record.session);
        std::fs::rename(dir.path().join("unmounted"), dir.path().join("state")).unwrap();
        assert!(!left.remove().unwrap() && beside(&target).exists(), "it is there again");
        assert_eq!(LeftBehind::find(&target).unwrap(), None);
        std::fs::rename(dir.path().join("state"), dir.path().join("unmounted")).unwrap();
        assert!(left.remove().unwrap() && !beside(&target).exists());
        assert_eq!(StateDir::of(&target, None).unwrap().record().unwrap(), None);
        std::fs::write(beside(&target), "a shopping list").unwrap();
        let refused = StateDir::of(&target, None).unwrap_err().to_string();
        assert!(refused.contains("is not understood"), "{refused}");
    }

    #[test]
    fn a_session_is_found_by_a_hard_link_beside_its_target_and_by_a_new_name() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("t.raw");
        std::fs::write(&target, "part of a disk").unwrap();
        let identity = TargetIdentity::at(&target).unwrap().unwrap();
        let state = StateDir::of(&target, None).unwrap();
        state.create().unwrap();
        state.keep(&SessionRecord { target: target.clone(), identity, ..record() }).unwrap();
        let link = dir.path().join("other-name.img");
        std::fs::hard_link(&target, &link).unwrap();
        assert_eq!(StateDir::of(&link, None).unwrap().path(), state.path());
        let refused = StateDir::of(&link, Some(&dir.path().join("st"))).unwrap_err().to_string();
        assert!(refused.contains(state.path().to_str().unwrap()), "{refused}");
        std::fs::remove_file(&link).unwrap();
        std::fs::rename(&target, &link).unwrap();
        assert_eq!(StateDir::of(&link, None).unwrap().path(), state.path());
        assert_eq!(StateDir::of(&target, None).unwrap().path(), state.path(), "nothing has the old name");
        std::fs::rename(&link, &target).unwrap();
        let copy = dir.path().join("copy.raw");
        std::fs::copy(&target, &copy).unwrap();
        std::fs::hard_link(&copy, dir.path().join("copy-2.raw")).unwrap();
        assert_eq!(StateDir::of(&copy, None).unwrap().record().unwrap(), None, "that is another file");
    }
}
