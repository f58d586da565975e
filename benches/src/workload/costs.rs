//! `costs`: what an operation costs a server, counted: its system calls (`strace -c`), and the instructions that it executes
//! outside the kernel (`valgrind --tool=callgrind`). Counts hold on a busy machine too, where times do not.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::Common;
use super::serve::servers::{self, Cache, Start, Who};
use super::serve::{fill, present};
use crate::child::{self, Server};
use crate::contest::Contender;
use crate::endpoint::Endpoint;
use crate::fio::Job;
use crate::peers::EXPORT;
use crate::report::{Metric, Report, Unit};

/// What `costs` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Only these servers
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Operations of a run that is counted
    #[arg(long, default_value_t = 20_000, value_name = "NUMBER")]
    operations: u32,
}

/// The file that is served: the operations go round in it.
const FILE_BYTES: u64 = 64 << 20;
/// A run under callgrind is this much shorter: it is fifty times as slow.
const SHORTER: u32 = 10;

const JOBS: [Job; 6] = [
    Job { pattern: "randread", block_size: 4 << 10, depth: 1, connections: 1 },
    Job { pattern: "randread", block_size: 4 << 10, depth: 32, connections: 1 },
    Job { pattern: "randwrite", block_size: 4 << 10, depth: 1, connections: 1 },
    Job { pattern: "randwrite", block_size: 4 << 10, depth: 32, connections: 1 },
    Job { pattern: "randread", block_size: 64 << 10, depth: 32, connections: 1 },
    Job { pattern: "randwrite", block_size: 64 << 10, depth: 32, connections: 1 },
];

/// What is counted: so many operations of a job on a file that is served there.
#[derive(Clone, Copy)]
struct Run<'a> {
    job: Job,
    operations: u32,
    file: &'a Path,
    at: &'a Endpoint,
}

/// Runs the workload: once, since counts hardly vary.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    for program in ["fio", "strace", "valgrind"] {
        child::require(program)?;
    }
    ensure!(options.operations >= 100 * SHORTER, "at least {} operations are needed", 100 * SHORTER);
    let mut report = Report::new("costs", 1, false);
    let mut present = present(common, &options.only, &mut report)?;
    present.retain(|who| who.program().is_some());
    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let file = scratch.path().join("disk.raw");
    fill(&file, FILE_BYTES)?;
    let at = Endpoint::Unix(scratch.path().join("bench.sock"));
    for job in JOBS {
        let run = |operations| Run { job, operations, file: &file, at: &at };
        for who in &present {
            let calls = system_calls(common, *who, run(options.operations))?;
            record(&mut report, &format!("{}: system calls", job.name()), *who, calls);
        }
        // The processes that nbd-server forks for its connections leave callgrind no total.
        for who in present.iter().filter(|who| **who != Who::NbdServer) {
            let count = |operations| instructions(common, *who, run(operations));
            let (few, many) = (options.operations / SHORTER / 5, options.operations / SHORTER);
            // The difference is without starting, negotiating and ending.
            let counted = count(many)?.saturating_sub(count(few)?) as f64 / f64::from(many - few);
            record(&mut report, &format!("{}: instructions", job.name()), *who, counted);
        }
    }
    report.notes.push(
        "on the server's side; instructions are those outside the kernel, ours counted with --io-engine=threads, since \
         valgrind knows no io_uring and what is in the page cache needs neither; not of nbd-server, whose processes \
         leave callgrind no total"
            .into(),
    );
    Ok(report)
}

fn record(report: &mut Report, title: &str, who: Who, value: f64) {
    eprintln!("{}: {title} {}", who.name(), Unit::PerOperation.show(value));
    report.record(&Metric::lower(title, Unit::PerOperation), who.name(), who.side(), value);
}

/// System calls of an operation, with strace attached to the server while fio works.
fn system_calls(common: &Common, who: Who, run: Run<'_>) -> Result<f64> {
    let Run { job, operations, file, at } = run;
    let start = Start { cache: Cache::Page, file, at, ours_arg: &[], prefix: &[] };
    let (serving, _) = servers::start(common, who, start)?;
    let pid = serving.pid().context("the server has no process")?;
    let summary = file.with_extension("strace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-c", "-U", "calls,name", "-o"]).arg(&summary).arg("-p").arg(pid.to_string());
    let mut strace = Server::start(&mut strace)?;
    strace.wait_for_text(" attached", "attach")?;
    child::run(&mut work(job, operations, at))?;
    strace.interrupt()?;
    drop(serving);
    remove_socket(at)?;
    let text = std::fs::read_to_string(&summary).context("strace wrote no summary")?;
    Ok(total_calls(&text)? as f64 / f64::from(operations))
}

/// The sum in strace's summary of calls and names.
fn total_calls(summary: &str) -> Result<u64> {
    let total = summary.lines().find(|line| line.split_whitespace().next_back() == Some("total"));
    let count = total.and_then(|line| line.split_whitespace().next());
    count.and_then(|count| count.parse().ok()).context("strace's summary has no total")
}

/// Instructions that the server executes for a whole run.
fn instructions(common: &Common, who: Who, run: Run<'_>) -> Result<u64> {
    let Run { job, operations, file, at } = run;
    let dir = file.parent().context("a file is in a directory")?;
    let counts = dir.join("callgrind");
    super::remove(&counts)?;
    std::fs::create_dir(&counts)?;
    let prefix = [
        "valgrind".to_owned(),
        "--quiet".to_owned(),
        "--tool=callgrind".to_owned(),
        "--trace-children=yes".to_owned(),
        format!("--callgrind-out-file={}/%p", counts.display()),
    ];
    let ours = ["--io-engine=threads".to_owned()];
    let start = Start { cache: Cache::Page, file, at, ours_arg: &ours, prefix: &prefix };
    let (serving, _) = servers::start(common, who, start)?;
    child::run(&mut work(job, operations, at))?;
    serving.end()?;
    remove_socket(at)?;
    let mut total = 0;
    for entry in std::fs::read_dir(&counts)? {
        total += executed(&std::fs::read_to_string(entry?.path())?);
    }
    ensure!(total > 0, "callgrind counted nothing of {}", who.name());
    Ok(total)
}

/// The totals in one of callgrind's files; a process that forked may have written several.
fn executed(profile: &str) -> u64 {
    let totals = profile.lines().filter_map(|line| line.strip_prefix("totals: "));
    totals.filter_map(|count| count.trim().parse::<u64>().ok()).sum()
}

fn work(job: Job, operations: u32, at: &Endpoint) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=j", "--ioengine=nbd", "--output-format=json"])
        .arg(format!("--uri={}", at.uri(EXPORT)))
        .arg(format!("--rw={}", job.pattern))
        .arg(format!("--bs={}", job.block_size))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--size={FILE_BYTES}"))
        .arg(format!("--io_size={}", u64::from(operations) * u64::from(job.block_size)));
    fio
}

fn remove_socket(at: &Endpoint) -> Result<()> {
    at.socket().map_or(Ok(()), super::remove)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_of_straces_summary_is_read() {
        let summary = "    calls syscall\n--------- ----------------\n    20000 preadv2\n     1036 sendto\n--------- ----------------\n    21036 total\n";
        assert_eq!(total_calls(summary).unwrap(), 21036);
        assert!(total_calls("").is_err());
    }

    #[test]
    fn all_totals_of_a_profile_count() {
        assert_eq!(executed("events: Ir\nsummary: 7\n\ntotals: 5\npart: 2\ntotals: 6\n"), 11);
    }
}
