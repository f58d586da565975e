//! `serve`: a raw file over NBD under fio, nbdcopy and `qemu-img bench`, ours beside nbdkit, qemu-nbd and nbd-server.

mod cells;
mod certificates;
mod picture;
pub(crate) mod servers;
mod verdict;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;

use self::cells::{Cache, Cell, Transport, Work};
use self::servers::Start;
use super::{Common, settle};
use crate::child;
use crate::contest::{Contender, Sample};
use crate::endpoint::Endpoint;
use crate::fio::{self, Job};
use crate::peers::EXPORT;
use crate::report::{Absent, Metric, Report, Side, Unit};

pub(crate) use self::picture::write as draw;
pub(crate) use self::servers::Who;

/// What `serve` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Only the cells whose name has one of these in it: `page-unix`, `randread-4k-d32-c1`; with a plus, all parts of one: `tls+64k`
    #[arg(long, value_delimiter = ',', value_name = "TEXT")]
    cells: Vec<String>,
    /// Only 4 KiB random reads at depth 32 over one connection
    #[arg(long, conflicts_with = "cells")]
    quick: bool,
    /// The seconds that fio runs for each sample
    #[arg(long, default_value_t = 3.0, value_name = "SECONDS")]
    runtime: f64,
    /// The size of the file that is served, in MiB
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    size: u64,
    /// Only these contenders
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// More arguments for lifeboot-nbd
    #[arg(long, allow_hyphen_values = true, value_name = "ARGUMENT")]
    ours_arg: Vec<String>,
}

/// The cell that `--quick` runs.
pub(crate) const QUICK: &str = "page-unix-randread-4k-d32-c1";
/// Requests of one `qemu-img bench`.
const QEMU_REQUESTS: u32 = 100_000;

impl Options {
    /// As `--quick`.
    pub(crate) fn quick() -> Self {
        let (cells, only, ours_arg) = (Vec::new(), Vec::new(), Vec::new());
        Self { cells, quick: true, runtime: 3.0, size: 1024, only, ours_arg }
    }

    fn chosen(&self) -> Result<Vec<Cell>> {
        if self.quick { cells::chosen(&[QUICK.to_owned()]) } else { cells::chosen(&self.cells) }
    }

    fn size_bytes(&self) -> u64 {
        self.size << 20
    }
}

/// Runs the workload.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    child::require("fio")?;
    let cells = options.chosen()?;
    let mut report = common.report("serve");
    let present = present(common, &options.only, &mut report)?;
    if cells.iter().any(|cell| cell.cache == Cache::Direct) {
        report.notes.push(
            "direct: O_DIRECT on the file; nbdkit's file plugin and nbd-server have no such mode".into(),
        );
    }

    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let file = scratch.path().join("disk.raw");
    fill(&file, options.size_bytes())?;
    if cells.iter().any(|cell| cell.transport == Transport::Tls) {
        certificates::write(scratch.path())?;
    }
    for cell in &cells {
        let players: Vec<Who> = present.iter().copied().filter(|who| who.takes_part(cell)).collect();
        // Who fails in one cell is out of that one alone.
        let mut part = common.report("serve");
        part.scratch_is(scratch.path());
        common.contest().run(&mut part, &players, |who, _, part| {
            settle();
            if cell.cache == Cache::Cold {
                forget(&file)?;
            }
            let at = servers::endpoint(cell.transport, scratch.path())?;
            let (serving, line) = servers::start(
                common,
                *who,
                Start { cache: cell.cache, file: &file, at: &at, ours_arg: &options.ours_arg, prefix: &[] },
            )?;
            part.ran(who.name(), line);
            let sample = measure(options, cell, &at)?;
            drop(serving);
            if let Some(socket) = at.socket() {
                super::remove(socket)?;
            }
            Ok(sample)
        })?;
        report.absorb(part);
    }
    report.notes.extend(verdict::sentences(&report, &cells));
    let job = Job { pattern: "randread", block_size: 4096, depth: 32, connections: 1 };
    let uri = Endpoint::from(Path::new("bench.sock")).uri(EXPORT);
    report.ran("fio (an example)", child::line(&job.command(&uri, Duration::from_secs_f64(options.runtime))));
    Ok(report)
}

/// What several runs found, one after the other, as one: of a cell that more than one has, the last counts.
pub(crate) fn merge(files: &[PathBuf]) -> Result<Report> {
    let mut merged: Option<Report> = None;
    for path in files {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let report: Report = serde_json::from_slice(&text)
            .with_context(|| format!("{} is no report of lifeboot-bench", path.display()))?;
        ensure!(report.workload == "serve", "{} is of {}, not of serve", path.display(), report.workload);
        match &mut merged {
            Some(merged) => {
                merged.cells.retain(|cell| report.cell(&cell.metric.title).is_none());
                merged.absorb(report);
            }
            None => merged = Some(report),
        }
    }
    let mut merged = merged.context("name the reports")?;
    merged.notes = verdict::sentences(&merged, &cells::table());
    Ok(merged)
}

/// Those who take part; the report names who cannot.
pub(crate) fn present(common: &Common, only: &[String], report: &mut Report) -> Result<Vec<Who>> {
    let mut present = Vec::new();
    for who in servers::EVERYONE {
        if !only.is_empty() && !only.iter().any(|name| who.name().contains(name.as_str())) {
            continue;
        }
        let Some(program) = who.program() else {
            present.push(who);
            continue;
        };
        if who.side() == Side::Ours {
            common.programs.path(program)?;
        } else if child::find(program).is_none() {
            let reason = format!("{program} is not installed");
            report.absent.push(Absent { contender: who.name().to_owned(), reason });
            continue;
        }
        present.push(who);
    }
    Ok(present)
}

fn measure(options: &Options, cell: &Cell, at: &Endpoint) -> Result<Sample> {
    let uri = at.uri(EXPORT);
    match cell.work {
        Work::Fio(job) => {
            let measured = fio::run(&job, at, EXPORT, Duration::from_secs_f64(options.runtime))?;
            let rate = if job.block_size >= 1 << 20 {
                (Metric::higher(cell.name(), Unit::BytesPerSecond), measured.bytes_per_second)
            } else {
                (Metric::higher(cell.name(), Unit::OpsPerSecond), measured.iops)
            };
            Ok(vec![rate, (Metric::lower(cell.p99_title(), Unit::Micros), measured.p99_micros)])
        }
        Work::Copy => {
            let copied = child::run(&mut at.trusted_by(nbdcopy(&uri)))?;
            let rate = options.size_bytes() as f64 / copied.elapsed.as_secs_f64();
            Ok(vec![(Metric::higher(cell.name(), Unit::BytesPerSecond), rate)])
        }
        Work::QemuBench { write } => {
            let ran = child::run(&mut qemu_img_bench(&uri, write))?;
            let rate = f64::from(QEMU_REQUESTS) / seconds_of(&ran.stdout)?;
            Ok(vec![(Metric::higher(cell.name(), Unit::OpsPerSecond), rate)])
        }
    }
}

fn nbdcopy(uri: &str) -> Command {
    let mut nbdcopy = Command::new("nbdcopy");
    nbdcopy.args(["--no-extents", "-C4", "-R64", "--request-size=262144"]).arg(uri).arg("null:");
    nbdcopy
}

fn qemu_img_bench(uri: &str, write: bool) -> Command {
    let mut bench = Command::new("qemu-img");
    bench.args(["bench", "-f", "raw", "-t", "none", "-d", "32", "-s", "4096"]);
    bench.arg("-c").arg(QEMU_REQUESTS.to_string());
    if write {
        bench.arg("-w");
    }
    bench.arg(uri);
    bench
}

/// The time in what `qemu-img bench` prints: `Run completed in 1.234 seconds.`
fn seconds_of(output: &str) -> Result<f64> {
    let words = output.split_once("completed in ").and_then(|(_, rest)| rest.split_whitespace().next());
    words.and_then(|word| word.parse().ok()).context("qemu-img bench does not say how long it took")
}

/// Drops a file from the page cache.
fn forget(file: &Path) -> Result<()> {
    let file = std::fs::File::open(file)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).context("cannot empty the page cache")
}

/// Makes the file that is served, of bytes that do not compress and are no holes.
pub(crate) fn fill(file: &Path, size: u64) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(file)?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..size / 8 {
        // xorshift64: enough that no two blocks are alike.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.write_all(&state.to_le_bytes())?;
    }
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_is_the_cell_of_the_figure() {
        let cells = Options::quick().chosen().unwrap();
        assert_eq!(cells.iter().map(Cell::name).collect::<Vec<_>>(), [QUICK]);
    }

    #[test]
    fn of_reports_that_are_put_together_the_last_sample_of_a_cell_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, workload: &str, samples: &[(&str, f64)]| {
            let mut report = Report::new(workload, 1, false);
            for (cell, rate) in samples {
                let metric = Metric::higher(*cell, Unit::OpsPerSecond);
                report.record(&metric, "lifeboot-nbd", Side::Ours, *rate);
                report.record(&metric, "nbdkit", Side::Peer, 100.0);
            }
            let path = dir.path().join(name);
            std::fs::write(&path, serde_json::to_vec(&report).unwrap()).unwrap();
            path
        };
        let (tcp, unix) = ("page-tcp-read-4k-d1-c1", "page-unix-read-4k-d1-c1");
        let first = write("a", "serve", &[(tcp, 50.0), (unix, 130.0)]);
        let second = write("b", "serve", &[(tcp, 120.0)]);
        let merged = merge(&[first, second]).unwrap();
        assert_eq!(merged.cells.len(), 2);
        let ratio = |cell: &str| merged.cell(cell).unwrap().subject().unwrap().samples[0];
        assert_eq!((ratio(tcp), ratio(unix)), (120.0, 130.0));
        assert!(merged.notes.iter().any(|note| note.starts_with("page-tcp: our rate")), "{:?}", merged.notes);
        let other = write("c", "boot", &[]);
        assert!(merge(&[other]).unwrap_err().to_string().contains("not of serve"));
    }

    #[test]
    fn the_time_of_qemu_img_bench_is_read() {
        let output = "Sending 100 read requests, 4096 bytes each, 32 in parallel (…)\nRun completed in 0.125 seconds.\n";
        assert_eq!(seconds_of(output).unwrap(), 0.125);
        assert!(seconds_of("Run failed").is_err());
    }

    #[test]
    fn the_file_that_is_served_has_no_hole_and_no_repetition() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk.raw");
        fill(&file, 1 << 20).unwrap();
        let bytes = std::fs::read(&file).unwrap();
        assert_eq!(bytes.len(), 1 << 20);
        let blocks: std::collections::HashSet<&[u8]> = bytes.chunks(4096).collect();
        assert_eq!(blocks.len(), 256);
        assert!(!blocks.contains(&[0; 4096][..]));
    }
}
