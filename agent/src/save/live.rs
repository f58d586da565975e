//! Saving disks that an agent serves: the request, and what the agent does for it.
//!
//! All of the agent's disks are held still together, frozen, and let go; then they are read while guests go on. Whatever
//! can fail without them is done before. Copies of what guests overwrite meanwhile are kept in memory, then in a file in
//! the session's directory that has no name any more, so that nothing of it stays behind.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use block::{DirectIo, Engine, FileDisk, FileOptions, OpenDevice};
use jiff::Timestamp;
use repository::{DiskName, Repository, SavedUpTo};
use serde::{Deserialize, Serialize};

use super::report::{Report, ReportedDisk};
use super::{Disk, Order, View, disk_names, foretold_lacks, order, store};
use crate::cli::{Failure, Interrupt};
use crate::live::{Frozen, FrozenOptions, FrozenReader, LiveDisk};
use crate::live_restore::{Asked, ServedDisk, SessionRecord, StateDir, base_of, damaged_ranges};
use crate::output::Output;
use crate::status::DamagedRange;

/// Copies of what guests overwrite that are kept in memory.
const MEMORY_BYTES: u64 = 64 << 20;
/// The most of them that are kept in a file, and at most half of the room that there is.
const SPILL_BYTES: u64 = 4 << 30;
/// How often the requester is told how far it is.
const TELL_INTERVAL: Duration = Duration::from_millis(200);

/// What an agent is asked to save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveRequest {
    /// The repository's absolute path.
    pub(crate) repository: PathBuf,
    pub(crate) group: Option<String>,
    /// The snapshot's time.
    pub(crate) time: Timestamp,
    pub(crate) note: Option<String>,
    pub(crate) level: i32,
    /// Only say what would be done.
    pub(crate) dry_run: bool,
    /// It is a backup of these disks, each given as its session's id and its name in the snapshot. Otherwise all of the agent's
    /// disks are saved, under the names that they have.
    pub(crate) backup_of: Option<Vec<(String, String)>>,
}

/// How far a save is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SaveProgress {
    pub(crate) bytes_done: u64,
}

/// A view of a disk that an agent serves.
struct LiveView {
    frozen: Frozen,
    disk: Arc<LiveDisk>,
    damaged: Vec<DamagedRange>,
}

impl View for LiveView {
    fn frozen(&self) -> &Frozen {
        &self.frozen
    }

    fn reader(&self) -> anyhow::Result<FrozenReader> {
        Ok(self.frozen.reader(self.disk.device()?))
    }

    fn known_damage(&self) -> Vec<DamagedRange> {
        self.damaged.clone()
    }
}

/// Does what an agent was asked.
pub(crate) async fn answer(request: SaveRequest, asked: &Asked) -> anyhow::Result<Report> {
    let service = Arc::clone(asked.service());
    let progress = Output::new(false, true).progress("saving", None);
    let counted = progress.clone();
    let interrupt = Interrupt::default();
    let raised = interrupt.clone();
    let agent = Arc::clone(&service);
    let work = asked.blocking_on_repository(move || {
        let check = || service.check_ending();
        let (disks, engine) = (service.disks(), service.engine);
        Save { request: &request, disks, engine, interrupt: raised }.run(&counted, &check)
    });
    let mut work = std::pin::pin!(work);
    let mut ticks = tokio::time::interval(TELL_INTERVAL);
    loop {
        tokio::select! {
            done = &mut work => return done,
            // Ctrl-C at the other end: what nobody waits for is not made.
            () = asked.abandoned(), if !interrupt.is_raised() => interrupt.raise(),
            _ = ticks.tick() => {}
        }
        asked.progress(&SaveProgress { bytes_done: progress.done() });
        if agent.check_ending().is_err() {
            // Not only between two steps: a chunk may take long to be compressed, and guests pay for the view meanwhile.
            interrupt.raise();
        }
    }
}

struct Save<'a> {
    request: &'a SaveRequest,
    disks: &'a [ServedDisk],
    engine: Engine,
    /// Raised when nobody wants it any more.
    interrupt: Interrupt,
}

impl Save<'_> {
    fn run(
        &self,
        progress: &crate::output::Progress,
        check: &dyn Fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<Report> {
        let started = Instant::now();
        let (served, names) = self.chosen()?;
        let records: Vec<&SessionRecord> = served.iter().map(|disk| &disk.record).collect();
        let group = self.request.group.as_ref().map(|group| group.parse()).transpose()?;
        let order = self.order(&records, group)?;
        let repository = Repository::open(&self.request.repository)
            .with_context(|| format!("the agent cannot use {}", self.request.repository.display()))?;
        let bases = served.iter().map(|disk| base_of(&repository, &disk.state, &disk.record));
        let bases = bases.collect::<anyhow::Result<Vec<_>>>()?;
        let mut report = Report {
            snapshot: order.free_name(&repository).to_string(),
            live_restore_of: records[0].snapshot.clone(),
            up_to: SavedUpTo::Acknowledged,
            disks: Vec::new(),
            damaged: Vec::new(),
            dry_run: self.request.dry_run,
            seconds: 0.0,
        };
        if self.request.dry_run {
            for (disk, name) in served.iter().zip(&names) {
                let (changed, layout) = (disk.session().changed(), disk.record.layout());
                let bytes = changed.iter().map(|&chunk| layout.chunk_range(chunk).len()).sum();
                let count = changed.len() as u64;
                report.disks.push(ReportedDisk::planned(
                    name,
                    &disk.record.target,
                    &disk.record,
                    count,
                    bytes,
                ));
                let damaged = damaged_ranges(&disk.session().stats(), layout);
                report.damaged.extend(foretold_lacks(name, layout, &changed, &damaged));
            }
            return Ok(report);
        }
        // From before the views begin until they were read: no machine is moved off us in between.
        let _saving = served.iter().map(|disk| disk.begin_saving()).collect::<anyhow::Result<Vec<_>>>()?;
        let views = self.freeze(&served)?;
        let mut disks = Vec::new();
        for (((disk, name), base), view) in served.iter().zip(names).zip(bases).zip(&views) {
            let (chunks, bytes) = (view.frozen.chunks().len() as u64, view.frozen.bytes());
            report.disks.push(ReportedDisk::planned(&name, &disk.record.target, &disk.record, chunks, bytes));
            disks.push(Disk { name, base, view });
        }
        let stored = store(&repository, &disks, order, self.engine, progress, &self.interrupt, check);
        let stored =
            stored.map_err(|error| check().err().unwrap_or_else(|| given_up(error, &served, &views)))?;
        report.complete(&stored, started);
        Ok(report)
    }

    /// The disks to be saved, with their names in the snapshot.
    fn chosen(&self) -> anyhow::Result<(Vec<&ServedDisk>, Vec<DiskName>)> {
        let Some(backup_of) = &self.request.backup_of else {
            let served: Vec<&ServedDisk> = self.disks.iter().collect();
            let records: Vec<&SessionRecord> = served.iter().map(|disk| &disk.record).collect();
            let names = disk_names(&records)?;
            return Ok((served, names));
        };
        let chosen = backup_of.iter().map(|(session, name)| {
            let disk = self.disks.iter().find(|disk| disk.record.session == *session);
            let disk = disk.ok_or_else(|| {
                Failure::new(
                    "not all of these disks are served by one agent",
                    "capture those of one agent together, and others by themselves",
                )
            })?;
            anyhow::Ok((disk, name.parse()?))
        });
        Ok(chosen.collect::<anyhow::Result<Vec<_>>>()?.into_iter().unzip())
    }

    fn order(
        &self,
        records: &[&SessionRecord],
        group: Option<repository::GroupName>,
    ) -> anyhow::Result<Order> {
        let SaveRequest { note, level, time, .. } = self.request;
        let order = order(records, group, SavedUpTo::Acknowledged, note.clone(), *level)?;
        let saved = if self.request.backup_of.is_some() { None } else { order.saved };
        Ok(Order { time: *time, saved, ..order })
    }

    /// Freezes all disks at one moment.
    fn freeze(&self, served: &[&ServedDisk]) -> anyhow::Result<Vec<LiveView>> {
        let options = served
            .iter()
            .map(|disk| {
                let spill = spill(&disk.state, self.engine)?;
                Ok(FrozenOptions { memory_bytes: MEMORY_BYTES / served.len() as u64, spill: Some(spill) })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let cannot = "the disk cannot be frozen";
        let views = self.engine.try_run(async {
            let mut still = Vec::with_capacity(served.len());
            for disk in served {
                still.push(disk.session().hold_still().await.context(cannot)?);
            }
            let views = still.iter().zip(options).zip(served).map(|((still, options), disk)| {
                let frozen = still.freeze(options).context(cannot)?;
                let damaged = damaged_ranges(&disk.session().stats(), disk.record.layout());
                Ok(LiveView { frozen, disk: Arc::clone(&disk.disk), damaged })
            });
            views.collect()
        });
        // Whoever asked is another process.
        views.with_context(|| format!("the agent (process {}) cannot save now", std::process::id()))?
    }
}

/// Why it was not saved: where copies found no room, that is the cause, whatever failed because of it.
fn given_up(error: anyhow::Error, served: &[&ServedDisk], views: &[LiveView]) -> anyhow::Error {
    let failed = served.iter().zip(views).find_map(|(disk, view)| Some((disk, view.frozen.failure()?)));
    let Some((disk, failure)) = failed else { return error };
    Failure::new(
        format!("{} could not be saved; its guest was not disturbed", disk.record.target.display()),
        format!(
            "save again when the guest writes less; or make room in {}, where what it overwrites meanwhile is kept",
            disk.state.path().display()
        ),
    )
    .because(failure)
    .into()
}

/// A file without a name in the session's directory, for what is overwritten while a view is read.
fn spill(state: &StateDir, engine: Engine) -> anyhow::Result<Arc<dyn OpenDevice>> {
    let path = state.file("spill");
    let make = |path: &Path| -> std::io::Result<_> {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).open(path)?;
        std::fs::remove_file(path)?;
        let room = rustix::fs::fstatvfs(&file)?;
        let half = room.f_bavail.saturating_mul(room.f_frsize) / 2;
        file.set_len(SPILL_BYTES.min(half) / block::BLOCK_SIZE * block::BLOCK_SIZE)?;
        Ok(file)
    };
    let file = make(&path).with_context(|| format!("cannot make {}", path.display()))?;
    let options = FileOptions::new(engine).direct(DirectIo::Off);
    Ok(Arc::new(FileDisk::from_file(file, &path, options)?))
}
