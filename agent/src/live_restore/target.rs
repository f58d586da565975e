//! The target of a session: found or made, locked, and what is known of it.
//!
//! One open file description carries the lock from the first look at a target until the session's end. A new
//! session's target is *taken* first: looked at, and locked. It is changed only when everything else that the session
//! needs was made ([`Taken::prepare`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use block::{Engine, FileDisk, FileOptions};
use rustix::fs::FlockOperation;

use super::control;
use super::made::{Made, Undo};
use crate::blank;
use crate::cli::{Failure, Interrupt};
use crate::status::Status;

/// How long a successor waits for the operations that a killed agent left in flight.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(30);
const LOCK_RETRY: Duration = Duration::from_millis(20);

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

/// The locked target of a session that is to be made, as it was found.
#[derive(Debug)]
pub(super) struct Taken {
    file: File,
    path: PathBuf,
    size: u64,
    is_device: bool,
    engine: Engine,
}

/// Makes or finds the target of a new session of a disk of `size` bytes, and locks it. One that holds anything is
/// refused without `force`. The guard takes back what was made.
pub(super) fn take(
    path: &Path,
    state: &Path,
    size: u64,
    force: bool,
    engine: Engine,
    interrupt: &Interrupt,
) -> anyhow::Result<(Taken, Made)> {
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
            if let Some(at) = seen.with_context(|| format!("cannot read the target {}", path.display()))? {
                return Err(holds_data(path, &format!(" (at byte {at})")));
            }
        }
    } else if undo == Undo::Nothing && !force {
        return Err(holds_data(path, ""));
    }
    Ok((Taken { file, path: path.to_owned(), size, is_device, engine }, made))
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
            prepare().with_context(|| format!("cannot prepare the target {}", path.display()))?;
        }
        let disk = FileDisk::from_file(file, path, FileOptions::new(engine))?;
        Ok(disk)
    }
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
    Err(Failure::new(
        format!("the target {} is a read-only device", disk.path().display()),
        "make it writable (`blockdev --setrw`), or name another target",
    )
    .into())
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
        "name another target, or give --force to overwrite what it holds",
    )
    .into()
}

/// Refuses where an agent serves this session: there is no need to try anything then.
pub(super) fn check_unserved(path: &Path, state: &Path) -> anyhow::Result<()> {
    match control::ask_status(state) {
        Ok(Some(by)) => Err(in_use(path, Some(&by))),
        _ => Ok(()),
    }
}

/// A target is in use: by this agent, if it is known.
pub(super) fn in_use(path: &Path, by: Option<&Status>) -> anyhow::Error {
    let who = match by {
        Some(status) => format!(
            "by the agent with the process id {}, which restores {}",
            status.pid.unwrap_or_default(),
            status.snapshot
        ),
        None => "by another program".to_owned(),
    };
    Failure::new(
        format!("the target {} is in use {who}", path.display()),
        "`lifeboot status TARGET` shows how far it is; end it (SIGTERM parks it) before another one begins",
    )
    .into()
}

/// Takes the lock. An agent that is alive is told of at once; what a dead one left in flight is waited for.
pub(super) fn lock(
    target: impl AsFd,
    path: &Path,
    state: &Path,
    patience: Duration,
    interrupt: &Interrupt,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut said = false;
    loop {
        match rustix::fs::flock(&target, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(errno) => {
                return Err(io::Error::from(errno))
                    .with_context(|| format!("cannot lock the target {}", path.display()));
            }
        }
        let by = control::ask_status(state).ok().flatten();
        if by.is_some() || begun.elapsed() >= patience {
            return Err(in_use(path, by.as_ref()));
        }
        if !said {
            said = true;
            tracing::info!(target = %path.display(), "waiting for the target's lock: operations of an agent that ended are still in flight");
        }
        interrupt.check()?;
        std::thread::sleep(LOCK_RETRY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn take_file(path: &Path, force: bool) -> anyhow::Result<(FileDisk, Contents)> {
        let (taken, made) = take(path, path, SIZE, force, Engine::THREADS, &Interrupt::default())?;
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
        let try_take = |force| take(&path, &path, SIZE, force, Engine::THREADS, &Interrupt::default());
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
        assert!(error.to_string().contains("in use"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
