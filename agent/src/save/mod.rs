//! `lifeboot save`: what a live-restore's guest wrote becomes a snapshot on top of the one that it restores.
//!
//! | the session | what is saved | who does it |
//! |---|---|---|
//! | is served | the disk at one moment, everything acknowledged in it; guests go on | its agent, all its disks together |
//! | was parked, or its agent was killed | everything acknowledged | this command, with the target's lock |
//! | the host went down, a sync failed, the live file was lost | everything flushed; of what was not, any part | this command |
//! | its journal is damaged or missing, and the live file is of this boot | everything acknowledged | this command |
//! | never served | nothing: refused | |
//! | handed over to QEMU | refused: its target is a disk of its own, which is captured | |
//!
//! `live::frozen` has how a moment is kept while guests write; `store` what is done with it. The session is the same
//! afterwards, and may be saved again, gone on with, or discarded.

mod live;
mod report;
mod store;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use block::{Engine, IoEngine};
use jiff::Timestamp;
use repository::{
    ChunkEncoder, Consistency, DiskName, GroupName, MAX_NOTE_LEN, Repository, Saved, SavedUpTo, SnapshotName,
};

pub use live::SaveRequest;
pub(crate) use live::answer;
use report::{Report, ReportedDisk};
pub(crate) use store::{Disk, LackingRange, Order, Stored, View, foretold_lacks, store};

use crate::cli::{Context, Failure, Interrupt, Outcome, UsageError, Verb};
use crate::live::Resumed;
use crate::live_restore::{self, Request, Rest, SessionRecord, StateDir};
use crate::output::Output;

/// Make a snapshot of what a live-restore's guest wrote
///
/// The snapshot is the restored disk as the guest sees it. It is made on top of the one that is being restored: only what the
/// guest wrote is read and stored. It can be made at any time, while an agent serves the disk and guests write to
/// it, or after it was parked, killed or failed; the session goes on afterwards as if nothing had been done.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot save -r /backup /var/lib/vm/web01.raw
  lifeboot save -r /backup /var/lib/vm/web01.raw web01-rescued \\
      --note 'before the rollback'

While it is served the snapshot holds everything that the guest was told was
written, as a power cut would leave it. After a crash of the host it holds
everything that the guest had flushed. A chunk that the guest wrote in part
and whose rest is damaged in the repository is lost in the snapshot, and each
restore of it says so; it is named, and the exit code is 3. The session still
has what the guest wrote: once the repository is mended, save it again.
Chunks that are known to be damaged, and that the guest did not write to, are
named likewise: they are as damaged in this snapshot.")]
pub struct Args {
    /// The target of the live-restore
    #[arg(value_name = "TARGET")]
    target: PathBuf,

    /// The group to save it in [default: that of the snapshot that is being restored]
    #[arg(value_name = "GROUP")]
    group: Option<String>,

    /// Another target whose guest is the same machine: it becomes a disk of the same snapshot; may be repeated. Disks that
    /// one agent serves are saved together without it
    #[arg(long, value_name = "TARGET")]
    with: Vec<PathBuf>,

    /// Say what would be done, and do nothing. What is known to be damaged is named: the exit code is 3 then, too
    #[arg(long)]
    dry_run: bool,

    /// What to remember about this snapshot
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,

    /// The target was copied or moved as a whole, together with its session. Where that was kept with --state, name the copy of
    /// that directory, or the session's own directory in it
    #[arg(long)]
    moved: bool,

    /// zstd's compression level
    #[arg(long, default_value_t = repository::DEFAULT_LEVEL, allow_negative_numbers = true)]
    level: i32,

    /// Where sessions are kept, if not beside the target
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// How to do I/O: auto, uring or threads
    #[arg(long, default_value_t = IoEngine::Auto, value_name = "ENGINE")]
    io_engine: IoEngine,
}

/// One session that is to be saved.
struct Wanted {
    path: PathBuf,
    state: StateDir,
    record: SessionRecord,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        if self.note.as_ref().is_some_and(|note| note.len() > MAX_NOTE_LEN) {
            return Err(UsageError::new(format_args!("a note has at most {MAX_NOTE_LEN} bytes")).into());
        }
        ChunkEncoder::new(self.level).map_err(UsageError::new)?;
        let group: Option<GroupName> = self
            .group
            .as_ref()
            .map(|group| group.parse().map_err(|error: repository::Error| UsageError::new(error)))
            .transpose()?;
        let wanted = std::iter::once(&self.target)
            .chain(&self.with)
            .map(|target| Wanted::find(target, self.state.as_deref(), self.moved))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let repository = Repository::open(context.repository_path()?)?;
        for one in &wanted {
            one.check_not_handed_over()?;
        }
        let (mut served, mut at_rest) = (None, None);
        for one in &wanted {
            let is_served = live_restore::ask_status(one.state.path())?.is_some();
            if is_served { &mut served } else { &mut at_rest }.get_or_insert(one.path.display());
        }
        match (served, at_rest) {
            (None, _) => {
                let saved = self.save_at_rest(context, &repository, &wanted, group);
                // An agent may have begun to serve it meanwhile: that one saves it.
                let is_served = saved.is_err()
                    && wanted.iter().any(|one| matches!(live_restore::ask_status(one.state.path()), Ok(Some(_))));
                if is_served { self.save_served(context, &repository, &wanted) } else { saved }
            }
            (Some(_), None) => self.save_served(context, &repository, &wanted),
            (Some(served), Some(at_rest)) => Err(Failure::new(
                format!(
                    "an agent serves {served}, and none {at_rest}: they cannot be saved as of one moment, in one snapshot"
                ),
                "save them one by one; or have one agent serve both, or none (SIGTERM parks a session), and save them together",
            )
            .into()),
        }
    }
}

impl Args {
    /// Has the agent that serves them save all its disks.
    fn save_served(
        &self,
        context: &Context,
        repository: &Repository,
        wanted: &[Wanted],
    ) -> anyhow::Result<Outcome> {
        let request = SaveRequest {
            repository: repository.path().canonicalize().context("cannot find the repository")?,
            group: self.group.clone(),
            time: Timestamp::now(),
            note: self.note.clone(),
            level: self.level,
            dry_run: true,
            backup_of: None,
        };
        let interrupt = context.interrupt()?;
        let agent = wanted[0].state.path();
        let plan = ask_to_save(agent, &request, &interrupt, |_| {})?;
        for one in wanted {
            if !plan.disks.iter().any(|disk| disk.target == one.record.target) {
                return Err(Failure::new(
                    format!("{} is not served by the agent of {}", one.path.display(), wanted[0].path.display()),
                    "disks of one agent are saved together; save others by themselves, or park all of them first",
                )
                .into());
            }
        }
        let plan = Report { dry_run: self.dry_run, ..plan };
        if self.dry_run {
            return plan.foretell(context.output());
        }
        plan.lines().for_each(|line| context.output().announce(line));
        let total = plan.disks.iter().map(|disk| disk.changed_bytes).sum();
        let progress = context.output().progress(format_args!("saving {}", plan.group()), Some(total));
        let request = SaveRequest { dry_run: false, ..request };
        let report = ask_to_save(agent, &request, &interrupt, |bytes| progress.set(bytes))?;
        drop(progress);
        report.conclude(context.output(), repository)
    }

    /// Saves sessions that no agent serves.
    fn save_at_rest(
        &self,
        context: &Context,
        repository: &Repository,
        wanted: &[Wanted],
        group: Option<GroupName>,
    ) -> anyhow::Result<Outcome> {
        let started = Instant::now();
        let engine = Engine::choose(self.io_engine)?;
        let interrupt = context.interrupt()?;
        // Before any target is locked: one that was named twice would wait for itself.
        let records: Vec<&SessionRecord> = wanted.iter().map(|wanted| &wanted.record).collect();
        let names = disk_names(&records)?;
        let rests = wanted
            .iter()
            .map(|Wanted { path, state, record }| {
                Rest::open(state, record, path, repository, engine, self.moved, &interrupt)
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let up_to = if rests.iter().any(|rest| rest.view.ended().is_from_journal_alone()) {
            SavedUpTo::Flushed
        } else {
            SavedUpTo::Acknowledged
        };
        let order = order(&records, group, up_to, self.note.clone(), self.level)?;
        let planned = names.iter().zip(&rests).zip(wanted).map(|((name, rest), wanted)| {
            let frozen = rest.frozen();
            ReportedDisk::planned(
                name,
                &wanted.path,
                &wanted.record,
                frozen.chunks().len() as u64,
                frozen.bytes(),
            )
        });
        let mut report = Report {
            snapshot: order.free_name(repository).to_string(),
            live_restore_of: records[0].snapshot.clone(),
            up_to,
            disks: planned.collect(),
            damaged: Vec::new(),
            dry_run: self.dry_run,
            seconds: 0.0,
        };
        for (rest, wanted) in rests.iter().zip(wanted) {
            warn_of(context.output(), rest, &wanted.path);
        }
        if self.dry_run {
            for ((name, rest), record) in names.iter().zip(&rests).zip(&records) {
                let changed = rest.frozen().chunks();
                report.damaged.extend(foretold_lacks(name, record.layout(), changed, &rest.damaged));
            }
            return report.foretell(context.output());
        }
        report.lines().for_each(|line| context.output().announce(line));
        let total = report.disks.iter().map(|disk| disk.changed_bytes).sum();
        let progress = context.output().progress(format_args!("saving {}", report.group()), Some(total));
        let disks: Vec<Disk<'_>> = names
            .into_iter()
            .zip(&rests)
            .map(|(name, rest)| Disk { name, base: rest.base.clone(), view: rest })
            .collect();
        let stored = store(repository, &disks, order, engine, &progress, &interrupt, &|| Ok(()))?;
        drop(progress);
        report.complete(&stored, started);
        report.conclude(context.output(), repository)
    }
}

/// Has the agent of the session in `dir` save, and hears of its progress in bytes. Where this is interrupted the agent
/// gives up, unless it has begun to make the snapshot: then that is what comes of it.
pub(crate) fn ask_to_save(
    dir: &Path,
    request: &SaveRequest,
    interrupt: &Interrupt,
    mut tell: impl FnMut(u64),
) -> anyhow::Result<Report> {
    let tell = |progress: Option<serde_json::Value>| {
        if let Some(progress) = progress {
            let live::SaveProgress { bytes_done } = serde_json::from_value(progress)?;
            tell(bytes_done);
        }
        Ok(())
    };
    let report = live_restore::ask_unless_interrupted(dir, &Request::Save(request.clone()), interrupt, tell)?;
    report.ok_or_else(|| {
        Failure::new(
            format!("the agent of the session in {} ended before it had saved", dir.display()),
            "what the guest wrote is kept: the same command saves it",
        )
        .into()
    })
}

impl Wanted {
    fn find(target: &Path, state: Option<&Path>, moved: bool) -> anyhow::Result<Self> {
        let path = live_restore::absolute(target)?;
        let state = StateDir::of_moved(target, state, moved)?;
        let Some(record) = state.record()?.filter(SessionRecord::was_begun) else {
            return Err(Failure::new(
                format!("there is nothing to save: no live-restore to {} is known", target.display()),
                format!(
                    "its session would be kept in {}; --state names another place, and --moved says that target and session were \
                     copied or moved together",
                    state.path().display()
                ),
            )
            .into());
        };
        Ok(Self { path, state, record })
    }

    /// Fails where a machine runs from the target itself: what it writes, we do not see.
    fn check_not_handed_over(&self) -> anyhow::Result<()> {
        if !self.record.handed_over {
            return Ok(());
        }
        Err(live_restore::no_session_any_more(&self.state, &self.record, &self.path).into())
    }
}

/// The names of the disks in the snapshot: those that they have in what is being restored.
pub(crate) fn disk_names(records: &[&SessionRecord]) -> anyhow::Result<Vec<DiskName>> {
    let mut names: Vec<DiskName> = Vec::with_capacity(records.len());
    for record in records {
        let name: DiskName = record.disk.parse().with_context(|| format!("disk {:?}", record.disk))?;
        if names.contains(&name) {
            return Err(Failure::new(
                format!("two of the disks are called {name}: they cannot be disks of one snapshot"),
                "save them one by one",
            )
            .into());
        }
        names.push(name);
    }
    Ok(names)
}

/// What a snapshot of these sessions is to be.
pub(crate) fn order(
    records: &[&SessionRecord],
    group: Option<GroupName>,
    up_to: SavedUpTo,
    note: Option<String>,
    level: i32,
) -> anyhow::Result<Order> {
    let base: SnapshotName = records[0].snapshot.parse()?;
    if let Some(other) = records.iter().find(|record| record.snapshot != records[0].snapshot) {
        return Err(Failure::new(
            format!(
                "the disks are not of one machine: {} is being restored, and {}",
                records[0].snapshot, other.snapshot
            ),
            "save them one by one",
        )
        .into());
    }
    let group = group.unwrap_or_else(|| base.group().clone());
    let parent = (group == *base.group()).then(|| base.time());
    let saved = Saved { live_restore_of: base.to_string(), up_to };
    let consistency = Consistency::Crash;
    Ok(Order { group, time: Timestamp::now(), parent, consistency, saved: Some(saved), note, level })
}

/// What a user should know of a session that is saved.
fn warn_of(output: &Output, rest: &Rest, path: &Path) {
    let path = path.display();
    match rest.view.ended() {
        Resumed::Parked | Resumed::AgentDied => {}
        Resumed::HostDied => output.warn(format_args!(
            "the host went down under {path}: what is saved is as of the guest's last flush"
        )),
        Resumed::SyncFailed => output.warn(format_args!(
            "a sync of {path} failed: what is saved is as of the guest's last flush before it"
        )),
        Resumed::LiveFileLost => output.warn(format_args!(
            "the live file of {path} is lost: what is saved is as of the guest's last flush"
        )),
    }
    if rest.view.counts_as_written() {
        output.warn(format_args!(
            "{path} may have been written to since its session was served last: all of it that is home is read"
        ));
    }
    if rest.view.journal_is_lost() {
        output.warn(format_args!(
            "the journal of {path} cannot be used; the live file has everything until the next reboot, so keep this snapshot"
        ));
    }
}
