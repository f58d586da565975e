//! Where the sockets of a machine stand: in a directory for its first target, the same one at each run. Beside them is noted
//! which disks the machine has, so that whoever meets another of its targets finds it too.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rustix::io::FdFlags;
use serde::{Deserialize, Serialize};

use crate::cli::Failure;
use crate::live_restore::{Service, absolute, replace, shell_line};
use crate::private_dir;

/// The file that says which disks the machine has.
const NOTE: &str = "machine.json";
/// The file that the machine's QEMU holds a lock on for as long as it lives.
const LOCK: &str = "machine.lock";
const VERSION: u32 = 1;

/// Which disks a machine has.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    version: u32,
    /// What it was booted from, by its full name.
    snapshot: String,
    disks: Vec<NotedDisk>,
    #[serde(flatten)]
    origin: Origin,
}

/// What `boot` was told that a command which goes on is told too. All of it is absolute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Origin {
    /// `None` of a machine that was booted before this was noted.
    repository: Option<PathBuf>,
    state: Option<PathBuf>,
    #[serde(default)]
    fallbacks: Vec<PathBuf>,
}

impl Origin {
    /// Of these paths, which may be relative to where we are.
    pub(super) fn of(repository: &Path, state: Option<&Path>, fallbacks: &[PathBuf]) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self {
            repository: Some(absolute(repository)),
            state: state.map(absolute),
            fallbacks: fallbacks.iter().map(|path| absolute(path)).collect(),
        }
    }
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

    /// Whether QEMU has made the monitor that moves drives.
    pub(super) fn has_monitor(&self) -> bool {
        crate::pivot::is_there(&self.mover())
    }

    /// Notes which disks the machine has that is about to be started.
    pub(super) fn note(&self, service: &Service, origin: &Origin) -> anyhow::Result<()> {
        let disks = service.disks().iter().map(|disk| &disk.record);
        let note = Note {
            version: VERSION,
            snapshot: disks.clone().next().map(|record| record.snapshot.clone()).unwrap_or_default(),
            disks: disks
                .map(|record| NotedDisk { name: record.disk.clone(), target: record.target.clone() })
                .collect(),
            origin: origin.clone(),
        };
        let path = self.dir.join(NOTE);
        replace(&path, &note).with_context(|| format!("cannot write {}", path.display()))
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
        let note: Note = serde_json::from_slice(&std::fs::read(self.dir.join(NOTE)).ok()?).ok()?;
        (note.version == VERSION).then_some(note)
    }

    /// Removes what is left of a machine that has ended.
    pub(super) fn remove(&self) {
        // QEMU removes its sockets itself, unless it was killed.
        for file in [self.mover(), self.ender(), self.dir.join(NOTE), self.dir.join(LOCK)] {
            let _ = std::fs::remove_file(file);
        }
        let _ = std::fs::remove_dir(&self.dir);
    }

    /// Fails where a machine of an earlier run is still there, one of whose disks is `target`, and says how it is gone on with.
    pub(super) fn check_unused(&self, target: &Path) -> anyhow::Result<()> {
        // Whatever it says, or does not say, somebody is there.
        if !self.has_monitor() && !self.is_locked() {
            return Ok(());
        }
        Err(Failure::new(
            format!("the machine of {} still runs from an earlier `lifeboot boot`", target.display()),
            format!(
                "if its lifeboot was killed, go on with `{}`; else end it first",
                self.going_on(self.noted(), target)
            ),
        )
        .into())
    }

    /// The command that goes on with a machine whose `boot` was killed.
    fn going_on(&self, noted: Option<Note>, target: &Path) -> String {
        let text = |path: &Path| path.display().to_string();
        let (disks, origin) = match noted {
            Some(Note { snapshot, disks, origin, .. }) => (named(&snapshot, &disks), origin),
            None => (vec!["SNAPSHOT".to_owned(), text(target)], Origin::default()),
        };
        let repository = origin.repository.map_or_else(|| "REPO".to_owned(), |path| text(&path));
        let mut words: Vec<String> = ["lifeboot", "live-restore", "-r"].map(str::to_owned).into();
        words.push(repository);
        words.extend(disks);
        let states = origin.state.iter().map(|path| ("--state", path));
        for (option, path) in states.chain(origin.fallbacks.iter().map(|path| ("--fallback", path))) {
            words.extend([option.to_owned(), text(path)]);
        }
        words.extend(["--listen".to_owned(), format!("unix:{}", text(&self.nbd()))]);
        words.extend(["--qmp".to_owned(), text(&self.mover())]);
        shell_line(&words)
    }
}

/// The snapshot of these disks, and the target of each.
fn named(snapshot: &str, disks: &[NotedDisk]) -> Vec<String> {
    if let [one] = disks {
        return vec![format!("{snapshot}/{}", one.name), one.target.display().to_string()];
    }
    let targets = disks.iter().map(|disk| format!("{}={}", disk.name, disk.target.display()));
    std::iter::once(snapshot.to_owned()).chain(targets).collect()
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
            let (snapshot, origin) = ("vm@latest".to_owned(), Origin::default());
            let note = Note { version: VERSION, snapshot, disks: disks.into(), origin };
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
    fn the_command_that_goes_on_is_one_that_can_be_typed() {
        let sockets = Sockets { dir: "/run/lifeboot/1".into() };
        let disk = |name: &str, target: &str| NotedDisk { name: name.to_owned(), target: target.into() };
        let note = |disks, origin| Note { version: VERSION, snapshot: "vm@t".to_owned(), disks, origin };
        let origin = Origin::of(Path::new("/my backup"), Some(Path::new("/st'ate")), &["/copy".into()]);
        let both = note(vec![disk("a", "/v/a b.raw"), disk("c", "/v/c.raw")], origin);
        assert_eq!(
            sockets.going_on(Some(both), Path::new("/v/c.raw")),
            concat!(
                r"lifeboot live-restore -r '/my backup' vm@t 'a=/v/a b.raw' c=/v/c.raw --state '/st'\''ate' --fallback /copy ",
                "--listen unix:/run/lifeboot/1/nbd.sock --qmp /run/lifeboot/1/qmp.sock"
            )
        );
        let one = note(vec![disk("a", "/v/a.raw")], Origin::of(Path::new("/b"), None, &[]));
        let text = String::from_utf8(serde_json::to_vec(&one).unwrap()).unwrap();
        let line = sockets.going_on(serde_json::from_str(&text).unwrap(), Path::new("/v/a.raw"));
        assert!(line.starts_with("lifeboot live-restore -r /b vm@t/a /v/a.raw --listen "), "{line}");
        // As an older one wrote it.
        let older = r#"{ "version": 1, "snapshot": "vm@t", "disks": [] }"#;
        assert!(serde_json::from_str::<Note>(older).unwrap().origin.repository.is_none());
    }

    #[test]
    fn a_machine_is_there_from_its_start_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let sockets = Sockets { dir: dir.path().to_owned() };
        let target = Path::new("/v/a.raw");
        sockets.check_unused(target).unwrap();
        let lock = sockets.lock().unwrap();
        let mut machine = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        drop(lock);
        let error = sockets.check_unused(target).unwrap_err();
        assert!(error.to_string().contains("still runs"), "{error:#}");
        machine.kill().unwrap();
        machine.wait().unwrap();
        sockets.check_unused(target).unwrap();
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
