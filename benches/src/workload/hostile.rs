//! `hostile`: what a client pays for the company of hostile ones.
//!
//! fio reads at depth 4 from `lifeboot-nbd`, alone and beside others who want nothing but to be in the way. Nobody else is measured:
//! what counts is the ratio of its p99 to the undisturbed one, in the same round.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use clap::Args;
use proto::wire::{CommandFlags, CommandKind, Cookie, MAX_PAYLOAD_BYTES, ReplyStyle, RequestHeader};

use super::{Common, settle};
use crate::child::{self, Server};
use crate::contest::Contender;
use crate::endpoint::Endpoint;
use crate::report::{Metric, Report, Side, Unit};
use crate::{fio, ours, stats};

/// What `hostile` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Bytes of the file, which stays in the page cache
    #[arg(long, default_value = "256MiB", value_name = "SIZE")]
    size: ByteSize,
    /// How long fio is measured, in seconds
    #[arg(long, default_value_t = 5, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=3600))]
    runtime: u64,
    /// Connections a second that the flood opens: they cost the machine something whoever listens
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    flood: u32,
    /// Clients that ask for 32 MiB again and again and take nothing
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=200))]
    deaf: u32,
    /// Clients that send a byte a second of their handshake
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    dribblers: u32,
}

const P99: &str = "randread 4k, depth 4: p99";
const P50: &str = "the same, p50";
const RATE: &str = "the same, rate";
const MEMORY: &str = "peak memory of the server";
/// No more than this, of the undisturbed p99.
const GOAL: f64 = 2.0;

const JOB: fio::Job = fio::Job { pattern: "randread", block_size: 4096, depth: 4, connections: 1 };
/// So many connections of a flood are open at once, as far as the flood is concerned.
const FLOOD_HELD: usize = 1000;
/// What each of the deaf asks for before it falls silent.
const DEAF_REQUESTS: u64 = 64;
/// fio connects before the others begin, and is measured when all of them are there.
const LEAD: Duration = Duration::from_secs(1);
const RAMP: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Undisturbed,
    Flood,
    Dribble,
    Deaf,
    All,
}

impl Who {
    const EACH: [Self; 5] = [Self::Undisturbed, Self::Flood, Self::Dribble, Self::Deaf, Self::All];

    fn has(self, part: Self) -> bool {
        self == part || self == Self::All
    }
}

impl Contender for Who {
    fn name(&self) -> &str {
        match self {
            Self::Undisturbed => "undisturbed",
            Self::Flood => "beside a flood of half-open connections",
            Self::Dribble => "beside a byte a second",
            Self::Deaf => "beside 32 MiB asked for and not taken",
            Self::All => "beside all of them",
        }
    }

    fn side(&self) -> Side {
        Side::Ours
    }
}

/// Runs the workload.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    child::require("fio")?;
    let mut report = common.report("hostile");
    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let file = scratch.path().join("disk.raw");
    let size = options.size.as_u64();
    let least = u64::from(MAX_PAYLOAD_BYTES);
    ensure!(size >= least, "the file must have at least {least} bytes: so much is asked for at once");
    write_file(&file, size)?;
    common.contest().run(&mut report, &Who::EACH, |who, _, report| {
        settle();
        let socket = scratch.path().join("s");
        let mut command = Command::new(common.programs.path("lifeboot-nbd")?);
        command.arg(&file).arg("--listen").arg(format!("unix:{}", socket.display()));
        report.ran("lifeboot-nbd", child::line(&command));
        let mut server = Server::listening(&mut command, socket.as_path())?;
        let measured = measured_beside(*who, options, &socket)?;
        ensure!(server.ended()?.is_none(), "the server did not survive: {}", server.stderr()?);
        let peak = server.terminate()?.peak_memory;
        Ok(vec![
            (Metric::lower(P99, Unit::Micros), measured.p99_micros),
            (Metric::lower(P50, Unit::Micros), measured.p50_micros),
            (Metric::higher(RATE, Unit::OpsPerSecond), measured.iops),
            (Metric::lower(MEMORY, Unit::Bytes), peak as f64),
        ])
    })?;
    let notes = verdicts(&report);
    report.notes.extend(notes);
    report.notes.push(format!(
        "the flood: {} connections a second, {FLOOD_HELD} of them held; {} that dribble; {} that take nothing of {DEAF_REQUESTS} times 32 MiB",
        options.flood, options.dribblers, options.deaf
    ));
    Ok(report)
}

/// The ratios, which the table leaves out where all rows are ours.
fn verdicts(report: &Report) -> Vec<String> {
    let Some(cell) = report.cell(P99) else { return Vec::new() };
    let Some(alone) = cell.of(Who::Undisturbed.name()) else { return Vec::new() };
    let others = cell.series.iter().filter(|series| series.contender != alone.contender);
    others
        .filter_map(|series| {
            let ratio = stats::ratio(&series.samples, &alone.samples)?;
            let verdict = if ratio.median <= GOAL { "met" } else { "missed" };
            Some(format!(
                "p99 {}: {:.2} of the undisturbed one ({:.2}..{:.2}); at most {GOAL}: {verdict}",
                series.contender, ratio.median, ratio.min, ratio.max
            ))
        })
        .collect()
}

fn measured_beside(who: Who, options: &Options, socket: &Path) -> Result<fio::Measured> {
    let uri = Endpoint::from(socket).uri(ours::EXPORT);
    let mut command = JOB.command(&uri, Duration::from_secs(options.runtime));
    command.arg(format!("--ramp_time={}ms", RAMP.as_millis()));
    let fio = Server::start(&mut command)?;
    let begin = Instant::now();
    let over = AtomicBool::new(false);
    let finished = thread::scope(|scope| {
        thread::sleep(LEAD);
        if who.has(Who::Flood) {
            scope.spawn(|| flood(socket, options.flood, &over));
        }
        if who.has(Who::Dribble) {
            scope.spawn(|| dribble(socket, options.dribblers as usize, &over));
        }
        let deaf = if who.has(Who::Deaf) { options.deaf } else { 0 };
        let deaf: Vec<_> = (0..deaf).filter_map(|_| ask_and_take_nothing(socket).ok()).collect();
        let finished = fio.finish(begin);
        over.store(true, Ordering::Relaxed);
        drop(deaf);
        finished
    })?;
    ensure!(finished.status.success(), "fio ended with {}: {}", finished.status, finished.stderr);
    fio::parse(&finished.stdout, JOB.writes())
}

/// Opens connections and says nothing.
fn flood(socket: &Path, rate: u32, over: &AtomicBool) {
    let mut held = VecDeque::new();
    let (begin, mut opened) = (Instant::now(), 0_u64);
    while !over.load(Ordering::Relaxed) {
        let due = begin.elapsed().as_millis() as u64 * u64::from(rate) / 1000;
        while opened < due && !over.load(Ordering::Relaxed) {
            held.extend(UnixStream::connect(socket));
            if held.len() > FLOOD_HELD {
                held.pop_front();
            }
            opened += 1;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Sends a byte of an endless option a second on each connection, and connects again where it was closed.
fn dribble(socket: &Path, count: usize, over: &AtomicBool) {
    let mut held: Vec<Option<UnixStream>> = (0..count).map(|_| None).collect();
    let pause = Duration::from_secs(1) / u32::try_from(count.max(1)).unwrap_or(u32::MAX);
    while !over.load(Ordering::Relaxed) {
        for place in &mut held {
            if over.load(Ordering::Relaxed) {
                return;
            }
            let sent = place.as_mut().is_some_and(|socket| socket.write_all(&[0]).is_ok());
            if !sent {
                *place = UnixStream::connect(socket).ok();
            }
            thread::sleep(pause);
        }
    }
}

/// A client with plain replies, which its handshake by EXPORT_NAME leads to at once. Asks for more than there is room for.
fn ask_and_take_nothing(socket: &Path) -> Result<UnixStream> {
    let mut socket = UnixStream::connect(socket)?;
    socket.read_exact(&mut [0; 18])?;
    // Fixed newstyle, no zeroes; then EXPORT_NAME of the only disk.
    let flags = 3_u32.to_be_bytes();
    socket.write_all(&[&flags[..], b"IHAVEOPT", &1_u32.to_be_bytes(), &0_u32.to_be_bytes()].concat())?;
    socket.read_exact(&mut [0; 10])?;
    for number in 0..DEAF_REQUESTS {
        let header = RequestHeader {
            flags: CommandFlags::NONE,
            kind: CommandKind::Read,
            cookie: Cookie(number),
            offset: 0,
            len: u64::from(MAX_PAYLOAD_BYTES),
        };
        socket.write_all(&header.encode(ReplyStyle::Simple))?;
    }
    Ok(socket)
}

fn write_file(path: &PathBuf, size: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    for number in 0..size / 16 {
        out.write_all(&number.to_le_bytes())?;
        out.write_all(b"lifeboot")?;
    }
    out.into_inner().context("cannot write the disk")?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_of_the_same_round_and_held_against_the_goal() {
        let mut report = Report::new("hostile", 2, false);
        let metric = Metric::lower(P99, Unit::Micros);
        for (who, samples) in
            [(Who::Undisturbed, [100.0, 200.0]), (Who::Flood, [150.0, 300.0]), (Who::All, [300.0, 400.0])]
        {
            for sample in samples {
                report.record(&metric, who.name(), Side::Ours, sample);
            }
        }
        let notes = verdicts(&report);
        assert_eq!(notes.len(), 2);
        assert!(
            notes[0].contains("flood") && notes[0].contains("1.50 of") && notes[0].ends_with("met"),
            "{notes:?}"
        );
        assert!(notes[1].contains("2.50 of") && notes[1].ends_with("missed"), "{notes:?}");
    }
}
