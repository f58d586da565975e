//! What is said of a save: what it will do, and what it has done.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use repository::{DiskName, Repository, SavedUpTo};
use serde::{Deserialize, Serialize};

use super::{LackingRange, Stored};
use crate::cli::{Outcome, not_latest};
use crate::live_restore::SessionRecord;
use crate::output::{Output, human_duration, human_size};

/// What a save does, or has done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The snapshot's full name; of one that is still to be made, a name that is free, which it has unless another takes it first.
    pub(crate) snapshot: String,
    /// What it is made on top of.
    pub(crate) live_restore_of: String,
    /// How much of the guest's writes is in it.
    pub(crate) up_to: SavedUpTo,
    pub(crate) disks: Vec<ReportedDisk>,
    /// What the snapshot does not have.
    pub(crate) damaged: Vec<LackingRange>,
    pub(crate) dry_run: bool,
    pub(crate) seconds: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ReportedDisk {
    pub(crate) name: String,
    pub(crate) target: PathBuf,
    pub(crate) size_bytes: u64,
    /// Chunks of the disk.
    pub(crate) chunks: u64,
    /// Chunks that the guest wrote to: those that are looked at.
    pub(crate) changed_chunks: u64,
    /// The bytes of those.
    pub(crate) changed_bytes: u64,
    /// Of what was looked at, what the repository did not have.
    pub(crate) new_chunks: u64,
    pub(crate) new_bytes: u64,
    pub(crate) new_stored_bytes: u64,
}

impl ReportedDisk {
    /// A disk of which so much is to be looked at.
    pub(super) fn planned(
        name: &DiskName,
        target: &Path,
        record: &SessionRecord,
        changed_chunks: u64,
        changed_bytes: u64,
    ) -> Self {
        Self {
            name: name.to_string(),
            target: target.to_owned(),
            size_bytes: record.size,
            chunks: record.size.div_ceil(u64::from(record.chunk_size)),
            changed_chunks,
            changed_bytes,
            new_chunks: 0,
            new_bytes: 0,
            new_stored_bytes: 0,
        }
    }
}

impl Report {
    /// What will be done, a line for each disk. The second that the snapshot will be called by is only known when it is made.
    pub(super) fn lines(&self) -> impl Iterator<Item = String> {
        let doing = if self.dry_run { "would save" } else { "saving" };
        self.disks.iter().map(move |disk| {
            format!(
                "{doing} {} as {} of a new snapshot of {}: {} of {} to read, on top of {}",
                disk.target.display(),
                disk.name,
                self.group(),
                human_size(disk.changed_bytes),
                human_size(disk.size_bytes),
                self.live_restore_of,
            )
        })
    }

    /// The group of the snapshot.
    pub(super) fn group(&self) -> &str {
        self.snapshot.split('@').next().unwrap_or_default()
    }

    /// Says what would be done, and does nothing.
    pub(super) fn foretell(&self, output: &Output) -> anyhow::Result<Outcome> {
        let snapshot = format!("a new snapshot of {}", self.group());
        self.damaged.iter().for_each(|lacking| output.damaged(lacking.words(&snapshot)));
        output.document(self)?;
        self.lines().try_for_each(|line| output.line(line))?;
        Ok(if self.damaged.is_empty() { Outcome::Done } else { Outcome::Damaged })
    }

    /// What was done.
    pub(super) fn complete(&mut self, stored: &Stored, started: Instant) {
        let manifest = stored.snapshot.manifest();
        self.snapshot = stored.snapshot.name().to_string();
        for (disk, entry) in self.disks.iter_mut().zip(&manifest.disks) {
            disk.new_chunks = entry.stats.new_chunks;
            disk.new_bytes = entry.stats.new_bytes;
            disk.new_stored_bytes = entry.stats.new_stored_bytes;
        }
        self.damaged.clone_from(&stored.damaged);
        self.seconds = started.elapsed().as_secs_f64();
    }

    /// Says what was done.
    pub(super) fn conclude(&self, output: &Output, repository: &Repository) -> anyhow::Result<Outcome> {
        self.damaged.iter().for_each(|lacking| output.damaged(lacking.words(&self.snapshot)));
        if let Some(warning) = self.snapshot.parse().ok().and_then(|made| not_latest(repository, &made)) {
            output.warn(warning);
        }
        let outcome = if self.damaged.is_empty() { Outcome::Done } else { Outcome::Damaged };
        outcome.once_told(
            self.tell(output),
            format_args!("the snapshot {} was made", self.snapshot),
            format_args!("`lifeboot show {}` tells what is in it", self.snapshot),
        )
    }

    fn tell(&self, output: &Output) -> anyhow::Result<()> {
        output.document(self)?;
        let sum = |of: fn(&ReportedDisk) -> u64| self.disks.iter().map(of).sum::<u64>();
        output.line(format_args!(
            "saved {} in {}: {} of {} chunks looked at, {} of it new ({} stored)",
            self.snapshot,
            human_duration(Duration::from_secs_f64(self.seconds)),
            sum(|disk| disk.changed_chunks),
            sum(|disk| disk.chunks),
            human_size(sum(|disk| disk.new_bytes)),
            human_size(sum(|disk| disk.new_stored_bytes)),
        ))
    }
}
