//! `serve`: a raw file over NBD under fio, ours beside nbdkit, qemu-nbd and nbd-server.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use super::{Common, settle};
use crate::child::{self, Server};
use crate::contest::{Contender, Contest};
use crate::fio::{self, Job};
use crate::peers::{self, EXPORT, NbdServer, Serving};
use crate::report::{Absent, Metric, Report, Side, Unit};

/// What `serve` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Only the cells whose name has one of these in it: `randread-4k-d32-c1`, `direct`, `nbdcopy`
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
pub(crate) const QUICK: &str = "randread-4k-d32-c1";

impl Options {
    /// As `--quick`.
    pub(crate) fn quick() -> Self {
        let (cells, only, ours_arg) = (Vec::new(), Vec::new(), Vec::new());
        Self { cells, quick: true, runtime: 3.0, size: 1024, only, ours_arg }
    }
}

/// Whether the file is read through the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cache {
    /// It is, and the file is in it.
    Page,
    /// Past it, by O_DIRECT.
    Direct,
}

/// What clients do in a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// fio runs a job.
    Fio(Job),
    /// nbdcopy reads the whole disk and throws it away.
    Copy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    cache: Cache,
    work: Work,
}

impl Cell {
    fn name(&self) -> String {
        let work = match self.work {
            Work::Fio(job) => job.name(),
            Work::Copy => "nbdcopy-to-null".to_owned(),
        };
        match self.cache {
            Cache::Page => work,
            Cache::Direct => format!("direct-{work}"),
        }
    }
}

/// Every cell of the table, in order.
fn table() -> Vec<Cell> {
    let job =
        |pattern, kib: u32, depth, connections| Job { pattern, block_size: kib << 10, depth, connections };
    let mut cells = Vec::new();
    for pattern in ["randread", "randwrite"] {
        for (depth, connections) in [(1, 1), (32, 1), (32, 4)] {
            cells.push(job(pattern, 4, depth, connections));
        }
        cells.push(job(pattern, 64, 32, 1));
    }
    cells.extend([job("read", 1024, 8, 1), job("write", 1024, 8, 1), job("read", 1024, 8, 4)]);
    let mut cells: Vec<Cell> =
        cells.into_iter().map(|job| Cell { cache: Cache::Page, work: Work::Fio(job) }).collect();
    cells.push(Cell { cache: Cache::Page, work: Work::Copy });
    let direct = [
        job("randread", 4, 1, 1),
        job("randread", 4, 32, 1),
        job("randwrite", 4, 32, 1),
        job("randread", 64, 32, 1),
        job("read", 1024, 8, 1),
        job("write", 1024, 8, 1),
    ];
    cells.extend(direct.map(|job| Cell { cache: Cache::Direct, work: Work::Fio(job) }));
    cells
}

fn chosen(options: &Options) -> Result<Vec<Cell>> {
    let wanted = |cell: &Cell| {
        let name = cell.name();
        if options.quick {
            name == QUICK
        } else {
            options.cells.is_empty() || options.cells.iter().any(|text| name.contains(text.as_str()))
        }
    };
    let cells: Vec<Cell> = table().into_iter().filter(wanted).collect();
    let names: Vec<String> = table().iter().map(Cell::name).collect();
    ensure!(!cells.is_empty(), "no cell is so named; there are: {}", names.join(", "));
    Ok(cells)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Ours,
    Nbdkit,
    QemuThreads,
    QemuUring,
    NbdServer,
}

const EVERYONE: [Who; 5] = [Who::Ours, Who::Nbdkit, Who::QemuThreads, Who::QemuUring, Who::NbdServer];

impl Contender for Who {
    fn name(&self) -> &str {
        match self {
            Self::Ours => "lifeboot-nbd",
            Self::Nbdkit => "nbdkit file",
            Self::QemuThreads => "qemu-nbd threads",
            Self::QemuUring => "qemu-nbd io_uring",
            Self::NbdServer => "nbd-server",
        }
    }

    fn side(&self) -> Side {
        if *self == Self::Ours { Side::Ours } else { Side::Peer }
    }
}

impl Who {
    fn program(self) -> &'static str {
        match self {
            Self::Ours => "lifeboot-nbd",
            Self::Nbdkit => "nbdkit",
            Self::QemuThreads | Self::QemuUring => "qemu-nbd",
            Self::NbdServer => "nbd-server",
        }
    }

    /// nbdkit's file plugin and nbd-server have no O_DIRECT.
    fn takes_part(self, cache: Cache) -> bool {
        cache == Cache::Page || matches!(self, Self::Ours | Self::QemuThreads | Self::QemuUring)
    }
}

/// Runs the workload.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    child::require("fio")?;
    let cells = chosen(options)?;
    let mut report = common.report("serve");
    let mut present = Vec::new();
    for who in EVERYONE {
        if !options.only.is_empty() && !options.only.iter().any(|name| who.name().contains(name.as_str())) {
            continue;
        }
        if who.side() == Side::Ours {
            common.programs.path(who.program())?;
        } else if child::find(who.program()).is_none() {
            let reason = format!("{} is not installed", who.program());
            report.absent.push(Absent { contender: who.name().to_owned(), reason });
            continue;
        }
        present.push(who);
    }
    if cells.iter().any(|cell| cell.cache == Cache::Direct) {
        report.notes.push(
            "direct: O_DIRECT on the file; nbdkit's file plugin and nbd-server have no such mode".into(),
        );
    }

    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let file = scratch.path().join("disk.raw");
    fill(&file, options.size << 20)?;
    let contest = Contest { warm_up: false, ..common.contest() };
    for cell in cells {
        let contest = Contest { warm_up: common.contest().warm_up, ..contest };
        let players: Vec<Who> = present.iter().copied().filter(|who| who.takes_part(cell.cache)).collect();
        contest.run(&mut report, &players, |who, _, report| {
            settle();
            let socket = scratch.path().join("bench.sock");
            let (serving, line) = start(common, options, *who, cell.cache, &file, &socket, scratch.path())?;
            report.ran(who.name(), line);
            let sample = match cell.work {
                Work::Fio(job) => {
                    let measured = fio::run(&job, &socket, EXPORT, Duration::from_secs_f64(options.runtime))?;
                    let rate = if job.block_size >= 1 << 20 {
                        (Metric::higher(cell.name(), Unit::BytesPerSecond), measured.bytes_per_second)
                    } else {
                        (Metric::higher(cell.name(), Unit::OpsPerSecond), measured.iops)
                    };
                    let p99 = Metric::lower(format!("{} p99", cell.name()), Unit::Micros);
                    vec![rate, (p99, measured.p99_micros)]
                }
                Work::Copy => {
                    let copied = child::run(&mut nbdcopy(&socket))?;
                    let rate = (options.size << 20) as f64 / copied.elapsed.as_secs_f64();
                    vec![(Metric::higher(cell.name(), Unit::BytesPerSecond), rate)]
                }
            };
            drop(serving);
            super::remove(&socket)?;
            Ok(sample)
        })?;
    }
    let job = Job { pattern: "randread", block_size: 4096, depth: 32, connections: 1 };
    let uri = format!("nbd+unix:///{EXPORT}?socket=bench.sock");
    report.ran("fio (an example)", child::line(&job.command(&uri, Duration::from_secs_f64(options.runtime))));
    Ok(report)
}

fn nbdcopy(socket: &Path) -> Command {
    let mut nbdcopy = Command::new("nbdcopy");
    nbdcopy.args(["--no-extents", "-C4", "-R64", "--request-size=262144"]);
    nbdcopy.arg(format!("nbd+unix:///{EXPORT}?socket={}", socket.display())).arg("null:");
    nbdcopy
}

fn start(
    common: &Common,
    options: &Options,
    who: Who,
    cache: Cache,
    file: &Path,
    socket: &Path,
    dir: &Path,
) -> Result<(Box<dyn Serving>, String)> {
    let qemu_cache = if cache == Cache::Direct { "none" } else { "writeback" };
    let mut command = match who {
        Who::Ours => {
            let mut command = Command::new(common.programs.path("lifeboot-nbd")?);
            command.arg(file).arg("--listen").arg(format!("unix:{}", socket.display()));
            command.arg("--name").arg(EXPORT);
            command.arg(if cache == Cache::Direct { "--direct=on" } else { "--direct=off" });
            command.args(&options.ours_arg);
            command
        }
        Who::Nbdkit => peers::nbdkit_file(file, socket),
        Who::QemuThreads => peers::qemu_nbd(file, socket, qemu_cache, "threads"),
        Who::QemuUring => peers::qemu_nbd(file, socket, qemu_cache, "io_uring"),
        Who::NbdServer => {
            let (server, line) = NbdServer::start(file, socket, dir)?;
            return Ok((Box::new(server), line));
        }
    };
    let line = child::line(&command);
    Ok((Box::new(Server::listening(&mut command, socket)?), line))
}

/// Makes the file that is served, of bytes that do not compress and are no holes.
fn fill(file: &Path, size: u64) -> Result<()> {
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

    fn options(cells: &[&str], quick: bool) -> Options {
        Options { cells: cells.iter().map(|&text| text.to_owned()).collect(), quick, ..Options::quick() }
    }

    #[test]
    fn quick_is_the_cell_of_the_figure() {
        let cells = chosen(&options(&[], true)).unwrap();
        assert_eq!(cells.iter().map(Cell::name).collect::<Vec<_>>(), [QUICK]);
    }

    #[test]
    fn cells_are_chosen_by_a_part_of_their_name_and_named_once() {
        assert!(chosen(&options(&["direct"], false)).unwrap().iter().all(|cell| cell.cache == Cache::Direct));
        assert!(
            format!("{:#}", chosen(&options(&["nonsense"], false)).unwrap_err()).contains("nbdcopy-to-null")
        );
        let mut names: Vec<String> = table().iter().map(Cell::name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
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
