//! Leases: who needs a snapshot, so that nobody removes it, or what it is made of, from under them.
//!
//! A live-restore leaves one while it still needs the repository, and renews it; whoever removes snapshots or packs asks first. A lease that
//! nobody renews ends by itself, so that a machine that burnt down holds nothing for ever. Clocks of different machines differ: a lease is
//! taken for one that ended only some time after it did, and never begins before the snapshot that it names.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::frame::{self, Document};
use crate::id::SegmentId;
use crate::name::{DiskName, SnapshotName};
use crate::repository::Repository;
use crate::storage::{WriteHint, read_all};

/// The directory of leases.
pub(crate) const DIR: &str = "leases";
/// How long a lease holds unless it is renewed.
pub const LEASE_SPAN: SignedDuration = SignedDuration::from_hours(7 * 24);
/// How much later than it says a lease is taken for one that ended.
pub const LEASE_SLACK: SignedDuration = SignedDuration::from_hours(24);
/// Digits of a session's id, and of what tells its leases apart.
const ID_DIGITS: usize = 32;
/// How often the directory is listed again because a lease was renewed while it was read.
const LISTED_AGAIN: usize = 8;

/// That somebody needs a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    features: Vec<String>,
    /// The session of the live-restore that needs it: 32 hexadecimal digits.
    pub session: String,
    /// The full name of the snapshot, `GROUP@TIME`.
    pub snapshot: String,
    /// The disk of it.
    pub disk: DiskName,
    /// Where the live-restore runs.
    pub host: String,
    /// When the lease was first left.
    pub since: Timestamp,
    /// When it was renewed last.
    pub renewed: Timestamp,
    /// When it ends unless it is renewed.
    pub expires: Timestamp,
}

impl Lease {
    /// A lease of a session on a disk of a snapshot, from `now` on.
    pub fn new(session: &str, snapshot: &SnapshotName, disk: DiskName, host: &str, now: Timestamp) -> Self {
        // A clock that was never set does not end it before it begins.
        let since = now.max(snapshot.time());
        Self {
            features: Vec::new(),
            session: session.to_owned(),
            snapshot: snapshot.to_string(),
            disk,
            host: host.to_owned(),
            since,
            renewed: since,
            expires: after(since),
        }
    }

    /// The same, renewed: for [`LEASE_SPAN`] from `now` on. A clock that was set back makes it no shorter.
    pub fn renewed(&self, now: Timestamp) -> Self {
        let renewed = now.max(self.renewed);
        Self { renewed, expires: after(renewed), ..self.clone() }
    }

    /// Whether it has ended, beyond what clocks may differ by.
    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.expires.checked_add(LEASE_SLACK).is_ok_and(|end| end < now)
    }

    /// Its file.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        self.check(&self.session).map_err(|how| Error::invalid(format!("this cannot be a lease: {how}")))?;
        frame::encode(Document::Lease, self)
    }

    /// What stands in a file whose name says that it is a lease of this session.
    pub(crate) fn decode(bytes: &[u8], session: &str) -> Result<Self> {
        let lease: Self = frame::decode(Document::Lease, bytes)?;
        match lease.check(session) {
            Ok(()) => Ok(lease),
            Err(how) => Err(Error::damaged(format!("the lease cannot be: {how}"))),
        }
    }

    fn check(&self, session: &str) -> std::result::Result<(), String> {
        if self.session != session || !is_id(&self.session) {
            return Err(format!("it names the session {:?}", self.session));
        }
        if self.snapshot.parse::<SnapshotName>().is_err() {
            return Err(format!("it names the snapshot {:?}", self.snapshot));
        }
        if self.since > self.renewed || self.renewed > self.expires {
            return Err("its times are in no order".to_owned());
        }
        Ok(())
    }
}

fn after(time: Timestamp) -> Timestamp {
    time.checked_add(LEASE_SPAN).unwrap_or(Timestamp::MAX)
}

/// The leases that there are.
#[derive(Debug, Default)]
pub struct Leases {
    /// Those that hold, in the order of their sessions.
    pub live: Vec<Lease>,
    /// Those that nobody has renewed in time: they hold nothing.
    pub expired: Vec<Lease>,
    /// Those that cannot be understood, and why. They may hold any snapshot.
    pub unreadable: Vec<Error>,
}

impl Leases {
    /// The snapshots that somebody needs: roots, for whoever collects garbage.
    ///
    /// # Errors
    /// Where a lease cannot be understood: then nothing may be removed.
    pub fn held(&self) -> Result<BTreeSet<SnapshotName>> {
        if let Some(error) = self.unreadable.first() {
            return Err(error.clone());
        }
        self.live.iter().map(|lease| lease.snapshot.parse()).collect()
    }

    /// Those that hold this snapshot.
    pub fn of<'a>(&'a self, snapshot: &SnapshotName) -> impl Iterator<Item = &'a Lease> {
        let name = snapshot.clone();
        // A time can be written in several ways.
        self.live
            .iter()
            .filter(move |lease| lease.snapshot.parse::<SnapshotName>().is_ok_and(|held| held == name))
    }
}

/// The session of a lease's file, and what tells its leases apart, newer ones being greater.
fn parts_of(file: &str) -> Option<(&str, &str)> {
    let (session, id) = file.strip_suffix(".lease")?.split_once('+')?;
    (is_id(session) && is_id(id)).then_some((session, id))
}

fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl Repository {
    /// Leaves a lease, or a renewed one in the place of those of its session.
    ///
    /// # Errors
    /// When it cannot be written: `NotPermitted` where the repository may only be read.
    pub fn keep_lease(&self, lease: &Lease) -> Result<()> {
        let bytes = lease.encode()?;
        let storage = &**self.storage();
        match storage.create_dir(DIR) {
            Ok(()) => storage.sync_dir(""),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
        }
        .map_err(|error| Error::io("cannot make the directory of leases", error).at(storage.describe(DIR)))?;
        let older = self.lease_files(&lease.session)?;
        let id = SegmentId::after(None)?;
        let (from, to) = (format!("tmp/{id}.lease"), format!("{DIR}/{}+{id}.lease", lease.session));
        let write = || {
            let mut file = storage.create(&from, WriteHint::Small)?;
            file.append(&bytes)?;
            file.sync()?;
            storage.publish(&from, &to)?;
            storage.sync_dir(DIR)
        };
        if let Err(error) = write() {
            let _ = storage.remove(&from);
            return Err(Error::io("cannot write a lease", error).at(storage.describe(&to)));
        }
        for file in older {
            // One that stays behind ends by itself.
            let _ = storage.remove(&format!("{DIR}/{file}"));
        }
        Ok(())
    }

    /// Removes the leases of a session; how many there were.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn remove_lease(&self, session: &str) -> Result<usize> {
        let files = self.lease_files(session)?;
        for file in &files {
            let path = format!("{DIR}/{file}");
            match self.storage().remove(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("cannot remove a lease", error).at(self.storage().describe(&path)));
                }
                _ => {}
            }
        }
        Ok(files.len())
    }

    /// The leases that there are, of each session the newest.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn leases(&self, now: Timestamp) -> Result<Leases> {
        let mut leases = Leases::default();
        let mut read = BTreeMap::new();
        for _ in 0..LISTED_AGAIN {
            let newest = self.newest_leases()?;
            let mut is_whole = true;
            read.retain(|session, (id, _)| newest.get(session).is_some_and(|newest| newest == id));
            for (session, id) in newest {
                if read.contains_key(&session) {
                    continue;
                }
                match self.read_lease(&session, &id) {
                    Some(lease) => drop(read.insert(session, (id, lease))),
                    // It was renewed, or removed, just now.
                    None => is_whole = false,
                }
            }
            if is_whole {
                break;
            }
        }
        for (_, lease) in read.into_values() {
            match lease {
                Ok(lease) if lease.has_expired(now) => leases.expired.push(lease),
                Ok(lease) => leases.live.push(lease),
                Err(error) => leases.unreadable.push(error),
            }
        }
        Ok(leases)
    }

    /// A lease; `None` where it is gone.
    fn read_lease(&self, session: &str, id: &str) -> Option<Result<Lease>> {
        let path = format!("{DIR}/{session}+{id}.lease");
        let bytes = match read_all(&**self.storage(), &path, frame::MAX_LEN) {
            Ok(Some(bytes)) => Ok(bytes),
            Ok(None) => Err(Error::damaged("the lease is too long")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => Err(Error::io("cannot read a lease", error)),
        };
        let lease = bytes.and_then(|bytes| Lease::decode(&bytes, session));
        let describe = |error: Error| {
            let error = error.at(self.storage().describe(&path));
            match error.kind() {
                crate::error::ErrorKind::NewerFormat => error,
                _ => error.hint(
                    "a live-restore that runs replaces it within a day; remove the file if none does that needs this repository",
                ),
            }
        };
        Some(lease.map_err(describe))
    }

    /// Of each session the newest lease.
    fn newest_leases(&self) -> Result<BTreeMap<String, String>> {
        let mut newest: BTreeMap<String, String> = BTreeMap::new();
        for file in self.list_leases()? {
            let Some((session, id)) = parts_of(&file) else { continue };
            let known = newest.entry(session.to_owned()).or_default();
            if id > known.as_str() {
                id.clone_into(known);
            }
        }
        Ok(newest)
    }

    fn lease_files(&self, session: &str) -> Result<Vec<String>> {
        let mut files = self.list_leases()?;
        files.retain(|file| parts_of(file).is_some_and(|(of, _)| of == session));
        Ok(files)
    }

    fn list_leases(&self) -> Result<Vec<String>> {
        match self.storage().list(DIR) {
            Ok(files) => Ok(files),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::io("cannot list leases", error).at(self.storage().describe(DIR))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::config::InitOptions;
    use crate::error::ErrorKind;

    const SESSION: &str = "00112233445566778899aabbccddeeff";
    const OTHER: &str = "ff112233445566778899aabbccddeeff";

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    fn repository(dir: &Path) -> Repository {
        Repository::init(dir.join("r"), InitOptions::default()).unwrap()
    }

    fn lease(session: &str) -> Lease {
        let snapshot = SnapshotName::new("vm".parse().unwrap(), at(0));
        Lease::new(session, &snapshot, "disk0".parse().unwrap(), "host", at(10))
    }

    fn files(dir: &Path) -> Vec<PathBuf> {
        let files = std::fs::read_dir(dir.join("r/leases")).unwrap();
        files.map(|file| file.unwrap().path()).collect()
    }

    #[test]
    fn a_lease_holds_its_snapshot_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let repository = repository(dir.path());
        assert!(repository.leases(at(0)).unwrap().held().unwrap().is_empty());
        repository.keep_lease(&lease(SESSION)).unwrap();
        repository.keep_lease(&lease(OTHER)).unwrap();
        let renewed = lease(SESSION).renewed(at(500));
        repository.keep_lease(&renewed).unwrap();
        assert_eq!(files(dir.path()).len(), 2, "one for each session");
        let leases = repository.leases(at(600)).unwrap();
        assert_eq!(leases.live, [renewed, lease(OTHER)]);
        let name: SnapshotName = lease(SESSION).snapshot.parse().unwrap();
        assert_eq!(leases.held().unwrap(), BTreeSet::from([name.clone()]));
        assert_eq!(leases.of(&name).count(), 2);
        let elsewhere = Lease { snapshot: name.to_string().replace('Z', "+00:00"), ..lease(OTHER) };
        repository.keep_lease(&elsewhere).unwrap();
        assert_eq!(
            repository.leases(at(600)).unwrap().of(&name).count(),
            2,
            "another way of writing the time"
        );
        assert_eq!(repository.remove_lease(SESSION).unwrap(), 1);
        assert_eq!(repository.remove_lease(SESSION).unwrap(), 0);
        assert_eq!(repository.leases(at(600)).unwrap().live, [elsewhere]);
        assert!(std::fs::read_dir(dir.path().join("r/tmp")).unwrap().next().is_none());
    }

    #[test]
    fn a_lease_that_nobody_renews_ends_and_clocks_may_differ() {
        let first = lease(SESSION);
        let span = LEASE_SPAN.as_secs();
        let end = 10 + span + LEASE_SLACK.as_secs();
        assert!(!first.has_expired(at(end)));
        assert!(first.has_expired(at(end + 1)));
        let renewed = first.renewed(at(span / 3));
        assert!(!renewed.has_expired(at(end + 1)));
        assert_eq!(first.renewed(at(-1_000_000)), first, "a clock that was set back");
        let unset = SnapshotName::new("vm".parse().unwrap(), at(0));
        let unset = Lease::new(SESSION, &unset, "disk0".parse().unwrap(), "host", Timestamp::UNIX_EPOCH);
        assert!(!unset.has_expired(at(span)), "a clock that was never set");

        let dir = tempfile::tempdir().unwrap();
        let repository = repository(dir.path());
        repository.keep_lease(&first).unwrap();
        let leases = repository.leases(at(end + 1)).unwrap();
        assert!(leases.live.is_empty() && leases.held().unwrap().is_empty());
        assert_eq!(leases.expired, [first]);
    }

    #[test]
    fn a_lease_that_cannot_be_understood_may_hold_anything() {
        let dir = tempfile::tempdir().unwrap();
        let repository = repository(dir.path());
        repository.keep_lease(&lease(SESSION)).unwrap();
        repository.keep_lease(&lease(OTHER)).unwrap();
        let file =
            files(dir.path()).into_iter().find(|file| file.to_string_lossy().contains(SESSION)).unwrap();
        let good = std::fs::read(&file).unwrap();
        let refused = |bytes: Vec<u8>, kind, words: &str| {
            std::fs::write(&file, bytes).unwrap();
            let leases = repository.leases(at(0)).unwrap();
            assert_eq!(leases.live, [lease(OTHER)], "the others are known all the same");
            let error = leases.held().unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(words), "{error}");
            assert!(error.to_string().contains(SESSION), "{error}");
        };
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        refused(flipped, ErrorKind::Damaged, "remove the file");
        refused(good[..good.len() - 1].to_vec(), ErrorKind::Damaged, "checksum");
        refused(Vec::new(), ErrorKind::Damaged, "first line");
        let newer = String::from_utf8(good).unwrap().replacen("lease 1 ", "lease 2 ", 1);
        refused(newer.into_bytes(), ErrorKind::NewerFormat, "version 2");
        let wrong = Lease { expires: at(0), ..lease(SESSION) };
        refused(frame::encode(Document::Lease, &wrong).unwrap(), ErrorKind::Damaged, "no order");
        refused(frame::encode(Document::Lease, &lease(OTHER)).unwrap(), ErrorKind::Damaged, "session");
        // A renewal takes its place.
        repository.keep_lease(&lease(SESSION)).unwrap();
        assert_eq!(repository.leases(at(0)).unwrap().held().unwrap().len(), 1);
    }

    #[test]
    fn what_else_is_in_the_directory_is_passed_over_and_verify_does_not_look_there() {
        let dir = tempfile::tempdir().unwrap();
        let repository = repository(dir.path());
        repository.keep_lease(&lease(SESSION)).unwrap();
        std::fs::write(dir.path().join("r/leases/README"), "x").unwrap();
        std::fs::write(dir.path().join(format!("r/leases/{OTHER}+x.lease")), "x").unwrap();
        assert_eq!(repository.leases(at(0)).unwrap().held().unwrap().len(), 1);
        let report = repository.verify(crate::VerifyOptions::default(), |_| ()).unwrap();
        assert!(report.damages.is_empty(), "{report:?}");
    }
}
