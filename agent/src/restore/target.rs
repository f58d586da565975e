//! What a restore writes to: a file that appears whole or not at all, or a block device that nobody uses.
//!
//! A file is written under the name `TARGET.lifeboot-partial` beside its own, and given its name once it
//! is whole and on stable storage. So a restore that fails, or is killed, never leaves something behind
//! that could be taken for the disk, and a file that `--force` replaces is there until then. A block
//! device is written in place; it is held exclusively, so that it cannot be mounted meanwhile.

use std::ffi::OsString;
use std::fs::{File, Metadata, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use block::{FileDisk, FileOptions};

use super::signature;
use crate::blank;
use crate::cli::Failure;
use crate::in_use::{in_use, open_exclusively, refuse_locked};
use crate::live_restore::StateDir;
use crate::output::human_size;
use crate::target_path::refuse_dangling;

/// A target that may be written. Dropped before [`Target::complete`], it takes away the file it had begun.
#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    File {
        partial: Partial,
        replaces: Option<Box<Metadata>>,
    },
    /// The handle that keeps everybody else from mounting it.
    Device {
        _exclusive: File,
    },
}

impl Target {
    /// Checks that `path` may be written with a disk of `size` bytes, and opens it for that.
    ///
    /// # Errors
    /// Where it is a device that is too small, in use, not empty without `force`, or neither a file nor a block device.
    pub(super) fn open(
        path: &Path,
        size: u64,
        force: bool,
        options: FileOptions,
    ) -> anyhow::Result<(Self, FileDisk)> {
        match std::fs::metadata(path) {
            Ok(existing) => {
                let path = std::fs::canonicalize(path)
                    .with_context(|| format!("cannot resolve {}", path.display()))?;
                Self::open_existing(path, existing, size, force, options)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                refuse_dangling(path)?;
                refuse_missing_dir(path)?;
                Self::open_file(path.to_owned(), None, size, options)
            }
            Err(error) => Err(error).with_context(|| format!("cannot look at the target {}", path.display())),
        }
    }

    fn open_existing(
        path: PathBuf,
        existing: Metadata,
        size: u64,
        force: bool,
        options: FileOptions,
    ) -> anyhow::Result<(Self, FileDisk)> {
        let kind = existing.file_type();
        if kind.is_block_device() {
            return Self::open_device(path, size, force, options);
        }
        if !kind.is_file() {
            let what = if kind.is_dir() { "a directory" } else { "neither a file nor a block device" };
            return Err(Failure::new(
                format_args!("the target {} is {what}", path.display()),
                "name a file (it need not exist) or a block device",
            )
            .into());
        }
        let file = File::open(&path).with_context(|| format!("cannot open the target {}", path.display()))?;
        refuse_locked(&path, &file)?;
        if !force && blank::has_data(&file).with_context(|| format!("cannot look into {}", path.display()))? {
            return Err(Failure::new(
                format_args!("the target {} is not empty ({})", path.display(), human_size(existing.len())),
                "name another target, or give --force to replace it (it stays as it is until the restore is complete)",
            )
            .into());
        }
        Self::open_file(path, Some(existing), size, options)
    }

    fn open_file(
        path: PathBuf,
        replaces: Option<Metadata>,
        size: u64,
        options: FileOptions,
    ) -> anyhow::Result<(Self, FileDisk)> {
        let (partial, disk) = Partial::create(&path, size, options)?;
        Ok((Self { path, kind: Kind::File { partial, replaces: replaces.map(Box::new) } }, disk))
    }

    fn open_device(
        path: PathBuf,
        size: u64,
        force: bool,
        options: FileOptions,
    ) -> anyhow::Result<(Self, FileDisk)> {
        let mut exclusive = open_exclusively(&path)?;
        let looked = || format!("cannot read the target {}", path.display());
        let device_size = exclusive.seek(SeekFrom::End(0)).with_context(looked)?;
        if device_size < size {
            return Err(too_small(&path, device_size, size));
        }
        if !force && let Some(at) = blank::first_data(&exclusive, device_size).with_context(looked)? {
            let head = probe(&mut exclusive, device_size).with_context(looked)?;
            let holds = signature::name(&head)
                .map_or_else(|| format!("there is data at byte {at}"), |name| format!("it holds {name}"));
            return Err(Failure::new(
                format_args!("the target {} is not empty: {holds}", path.display()),
                "name another target, or give --force to overwrite what is on it",
            )
            .into());
        }
        let disk = FileDisk::open(&path, options)?;
        if disk.geometry().read_only {
            return Err(Failure::new(
                format_args!("the target {} is a read-only device", path.display()),
                "make it writable (`blockdev --setrw`), or name another target",
            )
            .into());
        }
        if !disk.try_lock()? {
            return Err(in_use(&path, "locked by another program").into());
        }
        Ok((Self { path, kind: Kind::Device { _exclusive: exclusive } }, disk))
    }

    /// Whether the target reads as zeroes wherever nothing was written to it.
    pub(super) const fn starts_as_zeroes(&self) -> bool {
        matches!(self.kind, Kind::File { .. })
    }

    /// The target as the user named it, links resolved.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives a file its name, now that all of it is on stable storage.
    pub(super) fn complete(self) -> anyhow::Result<()> {
        match self.kind {
            Kind::Device { .. } => Ok(()),
            Kind::File { partial, replaces } => partial.publish(&self.path, replaces.as_deref()),
        }
    }
}

/// A file that is being written under another name than its own, and removed unless it is published.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
    /// Keeps the lock that tells a later restore that somebody is at work.
    _disk: FileDisk,
}

const PARTIAL_SUFFIX: &str = ".lifeboot-partial";
const SESSION_SUFFIX: &str = ".lifeboot";

impl Partial {
    fn create(target: &Path, size: u64, options: FileOptions) -> anyhow::Result<(Self, FileDisk)> {
        refuse_session(target)?;
        let path = with_suffix(target, PARTIAL_SUFFIX);
        remove_abandoned(&path)?;
        let disk = FileDisk::create(&path, size, options)?;
        let partial = Self { path, _disk: disk.clone() };
        if !disk.try_lock()? {
            return Err(in_use(&partial.path, "another restore is writing it").into());
        }
        Ok((partial, disk))
    }

    fn publish(self, target: &Path, replaces: Option<&Metadata>) -> anyhow::Result<()> {
        let shown = target.display();
        if let Some(old) = replaces {
            let file =
                File::open(&self.path).with_context(|| format!("cannot open {}", self.path.display()))?;
            file.set_permissions(old.permissions())
                .with_context(|| format!("cannot set the permissions of {shown}"))?;
            // Only root may give files away; others wrote the old one because it is theirs, or their group's.
            if let Err(error) = fchown(&file, Some(old.uid()), Some(old.gid())) {
                tracing::warn!(%error, target = %shown, "the owner of the file that was replaced is not kept");
            }
            file.sync_all().with_context(|| format!("cannot sync {}", self.path.display()))?;
        }
        std::fs::rename(&self.path, target)
            .with_context(|| format!("cannot rename {} to {shown}", self.path.display()))?;
        let dir = match target.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .with_context(|| format!("cannot sync the directory {}", dir.display()))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After it was published there is nothing of that name any more.
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path.display(), "an incomplete restore could not be removed");
        }
    }
}

/// A session beside the target would take the file that is restored for its own.
fn refuse_session(target: &Path) -> anyhow::Result<()> {
    let session = with_suffix(target, SESSION_SUFFIX);
    if !session.exists() {
        return Ok(());
    }
    let state = StateDir::of(target, None)?;
    let is_empty = || std::fs::read_dir(&session).is_ok_and(|mut entries| entries.next().is_none());
    let advice = if state.record()?.is_some() || is_empty() {
        format!(
            "go on with `lifeboot live-restore`, or give it up with `{}`, then restore",
            state.command("discard", target)
        )
    } else {
        format!(
            "{} holds no session: move it away if it is nobody's, or name another target",
            session.display()
        )
    };
    Err(Failure::new(
        format_args!("{} belongs to a live-restore ({} is there)", target.display(), session.display()),
        advice,
    )
    .into())
}

/// Removes what a killed restore left, unless one is at work.
fn remove_abandoned(path: &Path) -> anyhow::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot open {}", path.display())),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(in_use(path, "another restore is writing it").into()),
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    std::fs::remove_file(path)
        .with_context(|| format!("cannot remove what a killed restore left, {}", path.display()))
}

/// A file can be made only in a directory that is there.
fn refuse_missing_dir(path: &Path) -> anyhow::Result<()> {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() && !dir.exists() => Err(Failure::new(
            format_args!(
                "cannot make the target {}: the directory {} does not exist",
                path.display(),
                dir.display()
            ),
            "make the directory, or name a target in another one",
        )
        .into()),
        _ => Ok(()),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn too_small(path: &Path, size: u64, needed: u64) -> anyhow::Error {
    Failure::new(
        format_args!(
            "the target {} is too small: it has {size} bytes ({}), and the disk {needed} ({})",
            path.display(),
            human_size(size),
            human_size(needed),
        ),
        "name a larger device, or a file, which is made as large as the disk",
    )
    .into()
}

/// The first bytes of a device.
fn probe(device: &mut File, size: u64) -> io::Result<Vec<u8>> {
    device.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    device.take(size.min(signature::PROBE_LEN as u64)).read_to_end(&mut bytes)?;
    Ok(bytes)
}
