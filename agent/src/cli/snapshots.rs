//! `lifeboot snapshots`: what there is to go back to.

use std::collections::BTreeSet;

use repository::{Consistency, DiskName, GroupName, Lease, Leases, Repository, Snapshot};
use serde::Serialize;

use super::show::known_leases;
use super::{Context, Outcome, UsageError, Verb};
use crate::output::{Align, Table, human_size, human_time};

/// List snapshots, of one group or of all
#[derive(Debug, clap::Args)]
#[command(after_help = "\
NEW is what the capture brought that the repository did not have, STORED what
that takes. NEEDED ON are the hosts with a live-restore that still needs the
snapshot, if there are any.
With --json the document is an array of snapshots, the oldest of each group
first.")]
pub(super) struct Args {
    /// List only this group
    group: Option<String>,
}

#[derive(Serialize)]
struct Listed<'a> {
    snapshot: String,
    group: &'a GroupName,
    time: jiff::Timestamp,
    size_bytes: u64,
    new_bytes: u64,
    new_stored_bytes: u64,
    consistency: Consistency,
    disks: Vec<&'a DiskName>,
    attachments: Vec<&'a DiskName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<&'a str>,
    /// Live-restores that need it.
    leases: Vec<&'a Lease>,
}

impl<'a> Listed<'a> {
    fn of(snapshot: &'a Snapshot, leases: &'a Leases) -> Self {
        let manifest = snapshot.manifest();
        Self {
            snapshot: snapshot.name().to_string(),
            group: &manifest.group,
            time: manifest.time,
            size_bytes: manifest.size(),
            new_bytes: manifest.disks.iter().map(|disk| disk.stats.new_bytes).sum(),
            new_stored_bytes: manifest.disks.iter().map(|disk| disk.stats.new_stored_bytes).sum(),
            consistency: manifest.consistency,
            disks: manifest.disks.iter().map(|disk| &disk.name).collect(),
            attachments: manifest.attachments.iter().map(|attachment| &attachment.name).collect(),
            note: manifest.note.as_deref(),
            leases: leases.of(&snapshot.name()).collect(),
        }
    }

    /// The hosts of the live-restores that need it, each once.
    fn needed_on(&self) -> String {
        let hosts: BTreeSet<String> = self.leases.iter().map(|lease| one_line(&lease.host)).collect();
        Vec::from_iter(hosts).join(",")
    }
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let group =
            self.group.map(|group| group.parse::<GroupName>()).transpose().map_err(UsageError::new)?;
        let repository = Repository::open(context.repository_path()?)?;
        let found = repository.snapshots(group.as_ref())?;
        let output = context.output();
        let leases = known_leases(output, &repository, "one of them");
        let listed: Vec<_> = found.snapshots.iter().map(|snapshot| Listed::of(snapshot, &leases)).collect();
        output.document(&listed)?;
        if listed.is_empty() {
            output.line("there are no snapshots yet: `lifeboot capture` takes one")?;
        } else {
            output.table(&table(&listed))?;
        }
        for (name, error) in &found.damaged {
            output.damaged(format_args!("the snapshot {name} cannot be read: {error}"));
        }
        Ok(if found.damaged.is_empty() { Outcome::Done } else { Outcome::Damaged })
    }
}

fn table(listed: &[Listed<'_>]) -> Table {
    let is_any_needed = listed.iter().any(|snapshot| !snapshot.leases.is_empty());
    let mut columns = vec![
        ("SNAPSHOT", Align::Left),
        ("TAKEN (UTC)", Align::Left),
        ("SIZE", Align::Right),
        ("NEW", Align::Right),
        ("STORED", Align::Right),
        ("DISKS", Align::Left),
    ];
    if is_any_needed {
        columns.push(("NEEDED ON", Align::Left));
    }
    columns.push(("NOTE", Align::Left));
    let mut table = Table::new(&columns);
    for snapshot in listed {
        let disks = snapshot.disks.iter().map(|name| name.as_str()).collect::<Vec<_>>();
        let mut cells = vec![
            snapshot.snapshot.clone(),
            human_time(snapshot.time),
            human_size(snapshot.size_bytes),
            human_size(snapshot.new_bytes),
            human_size(snapshot.new_stored_bytes),
            disks.join(","),
        ];
        if is_any_needed {
            cells.push(snapshot.needed_on());
        }
        cells.push(shortened(&one_line(snapshot.note.unwrap_or_default())));
        table.row(cells);
    }
    table
}

/// A note as it fits into a list; `show` has all of it.
fn shortened(note: &str) -> String {
    const LONGEST: usize = 60;
    match note.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &note[..end]),
        None => note.to_owned(),
    }
}

/// A note as a cell: neither line breaks nor anything that a terminal would obey.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
