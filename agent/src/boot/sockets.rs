//! Where the sockets of a machine stand: in a directory for its first target, the same one at each run.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::cli::Failure;
use crate::live_restore::absolute;
use crate::pivot::{Qmp, QmpError};
use crate::private_dir;

/// The directory of a machine's sockets.
#[derive(Debug)]
pub(super) struct Sockets {
    dir: PathBuf,
}

impl Sockets {
    /// Those of the machine whose first target this is. The directory is made, for us alone.
    pub(super) fn of(target: &Path) -> anyhow::Result<Self> {
        let sockets = Self::at(&root(), target)?;
        for dir in [&root(), &sockets.dir] {
            make(dir).with_context(|| format!("cannot make {} for the machine's sockets", dir.display()))?;
        }
        Ok(sockets)
    }

    /// Where they would be: nothing is made.
    pub(super) fn where_of(target: &Path) -> anyhow::Result<Self> {
        Self::at(&root(), target)
    }

    fn at(root: &Path, target: &Path) -> anyhow::Result<Self> {
        let target = absolute(target)?;
        let name = format!("{:08x}", crc32fast::hash(target.as_os_str().as_encoded_bytes()));
        Ok(Self { dir: root.join(name) })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the disks are served.
    pub(super) fn nbd(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    /// The monitor that moves drives.
    pub(super) fn mover(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// The monitor that ends the machine: a monitor talks to one at a time.
    pub(super) fn ender(&self) -> PathBuf {
        self.dir.join("end.sock")
    }

    /// Fails where a machine of an earlier run is still there, and says how it is gone on with.
    pub(super) fn check_unused(&self, snapshot: &str, targets: &[PathBuf]) -> anyhow::Result<()> {
        // Whatever it says, somebody is there.
        if let Err(QmpError::Connect { .. }) = Qmp::connect(&self.mover()) {
            return Ok(());
        }
        let targets: Vec<String> = targets.iter().map(|target| target.display().to_string()).collect();
        Err(Failure::new(
            format!("the machine of {} still runs from an earlier `lifeboot boot`", targets[0]),
            format!(
                "if its lifeboot was killed, go on with `lifeboot live-restore -r REPO {snapshot} {} --listen unix:{} --qmp {}`; \
                 else end it first",
                targets.join(" "),
                self.nbd().display(),
                self.mover().display()
            ),
        )
        .into())
    }
}

/// Where such directories stand: a unix socket's path has 107 bytes at most.
fn root() -> PathBuf {
    if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_absolute()) {
        return PathBuf::from(dir).join("lifeboot");
    }
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/run/lifeboot");
    }
    std::env::temp_dir().join(format!("lifeboot-{}", rustix::process::geteuid().as_raw()))
}

/// Makes a directory that nobody else can write to, or takes one that is ours.
fn make(dir: &Path) -> anyhow::Result<()> {
    if !private_dir::make(dir)? {
        return Err(Failure::new(
            format!("{} belongs to somebody else, or others may write to it", dir.display()),
            "remove it, or set XDG_RUNTIME_DIR to a directory of your own",
        )
        .into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_others_may_write_to_is_not_taken() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("sockets");
        make(&place).unwrap();
        make(&place).unwrap();
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(make(&place).is_err());
        std::fs::remove_dir(&place).unwrap();
        std::os::unix::fs::symlink(dir.path(), &place).unwrap();
        assert!(make(&place).is_err());
    }
}
