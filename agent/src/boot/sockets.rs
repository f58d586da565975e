//! Where the sockets of a machine stand: in a directory for its first target, the same one at each run. Beside them is noted
//! which disks the machine has, so that whoever meets another of its targets finds it too.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::cli::Failure;
use crate::live_restore::{Service, absolute, replace};
use crate::pivot::{Qmp, QmpError};
use crate::private_dir;

/// The file that says which disks the machine has.
const NOTE: &str = "machine.json";
const VERSION: u32 = 1;

/// Which disks a machine has.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    version: u32,
    /// What it was booted from, by its full name.
    snapshot: String,
    disks: Vec<NotedDisk>,
}

#[derive(Debug, Serialize, Deserialize)]
struct NotedDisk {
    name: String,
    target: PathBuf,
}

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

    /// Notes which disks the machine has that is about to be started.
    pub(super) fn note(&self, service: &Service) -> anyhow::Result<()> {
        let disks = service.disks().iter().map(|disk| &disk.record);
        let note = Note {
            version: VERSION,
            snapshot: disks.clone().next().map(|record| record.snapshot.clone()).unwrap_or_default(),
            disks: disks
                .map(|record| NotedDisk { name: record.disk.clone(), target: record.target.clone() })
                .collect(),
        };
        let path = self.dir.join(NOTE);
        replace(&path, &note).with_context(|| format!("cannot write {}", path.display()))
    }

    fn noted(&self) -> Option<Note> {
        let note: Note = serde_json::from_slice(&std::fs::read(self.dir.join(NOTE)).ok()?).ok()?;
        (note.version == VERSION).then_some(note)
    }

    /// Removes what is left of a machine that has ended.
    pub(super) fn remove(&self) {
        // QEMU removes its sockets itself, unless it was killed.
        for file in [self.mover(), self.ender(), self.dir.join(NOTE)] {
            let _ = std::fs::remove_file(file);
        }
        let _ = std::fs::remove_dir(&self.dir);
    }

    /// Fails where a machine of an earlier run is still there, one of whose disks is `target`, and says how it is gone on with.
    pub(super) fn check_unused(&self, target: &Path) -> anyhow::Result<()> {
        // Whatever it says, somebody is there.
        if let Err(QmpError::Connect { .. }) = Qmp::connect(&self.mover()) {
            return Ok(());
        }
        let disks = match self.noted() {
            Some(Note { snapshot, disks, .. }) => match disks.as_slice() {
                [one] => format!("{snapshot}/{} {}", one.name, one.target.display()),
                disks => disks
                    .iter()
                    .fold(snapshot, |told, disk| format!("{told} {}={}", disk.name, disk.target.display())),
            },
            None => format!("SNAPSHOT {}", target.display()),
        };
        Err(Failure::new(
            format!("the machine of {} still runs from an earlier `lifeboot boot`", target.display()),
            format!(
                "if its lifeboot was killed, go on with `lifeboot live-restore -r REPO {disks} --listen unix:{} --qmp {}`; \
                 else end it first",
                self.nbd().display(),
                self.mover().display()
            ),
        )
        .into())
    }
}

/// Where the sockets are, or were, of machines that have this target among their disks.
pub(super) fn of_machines_with(target: &Path) -> anyhow::Result<Vec<Sockets>> {
    machines_with(&root(), target)
}

fn machines_with(root: &Path, target: &Path) -> anyhow::Result<Vec<Sockets>> {
    let target = absolute(target)?;
    // Known without a note too.
    let first = Sockets::at(root, &target)?;
    // There may never have been a machine.
    let others = std::fs::read_dir(root).into_iter().flatten().flatten();
    let others = others.map(|entry| Sockets { dir: entry.path() }).filter(|other| other.dir != first.dir);
    let have_it = others.filter(|other| {
        other.noted().is_some_and(|note| note.disks.iter().any(|disk| disk.target == target))
    });
    let have_it: Vec<Sockets> = have_it.collect();
    Ok(std::iter::once(first).chain(have_it).collect())
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
    fn a_machine_is_found_by_any_of_its_targets() {
        let dir = tempfile::tempdir().unwrap();
        let target = |name: &str| absolute(&dir.path().join(name)).unwrap();
        for names in [["a", "b"], ["c", "d"]] {
            let sockets = Sockets::at(dir.path(), &target(names[0])).unwrap();
            make(&sockets.dir).unwrap();
            let disks = names.map(|name| NotedDisk { name: name.to_owned(), target: target(name) });
            let note = Note { version: VERSION, snapshot: "vm@latest".to_owned(), disks: disks.into() };
            replace(&sockets.dir.join(NOTE), &note).unwrap();
        }
        std::fs::write(dir.path().join("SESSION.lost"), "").unwrap();
        let found = |name: &str| -> Vec<PathBuf> {
            machines_with(dir.path(), &target(name)).unwrap().into_iter().map(|sockets| sockets.dir).collect()
        };
        let at = |name: &str| Sockets::at(dir.path(), &target(name)).unwrap().dir;
        assert_eq!(found("a"), [at("a")]);
        assert_eq!(found("b"), [at("b"), at("a")]);
        assert_eq!(found("d"), [at("d"), at("c")]);
        assert_eq!(found("e"), [at("e")]);
        Sockets { dir: at("a") }.remove();
        assert_eq!(found("b"), [at("b")]);
    }

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
