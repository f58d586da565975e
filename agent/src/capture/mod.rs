//! `lifeboot capture`: disks into a repository.

mod composed;
mod export;
mod file;
mod format;
mod order;
mod pipeline;
mod reader;
mod session;
mod source;
mod stop;
mod workers;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use block::{Engine, IoEngine};
use repository::{
    CaptureOptions, CaptureWriter, ChunkEncoder, Consistency, DiskMap, DiskName, DiskWriter, GroupName,
    MAX_NOTE_LEN, MAX_PLAIN_LEN, Repository, Snapshot, SnapshotMeta, SnapshotName,
};
use serde::Serialize;

pub(crate) use pipeline::{Feed, feed};
pub(crate) use reader::{PIECE_LEN, Piece};
pub(crate) use stop::Stop;

use crate::cli::{Context, Failure, Outcome, Size, UsageError, Verb, not_latest};
use crate::output::{Output, human_count, human_duration, human_size};
use composed::Composed;
use reader::Plan;
use session::Scan;
use source::{Source, SourceArg};

/// Take a snapshot of one or more disks
///
/// Reads raw disk images, block devices and NBD exports. What the repository has already is not stored again, so a
/// second capture of a disk costs what has changed. Nothing of a capture can be seen until it is complete. Of the
/// target of a live-restore only what its guest wrote is read, where that is known for certain: while an agent serves it, and
/// after it was parked; all else is as in the snapshot that it restores.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot capture -r /backup web01 /var/lib/libvirt/images/web01.raw
  lifeboot capture -r /backup db root=/dev/vg/db-root data=/dev/vg/db-data \\
      --attach db.xml
  lifeboot capture -r /backup web01 'nbd+unix:///?socket=/run/web01.sock'
  lifeboot capture -r /backup db \\
      root='nbds://db.example/root?tls-certificates=/etc/lifeboot/db'

Disks without a NAME are called disk0, disk1, … by their place. A source is
read through the page cache if it is there already, and around it otherwise.
Of an NBD export what reads as zeroes is not read where its server tells; what
is written to it meanwhile is not noticed: have it serve a disk that nobody
writes to. An image that is no raw disk is captured through a server that knows
it, such as `qemu-nbd --read-only --format=qcow2 --socket=PATH IMAGE`.
Ctrl-C leaves nothing behind; exit code 130.")]
pub struct Args {
    /// The group: the machine whose disks these are
    group: String,

    /// A raw disk image, a block device, or an NBD URI (nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH, with TLS nbds://, nbds+unix://);
    /// `./a=b` for a file with = in its name
    #[arg(required = true, value_name = "[NAME=]SOURCE")]
    sources: Vec<SourceArg>,

    /// A file to keep with the snapshot, such as the machine's configuration; may be repeated
    #[arg(long, value_name = "FILE")]
    attach: Vec<PathBuf>,

    /// Bytes of a chunk, from 64KiB to 4MiB, a power of two [default: the parent snapshot's, else the repository's]
    #[arg(long, value_name = "SIZE")]
    chunk_size: Option<Size>,

    /// zstd's compression level
    #[arg(long, default_value_t = repository::DEFAULT_LEVEL, allow_negative_numbers = true)]
    level: i32,

    /// How to do I/O: auto, uring or threads
    #[arg(long, default_value_t = IoEngine::Auto, value_name = "ENGINE")]
    io_engine: IoEngine,

    /// What to remember about this snapshot
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,

    /// Read the whole target of a live-restore, not only what its guest wrote
    #[arg(long)]
    full: bool,

    /// Where sessions of live-restores are kept, if not beside their targets
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// Capture image files such as qcow2 as they are, not the disks in them
    #[arg(long)]
    as_raw: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    snapshot: String,
    consistency: Consistency,
    warnings: Vec<String>,
    disks: Vec<ReportedDisk<'a>>,
    attachments: Vec<&'a str>,
    seconds: f64,
}

#[derive(Serialize)]
struct ReportedDisk<'a> {
    name: &'a str,
    source: String,
    size_bytes: u64,
    chunk_size_bytes: u32,
    /// Chunks that were looked at, of a live-restore's target of which not all had to be.
    chunks_looked_at: Option<u64>,
    data_chunks: u64,
    zero_chunks: u64,
    new_chunks: u64,
    new_bytes: u64,
    new_stored_bytes: u64,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let started = Instant::now();
        let group: GroupName =
            self.group.parse().map_err(|error: repository::Error| UsageError::new(error))?;
        let named = source::name_all(self.sources).map_err(UsageError::new)?;
        let attached = name_attachments(self.attach)?;
        if self.note.as_ref().is_some_and(|note| note.len() > MAX_NOTE_LEN) {
            return Err(UsageError::new(format_args!("a note has at most {MAX_NOTE_LEN} bytes")).into());
        }
        let chunk_size = self.chunk_size.map(Size::chunk_size).transpose()?;
        // The workers make their own; this one finds out whether there is such a level.
        ChunkEncoder::new(self.level).map_err(UsageError::new)?;
        let repository = Repository::open(context.repository_path()?).map_err(offer_init)?;
        let engine = Engine::choose(self.io_engine)?;
        let interrupt = context.interrupt()?;
        let sources = named
            .into_iter()
            .map(|(name, place)| Source::open(name, place, self.as_raw, &interrupt))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let wish = session::Wish {
            repository: &repository,
            state: self.state.as_deref(),
            full: self.full,
            chunk_size,
            engine,
            interrupt: &interrupt,
        };
        let scans =
            sources.iter().map(|source| session::scan(source, &wish)).collect::<anyhow::Result<Vec<_>>>()?;
        let attachments = attached
            .into_iter()
            .map(|(name, path)| Ok((name, read_attachment(&path)?)))
            .collect::<anyhow::Result<Vec<_>>>()?;

        for (source, scan) in sources.iter().zip(&scans) {
            if let Scan::Whole { why: Some(why) } = scan {
                context.output().announce(format_args!("full scan of {source}: {why}"));
            }
        }
        let composed = Composed {
            context,
            repository: &repository,
            group: &group,
            sources: &sources,
            note: self.note.clone(),
            level: self.level,
            engine,
            started,
        };
        if scans.iter().any(|scan| matches!(scan, Scan::Served { .. })) {
            return composed.by_agent(&scans, attachments.is_empty());
        }
        if scans.iter().any(|scan| matches!(scan, Scan::Changed(rest) if !rest.view.is_whole())) {
            return composed.of_views(&scans, attachments.is_empty());
        }

        let parent = find_parent(&repository, &group, context.output());
        let mut writer = repository.begin_capture(&group, CaptureOptions::default())?;
        let disks = begin_disks(&repository, &mut writer, &sources, &scans, parent.as_ref(), chunk_size)?;
        let plans = sources
            .iter()
            .zip(&disks)
            .zip(&scans)
            .map(|((source, disk), scan)| {
                let plan = Plan::new(source, disk.chunk_size(), engine)?;
                Ok(match scan {
                    Scan::Changed(rest) => plan.only(&session::runs(rest)),
                    Scan::Whole { .. } | Scan::Served { .. } => plan,
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        for (source, plan) in sources.iter().zip(&plans) {
            if let Some(why) = &plan.why_more {
                context.output().announce(format_args!("all of {source} is read, zeroes too: {why}"));
            }
        }
        let looked_at: Vec<Option<u64>> = plans
            .iter()
            .zip(&scans)
            .map(|(plan, scan)| matches!(scan, Scan::Changed(_)).then(|| plan.chunks()))
            .collect();
        for (name, bytes) in &attachments {
            writer.add_attachment(name.clone(), bytes)?;
        }
        let total = plans.iter().map(Plan::data_bytes).sum();
        let progress = context.output().progress(format_args!("capturing {group}"), Some(total));
        pipeline::run(engine, &sources, &plans, &disks, self.level, &progress, interrupt.clone())?;
        drop(progress);

        let mut warnings = changes(&sources)?;
        for warning in &warnings {
            context.output().warn(warning);
        }
        let meta = SnapshotMeta {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            tool: concat!("lifeboot ", env!("CARGO_PKG_VERSION")).to_owned(),
            consistency: if warnings.is_empty() { Consistency::Crash } else { Consistency::Changing },
            parent: parent.as_ref().map(|parent| parent.manifest().time),
            saved: None,
            note: self.note,
        };
        // From here on it either becomes a snapshot or fails: an interrupt comes too late.
        interrupt.check()?;
        let snapshot = writer.commit(meta)?;
        warnings.extend(warn_if_not_latest(context.output(), &repository, &snapshot.name()));
        report(context.output(), &snapshot, &sources, &looked_at, warnings, Outcome::Done, started)
    }
}

/// A repository that is not there may be one that is yet to be made: whoever captures can begin with an empty one.
fn offer_init(error: repository::Error) -> repository::Error {
    match (error.kind(), error.advice()) {
        (repository::ErrorKind::NotFound | repository::ErrorKind::NotARepository, Some(advice)) => {
            let advice = format!("{advice}; `lifeboot init` makes a new one");
            error.advising(advice)
        }
        _ => error,
    }
}

/// The group's newest snapshot. One that cannot be read is a reason to warn, not to refuse a capture.
fn find_parent(repository: &Repository, group: &GroupName, output: &Output) -> Option<Snapshot> {
    match repository.latest(group) {
        Ok(parent) => parent,
        Err(error) => {
            output.warn(format_args!(
                "the newest snapshot of {group} cannot be read and is not used as parent: {error}"
            ));
            None
        }
    }
}

fn begin_disks(
    repository: &Repository,
    writer: &mut CaptureWriter,
    sources: &[Source],
    scans: &[Scan],
    parent: Option<&Snapshot>,
    chunk_size: Option<u32>,
) -> anyhow::Result<Vec<DiskWriter>> {
    let mut disks = Vec::with_capacity(sources.len());
    for (source, scan) in sources.iter().zip(scans) {
        if let Scan::Changed(rest) = scan {
            disks.push(writer.begin_disk_over(source.name.clone(), &rest.base)?);
            continue;
        }
        let before =
            parent.and_then(|parent| parent.manifest().disks.iter().find(|disk| disk.name == source.name));
        let chunk_size = chunk_size
            .or(before.map(|disk| disk.chunk_size))
            .unwrap_or_else(|| repository.config().chunk_size);
        let map: Option<DiskMap> = before.map(|disk| repository.disk_map(disk)).transpose()?;
        disks.push(writer.begin_disk(source.name.clone(), source.size, chunk_size, map)?);
    }
    Ok(disks)
}

/// Gives each attachment its name: that of its file.
fn name_attachments(paths: Vec<PathBuf>) -> Result<Vec<(DiskName, PathBuf)>, UsageError> {
    let mut named: Vec<(DiskName, PathBuf)> = Vec::with_capacity(paths.len());
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name: DiskName = name.parse().map_err(|error| {
            UsageError::new(format_args!("{} cannot be attached under its name: {error}", path.display()))
        })?;
        if let Some((_, other)) = named.iter().find(|(other, _)| *other == name) {
            return Err(UsageError::new(format_args!(
                "two attachments would be called {name}, {} and {}: an attachment has the name of its file, so attach a copy \
                 of another name",
                other.display(),
                path.display()
            )));
        }
        named.push((name, path));
    }
    Ok(named)
}

fn read_attachment(path: &Path) -> anyhow::Result<Vec<u8>> {
    let shown = path.display();
    let reading = || format!("cannot read the attachment {shown}");
    let metadata = std::fs::metadata(path).with_context(reading)?;
    if !metadata.is_file() || metadata.len() > MAX_PLAIN_LEN as u64 {
        return Err(Failure::new(
            format_args!(
                "{shown} cannot be attached: it is not a file of at most {}",
                human_size(MAX_PLAIN_LEN as u64)
            ),
            "attach small files, such as the machine's configuration; capture disks as sources",
        )
        .into());
    }
    std::fs::read(path).with_context(reading)
}

/// What changed while it was read, in words.
fn changes(sources: &[Source]) -> anyhow::Result<Vec<String>> {
    let mut warnings = Vec::new();
    for source in sources {
        if let Some(how) = source.change()? {
            warnings.push(format!(
                "{} ({source}) changed while it was captured: {how}; the snapshot may hold a state that never was",
                source.name,
            ));
        }
    }
    Ok(warnings)
}

/// Warns where the snapshot that was made is not the group's newest, and returns the words.
fn warn_if_not_latest(output: &Output, repository: &Repository, made: &SnapshotName) -> Option<String> {
    let warning = not_latest(repository, made)?;
    output.warn(&warning);
    Some(warning)
}

fn report(
    output: &Output,
    snapshot: &Snapshot,
    sources: &[Source],
    looked_at: &[Option<u64>],
    warnings: Vec<String>,
    outcome: Outcome,
    started: Instant,
) -> anyhow::Result<Outcome> {
    let elapsed = started.elapsed();
    let manifest = snapshot.manifest();
    let disks =
        manifest.disks.iter().zip(sources).zip(looked_at).map(|((disk, source), looked_at)| ReportedDisk {
            chunks_looked_at: *looked_at,
            name: disk.name.as_str(),
            source: source.to_string(),
            size_bytes: disk.size,
            chunk_size_bytes: disk.chunk_size,
            data_chunks: disk.stats.data_chunks,
            zero_chunks: disk.stats.zero_chunks,
            new_chunks: disk.stats.new_chunks,
            new_bytes: disk.stats.new_bytes,
            new_stored_bytes: disk.stats.new_stored_bytes,
        });
    let report = Report {
        snapshot: snapshot.name().to_string(),
        consistency: manifest.consistency,
        warnings,
        disks: disks.collect(),
        attachments: manifest.attachments.iter().map(|attachment| attachment.name.as_str()).collect(),
        seconds: elapsed.as_secs_f64(),
    };
    let name = &report.snapshot;
    outcome.once_told(
        tell(output, &report, manifest.size(), elapsed),
        format_args!("the snapshot {name} was made"),
        format_args!("`lifeboot show {name}` tells what is in it"),
    )
}

fn tell(output: &Output, report: &Report<'_>, size: u64, elapsed: Duration) -> anyhow::Result<()> {
    output.document(report)?;
    for disk in &report.disks {
        if let Some(looked_at) = disk.chunks_looked_at {
            let chunks = disk.size_bytes.div_ceil(u64::from(disk.chunk_size_bytes));
            output
                .line(format_args!("{}: incremental: {looked_at} of {chunks} chunks looked at", disk.name))?;
        }
    }
    let new: u64 = report.disks.iter().map(|disk| disk.new_bytes).sum();
    let stored: u64 = report.disks.iter().map(|disk| disk.new_stored_bytes).sum();
    output.line(format_args!(
        "captured {} in {}: {} of {}, {} of it new ({} stored)",
        report.snapshot,
        human_duration(elapsed),
        human_count(report.disks.len() as u64, "disk", "disks"),
        human_size(size),
        human_size(new),
        human_size(stored),
    ))
}
