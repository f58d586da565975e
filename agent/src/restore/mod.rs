//! `lifeboot restore`: a disk out of a repository, whole and verified.

mod damage;
mod decode;
mod pipeline;
mod plan;
mod signature;
mod target;
mod writer;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use block::{DirectIo, Engine, FileOptions, IoEngine};
use repository::{DiskEntry, DiskMap, MapEntry, Repository, Snapshot};
use serde::Serialize;

use crate::cli::{Context, Failure, Outcome, Verb};
use crate::live_restore::{StateDir, stopped_status};
use crate::output::{Output, human_count, human_duration, human_size};
use crate::source::{FallbackUse, Fallbacks, PaceArgs, Throttle};
use crate::status::Phase;
use crate::target_path::{no_such_disk, split};
use damage::{Damage, DamageLog};
use pipeline::Restore;
use target::Target;

/// Entries of a map that are looked at together.
const STRETCH: u64 = 64 << 10;

/// Bring a disk of a snapshot back to a file or a block device
///
/// Every chunk is verified before it is written. A file stays sparse, and gets its name only when it is
/// whole and on stable storage; a block device is written in place, and zeroed where the disk has zeroes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot restore -r /backup web01@latest /var/lib/libvirt/images/web01.raw
  lifeboot restore -r /backup db@2026-11-21T00:33:12Z/data /dev/vg/db-data \\
      --force

A target counts as empty if it is a file that was never written to (it may
have a size), or a block device that is zero in its first and last MiB. A file
is replaced by one of the disk's size, with the old one's owner and
permissions. Ctrl-C, or a failure, leaves a file target as it was; exit code
130, or 1.")]
pub struct Args {
    /// The snapshot, and the disk if it has several: web01@latest, web01@latest/disk0
    #[arg(value_name = "SNAPSHOT[/DISK]")]
    snapshot: String,

    /// A file, which need not exist, or a block device; with DISK= before it, for that disk of the snapshot
    #[arg(value_name = "[DISK=]TARGET")]
    target: PathBuf,

    /// Replace what is in the target. Without it a file must hold no data, and of a block device the first
    /// and last MiB and 256 samples between them must be zeroes
    #[arg(long)]
    force: bool,

    /// Leave zeroes where the repository is damaged, name all such places, and end with exit code 3
    #[arg(long)]
    keep_going: bool,

    /// A copy of the repository: a chunk that is damaged or missing is fetched from it, and verified. May be given
    /// several times
    #[arg(long, value_name = "REPO")]
    fallback: Vec<PathBuf>,

    /// How to do I/O: auto, uring or threads
    #[arg(long, default_value_t = IoEngine::Auto, value_name = "ENGINE")]
    io_engine: IoEngine,

    /// Whether to write around the page cache
    #[arg(long, value_enum, default_value_t = Direct::Auto, value_name = "WHEN")]
    direct: Direct,

    #[command(flatten)]
    pace: PaceArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Direct {
    /// Where the file system allows
    Auto,
    /// Or fail
    On,
    /// Through the page cache
    Off,
}

#[derive(Serialize)]
struct Report<'a> {
    snapshot: String,
    disk: &'a str,
    /// A name that is no text has other characters in the place of those that are none.
    target: Cow<'a, str>,
    size_bytes: u64,
    /// What was brought back of the disk's chunks that are not zeroes.
    data_bytes: u64,
    damaged_bytes: u64,
    damaged: &'a [Damage],
    /// What came from copies of the repository.
    fallbacks: &'a [FallbackUse],
    seconds: f64,
}

/// Fails where the target is that of a live-restore that is not complete: what its guest wrote is nowhere else.
fn check_no_session(path: &Path) -> anyhow::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let state = StateDir::of(path, None)?;
    let record = state.record()?.filter(|record| record.was_begun() && !record.handed_over);
    let Some(record) = record else { return Ok(()) };
    if stopped_status(&state, &record).is_ok_and(|status| status.phase == Phase::Complete) {
        return Ok(());
    }
    Err(Failure::new(
        format_args!(
            "{} is the target of a live-restore of {} that is not complete: session {} ({})",
            path.display(),
            record.snapshot,
            record.session,
            state.path().display()
        ),
        format_args!(
            "name another target; or `{}` keeps what its guest wrote, and `{}` gives it up",
            state.saving(&record),
            state.command("discard", path)
        ),
    )
    .into())
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let started = Instant::now();
        let output = context.output();
        let (name, wanted) = split(&self.target)?;
        let warn = |what| output.warn(what);
        let repository = Repository::open(context.repository_path()?);
        let lacks = |repository: &Repository| repository.resolve(&self.snapshot).map(drop);
        let (repository, fallbacks) = Fallbacks::beside(repository, &self.fallback, lacks, warn)?;
        let repository = repository?;
        let resolve = |repository: &Repository| repository.resolve(&self.snapshot);
        let (snapshot, disk) = resolve(&repository).or_else(|error| fallbacks.or_else(error, resolve))?;
        let disk = match (disk, name) {
            (Some(disk), None) => disk,
            (Some(disk), Some(name)) => called(&self.snapshot, std::slice::from_ref(&disk), name)?.clone(),
            (None, Some(name)) => called(&self.snapshot, &snapshot.manifest().disks, name)?.clone(),
            (None, None) => only_disk(&snapshot)?.clone(),
        };
        let map = repository.disk_map(&disk)?;
        let engine = Engine::choose(self.io_engine)?;
        let interrupt = context.interrupt()?;
        let direct = match self.direct {
            Direct::Auto => DirectIo::Auto,
            Direct::On => DirectIo::On,
            Direct::Off => DirectIo::Off,
        };
        let options = FileOptions::new(engine).direct(direct);
        check_no_session(wanted)?;
        let (target, target_disk) = Target::open(wanted, disk.size, self.force, options)?;

        let data_bytes = repository.data_bytes(&disk);
        let progress = output.progress(format_args!("restoring {}", disk.name), Some(data_bytes));
        let damage = DamageLog::new(self.keep_going);
        let restore = Restore {
            repository: &repository,
            fallbacks: &fallbacks,
            map: &map,
            target: &target_disk,
            target_is_zero: target.starts_as_zeroes(),
            engine,
            damage: &damage,
            progress: &progress,
            slots: self.pace.restore_slots(),
            throttle: Throttle::new(self.pace.pace()),
        };
        restore.run(interrupt.clone())?;
        interrupt.check()?;
        let path = target.path().to_owned();
        target.complete()?;
        drop(progress);

        let (damaged, damaged_bytes) = damage.conclude();
        let elapsed = started.elapsed();
        report_damage(output, &disk, &damaged, damaged_bytes);
        let data_bytes = if damaged.is_empty() { data_bytes } else { data_beside(&damaged, &map) };
        let report = Report {
            snapshot: snapshot.name().to_string(),
            disk: disk.name.as_str(),
            target: path.to_string_lossy(),
            size_bytes: disk.size,
            data_bytes,
            damaged_bytes,
            damaged: &damaged,
            fallbacks: &fallbacks.used(),
            seconds: elapsed.as_secs_f64(),
        };
        for used in fallbacks.used() {
            output.warn(format_args!(
                "{}, {}, came from the copy {}: `lifeboot verify` says what the repository lacks",
                human_count(used.chunks, "chunk", "chunks"),
                human_size(used.bytes),
                used.repository.display()
            ));
        }
        let lost = match damaged_bytes {
            0 => String::new(),
            bytes => format!(", {} lost", human_size(bytes)),
        };
        let told = output.document(&report).and_then(|()| {
            output.line(format_args!(
                "restored {}/{} to {} in {}: {}, {} of it data{lost}",
                snapshot.name(),
                disk.name,
                path.display(),
                human_duration(elapsed),
                human_size(disk.size),
                human_size(data_bytes),
            ))
        });
        let (outcome, advice) = if damaged.is_empty() {
            (Outcome::Done, "use it: all of the disk is there, verified")
        } else {
            (Outcome::Damaged, "all of the disk is there, verified, but what is named as lost above")
        };
        outcome.once_told(told, format_args!("{} was restored", path.display()), advice)
    }
}

/// The one disk of a snapshot.
///
/// # Errors
/// Where it has several: their names are offered.
pub(crate) fn only_disk(snapshot: &Snapshot) -> anyhow::Result<&DiskEntry> {
    let name = snapshot.name();
    match snapshot.manifest().disks.as_slice() {
        [disk] => Ok(disk),
        [] => {
            Err(Failure::new(format_args!("{name} has no disks"), "`lifeboot show` says what is in it")
                .into())
        }
        disks => {
            let names = disks.iter().map(|disk| format!("{name}/{}", disk.name)).collect::<Vec<_>>();
            Err(Failure::new(
                format_args!("{name} has {} disks", disks.len()),
                format_args!("say which one: {}", names.join(", ")),
            )
            .into())
        }
    }
}

/// That of these disks of `snapshot` which has this name.
fn called<'a>(snapshot: &str, disks: &'a [DiskEntry], name: &str) -> Result<&'a DiskEntry, Failure> {
    let names = || disks.iter().map(|disk| &disk.name).collect::<Vec<_>>();
    disks.iter().find(|disk| disk.name.as_str() == name).ok_or_else(|| no_such_disk(snapshot, name, &names()))
}

/// Bytes of the disk's chunks that are not zeroes, without what is damaged.
fn data_beside(damaged: &[Damage], map: &DiskMap) -> u64 {
    let chunk_size = u64::from(map.chunk_size());
    let lost = damaged.iter().map(|damage| {
        let end = damage.offset + damage.len;
        damage.offset / chunk_size..end.div_ceil(chunk_size)
    });
    let (mut at, mut bytes) = (0, 0);
    for lost in lost.chain(std::iter::once(map.chunk_count()..map.chunk_count())) {
        while at < lost.start {
            let end = lost.start.min(at + STRETCH);
            // It could be read a moment ago.
            let entries = map.entries(at..end).unwrap_or_default();
            let data = (at..end).zip(entries).filter(|(_, entry)| *entry != MapEntry::Zero);
            bytes += data.map(|(index, _)| map.chunk_len(index) as u64).sum::<u64>();
            at = end;
        }
        at = lost.end;
    }
    bytes
}

fn report_damage(output: &Output, disk: &DiskEntry, damaged: &[Damage], bytes: u64) {
    for damage in damaged {
        output.damaged(format_args!(
            "{}: {} bytes at offset {} are lost and left as zeroes: {}",
            disk.name, damage.len, damage.offset, damage.reason
        ));
    }
    if bytes > 0 {
        let places = human_count(damaged.len() as u64, "place", "places");
        output.damaged(format_args!("{} are lost in {places} of {}", human_size(bytes), disk.name));
    }
}
