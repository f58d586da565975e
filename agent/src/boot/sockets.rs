//! Where the sockets of a machine stand: in a directory for its first target, the same one at each run. Beside them is noted
//! which disks the machine has ([`super::note`]), so that whoever meets any of them finds it too.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rustix::io::FdFlags;

use super::note::{self, Note, Origin, Sought};
use crate::cli::Failure;
use crate::live_restore::{Service, absolute, replace};
use crate::private_dir;

/// The file that says which disks the machine has.
const NOTE: &str = "machine.json";
/// The file that the machine's QEMU holds a lock on for as long as it lives.
const LOCK: &str = "machine.lock";

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

    /// Whether QEMU has made the monitor that moves drives.
    pub(super) fn has_monitor(&self) -> bool {
        crate::pivot::is_there(&self.mover())
    }

    /// Notes which disks the machine has that is about to be started.
    pub(super) fn note(&self, service: &Service, origin: &Origin) -> anyhow::Result<()> {
        let path = self.dir.join(NOTE);
        replace(&path, &Note::of(service.disks(), origin))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// A lock that whoever is started while this lives inherits, and holds from the moment at which there is a process of it: its monitor
    /// comes later.
    pub(super) fn lock(&self) -> anyhow::Result<File> {
        let path = self.dir.join(LOCK);
        let locked = (|| {
            let file = File::options().write(true).create(true).truncate(false).open(&path)?;
            file.lock_shared()?;
            rustix::io::fcntl_setfd(&file, FdFlags::empty())?;
            std::io::Result::Ok(file)
        })();
        locked.with_context(|| format!("cannot lock {}", path.display()))
    }

    fn is_locked(&self) -> bool {
        let Ok(file) = File::open(self.dir.join(LOCK)) else { return false };
        let is_held = || matches!(file.try_lock(), Err(TryLockError::WouldBlock));
        // Somebody else may be looking, which takes a moment.
        is_held() && {
            std::thread::sleep(Duration::from_millis(20));
            is_held()
        }
    }

    fn noted(&self) -> Option<Note> {
        Note::read(&self.dir.join(NOTE))
    }

    /// Removes what is left of a machine that has ended.
    pub(super) fn remove(&self) {
        // QEMU removes its sockets itself, unless it was killed.
        for file in [self.mover(), self.ender(), self.dir.join(NOTE), self.dir.join(LOCK)] {
            let _ = std::fs::remove_file(file);
        }
        let _ = std::fs::remove_dir(&self.dir);
    }

    /// Fails where a machine of an earlier run is still there, one of whose disks is `sought`, and says how it is gone on with.
    pub(super) fn check_unused(&self, sought: &Sought) -> anyhow::Result<()> {
        // Whatever it says, or does not say, somebody is there.
        if !self.has_monitor() && !self.is_locked() {
            return Ok(());
        }
        let noted = self.noted();
        let whose = match noted.as_ref().and_then(|note| note.earlier_place(sought)) {
            Some(place) => format!("this session, whose disk was {} when it was booted,", place.display()),
            None => sought.target.display().to_string(),
        };
        Err(Failure::new(
            format!("the machine of {whose} still runs from an earlier `lifeboot boot`"),
            format!(
                "if its lifeboot was killed, go on with `{}`; else end it first",
                self.going_on(noted, sought)
            ),
        )
        .into())
    }

    /// The command that goes on with a machine whose `boot` was killed.
    fn going_on(&self, noted: Option<Note>, sought: &Sought) -> String {
        let (nbd, qmp) = (self.nbd(), self.mover());
        match noted {
            Some(note) => note.going_on(sought, &nbd, &qmp),
            None => note::going_on_with_unknown(sought, &nbd, &qmp),
        }
    }
}

/// Where the sockets are, or were, of machines that have this disk.
pub(super) fn of_machines_with(sought: &Sought) -> anyhow::Result<Vec<Sockets>> {
    machines_with(&root(), sought)
}

fn machines_with(root: &Path, sought: &Sought) -> anyhow::Result<Vec<Sockets>> {
    // Known without a note too.
    let first = Sockets::at(root, &sought.target)?;
    // There may never have been a machine.
    let others = std::fs::read_dir(root).into_iter().flatten().flatten();
    let others = others.map(|entry| Sockets { dir: entry.path() }).filter(|other| other.dir != first.dir);
    let have_it = others.filter(|other| other.noted().is_some_and(|note| note.has(sought)));
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
            let disks = names.map(target);
            let disks: Vec<_> = names.into_iter().zip(disks.iter().map(PathBuf::as_path)).collect();
            replace(&sockets.dir.join(NOTE), &note::tests::note(&disks)).unwrap();
        }
        std::fs::write(dir.path().join("SESSION.lost"), "").unwrap();
        let found = |name: &str| -> Vec<PathBuf> {
            let sought = Sought::at(&target(name)).unwrap();
            machines_with(dir.path(), &sought).unwrap().into_iter().map(|sockets| sockets.dir).collect()
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
    fn a_machine_is_there_from_its_start_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let sockets = Sockets { dir: dir.path().to_owned() };
        let sought = &Sought::at(&dir.path().join("a.raw")).unwrap();
        sockets.check_unused(sought).unwrap();
        let lock = sockets.lock().unwrap();
        let mut machine = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        drop(lock);
        let error = sockets.check_unused(sought).unwrap_err();
        assert!(error.to_string().contains("still runs"), "{error:#}");
        machine.kill().unwrap();
        machine.wait().unwrap();
        sockets.check_unused(sought).unwrap();
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
