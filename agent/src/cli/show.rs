//! `lifeboot show`: all about one snapshot, and what rides along with it.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use repository::{Attachment, Lease, Leases, Manifest, Repository, SavedUpTo, Snapshot};
use serde::Serialize;

use super::snapshots::one_line;
use super::{Context, Failure, Outcome, UsageError, Verb};
use crate::output::{Align, Output, Table, human_size, human_time};

/// Show what is in a snapshot: its disks, what was new in it, its notes
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot show -r /backup web01@latest
  lifeboot show -r /backup web01@latest --attachment web01.xml > web01.xml")]
pub(super) struct Args {
    /// The snapshot, or one disk of it: web01@latest, web01@2026-11-21T00:33:12Z/disk0
    #[arg(value_name = "SNAPSHOT[/DISK]")]
    snapshot: String,

    /// Write this attachment to stdout instead; with --json it needs --output
    #[arg(long, value_name = "NAME")]
    attachment: Option<String>,

    /// Write the attachment to this file, which must not exist
    #[arg(short, long, value_name = "FILE", requires = "attachment")]
    output: Option<PathBuf>,
}

#[derive(Serialize)]
struct Document<'a> {
    snapshot: String,
    size_bytes: u64,
    #[serde(flatten)]
    manifest: &'a Manifest,
    /// Live-restores that need it.
    leases: &'a [&'a Lease],
}

#[derive(Serialize)]
struct Written<'a> {
    attachment: &'a Attachment,
    output: &'a Path,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let repository = Repository::open(context.repository_path()?)?;
        let output = context.output();
        if self.attachment.is_some() && self.output.is_none() && output.is_json() {
            return Err(UsageError::new(
                "an attachment and a JSON document cannot both go to stdout: give --output FILE, or leave --json out",
            )
            .into());
        }
        let (snapshot, disk) = repository.resolve(&self.snapshot)?;
        if let Some(name) = &self.attachment {
            return give_back(output, &repository, attachment(&snapshot, name)?, self.output.as_deref());
        }
        let mut manifest = snapshot.manifest().clone();
        if let Some(disk) = disk {
            manifest.disks = vec![disk];
        }
        let name = snapshot.name().to_string();
        let known = known_leases(output, &repository, "it");
        let leases: Vec<&Lease> = known.of(&snapshot.name()).collect();
        output.document(&Document {
            snapshot: name,
            size_bytes: manifest.size(),
            manifest: &manifest,
            leases: &leases,
        })?;
        if !output.is_json() {
            describe(output, &repository, &manifest, &leases)?;
        }
        Ok(Outcome::Done)
    }
}

/// The leases, as far as they can be told: what is shown of the snapshots that may be `needed` can be shown all the same.
pub(super) fn known_leases(output: &Output, repository: &Repository, needed: &str) -> Leases {
    let known = repository.leases(jiff::Timestamp::now()).unwrap_or_else(|error| {
        output.warn(format_args!("which live-restores need {needed} cannot be told: {error}"));
        Leases::default()
    });
    for error in &known.unreadable {
        output.warn(format_args!("a lease, perhaps on {needed}, cannot be read: {error}"));
    }
    known
}

/// Writes an attachment to `path`, which must not exist, or to stdout.
fn give_back(
    output: &Output,
    repository: &Repository,
    attachment: &Attachment,
    path: Option<&Path>,
) -> anyhow::Result<Outcome> {
    let bytes = repository.read_attachment(attachment)?;
    let Some(path) = path else {
        output.stdout(&bytes)?;
        return Ok(Outcome::Done);
    };
    let shown = path.display();
    let writing = || format!("cannot write {shown}");
    let mut file = std::fs::File::create_new(path).with_context(writing)?;
    file.write_all(&bytes).with_context(writing)?;
    let (name, size) = (&attachment.name, human_size(attachment.size));
    let told = output
        .document(&Written { attachment, output: path })
        .and_then(|()| output.line(format_args!("wrote {name} ({size}) to {shown}")));
    Outcome::Done.once_told(told, format_args!("{name} was written to {shown}"), "use it: all of it is there")
}

fn attachment<'a>(snapshot: &'a Snapshot, name: &str) -> anyhow::Result<&'a Attachment> {
    let attachments = &snapshot.manifest().attachments;
    match attachments.iter().find(|attachment| attachment.name.as_str() == name) {
        Some(attachment) => Ok(attachment),
        None => {
            let names = attachments.iter().map(|attachment| attachment.name.as_str()).collect::<Vec<_>>();
            let advice = match names.as_slice() {
                [] => "it has no attachments".to_owned(),
                names => format!("it has {}", names.join(", ")),
            };
            Err(Failure::new(format_args!("{} has no attachment {name:?}", snapshot.name()), advice).into())
        }
    }
}

fn describe(
    output: &Output,
    repository: &Repository,
    manifest: &Manifest,
    leases: &[&Lease],
) -> anyhow::Result<()> {
    let consistency = serde_json::to_value(manifest.consistency)?;
    let mut facts = vec![
        ("snapshot", manifest.name().to_string()),
        ("taken", human_time(manifest.time)),
        ("by", format!("{} on {}", manifest.tool, manifest.host)),
        ("consistency", consistency.as_str().unwrap_or_default().to_owned()),
    ];
    if let Some(parent) = manifest.parent {
        facts.push(("parent", format!("{}@{parent}", manifest.group)));
    }
    if let Some(saved) = &manifest.saved {
        let up_to = match saved.up_to {
            SavedUpTo::Acknowledged => "everything that the guest was told was written",
            SavedUpTo::Flushed => "everything that the guest had flushed",
        };
        facts.push(("saved", format!("of the live-restore of {}: {up_to}", saved.live_restore_of)));
    }
    for lease in leases {
        let (disk, host, since) = (&lease.disk, one_line(&lease.host), human_time(lease.since));
        facts.push(("needed", format!("by the live-restore of {disk} on {host}, since {since}")));
    }
    if let Some(note) = &manifest.note {
        facts.push(("note", one_line(note)));
    }
    for attachment in &manifest.attachments {
        facts.push(("attachment", format!("{} ({})", attachment.name, human_size(attachment.size))));
    }
    let mut text = String::new();
    for (key, value) in facts {
        text.push_str(&format!("{key:<12} {value}\n"));
    }
    text.push('\n');
    output.stdout(text.as_bytes())?;

    let mut table = Table::new(&[
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("DATA", Align::Right),
        ("NEW", Align::Right),
        ("STORED", Align::Right),
        ("CHUNK", Align::Right),
    ]);
    for disk in &manifest.disks {
        table.row([
            disk.name.to_string(),
            human_size(disk.size),
            human_size(repository.data_bytes(disk)),
            human_size(disk.stats.new_bytes),
            human_size(disk.stats.new_stored_bytes),
            human_size(u64::from(disk.chunk_size)),
        ]);
    }
    output.table(&table)
}
