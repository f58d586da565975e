//! `boot`: a guest's boot, replayed request by request over a slow source, ours beside what people do today.

mod later;
pub(crate) mod machine;
pub(crate) mod players;
mod record;
mod replay;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use clap::Args;

use self::players::Who;
use super::{Common, remove, settle};
use crate::child;
use crate::contest::{Contender, Sample};
use crate::ours::{self, Programs};
use crate::peers::Pace;
use crate::report::{Absent, Metric, Report, Side, Unit};
use crate::trace::{self, Request};

/// What `boot` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The raw image that boots
    #[arg(default_value = "target/guest/disk.raw")]
    pub(crate) image: PathBuf,
    /// The trace to replay, as JSON lines; without it, boot-trace.jsonl beside the image, recorded where it is missing
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Bytes a second that the source yields, to ours and the peers alike; 0 is no limit
    #[arg(long, default_value = "100MB", value_name = "RATE")]
    pub(crate) source_rate: ByteSize,
    /// What each fetch from the source waits, in milliseconds
    #[arg(long, default_value_t = 5, value_name = "MS")]
    pub(crate) source_delay: u64,
    /// Only the contenders whose name has one of these in it
    #[arg(long, value_delimiter = ',', value_name = "TEXT")]
    pub(crate) only: Vec<String>,
    /// The chunk size to capture with, in bytes; without it, lifeboot's default
    #[arg(long, value_name = "BYTES")]
    pub(crate) chunk_size: Option<u32>,
    /// Record a trace here instead: boot the guest once under QEMU and log what it asks for
    #[arg(long, value_name = "OUT", requires = "guest")]
    record: Option<PathBuf>,
    /// The guest to record: a directory with disk.raw, vmlinuz and initrd.img
    #[arg(long, value_name = "DIR")]
    guest: Option<PathBuf>,
}

/// The title of the cell of times.
pub(crate) const TIME: &str = "time of the boot trace";
/// The title of the cell of fetched bytes.
pub(crate) const FETCHED: &str = "fetched from the repository";
/// The title of the cell of what those bytes decode to.
pub(crate) const FETCHED_PLAIN: &str = "the same, decoded";
/// The title of the cell of memory.
pub(crate) const MEMORY: &str = "peak memory of live-restore";

impl Options {
    /// What the figures need: ours and QEMU's own way.
    pub(crate) fn for_figures(
        image: PathBuf,
        trace: Option<PathBuf>,
        source_rate: ByteSize,
        source_delay: u64,
    ) -> Self {
        let only =
            [players::LIVE, players::FIRST, players::ON_DEMAND, players::OVERLAY].map(str::to_owned).to_vec();
        Self { image, trace, source_rate, source_delay, only, chunk_size: None, record: None, guest: None }
    }

    /// Starts with and without a trace, beside QEMU's own way.
    pub(crate) fn for_starts(image: PathBuf, trace: Option<PathBuf>, source_delay: u64) -> Self {
        let only = [players::LIVE, players::FIRST, players::OVERLAY].map(str::to_owned).to_vec();
        Self { only, ..Self::for_figures(image, trace, ByteSize::mb(100), source_delay) }
    }

    /// What a real guest is booted over.
    pub(crate) fn for_machine(image: PathBuf, trace: Option<PathBuf>) -> Self {
        Self { only: Vec::new(), ..Self::for_figures(image, trace, ByteSize::mb(100), 5) }
    }

    fn pace(&self) -> Pace {
        Pace { bytes_per_second: self.source_rate.as_u64(), delay: Duration::from_millis(self.source_delay) }
    }
}

/// The boot trace to replay on `image`: the one that was `named`, else the one beside the image, which is recorded
/// first where there is none and the guest's kernel is there as well.
pub(crate) fn trace_of(common: &Common, image: &Path, named: Option<&Path>) -> Result<Vec<Request>> {
    let path = named.map_or_else(|| image.with_file_name("boot-trace.jsonl"), Path::to_owned);
    if named.is_none() && !path.exists() {
        let guest = image.parent().unwrap_or(Path::new("."));
        eprintln!("there is no {} yet: booting the guest once to record it", path.display());
        record::run(guest, &path, &common.scratch()?, &mut common.report("record")).with_context(|| {
            format!("cannot record a boot trace of {}: name one with --trace", guest.display())
        })?;
    }
    let trace = trace::load(&path)?;
    ensure!(!trace.is_empty(), "the trace {} is empty", path.display());
    Ok(trace)
}

/// Runs the workload, or records a trace for it.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    let mut report = common.report("boot");
    if let (Some(out), Some(guest)) = (&options.record, &options.guest) {
        report.rounds = 1;
        report.warm_up = false;
        record::run(guest, out, &common.scratch()?, &mut report)?;
        return Ok(report);
    }
    let trace = trace_of(common, &options.image, options.trace.as_deref())?;
    let players = present(options, &mut report);
    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let repo = scratch.path().join("repo");
    if players.iter().any(|who| who.side() == Side::Ours) {
        child::run(&mut common.programs.init(&repo)?)?;
        child::run(&mut common.programs.capture(&repo, &options.image, options.chunk_size)?)?;
    }
    let image = scratch.path().join("later.raw");
    later::make(&options.image, &image)?;
    if players.contains(&Who::Live) {
        // The start from the earlier snapshot, whose trace is kept.
        let dir = scratch.path().join("earlier");
        std::fs::create_dir(&dir)?;
        let set = players::start(Who::Live, &common.programs, &repo, &options.image, options.pace(), &dir)?;
        replay::run((&set.socket, set.export), &trace, Instant::now(), None)?;
        set.finish()?;
        remove(&dir)?;
    }
    if players.iter().any(|who| who.side() == Side::Ours) {
        child::run(&mut common.programs.capture(&repo, &image, options.chunk_size)?)?;
    }

    common.contest().run(&mut report, &players, |who, turn, report| {
        let dir = scratch.path().join("turn");
        remove(&dir)?;
        std::fs::create_dir(&dir)?;
        settle();
        let begin = Instant::now();
        let set = players::start(*who, &common.programs, &repo, &image, options.pace(), &dir)?;
        report.ran(who.name(), set.line.clone());
        // The warm-up round is not timed, so this is where what was read is checked.
        let check = turn.round.is_none().then_some(image.as_path());
        let replayed = replay::run((&set.socket, set.export), &trace, begin, check)
            .with_context(|| format!("the replay over {} failed", who.name()))?;
        let mut sample: Sample = vec![
            (Metric::lower(TIME, Unit::Seconds), replayed.total.as_secs_f64()),
            (Metric::lower("from start to the first answer", Unit::Seconds), replayed.first.as_secs_f64()),
            (Metric::lower("reads, p50", Unit::Micros), replayed.read_p50_micros),
            (Metric::lower("reads, p99", Unit::Micros), replayed.read_p99_micros),
            (Metric::lower("slowest read", Unit::Micros), replayed.read_max_micros),
        ];
        if let Some(server) = set.finish()? {
            sample.push((Metric::lower(MEMORY, Unit::Bytes), server.peak_memory as f64));
            let fetched = fetched(&server.stdout)?;
            sample.push((Metric::lower(FETCHED, Unit::Bytes), fetched.fetched_bytes));
            sample.push((Metric::lower(FETCHED_PLAIN, Unit::Bytes), fetched.fetched_plain_bytes));
        }
        remove(&dir)?;
        Ok(sample)
    })?;

    let distinct = trace::distinct_bytes_read(&trace);
    report.notes.push(format!(
        "the trace: {} requests, {} distinct bytes read ({}); source: {} a second, {} ms a fetch",
        trace.len(),
        distinct,
        Unit::Bytes.show(distinct as f64),
        options.source_rate.display().si(),
        options.source_delay,
    ));
    report.notes.push(
        "lifeboot's source is its repository, whose chunks are compressed: the rate holds for the bytes fetched".into(),
    );
    if let Some(cell) = report.cell(FETCHED) {
        let ratios: Vec<String> = cell
            .series
            .iter()
            .map(|series| format!("{} {:.2}", series.contender, series.summary().median / distinct as f64))
            .collect();
        report.notes.push(format!("bytes fetched to distinct bytes asked for: {}", ratios.join(", ")));
    }
    Ok(report)
}

fn present(options: &Options, report: &mut Report) -> Vec<Who> {
    let wanted = |who: &Who| {
        options.only.is_empty() || options.only.iter().any(|text| who.name().contains(text.as_str()))
    };
    let mut present = Vec::new();
    for who in players::EVERYONE.into_iter().filter(wanted) {
        match who.programs().iter().find(|program| child::find(program).is_none()) {
            None => present.push(who),
            Some(program) => report.absent.push(Absent {
                contender: who.name().to_owned(),
                reason: format!("{program} is not installed"),
            }),
        }
    }
    present
}

/// What a live-restore fetched from its repository.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fetched {
    /// As stored.
    pub(crate) fetched_bytes: f64,
    /// Decoded.
    pub(crate) fetched_plain_bytes: f64,
}

/// Replays a trace once over a live-restore without background, from a source that is not slowed.
pub(crate) fn on_demand(
    programs: &Programs,
    repo: &Path,
    dir: &Path,
    trace: &[Request],
    begin: Instant,
) -> Result<Fetched> {
    let unpaced = Pace { bytes_per_second: 0, delay: Duration::ZERO };
    let set = players::start(Who::LiveOnDemand, programs, repo, Path::new(""), unpaced, dir)?;
    replay::run((&set.socket, set.export), trace, begin, None)?;
    let server = set.finish()?.context("live-restore is ours")?;
    fetched(&server.stdout)
}

/// What a live-restore says that it fetched, in its last word.
fn fetched(stdout: &str) -> Result<Fetched> {
    let last = ours::last_with(stdout, "fetched_bytes")
        .context("live-restore's JSON lines do not tell `fetched_bytes`")?;
    let bytes = |field: &str| {
        last[field]
            .as_u64()
            .map(|bytes| bytes as f64)
            .with_context(|| format!("`{field}` is not there: {last}"))
    };
    Ok(Fetched { fetched_bytes: bytes("fetched_bytes")?, fetched_plain_bytes: bytes("fetched_plain_bytes")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fetched_bytes_are_those_of_the_last_line_that_tells_them() {
        let lines = "{\"event\":\"progress\",\"fetched_bytes\":1,\"fetched_plain_bytes\":2}\n\
                     {\"event\":\"parked\",\"fetched_bytes\":30,\"fetched_plain_bytes\":40}\n";
        let fetched = fetched(lines).unwrap();
        assert_eq!((fetched.fetched_bytes, fetched.fetched_plain_bytes), (30.0, 40.0));
        assert!(super::fetched("{\"event\":\"ready\"}").is_err());
    }
}
