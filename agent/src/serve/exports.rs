//! Which disks are served, and under which names.

use std::path::Path;
use std::sync::Arc;

use block::{Engine, OpenDevice};
use nbd_server::Export;
use repository::{DiskEntry, Repository, Snapshot, SnapshotName};

use super::device::SnapshotDisk;
use super::room::Rooms;
use crate::cli::Failure;
use crate::live::{DiskLayout, Session};
use crate::source::{DiskSource, FetchPool, RepositoryStore, zero_chunks};
use crate::trace::TraceKeeper;

/// A disk that is to be served under these names.
pub(super) struct Wanted {
    snapshot: SnapshotName,
    names: Vec<String>,
    description: String,
    disk: DiskEntry,
}

/// An export, and the size of its disk in bytes.
pub(super) struct Opened {
    pub(super) export: Export,
    pub(super) size: u64,
}

/// What the clients of a disk that may be written to read while they start.
pub(super) struct Recording {
    session: Arc<Session>,
    keeper: TraceKeeper,
}

impl Recording {
    /// Keeps it if its time has come.
    pub(super) fn look(&self, is_ending: bool) {
        self.keeper.look(&self.session, is_ending);
    }
}

/// The disks that these specifications mean; all of the repository where there is none.
pub(super) fn wanted(repository: &Repository, specs: &[String]) -> anyhow::Result<Vec<Wanted>> {
    let mut wanted: Vec<Wanted> = Vec::new();
    if specs.is_empty() {
        for group in repository.groups()? {
            let list = repository.snapshots(Some(&group))?;
            for (name, error) in &list.damaged {
                tracing::warn!(snapshot = %name, %error, "it is not served");
            }
            let newest = list.snapshots.last().map(Snapshot::name);
            // The newest first, so that the empty name means something useful.
            for snapshot in list.snapshots.iter().rev() {
                for disk in &snapshot.manifest().disks {
                    let latest = (Some(snapshot.name()) == newest).then(|| format!("{group}@latest"));
                    add(&mut wanted, snapshot, disk, latest.as_deref());
                }
            }
        }
    }
    for spec in specs {
        let (snapshot, disk) = repository.resolve(spec)?;
        let alias = spec.split_once('/').map_or(spec.as_str(), |(snapshot, _)| snapshot);
        let disks = disk.map_or_else(|| snapshot.manifest().disks.clone(), |disk| vec![disk]);
        for disk in &disks {
            add(&mut wanted, &snapshot, disk, Some(alias));
        }
    }
    if wanted.is_empty() {
        return Err(Failure::new(
            format!("there is nothing to serve: {} has no snapshots", repository.path().display()),
            "capture a disk first",
        )
        .into());
    }
    Ok(wanted)
}

fn add(wanted: &mut Vec<Wanted>, snapshot: &Snapshot, disk: &DiskEntry, alias: Option<&str>) {
    let full = format!("{}/{}", snapshot.name(), disk.name);
    let alias = alias.map(|alias| format!("{alias}/{}", disk.name)).filter(|alias| *alias != full);
    let known = wanted.iter().position(|known| known.names.contains(&full));
    let at = known.unwrap_or_else(|| {
        let description = format!("disk {} of snapshot {}", disk.name, snapshot.name());
        let snapshot = snapshot.name();
        wanted.push(Wanted { snapshot, names: vec![full], description, disk: disk.clone() });
        wanted.len() - 1
    });
    if let Some(alias) = alias
        && !wanted.iter().any(|other| other.names.contains(&alias))
    {
        wanted[at].names.push(alias);
    }
}

/// Makes the exports. Nothing of a disk is read before somebody connects, but its map.
pub(super) fn open(
    wanted: Vec<Wanted>,
    pool: &Arc<FetchPool<RepositoryStore>>,
    repository: &Repository,
    scratch: Option<(&Path, Engine)>,
) -> anyhow::Result<(Vec<Opened>, Vec<Recording>)> {
    let mut exports = Vec::new();
    let mut recordings = Vec::new();
    let rooms = Rooms::new();
    for Wanted { snapshot, names, description, disk } in wanted {
        let map = repository.disk_map(&disk)?;
        let layout = DiskLayout { size: disk.size, chunk_size: disk.chunk_size };
        let zero = zero_chunks(&map)?;
        let number = pool.store().add(map);
        let source = Arc::new(DiskSource::new(Arc::clone(pool), number, layout, zero));
        let device: Arc<dyn OpenDevice> = match scratch {
            None => Arc::new(SnapshotDisk::new(source, rooms.clone())),
            Some((dir, engine)) => {
                let device = super::scratch::open(source, dir, engine)?;
                let session = Arc::clone(device.session());
                let (name, data_chunks) = (disk.name.clone(), disk.stats.data_chunks);
                let keeper =
                    TraceKeeper::new(repository.clone(), &snapshot, name, layout, data_chunks, false);
                recordings.push(Recording { session, keeper });
                device
            }
        };
        for name in names {
            let mut export = Export::new(name, Arc::clone(&device));
            export.description.clone_from(&description);
            export.read_only = scratch.is_none();
            exports.push(Opened { export, size: disk.size });
        }
    }
    Ok((exports, recordings))
}
