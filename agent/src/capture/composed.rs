//! Captures of live-restores' targets that are read through views of their sessions: those that an agent serves, and those
//! that are not wholly home.

use std::time::Instant;

use anyhow::Context as _;
use block::Engine;
use jiff::Timestamp;
use repository::{Consistency, GroupName, Repository, SnapshotName};

use super::session::Scan;
use super::source::Source;
use super::{report, warn_if_not_latest};
use crate::cli::{Context, Failure, Outcome};
use crate::save::{Disk, LackingRange, Order, SaveRequest, ask_to_save, store};

/// A capture that needs views.
pub(super) struct Composed<'a> {
    pub(super) context: &'a Context,
    pub(super) repository: &'a Repository,
    pub(super) group: &'a GroupName,
    pub(super) sources: &'a [Source],
    pub(super) note: Option<String>,
    pub(super) level: i32,
    pub(super) engine: Engine,
    pub(super) started: Instant,
}

impl Composed<'_> {
    /// The agent that serves the sources captures them, all at one moment.
    pub(super) fn by_agent(self, scans: &[Scan], without_attachments: bool) -> anyhow::Result<Outcome> {
        let refuse = |what: &str| {
            let why = "disks that an agent serves are captured by it, of one moment";
            Failure::new(
                format!("{what}: {why}"),
                "capture them by themselves, or park the agent first (SIGTERM)",
            )
        };
        if !without_attachments {
            return Err(refuse("nothing can be attached").into());
        }
        let mut agent = None;
        let mut backup_of = Vec::new();
        for (source, scan) in self.sources.iter().zip(scans) {
            let Scan::Served { dir, session } = scan else {
                return Err(refuse(&format!("{source} is not served, and others are")).into());
            };
            agent.get_or_insert(dir);
            backup_of.push((session.clone(), source.name.to_string()));
        }
        let request = SaveRequest {
            repository: self.repository.path().canonicalize().context("cannot find the repository")?,
            group: Some(self.group.to_string()),
            time: Timestamp::now(),
            note: self.note.clone(),
            level: self.level,
            dry_run: false,
            backup_of: Some(backup_of),
        };
        let output = self.context.output();
        let progress = output.progress(format_args!("capturing {}", self.group), None);
        let agent = agent.expect("there is a source");
        let saved = ask_to_save(agent, &request, &self.context.interrupt()?, |bytes| progress.set(bytes))?;
        drop(progress);
        let name: SnapshotName = saved.snapshot.parse()?;
        let looked_at: Vec<_> = saved.disks.iter().map(|disk| Some(disk.changed_chunks)).collect();
        self.conclude(&name, &looked_at, &saved.damaged)
    }

    /// Captures sessions at rest, not all of which are wholly home.
    pub(super) fn of_views(self, scans: &[Scan], without_attachments: bool) -> anyhow::Result<Outcome> {
        let refuse = |what: &str| {
            Failure::new(
                format!("{what} together with the target of a live-restore that is not complete"),
                "capture that target by itself, or complete its live-restore first",
            )
        };
        if !without_attachments {
            return Err(refuse("nothing can be attached").into());
        }
        let mut rests = Vec::new();
        for (source, scan) in self.sources.iter().zip(scans) {
            let Scan::Changed(rest) = scan else {
                return Err(refuse(&format!("{source} cannot be captured")).into());
            };
            rests.push(&**rest);
        }
        let disks: Vec<Disk<'_>> = self
            .sources
            .iter()
            .zip(&rests)
            .map(|(source, rest)| Disk { name: source.name.clone(), base: rest.base.clone(), view: *rest })
            .collect();
        let order = Order {
            group: self.group.clone(),
            time: Timestamp::now(),
            parent: self.repository.latest(self.group).ok().flatten().map(|parent| parent.manifest().time),
            consistency: Consistency::Crash,
            saved: None,
            note: self.note.clone(),
            level: self.level,
        };
        let output = self.context.output();
        let total = rests.iter().map(|rest| rest.frozen().bytes()).sum();
        let progress = output.progress(format_args!("capturing {}", self.group), Some(total));
        let interrupt = self.context.interrupt()?;
        let stored = store(self.repository, &disks, order, self.engine, &progress, &interrupt, &|| Ok(()))?;
        drop(progress);
        let looked_at: Vec<_> = rests.iter().map(|rest| Some(rest.frozen().chunks().len() as u64)).collect();
        self.conclude(&stored.snapshot.name(), &looked_at, &stored.damaged)
    }

    fn conclude(
        self,
        name: &SnapshotName,
        looked_at: &[Option<u64>],
        damaged: &[LackingRange],
    ) -> anyhow::Result<Outcome> {
        let snapshot = self.repository.snapshot(name)?;
        let output = self.context.output();
        damaged.iter().for_each(|lacking| output.damaged(lacking.words(&name.to_string())));
        let outcome = if damaged.is_empty() { Outcome::Done } else { Outcome::Damaged };
        let warnings = warn_if_not_latest(output, self.repository, name).into_iter().collect();
        report(output, &snapshot, self.sources, looked_at, warnings, outcome, self.started)
    }
}
