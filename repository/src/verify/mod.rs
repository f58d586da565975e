//! Verifying: every index entry, every chunk of every pack, every map of every snapshot, and what of it each snapshot needs.

mod packs;
mod trees;

use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::id::PackId;
use crate::name::{DiskName, SnapshotName};
use crate::repository::Repository;

/// So many damages are named; the rest is counted.
const MAX_NAMED: usize = 10_000;

/// How to verify.
#[derive(Clone, Copy, Debug)]
pub struct VerifyOptions {
    /// How many threads read and hash.
    pub threads: usize,
    /// Read and hash every chunk; without it only tables, indexes, maps and manifests are.
    pub read_data: bool,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads, read_data: true }
    }
}

/// How far it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VerifyProgress {
    /// Bytes of packs that were read.
    pub done_bytes: u64,
    /// Bytes of packs that will be.
    pub total_bytes: u64,
}

/// Something that is not as it was once written.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[non_exhaustive]
pub struct Damage {
    /// The file that is damaged or missing.
    pub path: Option<PathBuf>,
    /// The snapshot that needs it.
    pub snapshot: Option<String>,
    /// The disk of the snapshot.
    pub disk: Option<String>,
    /// The bytes of the disk that cannot be had, begin and end.
    pub range: Option<Range<u64>>,
    /// What was found.
    pub what: String,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(snapshot) = &self.snapshot {
            f.write_str(snapshot)?;
            if let Some(disk) = &self.disk {
                write!(f, "/{disk}")?;
            }
            if let Some(range) = &self.range {
                write!(f, " bytes {} to {}", range.start, range.end)?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&self.what)
    }
}

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Snapshots whose manifest was read.
    pub snapshots: u64,
    /// Disks whose map was walked.
    pub disks: u64,
    /// Index entries that were checked.
    pub index_entries: u64,
    /// Packs that were read.
    pub packs: u64,
    /// Packs that no index names: left by a capture that did not end. They do no harm.
    pub unnamed_packs: u64,
    /// Chunks, map nodes and attachments that were decoded and hashed.
    pub chunks: u64,
    /// Stored bytes of those.
    pub stored_bytes: u64,
    /// What is damaged, in the order of files, snapshots and places.
    pub damages: Vec<Damage>,
    /// How many damages there are beyond those that are named.
    pub more_damages: u64,
}

impl VerifyReport {
    /// Whether all is as it was written.
    pub fn is_clean(&self) -> bool {
        self.damages.is_empty()
    }
}

/// What a run collects.
struct Run<'a> {
    repository: &'a Repository,
    options: VerifyOptions,
    report: Mutex<VerifyReport>,
    /// Stored things that do not decode to what they are called, by their place.
    bad: Mutex<HashSet<(PackId, u32)>>,
    /// Packs of which nothing can be had.
    lost: Mutex<HashSet<PackId>>,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    progress: &'a (dyn Fn(VerifyProgress) + Sync),
}

impl Run<'_> {
    fn damage(&self, damage: Damage) {
        let mut report = self.report.lock();
        if report.damages.len() < MAX_NAMED {
            report.damages.push(damage);
        } else {
            report.more_damages += 1;
        }
    }

    /// Something is wrong with a file, whoever needs it.
    fn file_damage(&self, path: PathBuf, error: &Error) {
        self.damage(Damage {
            path: Some(path),
            snapshot: None,
            disk: None,
            range: None,
            what: error.to_string(),
        });
    }

    /// Something that a snapshot needs cannot be had.
    fn snapshot_damage(
        &self,
        snapshot: &SnapshotName,
        disk: Option<&DiskName>,
        range: Option<Range<u64>>,
        error: &Error,
    ) {
        self.damage(Damage {
            path: error.path().map(PathBuf::from),
            snapshot: Some(snapshot.to_string()),
            disk: disk.map(ToString::to_string),
            range,
            what: error.to_string(),
        });
    }

    fn advance(&self, bytes: u64) {
        let done_bytes = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let total_bytes = self.total_bytes.load(Ordering::Relaxed);
        (self.progress)(VerifyProgress { done_bytes: done_bytes.min(total_bytes), total_bytes });
    }
}

/// Whether the error is a finding, rather than a reason to give up.
fn is_finding(error: &Error) -> bool {
    !matches!(error.kind(), ErrorKind::NotPermitted | ErrorKind::NoSpace | ErrorKind::InvalidInput)
}

impl Repository {
    /// Verifies all of it. `progress` is called by several threads.
    ///
    /// Damage is no error: it is in the report.
    ///
    /// # Errors
    /// When verifying could not be done: `NotPermitted`, or the directories cannot be listed.
    pub fn verify(
        &self,
        options: VerifyOptions,
        progress: impl Fn(VerifyProgress) + Sync,
    ) -> Result<VerifyReport> {
        self.index().refresh()?;
        let run = Run {
            repository: self,
            options,
            report: Mutex::default(),
            bad: Mutex::default(),
            lost: Mutex::default(),
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            progress: &progress,
        };
        packs::verify(&run)?;
        trees::verify(&run)?;
        let mut report = run.report.into_inner();
        let key = |damage: &Damage| {
            (
                damage.snapshot.clone(),
                damage.disk.clone(),
                damage.range.clone().map(|range| range.start),
                damage.path.clone(),
            )
        };
        report.damages.sort_by_cached_key(key);
        Ok(report)
    }
}
