//! `lifeboot show`: all about one snapshot, and what rides along with it.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context as _;
use repository::{Manifest, Repository, Snapshot};
use serde::Serialize;

use super::snapshots::one_line;
use super::{Context, Failure, Outcome, Verb};
use crate::output::{Align, Output, Table, human_size, human_time};

/// Show what is in a snapshot: its disks, what was new in it, its notes
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot show -r /backup web01@latest
  lifeboot show -r /backup web01@latest --attachment web01.xml > web01.xml")]
pub(super) struct Args {
    /// The snapshot: web01@latest, web01@2026-11-21T00:33:12Z
    snapshot: String,

    /// Write this attachment to stdout instead
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
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let repository = Repository::open(context.repository_path()?)?;
        let (snapshot, _) = repository.resolve(&self.snapshot)?;
        let output = context.output();
        if let Some(name) = &self.attachment {
            let bytes = attachment(&repository, &snapshot, name)?;
            match &self.output {
                None => output.stdout(&bytes)?,
                Some(path) => {
                    let writing = || format!("cannot write {}", path.display());
                    let mut file = std::fs::File::create_new(path).with_context(writing)?;
                    file.write_all(&bytes).with_context(writing)?;
                }
            }
            return Ok(Outcome::Done);
        }
        let manifest = snapshot.manifest();
        let name = snapshot.name().to_string();
        output.document(&Document { snapshot: name, size_bytes: manifest.size(), manifest })?;
        if !output.is_json() {
            describe(output, &snapshot)?;
        }
        Ok(Outcome::Done)
    }
}

fn attachment(repository: &Repository, snapshot: &Snapshot, name: &str) -> anyhow::Result<Vec<u8>> {
    let attachments = &snapshot.manifest().attachments;
    match attachments.iter().find(|attachment| attachment.name.as_str() == name) {
        Some(attachment) => Ok(repository.read_attachment(attachment)?),
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

fn describe(output: &Output, snapshot: &Snapshot) -> anyhow::Result<()> {
    let manifest = snapshot.manifest();
    let consistency = serde_json::to_value(manifest.consistency)?;
    let mut facts = vec![
        ("snapshot", snapshot.name().to_string()),
        ("taken", human_time(manifest.time)),
        ("by", format!("{} on {}", manifest.tool, manifest.host)),
        ("consistency", consistency.as_str().unwrap_or_default().to_owned()),
    ];
    if let Some(parent) = manifest.parent {
        facts.push(("parent", format!("{}@{parent}", manifest.group)));
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
        let data = (disk.stats.data_chunks * u64::from(disk.chunk_size)).min(disk.size);
        table.row([
            disk.name.to_string(),
            human_size(disk.size),
            human_size(data),
            human_size(disk.stats.new_bytes),
            human_size(disk.stats.new_stored_bytes),
            human_size(u64::from(disk.chunk_size)),
        ]);
    }
    output.table(&table)
}
