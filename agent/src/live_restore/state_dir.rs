//! Where a session keeps its memory: a directory beside a file target (`TARGET.lifeboot/`), or below
//! the state directory for a block device, which has no "beside".
//!
//! Below a state directory a session is found by what its target is (its [`TargetIdentity`]), whatever its path or
//! number is today; and where none has that identity, by the target's path, so that whoever names a path that leads
//! elsewhere now is told so. The directory's own name only keeps them apart.
//!
//! | file | what | written |
//! |---|---|---|
//! | `session.json` | what the session is: snapshot, disk, target | before anything else, and by each start when it is ready |
//! | `journal` | which blocks are known on stable storage | see `agent::live` |
//! | `live` | the live file, for a restart on the same boot | see `agent::live` |
//! | `damaged.json` | what could not be brought home | while there is such, by the agent that finds it |
//! | `place.json` | which directory this is, so that a copy is known | by each start that finds another |
//! | `lease.json` | where the repository was told that the snapshot is needed | while it is needed |
//! | `move.json` | whether the machine of a session that is marked as handed over was moved | by each move, before and after it; removed with the mark |
//! | `machine.json` | where the sockets are of the machine that `boot` runs on it | by each `boot`, until its QEMU has ended |
//! | `control.sock` | answers `lifeboot status` and other verbs while an agent runs | by each agent |

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

use super::identity::TargetIdentity;
use super::record::{RecordError, SessionRecord};
use crate::cli::Failure;

/// Where sessions of block devices are kept if nobody says otherwise.
pub const DEFAULT_STATE_ROOT: &str = "/var/lib/lifeboot";

pub(super) const RECORD: &str = "session.json";
pub(super) const JOURNAL: &str = "journal";
pub(super) const LIVE_FILE: &str = "live";
/// The longest part of a target's identity that a directory is named by.
const LABEL_CHARS: usize = 40;

/// The directory of one session.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// As what it was looked for; `None` where it was not.
    pub(super) sought: Option<Sought>,
}

/// What somebody must name so that a session is found.
#[derive(Clone, Debug)]
pub(super) struct Sought {
    /// The target's absolute path.
    pub(super) target: PathBuf,
    /// The absolute path of the state directory, if one was named.
    pub(super) root: Option<PathBuf>,
}

impl StateDir {
    /// Where the session of `target` is kept, whether or not there is one.
    ///
    /// # Errors
    /// Where the target's path cannot be made absolute, or is a directory.
    pub fn of(target: &Path, state_root: Option<&Path>) -> anyhow::Result<Self> {
        let absolute = absolute(target)?;
        let root = state_root.map(|root| std::path::absolute(root).unwrap_or_else(|_| root.to_owned()));
        let sought = Sought { target: absolute.clone(), root: root.clone() };
        let metadata = std::fs::metadata(&absolute).ok();
        if metadata.as_ref().is_some_and(std::fs::Metadata::is_dir) {
            return Err(Failure::new(
                format!("the target {} is a directory", target.display()),
                "name a file, or a block device",
            )
            .into());
        }
        let device = metadata.filter(|metadata| metadata.file_type().is_block_device());
        let is_file = device.is_none();
        let path = match (device, root.as_deref()) {
            (None, None) => return Ok(Self::beside_any_name(&absolute)?.sought_as(sought)),
            (device, root) => {
                let root = root.unwrap_or(Path::new(DEFAULT_STATE_ROOT));
                let name =
                    absolute.file_name().unwrap_or(absolute.as_os_str()).to_string_lossy().into_owned();
                let identity = TargetIdentity::at(&absolute)
                    .with_context(|| format!("cannot look at the target {}", target.display()))?;
                let name = match (&device, identity.as_ref().and_then(|identity| identity.name.as_ref())) {
                    (Some(_), Some(identity)) => {
                        format!("dev-{}-{:08x}", label(identity), crc32fast::hash(identity.as_bytes()))
                    }
                    (Some(device), None) => {
                        let number = device.rdev();
                        format!("dev-{}-{}", rustix::fs::major(number), rustix::fs::minor(number))
                    }
                    (None, _) => {
                        format!("{name}-{:08x}", crc32fast::hash(absolute.as_os_str().as_encoded_bytes()))
                    }
                };
                find(root, &absolute, identity.as_ref(), &name)
            }
        };
        let state = Self::at(path).sought_as(sought);
        if is_file && !state.is_begun() {
            // What stands beside the target is not to be passed over because another place was named.
            let beside = Self::beside_any_name(&absolute)
                .ok()
                .filter(|beside| beside.path != state.path && beside.is_begun());
            if let Some(beside) = beside {
                return Err(Failure::new(
                    format!(
                        "the live-restore of {} is kept in {}",
                        absolute.display(),
                        beside.path.display()
                    ),
                    format!(
                        "leave --state out; or give that session up first: `{}`",
                        beside.command("discard", &absolute)
                    ),
                )
                .into());
            }
        }
        Ok(state)
    }

    pub(super) fn is_begun(&self) -> bool {
        self.record().ok().flatten().is_some_and(|record| record.was_begun())
    }

    pub(super) const fn at(path: PathBuf) -> Self {
        Self { path, sought: None }
    }

    pub(super) fn sought_as(self, sought: Sought) -> Self {
        self.with_sought(Some(sought))
    }

    pub(super) fn with_sought(self, sought: Option<Sought>) -> Self {
        Self { sought, ..self }
    }

    /// Where the session of `target` is kept, as [`Self::of`] has it; where there is none, the session whose own directory was named.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn of_target_or_named(target: &Path, state_root: Option<&Path>) -> anyhow::Result<Self> {
        let state = Self::of(target, state_root)?;
        let named = state.sought.as_ref().and_then(|sought| sought.root.clone()).map(Self::at);
        match named.filter(|named| !state.is_begun() && named.is_begun()) {
            Some(named) => Ok(named.with_sought(state.sought)),
            None => Ok(state),
        }
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file of the session.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The session that is kept here, if there is one.
    ///
    /// # Errors
    /// Where the record cannot be read, or was written by a newer version.
    pub fn record(&self) -> anyhow::Result<Option<SessionRecord>> {
        let path = self.file(RECORD);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                // It is written before the journal is.
                if self.file(JOURNAL).exists() {
                    return Err(self.unusable(format!("{} is missing", path.display())).into());
                }
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        match SessionRecord::parse(&text) {
            Ok(record) => Ok(Some(record)),
            Err(error @ RecordError::Newer(_)) => Err(Failure::new(
                format!("{} was written by a newer version of lifeboot", path.display()),
                "use that version, or a newer one",
            )
            .because(error)
            .into()),
            Err(RecordError::Damaged(error)) => {
                Err(self.unusable(format!("{} is damaged", path.display())).because(error).into())
            }
        }
    }

    /// Makes the directory, for the owner alone. One that is there is taken.
    ///
    /// Returns the directories that were made, the outermost first.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn create(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut missing: Vec<PathBuf> =
            self.path.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
        missing.reverse();
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path);
        if made.is_err() {
            remove_dirs(&missing);
        }
        made.with_context(|| format!("cannot make the session's directory {}", self.path.display()))?;
        Ok(missing)
    }

    /// Keeps the record: it is there whole, or not at all.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn keep(&self, record: &SessionRecord) -> anyhow::Result<()> {
        let write = || -> io::Result<()> {
            self.replace(RECORD, record)?;
            File::open(&self.path)?.sync_all()?;
            if let Some(parent) = self.path.parent() {
                File::open(parent)?.sync_all()?;
            }
            Ok(())
        };
        write().with_context(|| format!("cannot write {}", self.file(RECORD).display()))
    }

    /// Replaces a file by `value` as JSON: whoever reads it finds the old one or the new one, whole. That the new one
    /// has taken the name is not on stable storage yet.
    pub(super) fn replace(&self, name: &str, value: &impl Serialize) -> io::Result<()> {
        replace(&self.file(name), value)
    }

    /// Where the next contents of a file are written.
    pub(super) fn temporary(&self, name: &str) -> PathBuf {
        temporary(&self.file(name))
    }
}

/// Replaces the file at `path` by `value` as JSON, as [`StateDir::replace`] does.
pub(crate) fn replace(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let temporary = temporary(path);
    let mut text = serde_json::to_vec_pretty(value).map_err(io::Error::other)?;
    text.push(b'\n');
    let mut file = File::create(&temporary)?;
    file.write_all(&text)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

/// Where the next contents of the file at `path` are written.
pub(super) fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// Removes those of these directories that are empty, the innermost first.
pub(super) fn remove_dirs(dirs: &[PathBuf]) {
    for dir in dirs.iter().rev() {
        // One that holds something is not ours alone.
        let _ = std::fs::remove_dir(dir);
    }
}

/// The directory below `root`, or `root` itself, of the session whose target this is; else of one that was begun under its path; else
/// a free one, called `name`.
fn find(root: &Path, target: &Path, identity: Option<&TargetIdentity>, name: &str) -> PathBuf {
    let sessions = sessions_below(root);
    let is_same = |record: &SessionRecord| {
        identity.is_some_and(|identity| identity.name.is_some() && identity.is_same(&record.identity))
    };
    let by_identity = sessions.iter().find(|(_, record)| is_same(record));
    if let Some((path, _)) =
        by_identity.or_else(|| sessions.iter().find(|(_, record)| record.target == target))
    {
        return path.clone();
    }
    let names = std::iter::once(name.to_owned()).chain((2_u64..).map(|number| format!("{name}-{number}")));
    let mut dirs = names.map(|name| root.join(name));
    dirs.find(|dir| sessions.iter().all(|(path, _)| path != dir)).expect("the numbers do not end")
}

/// The sessions that were begun of a state directory, which may be a session's own, with their directories.
pub(super) fn sessions_below(root: &Path) -> Vec<(PathBuf, SessionRecord)> {
    let begun = |path: PathBuf| {
        let record = StateDir::at(path.clone()).record().ok().flatten();
        record.filter(SessionRecord::was_begun).map(|record| (path, record))
    };
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut sessions: Vec<_> = std::iter::once(root.to_owned()).chain(entries).filter_map(begun).collect();
    sessions.sort_by(|(a, _), (b, _)| a.cmp(b));
    sessions
}

/// The end of an identity, as part of a file's name.
fn label(identity: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._".contains(c);
    let plain: String = identity.chars().map(|c| if is_plain(c) { c } else { '-' }).collect();
    plain[plain.len().saturating_sub(LABEL_CHARS)..].trim_start_matches(['-', '.']).to_owned()
}

/// An absolute path whose last part need not exist yet.
///
/// # Errors
/// Where the directory it would lie in does not exist.
pub fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    if let Ok(path) = path.canonicalize() {
        return Ok(path);
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let parent = parent
        .canonicalize()
        .with_context(|| format!("cannot use the directory {} of the target", parent.display()))?;
    Ok(parent.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_restore::record::tests::record;

    fn keep(root: &Path, name: &str, record: &SessionRecord) -> PathBuf {
        let state = StateDir::at(root.join(name));
        state.create().unwrap();
        state.keep(record).unwrap();
        state.path
    }

    #[test]
    fn a_session_is_found_by_its_targets_identity_and_else_by_its_path() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let identity = |name: &str| TargetIdentity { name: Some(name.into()), size: 1 };
        let of = |name: &str, path: &str| SessionRecord {
            identity: identity(name),
            target: path.into(),
            ..record()
        };
        let sdb = keep(root, "one", &of("disk b", "/dev/sdb"));
        let sdc = keep(root, "two", &of("disk c", "/dev/sdc"));
        let found = |name: &str, path: &str| find(root, Path::new(path), Some(&identity(name)), "new");
        // They have changed places.
        assert_eq!(found("disk b", "/dev/sdc"), sdb);
        assert_eq!(found("disk c", "/dev/sdb"), sdc);
        assert_eq!(found("disk d", "/dev/sdb"), sdb, "whose session says that it is another disk");
        assert_eq!(found("disk d", "/dev/sdd"), root.join("new"));
        let nameless = TargetIdentity { name: None, size: 1 };
        assert_eq!(find(root, Path::new("/dev/sdc"), Some(&nameless), "new"), sdc);
        assert_eq!(find(root, Path::new("/dev/sde"), None, "one"), root.join("one-2"), "that is another's");
        // What was never served holds no path.
        keep(root, "three", &SessionRecord { boot: None, ..of("disk e", "/dev/sde") });
        assert_eq!(found("disk f", "/dev/sde"), root.join("new"));
        assert_eq!(find(&root.join("nowhere"), Path::new("/dev/sde"), None, "new"), root.join("nowhere/new"));
    }

    #[test]
    fn a_label_is_the_end_of_an_identity_in_plain_letters() {
        assert_eq!(label("loop device on /x/d 1.img"), "loop-device-on--x-d-1.img");
        assert_eq!(label(&format!("disk {}", "é".repeat(60))).len(), 0);
    }

    #[test]
    fn a_journal_without_a_record_and_a_record_that_does_not_tell_whether_it_was_served_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::of(&dir.path().join("t.raw"), None).unwrap();
        state.create().unwrap();
        state.keep(&SessionRecord { boot: None, ..record() }).unwrap();
        assert!(!state.record().unwrap().unwrap().was_begun());
        let text = std::fs::read_to_string(state.file(RECORD)).unwrap();
        assert!(text.contains(",\n  \"boot\": null"), "{text}");
        std::fs::write(state.file(RECORD), text.replace(",\n  \"boot\": null", "")).unwrap();
        assert!(state.record().unwrap_err().to_string().contains("damaged"));
        std::fs::remove_file(state.file(RECORD)).unwrap();
        assert_eq!(state.record().unwrap(), None);
        std::fs::write(state.file(JOURNAL), "x").unwrap();
        assert!(state.record().unwrap_err().to_string().contains("session.json is missing"));
    }

    #[test]
    fn a_record_comes_back_as_it_was_kept() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::of(&dir.path().join("t.raw"), None).unwrap();
        assert!(state.path().ends_with("t.raw.lifeboot"));
        assert_eq!(state.record().unwrap(), None);
        state.create().unwrap();
        state.keep(&record()).unwrap();
        assert_eq!(state.record().unwrap(), Some(record()));
    }

    #[test]
    fn damaged_and_newer_records_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::of(&dir.path().join("t.raw"), None).unwrap();
        state.create().unwrap();
        for (text, says) in [("{", "damaged"), ("{\"version\": 9, \"more\": 1}", "newer version")] {
            std::fs::write(state.file(RECORD), text).unwrap();
            assert!(state.record().unwrap_err().to_string().contains(says));
        }
    }

    #[test]
    fn a_state_root_keeps_targets_of_one_name_apart() {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["a", "b"] {
            std::fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let root = Some(dir.path());
        let a = StateDir::of(&dir.path().join("a/t.raw"), root).unwrap();
        let b = StateDir::of(&dir.path().join("b/t.raw"), root).unwrap();
        assert_ne!(a.path(), b.path());
        assert!(StateDir::of(dir.path(), None).unwrap_err().to_string().contains("is a directory"));
    }
}
