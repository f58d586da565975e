//! What is noted of a machine beside its sockets: which disks it has, and what a command that goes on with them is told.
//!
//! A disk is known by what it is, as its session is: a file may be renamed or have several names, and a device's path lead to another
//! one. So the machine that waits for an agent is found by its disk's path, by the target's identity, and by its session.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::live_restore::{ServedDisk, TargetIdentity, absolute, name_of_directory, shell_line};

const VERSION: u32 = 1;

/// Which disks a machine has.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Note {
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

#[derive(Debug, Serialize, Deserialize)]
struct NotedDisk {
    name: String,
    /// Where it was when the machine was booted.
    target: PathBuf,
    /// `None` of a machine that was booted before this was noted, as is the session.
    #[serde(default)]
    identity: Option<TargetIdentity>,
    #[serde(default)]
    session: Option<NotedSession>,
}

#[derive(Debug, Serialize, Deserialize)]
struct NotedSession {
    /// Its id, which copies of it have too.
    id: String,
    dir: PathBuf,
    /// What its directory is, by whatever name.
    directory: Option<String>,
}

/// The disk that somebody asks about, who does not know whether a machine has it.
pub(super) struct Sought {
    /// Where it is said to be.
    pub(super) target: PathBuf,
    /// What stands there.
    identity: Option<TargetIdentity>,
    session: Option<String>,
    /// The session's directory.
    pub(super) dir: Option<PathBuf>,
    /// What that is.
    directory: Option<String>,
}

impl Sought {
    /// What stands at this path.
    pub(super) fn at(target: &Path) -> anyhow::Result<Self> {
        let target = absolute(target)?;
        let identity = TargetIdentity::at(&target).ok().flatten();
        Ok(Self { target, identity, session: None, dir: None, directory: None })
    }

    /// Whatever stands there, with the session in `dir`.
    pub(super) fn with_session(self, session: Option<&str>, dir: &Path) -> Self {
        let (session, directory) = (session.map(str::to_owned), name_of_directory(dir));
        Self { session, dir: Some(dir.to_owned()), directory, ..self }
    }

    /// The target that the session's directory is beside, if that tells: it may have been renamed together with it.
    fn beside(&self) -> Option<PathBuf> {
        let dir =
            self.dir.as_deref().filter(|dir| dir.extension().is_some_and(|suffix| suffix == "lifeboot"))?;
        absolute(&dir.with_extension("")).ok()
    }
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

impl Note {
    /// Of a machine with these disks.
    pub(super) fn of(disks: &[ServedDisk], origin: &Origin) -> Self {
        Self {
            version: VERSION,
            snapshot: disks.first().map(|disk| disk.record.snapshot.clone()).unwrap_or_default(),
            disks: disks.iter().map(NotedDisk::of).collect(),
            origin: origin.clone(),
        }
    }

    /// What is noted in this file, where that is understood.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let note: Self = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        (note.version == VERSION).then_some(note)
    }

    /// Whether the machine has this disk.
    pub(super) fn has(&self, sought: &Sought) -> bool {
        self.disks.iter().any(|disk| disk.is(sought))
    }

    /// Where the disk was when the machine was booted, if that is elsewhere than where it is sought.
    pub(super) fn earlier_place(&self, sought: &Sought) -> Option<&Path> {
        let disk = self.disks.iter().find(|disk| disk.is(sought))?;
        (disk.target != sought.target).then_some(&*disk.target)
    }

    /// Where the sessions of its disks were when it was booted.
    pub(super) fn sessions(&self) -> impl Iterator<Item = &Path> {
        self.disks.iter().filter_map(|disk| Some(&*disk.session.as_ref()?.dir))
    }

    /// What that command leaves to be put in, as nobody knows it.
    pub(super) fn to_be_put_in(&self, sought: &Sought) -> String {
        let strayed = self.disks.iter().filter(|disk| disk.place(sought).is_none());
        strayed.map(NotedDisk::strayed).collect()
    }

    /// The command that goes on with the machine, one of whose disks is sought, at these sockets.
    pub(super) fn going_on(&self, sought: &Sought, nbd: &Path, qmp: &Path) -> String {
        let Self { snapshot, disks, origin, .. } = self;
        line(origin, named(snapshot, disks, sought), nbd, qmp)
    }
}

/// The same of a machine of which nothing is noted.
pub(super) fn going_on_with_unknown(sought: &Sought, nbd: &Path, qmp: &Path) -> String {
    let disks = vec!["SNAPSHOT".to_owned(), text(&sought.target)];
    line(&Origin::default(), disks, nbd, qmp)
}

fn line(origin: &Origin, disks: Vec<String>, nbd: &Path, qmp: &Path) -> String {
    let mut words: Vec<String> = ["lifeboot", "live-restore", "-r"].map(str::to_owned).into();
    words.push(origin.repository.as_deref().map_or_else(|| "REPO".to_owned(), text));
    words.extend(disks);
    let states = origin.state.iter().map(|path| ("--state", path));
    for (option, path) in states.chain(origin.fallbacks.iter().map(|path| ("--fallback", path))) {
        words.extend([option.to_owned(), text(path)]);
    }
    words.extend(["--listen".to_owned(), format!("unix:{}", text(nbd))]);
    words.extend(["--qmp".to_owned(), text(qmp)]);
    shell_line(&words)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The snapshot of these disks, and the target of each.
fn named(snapshot: &str, disks: &[NotedDisk], sought: &Sought) -> Vec<String> {
    if let [one] = disks {
        return vec![format!("{snapshot}/{}", one.name), one.place_or_none(sought)];
    }
    let targets = disks.iter().map(|disk| format!("{}={}", disk.name, disk.place_or_none(sought)));
    std::iter::once(snapshot.to_owned()).chain(targets).collect()
}

impl NotedDisk {
    fn of(disk: &ServedDisk) -> Self {
        let dir = disk.state.path();
        Self {
            name: disk.record.disk.clone(),
            target: disk.record.target.clone(),
            identity: Some(disk.record.identity.clone()),
            session: Some(NotedSession {
                id: disk.record.session.clone(),
                dir: std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned()),
                directory: name_of_directory(dir),
            }),
        }
    }

    fn is(&self, sought: &Sought) -> bool {
        let identities = self.identity.as_ref().zip(sought.identity.as_ref());
        // A size alone is that of many.
        let named = identities.filter(|(ours, there)| ours.name.is_some() && there.name.is_some());
        let is_target = match named {
            Some((ours, there)) => ours.is_same(there),
            None => self.target == sought.target,
        };
        is_target || self.session.as_ref().is_some_and(|session| session.is(sought))
    }

    /// Where it is now, as far as that can be told.
    fn place(&self, sought: &Sought) -> Option<String> {
        let Some(identity) = &self.identity else { return Some(text(&self.target)) };
        let beside = sought.beside();
        let mut places = [&self.target, &sought.target].into_iter().chain(&beside);
        places.find(|path| identity.is_at(path) == Some(true)).map(|path| text(path))
    }

    fn place_or_none(&self, sought: &Sought) -> String {
        self.place(sought).unwrap_or_else(|| "TARGET".to_owned())
    }

    /// Which disk is meant by a target that nobody knows the place of.
    fn strayed(&self) -> String {
        let what = self.identity.as_ref().map(|identity| format!(" ({identity})")).unwrap_or_default();
        format!(
            ", where TARGET is what the disk {} is called now that was {}{what} when the machine was booted",
            self.name,
            text(&self.target)
        )
    }
}

impl NotedSession {
    /// Whether it is the one that is sought, and not the original of a copy.
    fn is(&self, sought: &Sought) -> bool {
        let is_here = self.directory.is_some() && self.directory == sought.directory;
        let is_elsewhere = || self.directory.is_some() && name_of_directory(&self.dir) == self.directory;
        is_here || (sought.session.as_ref() == Some(&self.id) && !is_elsewhere())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A machine with disks of these names and paths, of which nothing more is known.
    pub(crate) fn note(disks: &[(&str, &Path)]) -> Note {
        noted(disks.iter().map(|(name, target)| disk(name, target)).collect(), Origin::default())
    }

    fn noted(disks: Vec<NotedDisk>, origin: Origin) -> Note {
        Note { version: VERSION, snapshot: "vm@t".to_owned(), disks, origin }
    }

    fn disk(name: &str, target: &Path) -> NotedDisk {
        NotedDisk { name: name.to_owned(), target: target.to_owned(), identity: None, session: None }
    }

    fn going_on(note: &Note, target: &Path) -> String {
        let target = target.to_owned();
        let sought = Sought { target, identity: None, session: None, dir: None, directory: None };
        note.going_on(&sought, Path::new("/run/n.sock"), Path::new("/run/q.sock"))
    }

    #[test]
    fn the_command_that_goes_on_is_one_that_can_be_typed() {
        let origin = Origin::of(Path::new("/my backup"), Some(Path::new("/st'ate")), &["/copy".into()]);
        let (a, c) = (Path::new("/v/a b.raw"), Path::new("/v/c.raw"));
        let both = noted(vec![disk("a", a), disk("c", c)], origin);
        assert_eq!(
            going_on(&both, c),
            concat!(
                r"lifeboot live-restore -r '/my backup' vm@t 'a=/v/a b.raw' c=/v/c.raw --state '/st'\''ate' --fallback /copy ",
                "--listen unix:/run/n.sock --qmp /run/q.sock"
            )
        );
        let one = noted(vec![disk("a", a)], Origin::of(Path::new("/b"), None, &[]));
        let text = String::from_utf8(serde_json::to_vec(&one).unwrap()).unwrap();
        let line = going_on(&serde_json::from_str(&text).unwrap(), a);
        assert!(line.starts_with("lifeboot live-restore -r /b vm@t/a '/v/a b.raw' --listen "), "{line}");
        // As an older one wrote it.
        let older = r#"{ "version": 1, "snapshot": "vm@t", "disks": [{ "name": "a", "target": "/v/a" }] }"#;
        let older: Note = serde_json::from_str(older).unwrap();
        assert!(going_on(&older, Path::new("/v/a")).contains("-r REPO vm@t/a /v/a --listen"));
    }

    #[test]
    fn a_disk_is_known_by_what_it_is_and_by_its_session_wherever_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
        let (target, session) = (path("a.raw"), path("a.session"));
        std::fs::write(&target, "a disk").unwrap();
        std::fs::create_dir(&session).unwrap();
        let identity = TargetIdentity::at(&target).unwrap();
        let directory = name_of_directory(&session);
        let noted_session = NotedSession { id: "1".into(), dir: session.clone(), directory };
        let noted_disk = NotedDisk { identity, session: Some(noted_session), ..disk("a", &target) };
        let machine = noted(vec![noted_disk], Origin::default());
        let sought =
            |target: &str, dir: &str| Sought::at(&path(target)).unwrap().with_session(Some("1"), &path(dir));
        let line = |sought: &Sought| machine.going_on(sought, Path::new("/n"), Path::new("/q"));
        // A copy of both is another machine's.
        std::fs::copy(&target, path("copy.raw")).unwrap();
        std::fs::create_dir(path("copy.session")).unwrap();
        assert!(!machine.has(&sought("copy.raw", "copy.session")));
        // Another disk under its session's, as where the target's path leads elsewhere.
        let elsewhere = sought("copy.raw", "a.session");
        assert!(machine.has(&elsewhere) && line(&elsewhere).contains(target.to_str().unwrap()));
        std::fs::rename(&target, path("b.raw")).unwrap();
        std::fs::rename(&session, path("b.session")).unwrap();
        let renamed = sought("b.raw", "b.session");
        assert!(machine.has(&renamed) && line(&renamed).contains(path("b.raw").to_str().unwrap()));
        assert_eq!(machine.earlier_place(&renamed), Some(&*target));
        assert!(machine.has(&sought("b.raw", "nothing")), "by the target");
        assert!(machine.has(&sought("nothing", "b.session")), "by the session");
        assert!(line(&sought("nothing", "b.session")).contains(" TARGET "), "nobody knows where it is");
        let damaged = Sought::at(&path("nothing")).unwrap().with_session(None, &path("b.session"));
        assert!(machine.has(&damaged), "by the directory of a session that cannot be read");
        // Moved to another file system, both of them.
        std::fs::remove_dir(path("b.session")).unwrap();
        assert!(machine.has(&sought("copy.raw", "copy.session")));
    }
}
