//! Targets that somebody else uses: found before anything is written, and kept from others meanwhile.
//!
//! A block device is opened exclusively, which fails while it is mounted, swap or part of a volume, and keeps it from
//! becoming that. Of a file, locks tell: ours and QEMU's.

mod held;
mod locks;
mod open_files;

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use anyhow::Context as _;

use crate::cli::Failure;

pub(crate) use held::{Held, metadata_of};
pub(crate) use open_files::{has_open, is_same};

/// What keeps others from a target while it lives.
#[derive(Debug)]
pub(crate) struct Claim {
    /// A block device, open exclusively. The lock of a file is its own affair.
    _device: Option<File>,
}

/// Makes sure that nobody else uses the target, if it exists.
///
/// # Errors
/// Where it is in use, or cannot be looked at.
pub(crate) fn claim(path: &Path) -> anyhow::Result<Claim> {
    let looked = || format!("cannot look at the target {}", path.display());
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Claim { _device: None }),
        Err(error) => return Err(error).with_context(looked),
    };
    if kind.is_block_device() {
        return Ok(Claim { _device: Some(open_exclusively(path)?) });
    }
    // Of anything else it is said elsewhere that it is no target.
    if kind.is_file() {
        let file = File::open(path).with_context(looked)?;
        if let Some(how) = locks::holder(&file).with_context(looked)? {
            return Err(in_use(path, &how).into());
        }
    }
    Ok(Claim { _device: None })
}

/// Whether some program holds a lock on a file, other than one like ours; false where that cannot be told.
pub(crate) fn is_locked(path: &Path) -> bool {
    File::open(path).and_then(|file| locks::holder(&file)).is_ok_and(|holder| holder.is_some())
}

/// Whether some program other than `process` holds a lock on a file, as [`is_locked`] tells: not where `process` has it open itself.
pub(crate) fn is_locked_by_another(path: &Path, process: Option<u32>) -> bool {
    let has_open =
        |process| std::fs::metadata(path).and_then(|file| has_open(process, &file)).unwrap_or(false);
    is_locked(path) && !process.is_some_and(has_open)
}

/// A process that has `path` open, other than this one, in words; `None` where there is none, or that cannot be told.
pub(crate) fn opener(path: &Path) -> Option<String> {
    let process = open_files::opener(&std::fs::metadata(path).ok()?)?;
    let name = std::fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    Some(format!("the process {process} ({})", name.trim_end()))
}

/// The process of another lifeboot that has locked this file as its target, where that can be told.
pub(crate) fn other_lifeboot(file: &File) -> Option<u32> {
    locks::other_lifeboot(file)
}

/// Opens a block device that nobody else uses, for reading and writing.
///
/// # Errors
/// Where it is mounted or otherwise held by the kernel, or open exclusively elsewhere; and any other failure to open it.
pub(crate) fn open_exclusively(path: &Path) -> anyhow::Result<File> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(path);
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => in_use(path, "mounted, or held by the kernel or another program").into(),
        _ => anyhow::Error::from(error).context(format!("cannot open the target {}", path.display())),
    })
}

/// Fails where somebody holds a lock on a file, of whatever kind.
pub(crate) fn refuse_locked(path: &Path, file: &File) -> anyhow::Result<()> {
    let used = match file.try_lock() {
        Ok(()) => locks::holder(file).with_context(|| format!("cannot look at {}", path.display()))?,
        Err(TryLockError::WouldBlock) => Some("locked by another program".to_owned()),
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    };
    used.map_or(Ok(()), |how| Err(in_use(path, &how).into()))
}

/// That `path` is in use, and what to do.
pub(crate) fn in_use(path: &Path, how: &str) -> Failure {
    Failure::new(
        format_args!("{} is in use: {how}", path.display()),
        "stop what uses it (unmount it, shut the machine down), or name another target",
    )
}
