//! The target of a session: found or made, locked, and what is known of it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use block::{ByteRange, Engine, FileDisk, FileOptions};
use rustix::fs::FlockOperation;

use super::control;
use crate::cli::{Failure, Interrupt};

/// How long a successor waits for the operations that a killed agent left in flight.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);
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
    lock(&disk, state, interrupt)?;
    Ok(disk)
}

/// Makes or takes the target of a new session, and locks it. One that holds anything is refused without `force`.
pub(super) fn take(
    path: &Path,
    state: &Path,
    size: u64,
    force: bool,
    engine: Engine,
    interrupt: &Interrupt,
) -> anyhow::Result<(FileDisk, Contents)> {
    let options = FileOptions::new(engine);
    let Some(metadata) = metadata(path)? else {
        let disk = FileDisk::create(path, size, options)?;
        lock(&disk, state, interrupt)?;
        return Ok((disk, Contents::Zeroes));
    };
    if metadata.file_type().is_block_device() {
        let disk = FileDisk::open(path, options)?;
        lock(&disk, state, interrupt)?;
        check_size(&disk, path, size)?;
        if !force && !is_blank(&disk)? {
            return Err(holds_data(path));
        }
        return Ok((disk, Contents::Unknown));
    }
    if !metadata.is_file() {
        return Err(Failure::new(
            format!("the target {} is neither a file nor a block device", path.display()),
            "name a raw file that may be made, or a block device",
        )
        .into());
    }
    make_room(path, state, size, force)?;
    let disk = FileDisk::open(path, options)?;
    lock(&disk, state, interrupt)?;
    let contents = if has_data(&disk)? { Contents::Unknown } else { Contents::Zeroes };
    Ok((disk, contents))
}

fn metadata(path: &Path) -> anyhow::Result<Option<std::fs::Metadata>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot look at the target {}", path.display())),
    }
}

/// Makes an existing file as long as the disk. It is emptied only where `force` allows, and only under the
/// lock: somebody may be serving it.
fn make_room(path: &Path, state: &Path, size: u64, force: bool) -> anyhow::Result<()> {
    let cannot = || format!("cannot prepare the target {}", path.display());
    let file = OpenOptions::new().read(true).write(true).open(path).with_context(cannot)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(in_use(path, state)),
        Err(errno) => return Err(io::Error::from(errno)).with_context(cannot),
    }
    if is_all_holes(&file).with_context(cannot)? {
        return file.set_len(size).with_context(cannot);
    }
    if !force {
        return Err(holds_data(path));
    }
    file.set_len(0).and_then(|()| file.set_len(size)).with_context(cannot)
}

fn is_all_holes(file: &File) -> io::Result<bool> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0)) {
        Ok(_) => Ok(false),
        Err(rustix::io::Errno::NXIO) => Ok(true),
        // A file system without holes: only an empty file holds nothing.
        Err(rustix::io::Errno::INVAL) => Ok(file.metadata()?.len() == 0),
        Err(errno) => Err(errno.into()),
    }
}

fn has_data(disk: &FileDisk) -> anyhow::Result<bool> {
    let whole = ByteRange::from_bounds(0, disk.size());
    Ok(!disk.data_ranges(whole)?.is_empty())
}

/// Whether the start and the end of a device, where partition tables and signatures stand, are zeroes.
fn is_blank(disk: &FileDisk) -> anyhow::Result<bool> {
    const LOOKED_AT: u64 = 1 << 20;
    let len = LOOKED_AT.min(disk.size());
    for offset in [0, disk.size() - len] {
        let buf = block::AlignedBuf::zeroed(usize::try_from(len).expect("one MiB"));
        let (result, buf) = disk.read_blocking(offset, buf);
        result?;
        if !repository::is_zero(&buf) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn check_size(disk: &FileDisk, path: &Path, size: u64) -> anyhow::Result<()> {
    if disk.size() >= size {
        return Ok(());
    }
    Err(Failure::new(
        format!("the target {} has {} bytes, the disk {size}", path.display(), disk.size()),
        "name a device that is at least as large",
    )
    .into())
}

fn holds_data(path: &Path) -> anyhow::Error {
    Failure::new(
        format!("the target {} holds data already, and no session of it was found", path.display()),
        "name another target, or give --force to overwrite what it holds",
    )
    .into()
}

pub(super) fn in_use(path: &Path, state: &Path) -> anyhow::Error {
    let who = match control::ask(state) {
        Ok(Some(status)) => format!(
            "by the agent with the process id {}, which restores {}",
            status.pid.unwrap_or_default(),
            status.snapshot
        ),
        _ => "by another program".to_owned(),
    };
    Failure::new(
        format!("the target {} is in use {who}", path.display()),
        "`lifeboot status TARGET` shows how far it is; end it (SIGTERM parks it) before another one begins",
    )
    .into()
}

/// Takes the lock. An agent that is alive is told of at once; what a dead one left in flight is waited for.
fn lock(disk: &FileDisk, state: &Path, interrupt: &Interrupt) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut said = false;
    while !disk.try_lock()? {
        let alive = matches!(control::ask(state), Ok(Some(_)));
        if alive || begun.elapsed() > LOCK_PATIENCE {
            return Err(in_use(disk.path(), state));
        }
        if !said {
            said = true;
            tracing::info!(target = %disk.path().display(), "waiting for the target's lock: operations of an agent that ended are still in flight");
        }
        interrupt.check()?;
        std::thread::sleep(LOCK_RETRY);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn take_file(path: &Path, force: bool) -> anyhow::Result<(FileDisk, Contents)> {
        take(path, path, SIZE, force, Engine::THREADS, &Interrupt::default())
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
