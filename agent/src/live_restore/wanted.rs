//! Which disk of which snapshot: what somebody asked for, or what the session has been restoring.
//!
//! Whether both are one is told by names alone, so that it can be told without the repository.

use std::path::Path;

use repository::{DiskEntry, Repository, Snapshot, SnapshotName};

use super::open::Wish;
use super::record::SessionRecord;
use super::state_dir::StateDir;
use crate::cli::Failure;

/// Fails where what was asked for is not what the session restores.
pub(super) fn check_asked(wish: &Wish<'_>, record: &SessionRecord) -> anyhow::Result<()> {
    let name: SnapshotName = record.snapshot.parse()?;
    let spec: repository::SnapshotSpec = wish.spec.parse()?;
    let is_disk = spec.disk.as_ref().is_none_or(|wanted| wanted.as_str() == record.disk.as_str());
    if spec.may_mean(&name) && is_disk {
        return Ok(());
    }
    Err(belongs_elsewhere(wish.target, record, wish.spec))
}

/// That a target's session restores something else than `spec`.
pub(super) fn belongs_elsewhere(target: &Path, record: &SessionRecord, spec: &str) -> anyhow::Error {
    Failure::new(
        format!(
            "the target {} belongs to a session that restores {}/{}, not {spec}",
            target.display(),
            record.snapshot,
            record.disk,
        ),
        "name that snapshot to go on with it, or another target",
    )
    .into()
}

/// The disk that a session restores.
pub(super) fn of_record(
    wish: &Wish<'_>,
    state: &StateDir,
    record: &SessionRecord,
) -> anyhow::Result<DiskEntry> {
    let repository = wish.repository().map_err(|error| gone(state, record, error))?;
    let error = match base_of(repository, state, record) {
        Ok(disk) => return Ok(disk),
        Err(error) => error,
    };
    let mut said = String::new();
    for copy in wish.fallbacks.repositories() {
        match base_of(copy, state, record) {
            Ok(disk) => return Ok(disk),
            Err(error) => said.push_str(&format!("; its copy {}: {error:#}", copy.path().display())),
        }
    }
    if said.is_empty() {
        return Err(error);
    }
    let what = format!("none of the repositories has what is restored{said}");
    Err(error.context(what))
}

fn gone(state: &StateDir, record: &SessionRecord, error: repository::Error) -> Failure {
    let what = format!(
        "the session of {} restores {}, which cannot be had",
        state.target(record).display(),
        record.snapshot
    );
    Failure::new(what, "name the repository that the session was begun with").because(error)
}

/// As [`gone`], where there is a repository, but it cannot give the snapshot.
fn not_there(state: &StateDir, record: &SessionRecord, error: repository::Error) -> Failure {
    if error.kind() != repository::ErrorKind::NotFound {
        return gone(state, record, error);
    }
    let path = state.target(record);
    let (target, status) = (path.display(), state.command("status", path));
    Failure::new(
        format!("the session of {target} restores {}, which this repository does not have", record.snapshot),
        format!(
            "name the repository that the session was begun with, or, if the snapshot was forgotten there, a copy that still has \
             it; a disk that is wholly home (`{status}`) needs neither: `lifeboot capture GROUP {target}`"
        ),
    )
    .because(error)
}

/// The disk that a session restores, in `repository`.
pub(crate) fn base_of(
    repository: &Repository,
    state: &StateDir,
    record: &SessionRecord,
) -> anyhow::Result<DiskEntry> {
    let name = record.snapshot.parse().map_err(|error| gone(state, record, error))?;
    // The record's name is not misspelt, and no other snapshot does for it.
    let had = repository.snapshot(&name).map_err(repository::Error::without_nearest);
    let snapshot = had.map_err(|error| not_there(state, record, error))?;
    let disk = snapshot.manifest().disks.iter().find(|disk| {
        disk.name.as_str() == record.disk && map_name(disk) == record.map && disk.size == record.size
    });
    let Some(disk) = disk.cloned() else {
        return Err(Failure::new(
            format!(
                "the session of {} restores disk {} of {}, which is another disk in this repository",
                state.target(record).display(),
                record.disk,
                record.snapshot
            ),
            "name the repository that the session was begun with",
        )
        .into());
    };
    Ok(disk)
}

/// The snapshot and the disk of it that a new session is to restore.
pub(super) fn asked_for(wish: &Wish<'_>) -> anyhow::Result<(Snapshot, DiskEntry)> {
    let resolve = |repository: &Repository| repository.resolve(wish.spec);
    let (snapshot, disk) =
        resolve(wish.repository()?).or_else(|error| wish.fallbacks.or_else(error, resolve))?;
    if let Some(disk) = disk {
        return Ok((snapshot, disk));
    }
    match snapshot.manifest().disks.as_slice() {
        [disk] => {
            let disk = disk.clone();
            Ok((snapshot, disk))
        }
        disks => {
            let names: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
            Err(Failure::new(
                format!("{} has {} disks: {}", wish.spec, disks.len(), names.join(", ")),
                format!(
                    "say which one, as in {}/{}; or name a TARGET for each of them",
                    wish.spec,
                    names.first().unwrap_or(&"disk0")
                ),
            )
            .into())
        }
    }
}

/// The root of a disk's map, as a record has it.
pub(super) fn map_name(disk: &DiskEntry) -> String {
    disk.map.map_or_else(|| "zeroes".to_owned(), |root| root.to_string())
}
