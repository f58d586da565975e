//! A test's own directory and devices, gone when the test is.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::{process, programs};

/// A directory for a test's files, and one with a short path for its sockets.
#[derive(Debug)]
pub struct WorkDir {
    files: TempDir,
    /// A socket's path has 107 bytes at most, which a checkout deep in a tree would exceed.
    sockets: TempDir,
}

impl WorkDir {
    /// A new directory in Cargo's target directory: on a real file system, whatever the system's temporary one is.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(name: &str) -> Result<Self> {
        let parent = programs::target_dir()?.join("e2e");
        std::fs::create_dir_all(&parent).with_context(|| format!("cannot make {}", parent.display()))?;
        let prefix = format!("{name}.");
        let files = tempfile::Builder::new().prefix(&prefix).tempdir_in(&parent);
        let files = files.with_context(|| format!("cannot make a directory in {}", parent.display()))?;
        let sockets = tempfile::Builder::new().prefix("lifeboot.").tempdir();
        Ok(Self { files, sockets: sockets.context("cannot make a temporary directory")? })
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        self.files.path()
    }

    /// The path of a file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// The path of a socket.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.path().join(name)
    }
}

/// A small file system in memory, to be filled to its end; unmounted when dropped.
#[derive(Debug)]
pub struct SmallFileSystem {
    path: PathBuf,
}

impl SmallFileSystem {
    /// Mounts one of `size_bytes` at `path`, which is made.
    ///
    /// # Errors
    /// It cannot be mounted, which needs root.
    pub fn mount(path: PathBuf, size_bytes: u64) -> Result<Self> {
        std::fs::create_dir_all(&path)?;
        let size = format!("size={size_bytes}");
        process::run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "lifeboot-test"]).arg(&path))?;
        Ok(Self { path })
    }

    /// Gives it another size while it is in use.
    ///
    /// # Errors
    /// It cannot be remounted.
    pub fn resize(&self, size_bytes: u64) -> Result<()> {
        let options = format!("remount,size={size_bytes}");
        process::run(Command::new("mount").args(["-o", &options]).arg(&self.path)).map(|_| ())
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // Lazily: whoever still has a file open there is killed by its own guard.
        let _ = process::run(Command::new("umount").arg("-l").arg(&self.path));
    }
}

/// A file as a block device; detached when dropped.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Attaches `file` to a loop device that is free.
    ///
    /// # Errors
    /// There is none, or this is not root.
    pub fn attach(file: &Path) -> Result<Self> {
        let printed = process::run(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        Ok(Self { path: PathBuf::from(printed.trim()) })
    }

    /// Attaches `file` to the loop device of this number, which must be free: one beyond those that
    /// [`LoopDevice::attach`] hands out.
    ///
    /// # Errors
    /// It is not free, or this is not root.
    pub fn attach_to(number: u32, file: &Path) -> Result<Self> {
        let path = PathBuf::from(format!("/dev/loop{number}"));
        process::run(Command::new("losetup").arg(&path).arg(file))?;
        Ok(Self { path })
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets it read-only, or not.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_read_only(&self, read_only: bool) -> Result<()> {
        let how = if read_only { "--setro" } else { "--setrw" };
        process::run(Command::new("blockdev").arg(how).arg(&self.path)).map(|_| ())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // The number would keep it, for whatever is attached to it next.
        let _ = self.set_read_only(false);
        // Nothing to be done where it fails: the device stays attached until somebody detaches it.
        let _ = process::run(Command::new("losetup").arg("--detach").arg(&self.path));
    }
}
