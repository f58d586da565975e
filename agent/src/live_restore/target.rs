//! The target of a session: found or made, locked, and what is known of it.
//!
//! One open file description carries the lock from the first look at a target until the session's end. A new
//! session's target is *taken* first: looked at, and locked. It is changed only when everything else that the session
//! needs was made ([`Taken::prepare`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use block::{Engine, FileDisk, FileOptions};
use rustix::fs::Access;
use rustix::io::Errno;

use super::made::{Made, Undo};
use super::record::SessionRecord;
use super::state_dir::StateDir;
use super::target_lock::{LOCK_PATIENCE, lock};
use crate::blank;
use crate::cli::{Failure, Interrupt, READ_ONLY_ADVICE};

/// What a new session may assume of its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contents {
    /// It reads as zeroes from its start to its end.
    Zeroes,
    /// Anything.
    Unknown,
}

/// Opens the target of a session that is resumed, and locks it.
pub(super) fn reopen(
    path: &Path,
    state: &Path,
    engine: Engine,
    interrupt: &Interrupt,
) -> anyhow::Result<FileDisk> {
    let disk = FileDisk::open(path, FileOptions::new(engine))?;
    lock(&disk, path, state, LOCK_PATIENCE, interrupt)?;
    check_writable(&disk)?;
    Ok(disk)
}

/// Opens the target of a session as [`reopen`] will, while somebody else has its lock: to be looked at.
pub(super) fn open_to_look(path: &Path, engine: Engine) -> anyhow::Result<FileDisk> {
    let disk = FileDisk::open(path, FileOptions::new(engine))?;
    check_writable(&disk)?;
    Ok(disk)
}

/// Fails where the locked target of a session is shorter than the disk: what stood there is lost, and a file that is only made
/// longer again would be believed where it has zeroes now.
pub(super) fn check_not_cut_off(
    target: &FileDisk,
    state: &StateDir,
    record: &SessionRecord,
) -> anyhow::Result<()> {
    if target.size() >= record.size {
        return Ok(());
    }
    Err(cut_off(target.path(), target.size(), state, record).into())
}

/// Why the target of a session that nobody serves cannot be gone on with, as far as can be seen without opening it.
pub(super) fn trouble(state: &StateDir, record: &SessionRecord) -> Option<Failure> {
    let path = state.target(record);
    match std::fs::metadata(path) {
        Ok(_) if record.identity.is_at(path) == Some(false) => Some(another(path)),
        Ok(there) if there.is_file() && there.len() < record.size => {
            Some(cut_off(path, there.len(), state, record))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some(gone(state, path)),
        _ => None,
    }
}

/// Why neither the target nor the session's files can be written by anybody, where they cannot: which the rest of the disk needs.
pub(super) fn unwritable(state: &StateDir, record: &SessionRecord) -> Option<Failure> {
    let path = state.target(record);
    if is_read_only_device(path) {
        return Some(read_only_device(path));
    }
    [path, state.path()].into_iter().find_map(|path| match rustix::fs::access(path, Access::WRITE_OK) {
        Err(Errno::ROFS) => {
            let what = format!("the file system of {} is read-only", path.display());
            Some(Failure::new(what, READ_ONLY_ADVICE))
        }
        // What only others may write to is EACCES.
        Err(Errno::PERM) => Some(Failure::new(
            format!("nobody may write to {}: it is immutable", path.display()),
            "let it be written to again (`chattr -i`)",
        )),
        _ => None,
    })
}

fn is_read_only_device(path: &Path) -> bool {
    let Some(there) = std::fs::metadata(path).ok().filter(|there| there.file_type().is_block_device()) else {
        return false;
    };
    let (major, minor) = (rustix::fs::major(there.rdev()), rustix::fs::minor(there.rdev()));
    let told = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro"));
    told.is_ok_and(|told| told.trim() == "1")
}

fn another(path: &Path) -> Failure {
    Failure::new(
        format!("{} is another target than the session's", path.display()),
        "give the live-restore command --moved if it was copied or moved as a whole, together with its session; else name the session's own target",
    )
}

/// Fails where a file that is so long may not be written by us: its writes would fail once they are beyond the limit, as they do
/// where there is no room.
pub(super) fn check_file_limit(path: &Path, size: u64) -> anyhow::Result<()> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    let is_device = || std::fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device());
    match limit.filter(|limit| *limit < size) {
        Some(limit) if !is_device() => Err(Failure::new(
            format!(
                "cannot write the target {}: this process may make no file of more than {limit} bytes, and the disk has {size}",
                path.display()
            ),
            "raise its limit of file sizes (`ulimit -f unlimited`, or LimitFSIZE= of its systemd unit), then run the same command again",
        )
        .into()),
        _ => Ok(()),
    }
}

/// That the target of a session that is there is not.
pub(super) fn gone(state: &StateDir, path: &Path) -> Failure {
    Failure::new(
        format!("the target {} of the session in {} is gone", path.display(), state.path().display()),
        format!("put it back: what the guest wrote is in it; or {}", state.giving_up()),
    )
}

fn cut_off(path: &Path, size: u64, state: &StateDir, record: &SessionRecord) -> Failure {
    Failure::new(
        format!(
            "the target {} has {size} bytes, and the disk {}: since its session was served last it was cut off, and what stood there is \
             lost",
            path.display(),
            record.size
        ),
        format!(
            "put a whole copy of it back, if there is one (do not just make it longer: zeroes would be taken for the guest's data); \
             else keep what is left of it, if the guest's data are worth looking for in there; then {}, and a new one begins with \
             --force",
            state.giving_up()
        ),
    )
}

/// The locked target of a session that is to be made, as it was found.
#[derive(Debug)]
pub(super) struct Taken {
    file: File,
    path: PathBuf,
    size: u64,
    is_device: bool,
    engine: Engine,
}

/// What is to become the target of a new session.
#[derive(Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub(super) path: &'a Path,
    /// Where the session would be kept.
    pub(super) state: &'a Path,
    /// The disk's size in bytes.
    pub(super) size: u64,
    /// Overwrite what it holds.
    pub(super) force: bool,
    pub(super) engine: Engine,
    pub(super) interrupt: &'a Interrupt,
}

fn was_just_made(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
}

impl Candidate<'_> {
    /// Makes or finds it, and locks it. One that holds anything is refused without `force`. The guard takes back what was
    /// made.
    pub(super) fn take(self) -> anyhow::Result<(Taken, Made)> {
        match self.take_as_it_is() {
            // Somebody else has made it meanwhile: now it is there.
            Err(error) if was_just_made(&error) => self.take_as_it_is(),
            taken => taken,
        }
    }

    fn take_as_it_is(self) -> anyhow::Result<(Taken, Made)> {
        let Self { path, state, size, force, engine, interrupt } = self;
        let metadata = metadata(path)?;
        let is_device = metadata.as_ref().is_some_and(|metadata| metadata.file_type().is_block_device());
        if metadata.as_ref().is_some_and(|metadata| !metadata.is_file() && !is_device) {
            return Err(Failure::new(
                format!("the target {} is neither a file nor a block device", path.display()),
                "name a raw file that may be made, or a block device",
            )
            .into());
        }
        let mut options = OpenOptions::new();
        // A FIFO that takes its place must not block us.
        options.read(true).write(true).create_new(metadata.is_none()).custom_flags(libc::O_NONBLOCK);
        let cannot = || {
            let doing = if metadata.is_none() { "make" } else { "open" };
            format!("cannot {doing} the target {}", path.display())
        };
        let file = options.open(path).with_context(cannot)?;
        // Nobody of ours can have left operations in flight. Whoever locks a file that was just made has found it, and
        // it is not ours any more.
        lock(&file, path, state, Duration::ZERO, interrupt)?;
        let undo = match &metadata {
            None => Undo::Remove,
            Some(metadata) if metadata.is_file() && !blank::has_data(&file).with_context(cannot)? => {
                Undo::Shorten(metadata.len())
            }
            Some(_) => Undo::Nothing,
        };
        let made = Made::new(&file, path, undo).with_context(cannot)?;
        if is_device {
            let disk =
                FileDisk::from_file(file.try_clone().with_context(cannot)?, path, FileOptions::new(engine))?;
            check_writable(&disk)?;
            check_size(&disk, size)?;
            if !force {
                // Through the page cache, and another description: no alignment, and no lock.
                let seen = File::open(path).and_then(|device| blank::first_data(&device, disk.size()));
                if let Some(at) =
                    seen.with_context(|| format!("cannot read the target {}", path.display()))?
                {
                    return Err(holds_data(path, &format!(" (at byte {at})")));
                }
            }
        } else if undo == Undo::Nothing && !force {
            return Err(holds_data(path, ""));
        }
        Ok((Taken { file, path: path.to_owned(), size, is_device, engine }, made))
    }
}

impl Taken {
    /// What was taken.
    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// What may be assumed of it once it is prepared.
    pub(super) const fn contents(&self) -> Contents {
        if self.is_device { Contents::Unknown } else { Contents::Zeroes }
    }

    /// Makes a file as long as the disk, and empty; its name is on stable storage then. A device stays as it is.
    pub(super) fn prepare(self) -> anyhow::Result<FileDisk> {
        let Self { file, path, size, is_device, engine } = self;
        let prepare = || -> io::Result<()> {
            if blank::has_data(&file)? {
                file.set_len(0)?;
            }
            file.set_len(size)?;
            File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
        };
        if !is_device {
            prepare().map_err(|error| cannot_prepare(&path, size, error))?;
        }
        let disk = FileDisk::from_file(file, path, FileOptions::new(engine))?;
        Ok(disk)
    }
}

fn cannot_prepare(path: &Path, size: u64, error: io::Error) -> anyhow::Error {
    let what = format!("cannot prepare the target {}", path.display());
    if error.kind() != io::ErrorKind::FileTooLarge {
        return anyhow::Error::from(error).context(what);
    }
    let advice = format!(
        "its file system has no files of {size} bytes: name a target on another one, or a block device"
    );
    Failure::new(what, advice).because(error).into()
}

fn metadata(path: &Path) -> anyhow::Result<Option<std::fs::Metadata>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot look at the target {}", path.display())),
    }
}

/// Refuses a device that is set read-only.
fn check_writable(disk: &FileDisk) -> anyhow::Result<()> {
    if !disk.geometry().read_only {
        return Ok(());
    }
    Err(read_only_device(disk.path()).into())
}

fn read_only_device(path: &Path) -> Failure {
    Failure::new(
        format!("the target {} is a read-only device", path.display()),
        "make it writable (`blockdev --setrw`), or name another target",
    )
}

fn check_size(disk: &FileDisk, size: u64) -> anyhow::Result<()> {
    if disk.size() >= size {
        return Ok(());
    }
    Err(Failure::new(
        format!("the target {} has {} bytes, the disk {size}", disk.path().display(), disk.size()),
        "name a device that is at least as large",
    )
    .into())
}

fn holds_data(path: &Path, place: &str) -> anyhow::Error {
    Failure::new(
        format!("the target {} holds data already{place}, and no session of it was found", path.display()),
        "name another target; give --moved if it was copied together with its session, or --force to overwrite what it holds",
    )
    .into()
}

#[cfg(test)]
mod tests {
    use rustix::fs::FlockOperation;

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn candidate<'a>(path: &'a Path, force: bool, interrupt: &'a Interrupt) -> Candidate<'a> {
        Candidate { path, state: path, size: SIZE, force, engine: Engine::THREADS, interrupt }
    }

    fn take_file(path: &Path, force: bool) -> anyhow::Result<(FileDisk, Contents)> {
        let (taken, made) = candidate(path, force, &Interrupt::default()).take()?;
        let contents = taken.contents();
        let prepared = taken.prepare()?;
        made.keep();
        Ok((prepared, contents))
    }

    #[test]
    fn a_new_file_and_one_of_holes_read_as_zeroes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.raw");
        let (disk, contents) = take_file(&path, false).unwrap();
        assert_eq!((disk.size(), contents), (SIZE, Contents::Zeroes));
        drop(disk);
        let (disk, contents) = take_file(&path, false).unwrap();
        assert_eq!((disk.size(), contents), (SIZE, Contents::Zeroes));
    }

    #[test]
    fn taking_changes_nothing_before_it_is_prepared_and_is_undone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.raw");
        let interrupt = Interrupt::default();
        let try_take = |force| candidate(&path, force, &interrupt).take();
        drop(try_take(false).unwrap());
        assert!(!path.exists());
        std::fs::write(&path, b"precious").unwrap();
        drop(try_take(true).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        File::create(&path).unwrap();
        let (taken, made) = try_take(false).unwrap();
        let disk = taken.prepare().unwrap();
        assert_eq!(disk.size(), SIZE);
        drop(disk);
        drop(made);
        assert_eq!(path.metadata().unwrap().len(), 0, "the length that it had");
    }

    #[test]
    fn a_file_that_holds_data_is_kept_without_force_and_emptied_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.raw");
        std::fs::write(&path, b"precious").unwrap();
        let error = take_file(&path, false).unwrap_err();
        assert!(error.to_string().contains("holds data already"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        let (disk, contents) = take_file(&path, true).unwrap();
        assert_eq!((disk.size(), contents), (SIZE, Contents::Zeroes));
    }

    #[test]
    fn a_target_that_somebody_serves_is_refused_and_kept_even_with_force() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.raw");
        std::fs::write(&path, b"precious").unwrap();
        let other = File::open(&path).unwrap();
        rustix::fs::flock(&other, FlockOperation::LockExclusive).unwrap();
        let error = take_file(&path, true).unwrap_err();
        // This is of the same name.
        assert!(error.to_string().contains("in use by another lifeboot, the process"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
