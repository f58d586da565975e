//! Where a session keeps its memory: a directory beside a file target (`TARGET.lifeboot/`), or below
//! the state directory for a block device, which has no "beside".
//!
//! | file | what | written |
//! |---|---|---|
//! | `session.json` | what the session is: snapshot, disk, target | once, before anything else; replaced never |
//! | `journal` | which blocks are known on stable storage | see `agent::live` |
//! | `live` | the live file, for a restart on the same boot | see `agent::live` |
//! | `damaged.json` | what could not be brought home | while there is such, by the agent that finds it |
//! | `status.sock` | answers `lifeboot status` while an agent runs | by each agent |

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::cli::Failure;

/// Where sessions of block devices are kept if nobody says otherwise.
pub const DEFAULT_STATE_ROOT: &str = "/var/lib/lifeboot";

const RECORD: &str = "session.json";
const VERSION: u32 = 1;

/// What a session is, in words that a person can read with `cat`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionRecord {
    /// The version of this record.
    pub version: u32,
    /// The session's id: 32 hexadecimal digits.
    pub session: String,
    /// The snapshot's full name, `group@time`.
    pub snapshot: String,
    /// The disk's name within the snapshot.
    pub disk: String,
    /// The disk's size in bytes.
    pub size: u64,
    /// The disk's chunk size in bytes.
    pub chunk_size: u32,
    /// The root of the disk's map, as text: what the snapshot's name stood for when the session began.
    pub map: String,
    /// The target, as an absolute path.
    pub target: PathBuf,
}

impl SessionRecord {
    /// A record of this version.
    #[must_use]
    pub const fn version() -> u32 {
        VERSION
    }
}

/// The directory of one session.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Where the session of `target` is kept, whether or not there is one.
    ///
    /// # Errors
    /// Where the target's path cannot be made absolute, or is a directory.
    pub fn of(target: &Path, state_root: Option<&Path>) -> anyhow::Result<Self> {
        let absolute = absolute(target)?;
        let metadata = std::fs::metadata(&absolute).ok();
        if metadata.as_ref().is_some_and(std::fs::Metadata::is_dir) {
            return Err(Failure::new(
                format!("the target {} is a directory", target.display()),
                "name a file, or a block device",
            )
            .into());
        }
        let device = metadata.filter(|metadata| metadata.file_type().is_block_device());
        let path = match (device, state_root) {
            (None, None) => {
                let mut name = absolute.into_os_string();
                name.push(".lifeboot");
                PathBuf::from(name)
            }
            (device, root) => {
                let root = root.unwrap_or(Path::new(DEFAULT_STATE_ROOT));
                let name =
                    absolute.file_name().unwrap_or(absolute.as_os_str()).to_string_lossy().into_owned();
                match device {
                    // The same device has many names; its number is one.
                    Some(device) => {
                        let number = device.rdev();
                        root.join(format!("dev-{}-{}", rustix::fs::major(number), rustix::fs::minor(number)))
                    }
                    None => root.join(format!(
                        "{name}-{:08x}",
                        crc32fast::hash(absolute.as_os_str().as_encoded_bytes())
                    )),
                }
            }
        };
        Ok(Self { path })
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
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let path = self.file(RECORD);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let damaged = |error: serde_json::Error| {
            Failure::new(
                format!("{} is damaged", path.display()),
                format!(
                    "the target may hold what a guest wrote: keep it; to give the session up, remove {} and restore anew",
                    self.path.display()
                ),
            )
            .because(error)
        };
        let version: Version = serde_json::from_slice(&text).map_err(damaged)?;
        if version.version > VERSION {
            return Err(Failure::new(
                format!("{} was written by a newer version of lifeboot", path.display()),
                "use that version, or a newer one",
            )
            .into());
        }
        Ok(Some(serde_json::from_slice(&text).map_err(damaged)?))
    }

    /// Makes the directory, for the owner alone. One that is there is taken.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn create(&self) -> anyhow::Result<()> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .with_context(|| format!("cannot make the session's directory {}", self.path.display()))
    }

    /// Keeps the record: it is there whole, or not at all.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn keep(&self, record: &SessionRecord) -> anyhow::Result<()> {
        let path = self.file(RECORD);
        let temporary = self.file("session.json.new");
        let write = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            let mut text = serde_json::to_vec_pretty(record).map_err(io::Error::other)?;
            text.push(b'\n');
            file.write_all(&text)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)?;
            File::open(&self.path)?.sync_all()?;
            if let Some(parent) = self.path.parent() {
                File::open(parent)?.sync_all()?;
            }
            Ok(())
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }
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

    fn record() -> SessionRecord {
        SessionRecord {
            version: VERSION,
            session: "00".repeat(16),
            snapshot: "web01@2026-11-21T00:33:12Z".into(),
            disk: "disk0".into(),
            size: 1 << 30,
            chunk_size: 1 << 17,
            map: "none".into(),
            target: "/x/t.raw".into(),
        }
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
