//! The Debian guest that scripts/guest.sh builds and keeps in the target directory.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{process, programs};

/// The guest's disk, kernel and initial file system. The disk is shared by all tests: none may write to it.
#[derive(Debug, Clone)]
pub struct GuestImage {
    directory: PathBuf,
}

impl GuestImage {
    /// Where the guest is; built now if it is not there, which takes about 90 s and root.
    ///
    /// # Errors
    /// It cannot be built; the error has what scripts/guest.sh said.
    pub fn prepare() -> Result<Self> {
        let script = programs::project_dir().join("scripts/guest.sh");
        let target = programs::target_dir()?;
        let output = process::run(Command::new(script).env("CARGO_TARGET_DIR", target))?;
        let directory = PathBuf::from(output.lines().last().context("guest.sh names the guest's directory")?);
        ensure!(directory.join("disk.raw").is_file(), "no guest in {}", directory.display());
        Ok(Self { directory })
    }

    /// Its disk: 8 GiB, about 500 MB of it data.
    pub fn disk(&self) -> PathBuf {
        self.directory.join("disk.raw")
    }

    /// Its kernel.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// Its initial file system.
    pub fn initrd(&self) -> PathBuf {
        self.directory.join("initrd.img")
    }
}

/// A file of the ext4 file system on `disk`, read without mounting it.
///
/// # Errors
/// There is no such file or file system.
pub fn read_file(disk: &Path, path: &str) -> Result<Vec<u8>> {
    let output = process::run_any(Command::new("debugfs").arg("-R").arg(format!("cat {path}")).arg(disk))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    // The first line is its version; it ends with 0 whatever happened.
    ensure!(errors.lines().count() <= 1, "debugfs cannot read {path}: {errors}");
    Ok(output.stdout)
}

/// The names in a directory of the ext4 file system on `disk`.
///
/// # Errors
/// debugfs cannot be started, or there is nothing.
pub fn list_directory(disk: &Path, path: &str) -> Result<Vec<String>> {
    let output = process::run(Command::new("debugfs").arg("-R").arg(format!("ls -p {path}")).arg(disk))?;
    // /INODE/MODE/OWNER/GROUP/NAME/SIZE/
    let names = output.lines().filter_map(|line| line.split('/').nth(5)).map(str::to_owned);
    let names: Vec<String> = names.filter(|name| !matches!(name.as_str(), "." | ".." | "")).collect();
    ensure!(!names.is_empty(), "{} has nothing in {path}", disk.display());
    Ok(names)
}

/// Demands that the file system on `disk` is whole, without changing a byte of it.
///
/// # Errors
/// It is not, with what fsck found.
pub fn ensure_sound(disk: &Path) -> Result<()> {
    process::run(Command::new("fsck.ext4").args(["-f", "-n"]).arg(disk)).map(|_| ())
}
