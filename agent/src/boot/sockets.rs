//! Where the sockets of a machine stand: in a directory for its first target, the same one at each run. Beside them is noted
//! which disks the machine has ([`super::note`]), so that whoever meets any of them finds it too.
//!
//! Where such directories stand depends on who runs `boot`, and from where: with a login's runtime directory or without. So each
//! session's directory says where its machine's is, and the usual places are all looked at.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rustix::io::FdFlags;
use serde::{Deserialize, Serialize};

use super::note::{self, Note, Origin, Sought};
use crate::cli::Failure;
use crate::live_restore::{Service, absolute, replace};
use crate::private_dir;

/// The file that says which disks the machine has.
pub(crate) const NOTE: &str = "machine.json";
/// The file that the machine's QEMU holds a lock on for as long as it lives.
const LOCK: &str = "machine.lock";

/// Where all users' runtime directories are.
const RUN: &str = "/run";

/// What stands in a session's directory, under the name of a note: where the sockets of its machine are.
#[derive(Serialize, Deserialize)]
struct Pointer {
    version: u32,
    sockets: PathBuf,
}

const POINTER_VERSION: u32 = 1;

/// The directory of a machine's sockets.
#[derive(Debug)]
pub(super) struct Sockets {
    dir: PathBuf,
}

impl Sockets {
    /// Those of the machine whose first target this is, which no machine has. The directory is made, for us alone.
    pub(super) fn of(target: &Path) -> anyhow::Result<Self> {
        Self::below(&root(), target)
    }

    fn below(root: &Path, target: &Path) -> anyhow::Result<Self> {
        let name = name_for(&absolute(target)?);
        let further = (2_u64..).map(|number| format!("{name}-{number}"));
        let names = std::iter::once(name.clone()).chain(further);
        let mut all = names.map(|name| Self { dir: root.join(name) });
        // A machine may still run whose disk had this path when it was booted.
        let sockets = all.find(|sockets| !sockets.is_used()).expect("the numbers do not end");
        for dir in [root, &sockets.dir] {
            make(dir).with_context(|| format!("cannot make {} for the machine's sockets", dir.display()))?;
        }
        Ok(sockets)
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

    /// Notes which disks the machine has that is about to be started, and with the session of each where that is noted.
    pub(super) fn note(&self, service: &Service, origin: &Origin) -> anyhow::Result<()> {
        write(&self.dir.join(NOTE), &Note::of(service.disks(), origin))?;
        let pointer = Pointer { version: POINTER_VERSION, sockets: self.dir.clone() };
        service.disks().iter().try_for_each(|disk| write(&disk.state.file(NOTE), &pointer))
    }

    /// Where the machine of the session in this directory has, or had, its sockets.
    fn of_session(dir: &Path) -> Option<Self> {
        let pointer: Pointer = serde_json::from_slice(&std::fs::read(dir.join(NOTE)).ok()?).ok()?;
        (pointer.version == POINTER_VERSION).then_some(Self { dir: pointer.sockets })
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

    /// Whether a machine is there.
    fn is_used(&self) -> bool {
        self.has_monitor() || self.is_locked()
    }

    /// Whether it cannot be told if a machine is there, as somebody else's directory is not ours to look into.
    fn is_hidden(&self) -> bool {
        let looked = std::fs::symlink_metadata(self.dir.join(LOCK));
        looked.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    }

    /// Whether the machine that is, or was, here has this disk. Where nothing is noted, `or` tells.
    fn has(&self, sought: &Sought, or: impl FnOnce() -> bool) -> bool {
        self.noted().map_or_else(or, |note| note.has(sought))
    }

    /// Removes what is left of a machine that has ended.
    pub(super) fn remove(&self) {
        for dir in self.noted().iter().flat_map(Note::sessions) {
            if Self::of_session(dir).is_some_and(|named| named.dir == self.dir) {
                forget(dir);
            }
        }
        // QEMU removes its sockets itself, unless it was killed.
        for file in [self.mover(), self.ender(), self.dir.join(NOTE), self.dir.join(LOCK)] {
            let _ = std::fs::remove_file(file);
        }
        let _ = std::fs::remove_dir(&self.dir);
    }

    /// Fails where a machine of an earlier run is still there, one of whose disks is `sought`, and says how it is gone on with.
    pub(super) fn check_unused(&self, sought: &Sought) -> anyhow::Result<()> {
        if self.is_hidden() {
            return Err(Failure::new(
                format!(
                    "it cannot be told whether the machine of {} still runs: {} may not be looked into",
                    sought.target.display(),
                    self.dir.display()
                ),
                "run the same command as root, or as who booted the machine",
            )
            .into());
        }
        // Whatever it says, or does not say, somebody is there.
        if !self.is_used() {
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
                "if its lifeboot was killed, go on with {}; else end it first",
                self.going_on(noted, sought)
            ),
        )
        .into())
    }

    /// The command that goes on with a machine whose `boot` was killed, and what must be put in.
    fn going_on(&self, noted: Option<Note>, sought: &Sought) -> String {
        let (nbd, qmp) = (self.nbd(), self.mover());
        match noted {
            Some(note) => {
                let line = note.going_on(sought, &nbd, &qmp);
                format!("`{line}`{}", note.to_be_put_in(sought))
            }
            None => format!("`{}`", note::going_on_with_unknown(sought, &nbd, &qmp)),
        }
    }
}

/// What directories are called whose machine's first target this is.
fn name_for(target: &Path) -> String {
    format!("{:08x}", crc32fast::hash(target.as_os_str().as_encoded_bytes()))
}

fn write(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    replace(path, value).with_context(|| format!("cannot write {}", path.display()))
}

/// Removes what says with the session in `dir` where its machine's sockets are: that machine has ended, or needs the session no more.
pub(super) fn forget(dir: &Path) {
    // It may never have been there.
    let _ = std::fs::remove_file(dir.join(NOTE));
}

/// Where the sockets are, or were, of machines that have this disk.
pub(super) fn of_machines_with(sought: &Sought) -> Vec<Sockets> {
    machines_with(&places(Path::new(RUN)), sought)
}

fn machines_with(places: &[PathBuf], sought: &Sought) -> Vec<Sockets> {
    // Wherever that is. One that notes nothing was the session's when that was written.
    let of_session = sought.dir.as_deref().and_then(Sockets::of_session).filter(|it| it.has(sought, || true));
    let entries = places.iter().flat_map(|place| std::fs::read_dir(place).into_iter().flatten().flatten());
    let name = name_for(&sought.target);
    let has_it = |it: &Sockets| it.has(sought, || it.dir.file_name().is_some_and(|it| *it == *name));
    let believed = believed(sought);
    let others = entries.map(|entry| Sockets { dir: entry.path() });
    let others =
        others.filter(|it| owner(&it.dir).is_some_and(|owner| believed.contains(&owner))).filter(has_it);
    of_session.into_iter().chain(others).collect()
}

/// Whose notes are believed of this disk: ours, root's, and those of whom it belongs to. Anybody else could say that he has a machine on it.
fn believed(sought: &Sought) -> Vec<u32> {
    let its = [Some(&*sought.target), sought.dir.as_deref()].into_iter().flatten().filter_map(owner);
    [rustix::process::geteuid().as_raw(), 0].into_iter().chain(its).collect()
}

fn owner(path: &Path) -> Option<u32> {
    std::fs::metadata(path).ok().map(|metadata| metadata.uid())
}

/// Where such directories may stand, whoever made them: where ours do, root's, and those of everybody's logins that we may look into.
fn places(run: &Path) -> Vec<PathBuf> {
    let users = std::fs::read_dir(run.join("user")).into_iter().flatten().flatten();
    let users = users.map(|user| user.path());
    let others = std::iter::once(run.to_owned()).chain(users).map(|dir| dir.join("lifeboot"));
    std::iter::once(root()).chain(others).collect()
}

/// Where our directories stand: a unix socket's path has 107 bytes at most.
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

    fn at(place: &Path, target: &Path) -> PathBuf {
        place.join(name_for(&absolute(target).unwrap()))
    }

    #[test]
    fn a_machine_is_found_by_any_of_its_targets_in_any_place() {
        let dir = tempfile::tempdir().unwrap();
        let target = |name: &str| absolute(&dir.path().join(name)).unwrap();
        let run = dir.path().join("run");
        let [of_root, of_user] = ["lifeboot", "user/1000/lifeboot"].map(|place| run.join(place));
        for (place, names) in [(&of_root, ["a", "b"]), (&of_user, ["c", "d"])] {
            std::fs::create_dir_all(place).unwrap();
            let sockets = Sockets { dir: at(place, &target(names[0])) };
            make(&sockets.dir).unwrap();
            let disks = names.map(target);
            let disks: Vec<_> = names.into_iter().zip(disks.iter().map(PathBuf::as_path)).collect();
            replace(&sockets.dir.join(NOTE), &note::tests::note(&disks)).unwrap();
        }
        std::fs::write(of_root.join("SESSION.lost"), "").unwrap();
        let places = &places(&run)[1..];
        let found_by = |sought: &Sought| -> Vec<PathBuf> {
            machines_with(places, sought).into_iter().map(|sockets| sockets.dir).collect()
        };
        let found = |name: &str| found_by(&Sought::at(&target(name)).unwrap());
        let (of_a, of_c) = (at(&of_root, &target("a")), at(&of_user, &target("c")));
        assert_eq!([found("a"), found("b")], [[of_a.clone()], [of_a.clone()]]);
        assert_eq!([found("c"), found("d")], [[of_c.clone()], [of_c]]);
        assert!(found("e").is_empty());
        Sockets { dir: of_a }.remove();
        assert!(found("b").is_empty());
        // Nothing is noted.
        let of_e = at(&of_user, &target("e"));
        make(&of_e).unwrap();
        assert_eq!(found("e"), [of_e]);
        // Where nobody looks, with a session.
        let (hidden, session) = (dir.path().join("hidden"), dir.path().join("session"));
        for dir in [&hidden, &session] {
            make(dir).unwrap();
        }
        replace(&session.join(NOTE), &Pointer { version: 1, sockets: hidden.clone() }).unwrap();
        let sought = || Sought::at(&target("f")).unwrap().with_session(None, &session);
        assert_eq!(found_by(&sought()), std::slice::from_ref(&hidden));
        let note = |name: &str| note::tests::note(&[(name, &target(name))]);
        replace(&hidden.join(NOTE), &note("f")).unwrap();
        assert_eq!(found_by(&sought()), std::slice::from_ref(&hidden));
        replace(&hidden.join(NOTE), &note("g")).unwrap();
        assert!(found_by(&sought()).is_empty(), "another machine's by now");
        forget(&session);
        assert!(!session.join(NOTE).exists());
    }

    #[test]
    fn somebody_elses_note_is_believed_of_what_is_his_alone() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a.raw");
        std::fs::write(&target, "").unwrap();
        let sockets = Sockets::below(dir.path(), &target).unwrap();
        replace(&sockets.dir.join(NOTE), &note::tests::note(&[("a", &target)])).unwrap();
        let is_found = || !machines_with(&[dir.path().to_owned()], &Sought::at(&target).unwrap()).is_empty();
        let give = |path: &Path| std::os::unix::fs::chown(path, Some(12_345), None).unwrap();
        assert!(is_found());
        give(&sockets.dir);
        assert!(!is_found());
        give(&target);
        assert!(is_found());
    }

    #[test]
    fn a_directory_that_a_machine_uses_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (place, target) = (dir.path().join("lifeboot"), dir.path().join("a.raw"));
        let of = || Sockets::below(&place, &target).unwrap();
        let first = of();
        assert_eq!((&first.dir, &of().dir), (&at(&place, &target), &first.dir));
        let lock = first.lock().unwrap();
        let name = format!("{}-2", first.dir.file_name().unwrap().display());
        assert_eq!(of().dir, place.join(name));
        drop(lock);
        assert_eq!(of().dir, first.dir);
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
