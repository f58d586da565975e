//! Whether QEMU has the very file open that we serve: its path may mean another file to QEMU (another mount namespace,
//! another host behind a forwarded socket), and a machine that is moved onto the wrong disk is lost.

use std::path::Path;

use crate::cli::Failure;
use crate::in_use;

/// Fails unless the process has `target` open, for reading and writing or not.
pub(super) fn check_has_open(process: Option<u32>, target: &Path) -> anyhow::Result<()> {
    let ours = std::fs::metadata(target)?;
    let Some(process) = process else {
        return Err(cannot_tell(target, "its process cannot be told").into());
    };
    let has_open = in_use::has_open(process, &ours)
        .map_err(|error| cannot_tell(target, &format!("its process {process}: {error}")))?;
    if has_open {
        return Ok(());
    }
    Err(Failure::new(
        format!(
            "to QEMU (process {process}) the path {} is another file than the one that is restored here",
            target.display()
        ),
        "QEMU sees other directories (a container, a chroot, another machine): mount the target there under the same path",
    )
    .into())
}

fn cannot_tell(target: &Path, why: &str) -> Failure {
    Failure::new(
        format!("cannot tell whether QEMU means the same file by {}: {why}", target.display()),
        "let lifeboot see QEMU's process: run it as root or as QEMU's user, in the same PID namespace, at QEMU's own socket",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_by_what_it_is_and_not_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let (target, other) = (dir.path().join("t"), dir.path().join("o"));
        std::fs::write(&target, "x").unwrap();
        std::fs::write(&other, "x").unwrap();
        let us = Some(std::process::id());
        assert!(check_has_open(us, &target).is_err());
        let file = std::fs::File::open(&target).unwrap();
        std::fs::rename(&target, dir.path().join("renamed")).unwrap();
        check_has_open(us, &dir.path().join("renamed")).unwrap();
        assert!(check_has_open(us, &other).is_err());
        assert!(check_has_open(None, &dir.path().join("renamed")).is_err());
        drop(file);
    }
}
