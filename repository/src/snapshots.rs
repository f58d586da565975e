//! Groups and snapshots: listing them, and finding the one that somebody means.

use std::io;

use jiff::Timestamp;

use crate::error::{Error, ErrorKind, Result, nearest_names};
use crate::frame;
use crate::manifest::{DiskEntry, Manifest, Snapshot};
use crate::name::{GroupName, SnapshotName, SnapshotSpec, When};
use crate::repository::{Repository, not_found};
use crate::storage::read_all;

/// The directory of groups, each a directory of manifests.
pub(crate) const DIR: &str = "snapshots";
/// How many of a group's newest snapshots are offered beside its latest.
const NEWEST_OFFERED: usize = 2;
/// How many of a group's snapshots are offered in the place of one that is not there.
const NEAREST_OFFERED: usize = 3;
/// How many manifests are tried to find one that can be read in the place of one that cannot.
const READABLE_TRIED: usize = 8;

/// What there is.
#[derive(Clone, Debug, Default)]
pub struct SnapshotList {
    /// The snapshots, by group and then by time.
    pub snapshots: Vec<Snapshot>,
    /// Those whose manifest cannot be read, and why.
    pub damaged: Vec<(SnapshotName, Error)>,
}

pub(crate) fn group_dir(group: &GroupName) -> String {
    format!("{DIR}/{group}")
}

pub(crate) fn path(name: &SnapshotName) -> String {
    format!("{DIR}/{}/{}", name.group(), name.file_name())
}

impl Repository {
    /// The groups that have snapshots, in the order of their names.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn groups(&self) -> Result<Vec<GroupName>> {
        let mut groups = self.group_dirs()?;
        let mut failure = None;
        groups.retain(|group| match self.snapshot_names(group) {
            Ok(names) => !names.is_empty(),
            Err(error) => {
                failure.get_or_insert(error);
                false
            }
        });
        failure.map_or(Ok(groups), Err)
    }

    /// All directories of groups, with snapshots or without.
    fn group_dirs(&self) -> Result<Vec<GroupName>> {
        let names = self.storage().list(DIR);
        let names = names.map_err(|error| self.list_failed(DIR, error))?;
        let mut groups: Vec<GroupName> = names.iter().filter_map(|name| name.parse().ok()).collect();
        groups.sort_unstable();
        Ok(groups)
    }

    fn list_failed(&self, dir: &str, error: io::Error) -> Error {
        Error::io("cannot list snapshots", error).at(self.storage().describe(dir))
    }

    /// The names of a group's snapshots, in the order of time. No manifest is read for it. An unknown group has none.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn snapshot_names(&self, group: &GroupName) -> Result<Vec<SnapshotName>> {
        let dir = group_dir(group);
        let files = match self.storage().list(&dir) {
            Ok(files) => files,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Vec::new()
            }
            Err(error) => return Err(self.list_failed(&dir, error)),
        };
        let mut names: Vec<_> =
            files.iter().filter_map(|file| SnapshotName::from_file_name(group, file)).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// The snapshots of a group, or of all groups.
    ///
    /// # Errors
    /// `NotFound` for an unknown group, with the nearest names. A manifest that cannot be read is no error: it stands in the list.
    pub fn snapshots(&self, group: Option<&GroupName>) -> Result<SnapshotList> {
        let groups = match group {
            Some(group) => vec![group.clone()],
            None => self.group_dirs()?,
        };
        let mut list = SnapshotList::default();
        for each in &groups {
            let names = self.snapshot_names(each)?;
            if names.is_empty() && group.is_some() {
                return Err(self.no_such_group(each)?);
            }
            for name in names {
                match self.snapshot(&name) {
                    Ok(snapshot) => list.snapshots.push(snapshot),
                    Err(error) => list.damaged.push((name, error)),
                }
            }
        }
        Ok(list)
    }

    fn no_such_group(&self, group: &GroupName) -> Result<Error> {
        let groups = self.groups()?;
        let what = format!("there is no group {group}");
        Ok(not_found(what, group.as_str(), groups.iter().map(GroupName::as_str)).at(self.path()))
    }

    /// The snapshot of exactly that name.
    ///
    /// # Errors
    /// `NotFound`, with the nearest names of those that can be read; `Damaged`, `NewerFormat` for its manifest.
    pub fn snapshot(&self, name: &SnapshotName) -> Result<Snapshot> {
        match self.snapshot_if_there(name)? {
            Some(snapshot) => Ok(snapshot),
            None => Err(self.no_such_snapshot(name)?),
        }
    }

    fn snapshot_if_there(&self, name: &SnapshotName) -> Result<Option<Snapshot>> {
        let path = path(name);
        let describe = || self.storage().describe(&path);
        let bytes = match read_all(&**self.storage(), &path, frame::MAX_LEN) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                return Err(Error::damaged(format!("the manifest of {name} is too long")).at(describe()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("cannot read snapshot {name}"), error).at(describe())),
        };
        let manifest = Manifest::decode(&bytes, name).map_err(|error| error.within(name).at(describe()))?;
        Ok(Some(Snapshot::new(manifest)))
    }

    fn no_such_snapshot(&self, name: &SnapshotName) -> Result<Error> {
        let mut names = self.snapshot_names(name.group())?;
        if names.is_empty() {
            return self.no_such_group(name.group());
        }
        let distance = |time: Timestamp| time.as_second().abs_diff(name.time().as_second());
        names.sort_by_key(|other| distance(other.time()));
        let can_be_had = |other: &&SnapshotName| matches!(self.snapshot_if_there(other), Ok(Some(_)));
        let near = names.iter().take(READABLE_TRIED).filter(can_be_had);
        let nearest = near.take(NEAREST_OFFERED).map(ToString::to_string).collect();
        Ok(Error::new(ErrorKind::NotFound, format!("there is no snapshot {name}"))
            .at(self.path())
            .offer(nearest))
    }

    /// The newest snapshot of a group; none if it has no snapshot.
    ///
    /// # Errors
    /// `Damaged` if the newest is: an older one is never taken in its place.
    pub fn latest(&self, group: &GroupName) -> Result<Option<Snapshot>> {
        match self.snapshot_names(group)?.last() {
            Some(name) => self.snapshot(name).map(Some),
            None => Ok(None),
        }
    }

    /// The snapshot, and the disk if one was named, that somebody means by `web01@latest` or `web01@2026-11-21T00:33:12Z/disk0`.
    ///
    /// # Errors
    /// `InvalidInput` for what is not such a name, `NotFound`, both with the nearest names; `Damaged` for the manifest, with a
    /// snapshot of the group that can be read.
    pub fn resolve(&self, spec: &str) -> Result<(Snapshot, Option<DiskEntry>)> {
        let SnapshotSpec { group, when, disk } =
            spec.parse().map_err(|error| self.offer_snapshots(spec, error))?;
        let name = match when {
            When::At(time) => SnapshotName::new(group, time),
            When::Latest => match self.snapshot_names(&group)?.pop() {
                Some(newest) => newest,
                None => return Err(self.no_such_group(&group)?),
            },
        };
        let snapshot = self.snapshot(&name).map_err(|error| self.offer_readable(&name, error))?;
        let disk = disk.map(|name| snapshot.disk(&name).cloned()).transpose()?;
        Ok((snapshot, disk))
    }

    /// `error`, which says that `text` is not a snapshot's name, with the snapshots that may have been meant.
    fn offer_snapshots(&self, text: &str, error: Error) -> Error {
        let (snapshot, disk) = text.find('/').map_or((text, ""), |at| text.split_at(at));
        if snapshot.parse::<SnapshotSpec>().is_ok() {
            // It is the disk that has no name.
            return error;
        }
        let group = snapshot.split_once('@').map_or(snapshot, |(group, _)| group);
        let latest = |group: &str| format!("{group}@latest{disk}");
        // Where the directories cannot be listed, what was typed is wrong all the same.
        let Ok(groups) = self.groups() else { return error };
        let nearest = nearest_names(group, groups.iter().map(GroupName::as_str));
        let nearest = nearest.iter().map(|group| latest(group)).collect();
        match group.parse().map(|group| self.snapshot_names(&group)) {
            Ok(Ok(names)) if !names.is_empty() => {
                let newest = names.iter().rev().take(NEWEST_OFFERED).map(|name| format!("{name}{disk}"));
                error.offer(std::iter::once(latest(group)).chain(newest).collect())
            }
            Ok(Ok(_)) => error
                .and(format_args!("there is no group {group:?}"))
                .at(self.path())
                .offer(nearest)
                .hint("`lifeboot snapshots` lists what there is"),
            // It is the group that has no name.
            Err(_) => error.offer(nearest),
            Ok(Err(_)) => error,
        }
    }

    /// `error`, which says why the snapshot `name` cannot be read, with another one of its group that can.
    fn offer_readable(&self, name: &SnapshotName, error: Error) -> Error {
        if error.kind() != ErrorKind::Damaged {
            return error;
        }
        let Ok(names) = self.snapshot_names(name.group()) else { return error };
        let (older, newer): (Vec<_>, Vec<_>) =
            names.iter().filter(|other| *other != name).partition(|other| *other < name);
        let nearest = older.into_iter().rev().chain(newer).take(READABLE_TRIED);
        let hint = match nearest.into_iter().find(|other| self.snapshot(other).is_ok()) {
            Some(other) if other < name => format!("the next older one that can be read is {other}"),
            Some(other) => format!("no older one can be read, but {other} can"),
            None => format!("no other snapshot of {} near it can be read either", name.group()),
        };
        error.hint(hint + "; `lifeboot verify` says what else is damaged")
    }
}
