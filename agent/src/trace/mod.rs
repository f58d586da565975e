//! `lifeboot trace`: what machines read while they start, as it is kept with their groups.

mod keeper;

use std::path::PathBuf;

use clap::Subcommand;
use repository::{DiskName, GroupName, Repository, Trace};
use serde::Serialize;

use crate::cli::{Context, Failure, Outcome, UsageError, Verb};
use crate::live_restore::{Request, ask};
use crate::output::{Align, Table, human_size, human_time};
use crate::status::session_of;

pub use keeper::KeptTrace;
pub(crate) use keeper::{TraceKeeper, look_for_the_last_time};

/// Show, take or remove the boot traces of a group
///
/// A boot trace says which places of a disk a machine reads while it starts, in their order. A live-restore records one by
/// itself, until its guest asks for nothing new any more, and keeps it with the group in the repository; so does
/// `serve --scratch`. The next live-restore of the group fetches those places first.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot trace show -r /backup web01
  lifeboot trace begin /var/lib/vm/web01.raw

and, when the guest has done what is to be quick next time:
  lifeboot trace take /var/lib/vm/web01.raw")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Show the traces that are kept with a group
    Show {
        /// The group, or one of its disks: web01, web01/disk0
        #[arg(value_name = "GROUP[/DISK]")]
        group: String,
        /// List every place too, in the order in which they were read
        #[arg(long)]
        places: bool,
    },
    /// Begin to record anew, in a live-restore that runs: until `trace take`, however long that is
    Begin {
        #[command(flatten)]
        of: Running,
    },
    /// End the recording of a live-restore that runs, and keep what it has
    Take {
        #[command(flatten)]
        of: Running,
    },
    /// Remove the traces that are kept with a group
    Remove {
        /// The group, or one of its disks: web01, web01/disk0
        #[arg(value_name = "GROUP[/DISK]")]
        group: String,
    },
}

#[derive(Debug, clap::Args)]
struct Running {
    /// The target of the live-restore
    #[arg(value_name = "TARGET")]
    target: PathBuf,

    /// Where sessions are kept, if not beside the target
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

#[derive(Serialize)]
struct Shown<'a> {
    disk: &'a DiskName,
    /// The snapshot that it was recorded from.
    snapshot: String,
    recorded: jiff::Timestamp,
    millis: u64,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    places: Option<Vec<Place>>,
}

#[derive(Serialize)]
struct Place {
    offset: u64,
    len: u64,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        match self.what {
            What::Show { group, places } => show(context, &group, places),
            What::Begin { of } => of.begin(context),
            What::Take { of } => of.take(context),
            What::Remove { group } => remove(context, &group),
        }
    }
}

fn show(context: &Context, text: &str, with_places: bool) -> anyhow::Result<Outcome> {
    let repository = Repository::open(context.repository_path()?)?;
    let (group, disks) = disks_of(&repository, text)?;
    let mut traces: Vec<Trace> = Vec::new();
    for disk in &disks {
        traces.extend(repository.trace(&group, disk)?);
    }
    let output = context.output();
    let places =
        |trace: &Trace| -> Vec<Place> { trace.places().map(|(offset, len)| Place { offset, len }).collect() };
    let shown: Vec<Shown<'_>> = traces
        .iter()
        .map(|trace| Shown {
            disk: &trace.disk,
            snapshot: repository::SnapshotName::new(group.clone(), trace.snapshot).to_string(),
            recorded: trace.recorded,
            millis: trace.millis,
            bytes: trace.covered_bytes(),
            places: with_places.then(|| places(trace)),
        })
        .collect();
    output.document(&shown)?;
    if shown.is_empty() {
        output.line(format_args!("no boot trace is kept with {text}: the first live-restore records one"))?;
        return Ok(Outcome::Done);
    }
    let mut table = Table::new(&[
        ("DISK", Align::Left),
        ("RECORDED", Align::Left),
        ("FROM", Align::Left),
        ("TIME", Align::Right),
        ("READ", Align::Right),
    ]);
    for one in &shown {
        table.row([
            one.disk.to_string(),
            human_time(one.recorded),
            one.snapshot.clone(),
            format!("{:.1} s", one.millis as f64 / 1000.0),
            human_size(one.bytes),
        ]);
    }
    output.table(&table)?;
    for one in &shown {
        for place in one.places.iter().flatten() {
            output.line(format_args!("{} {} {}", one.disk, place.offset, place.len))?;
        }
    }
    Ok(Outcome::Done)
}

fn remove(context: &Context, text: &str) -> anyhow::Result<Outcome> {
    let repository = Repository::open(context.repository_path()?)?;
    let (group, disks) = disks_of(&repository, text)?;
    let mut removed = 0;
    for disk in &disks {
        removed += repository.remove_trace(&group, disk)?;
    }
    let output = context.output();
    let told = output.document(&serde_json::json!({ "removed": removed })).and_then(|()| {
        if removed == 0 {
            output.line(format_args!("no boot trace was kept with {text}"))
        } else {
            output.line(format_args!("removed {removed} from {text}"))
        }
    });
    Outcome::Done.once_told(
        told,
        format_args!("the boot traces of {text} were removed"),
        "the next live-restore records one",
    )
}

/// The group that `GROUP[/DISK]` names, and its disks that have a trace or are those of its newest snapshot.
fn disks_of(repository: &Repository, text: &str) -> anyhow::Result<(GroupName, Vec<DiskName>)> {
    let (group, disk) = text.split_once('/').map_or((text, None), |(group, disk)| (group, Some(disk)));
    let group: GroupName = group.parse().map_err(UsageError::new)?;
    let disk = disk.map(str::parse::<DiskName>).transpose().map_err(UsageError::new)?;
    let mut disks = repository.traced_disks(&group)?;
    if disks.is_empty() && repository.snapshot_names(&group)?.is_empty() {
        // It says which groups there are.
        repository.snapshots(Some(&group))?;
    }
    if let Some(disk) = disk {
        let newest = repository.latest(&group)?;
        let of_newest = newest.iter().flat_map(|snapshot| &snapshot.manifest().disks).map(|disk| &disk.name);
        let mut known: Vec<DiskName> = disks.iter().chain(of_newest).cloned().collect();
        known.sort();
        known.dedup();
        if !known.contains(&disk) {
            let known: Vec<String> = known.iter().map(ToString::to_string).collect();
            return Err(Failure::new(
                format!("the group {group} has no disk called {disk}; it has {}", known.join(", ")),
                "name one of those, or the group alone for all of them",
            )
            .into());
        }
        disks.retain(|known| *known == disk);
    }
    Ok((group, disks))
}

impl Running {
    fn begin(&self, context: &Context) -> anyhow::Result<Outcome> {
        let _: serde_json::Value = self.ask(&Request::TraceBegin)?;
        let output = context.output();
        let what_now = format!("`lifeboot trace take {}` keeps what was read by then", self.target.display());
        let told = output
            .document(&serde_json::json!({ "recording": true }))
            .and_then(|()| output.line(format_args!("recording; {what_now}")));
        Outcome::Done.once_told(told, "the recording was begun", what_now)
    }

    fn take(&self, context: &Context) -> anyhow::Result<Outcome> {
        let kept: KeptTrace = self.ask(&Request::TraceTake)?;
        let output = context.output();
        let told = output.document(&kept).and_then(|()| {
            output.line(format_args!(
                "kept with {}: what was read of {} in {:.1} s, {} chunks",
                kept.group,
                kept.disk,
                kept.millis as f64 / 1000.0,
                kept.chunks
            ))
        });
        let KeptTrace { group, disk, .. } = &kept;
        Outcome::Done.once_told(
            told,
            format_args!("the boot trace was kept with {group}"),
            format_args!("`lifeboot trace show {group}/{disk}` shows it"),
        )
    }

    fn ask<T: serde::de::DeserializeOwned>(&self, request: &Request) -> anyhow::Result<T> {
        let (state, _) = session_of(&self.target, self.state.as_deref())?;
        let no_agent = || {
            Failure::new(
                format!("no agent serves the live-restore to {}", self.target.display()),
                "start it: what a guest reads is recorded while it runs",
            )
        };
        Ok(ask(state.path(), request)?.ok_or_else(no_agent)?)
    }
}
