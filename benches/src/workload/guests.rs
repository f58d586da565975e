//! `guests`: guests and the background beside each other, over a source held to a rate and a delay.
//!
//! How much guests that read at random slow the background down; what the background costs them, for what is home and
//! for what is not; and whether a write to what is absent costs more than one to what is home. Nobody else has a
//! background to compare with, so each figure is a ratio of ours to ours, in the same round.

use std::fs::File;
use std::io::{BufWriter, Seek as _, SeekFrom, Write};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use clap::Args;
use rustix::fs::FallocateFlags;

use super::{Common, remove, settle};
use crate::child::{self, Server};
use crate::client::Client;
use crate::contest::{Contender, Sample};
use crate::report::{Metric, Report, Side, Unit};
use crate::stats::percentile;
use crate::{fio, ours};

/// What `guests` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Bytes of the disk: all of it is data, which shrinks to half
    #[arg(long, default_value = "1GiB", value_name = "SIZE")]
    pub(crate) size: ByteSize,
    /// Bytes a second that the source yields
    #[arg(long, default_value = "100MB", value_name = "RATE")]
    pub(crate) source_rate: ByteSize,
    /// What each fetch from the source waits, in milliseconds
    #[arg(long, default_value_t = 5, value_name = "MS")]
    pub(crate) source_delay: u64,
    /// Give targets, and the plain file, all of their blocks beforehand, as `fallocate` does
    #[arg(long)]
    pub(crate) preallocate: bool,
    /// Restore to this block device, and have it in place of the plain file: what it holds is lost
    #[arg(long, value_name = "PATH", conflicts_with = "preallocate")]
    pub(crate) device: Option<PathBuf>,
}

impl Options {
    /// As the figures need it.
    pub(crate) const fn for_figures() -> Self {
        let (size, source_rate) = (ByteSize::gib(1), ByteSize::mb(100));
        Self { size, source_rate, source_delay: 5, preallocate: false, device: None }
    }

    /// The device, or else a file of this name in `dir`.
    fn disk(&self, dir: &Path, name: &str) -> PathBuf {
        self.device.clone().unwrap_or_else(|| dir.join(name))
    }

    /// Makes a file that reads as zeroes, as long as the disk. Nothing has to be made of a device.
    fn empty(&self, path: &Path) -> Result<()> {
        if self.device.is_some() {
            return Ok(());
        }
        let (file, size) = (File::create(path)?, self.size.as_u64());
        if self.preallocate {
            return rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size).context("fallocate");
        }
        Ok(file.set_len(size)?)
    }
}

/// The titles of the cells.
pub(crate) const TIME: &str = "until the disk is home";
pub(crate) const HOME: &str = "reads of what is home, p99, beside the background";
pub(crate) const HOME_IDLE: &str = "the same when the background has ended";
pub(crate) const SLOWEST: &str = "slowest read of all";
pub(crate) const FETCH: &str = "read of a chunk that is absent, alone, p50";
pub(crate) const WRITE_ABSENT_P50: &str = "write to what is absent, p50";
pub(crate) const WRITE_ABSENT_P99: &str = "write to what is absent, p99";
pub(crate) const WRITE_HOME_P50: &str = "write to what is home, p50";
pub(crate) const WRITE_HOME_P99: &str = "write to what is home, p99";

/// What is read until it is home before the guests begin.
const HOME_BYTES: u64 = 16 << 20;
const BLOCK: usize = 4096;
const CHUNK: u64 = 128 << 10;
/// How often what is home is read.
const PROBE_EVERY: Duration = Duration::from_millis(2);
/// For how long it is read once the background has ended.
const IDLE: Duration = Duration::from_secs(3);
/// Reads of absent chunks that are made alone.
const ALONE: u64 = 100;
/// Bytes that are written, and the part of the disk that they go to.
const WRITTEN: u64 = 48 << 20;
const WRITTEN_TO: u64 = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// No guest.
    Undisturbed,
    /// fio reads at random, four at a time, all the while.
    Disturbed,
    /// No background: one read after another, then writes.
    Alone,
    /// A raw file, or the device, with nothing to restore: what the file system charges for a hole, and the storage for writes beside reads.
    Plain,
}

impl Contender for Who {
    fn name(&self) -> &str {
        match self {
            Self::Undisturbed => "the background alone",
            Self::Disturbed => "beside fio, randread, depth 4",
            Self::Alone => "guests alone (no background)",
            Self::Plain => "a plain file (lifeboot-nbd), writes beside it by fio",
        }
    }

    fn side(&self) -> Side {
        if *self == Self::Plain { Side::Reference } else { Side::Ours }
    }
}

/// Runs the workload.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    child::require("fio")?;
    let mut report = common.report("guests");
    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let (image, repo) = (scratch.path().join("disk.raw"), scratch.path().join("repo"));
    let size = options.size.as_u64();
    ensure!(size >= 2 * WRITTEN_TO, "the disk must have at least {} bytes", 2 * WRITTEN_TO);
    if let Some(device) = &options.device {
        let there = size_of_device(device)?;
        ensure!(there == size, "{} has {there} bytes, and the disk {size}: give --size", device.display());
    }
    write_image(&image, size)?;
    child::run(&mut common.programs.init(&repo)?)?;
    child::run(&mut common.programs.capture(&repo, &image, None)?)?;
    std::fs::remove_file(&image)?;
    common.contest().run(
        &mut report,
        &[Who::Undisturbed, Who::Disturbed, Who::Alone, Who::Plain],
        |who, _, report| {
            let dir = scratch.path().join("turn");
            remove(&dir)?;
            std::fs::create_dir(&dir)?;
            settle();
            let socket = dir.join("live.sock");
            if *who == Who::Plain {
                let sample = plain(common, options, &dir, &socket, report)?;
                remove(&dir)?;
                return Ok(sample);
            }
            let target = options.disk(&dir, "target.raw");
            if options.preallocate {
                options.empty(&target)?;
            }
            let mut command = common.programs.live_restore(&repo, &target, &socket)?;
            command.arg("--no-trace");
            if options.device.is_some() {
                command.arg("--force").arg("--state").arg(dir.join("state"));
            }
            command.arg(format!("--source-rate={}", options.source_rate.as_u64()));
            command.arg(format!("--source-delay={}ms", options.source_delay));
            if *who == Who::Alone {
                command.arg("--no-background");
            }
            report.ran(who.name(), child::line(&command));
            let begin = Instant::now();
            let mut server = Server::listening(&mut command, &socket)?;
            let sample = match who {
                Who::Undisturbed => {
                    wait_complete(&mut server)?;
                    vec![(Metric::lower(TIME, Unit::Seconds), begin.elapsed().as_secs_f64())]
                }
                Who::Disturbed => disturbed(&mut server, &socket, begin)?,
                Who::Alone => alone(&socket, size)?,
                Who::Plain => unreachable!("it was served above"),
            };
            server.terminate()?;
            remove(&dir)?;
            Ok(sample)
        },
    )?;
    report.notes.push(format!(
        "the disk: {}, all of it data; source: {} a second, {} ms a fetch",
        Unit::Bytes.show(size as f64),
        options.source_rate.display().si(),
        options.source_delay
    ));
    Ok(report)
}

/// Bytes of a block device.
fn size_of_device(path: &Path) -> Result<u64> {
    let device = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    ensure!(device.metadata()?.file_type().is_block_device(), "{} is no block device", path.display());
    Ok((&device).seek(SeekFrom::End(0))?)
}

fn is_complete(server: &mut Server) -> Result<bool> {
    Ok(!ours::events(&server.stdout()?, "complete").is_empty())
}

fn wait_complete(server: &mut Server) -> Result<()> {
    let begin = Instant::now();
    while !is_complete(server)? {
        ensure!(begin.elapsed() < PATIENCE, "the disk is not home after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn disturbed(server: &mut Server, socket: &Path, begin: Instant) -> Result<Sample> {
    let mut client = Client::connect(socket, ours::EXPORT)?;
    let mut piece = vec![0; 1 << 20];
    for offset in (0..HOME_BYTES).step_by(piece.len()) {
        client.read(offset, &mut piece)?;
    }
    let guest = Server::start(&mut random_reads(socket))?;
    let mut home = Duration::ZERO;
    let mut sample = home_reads(&mut client, || {
        ensure!(begin.elapsed() < PATIENCE, "the disk is not home after {PATIENCE:?}");
        home = begin.elapsed();
        is_complete(server)
    })?;
    let measured = fio::parse(&guest.terminate()?.stdout, false)?;
    sample.push((Metric::lower(TIME, Unit::Seconds), home.as_secs_f64()));
    sample.push((Metric::lower(SLOWEST, Unit::Micros), measured.max_micros));
    Ok(sample)
}

/// Reads what is home now and then, until `is_over` and for a while after.
fn home_reads(client: &mut Client, mut is_over: impl FnMut() -> Result<bool>) -> Result<Sample> {
    let mut random = Random(1);
    let mut block = vec![0; BLOCK];
    let mut probe = |into: &mut Vec<f64>| -> Result<()> {
        let offset = random.below(HOME_BYTES / BLOCK as u64) * BLOCK as u64;
        let sent = Instant::now();
        client.read(offset, &mut block)?;
        into.push(sent.elapsed().as_secs_f64() * 1e6);
        std::thread::sleep(PROBE_EVERY);
        Ok(())
    };
    let (mut beside, mut after) = (Vec::new(), Vec::new());
    while !is_over()? {
        for _ in 0..20 {
            probe(&mut beside)?;
        }
    }
    let ended = Instant::now();
    while ended.elapsed() < IDLE {
        probe(&mut after)?;
    }
    let p99 = |samples: &[f64]| percentile(samples, 99.0).context("nothing was read");
    Ok(vec![
        (Metric::lower(HOME, Unit::Micros), p99(&beside)?),
        (Metric::lower(HOME_IDLE, Unit::Micros), p99(&after)?),
    ])
}

fn alone(socket: &Path, size: u64) -> Result<Sample> {
    let mut client = Client::connect(socket, ours::EXPORT)?;
    let mut block = vec![0; BLOCK];
    let mut times = Vec::new();
    // From the second half, far from each other, so that none comes along with another.
    let step = size / 2 / ALONE / CHUNK * CHUNK;
    let mut random = Random(7);
    let mut order: Vec<u64> = (0..ALONE).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, random.below(at as u64 + 1) as usize);
    }
    for number in order {
        let sent = Instant::now();
        client.read(size / 2 + number * step, &mut block)?;
        times.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    drop(client);
    let mut sample =
        vec![(Metric::lower(FETCH, Unit::Micros), percentile(&times, 50.0).context("nothing was read")?)];
    sample.extend(write_twice(socket)?);
    Ok(sample)
}

/// The same writes to a sparse file: to holes, and then to what they filled. Then reads of what is there of another one, while
/// somebody else writes what the background would, into its holes.
fn plain(
    common: &Common,
    options: &Options,
    dir: &Path,
    socket: &Path,
    report: &mut Report,
) -> Result<Sample> {
    let (file, half) = (options.disk(dir, "plain.raw"), options.disk(dir, "half.raw"));
    options.empty(&file)?;
    let mut command = Command::new(common.programs.path("lifeboot-nbd")?);
    // As live-restore opens its target.
    command.arg(&file).args(["--direct", "auto", "--listen"]).arg(format!("unix:{}", socket.display()));
    report.ran(Who::Plain.name(), child::line(&command));
    let server = Server::listening(&mut command, socket)?;
    let mut sample = write_twice(socket)?;
    server.terminate()?;
    // As much is there as of a live-restore's target; the rest is written past the server, into holes.
    options.empty(&half)?;
    fill(File::options().write(true).open(&half)?, HOME_BYTES)?;
    if half != file {
        std::fs::rename(&half, &file)?;
    }
    settle();
    let server = Server::listening(&mut command, socket)?;
    let mut client = Client::connect(socket, ours::EXPORT)?;
    let guest = Server::start(&mut random_reads(socket))?;
    let mut writes = plain_writes(&file, options);
    report.ran(Who::Plain.name(), child::line(&writes));
    let mut writer = writes.stdout(Stdio::null()).spawn().context("cannot start fio")?;
    sample.extend(home_reads(&mut client, || Ok(writer.try_wait()?.is_some()))?);
    ensure!(writer.wait()?.success(), "fio cannot write beside it");
    guest.terminate()?;
    server.terminate()?;
    Ok(sample)
}

/// The disk's bytes at the pace at which the source can give them: they are twice what is stored.
fn plain_writes(file: &Path, options: &Options) -> Command {
    let mut fio = Command::new("fio");
    fio.args([
        "--name=w",
        "--rw=write",
        "--direct=1",
        "--ioengine=io_uring",
        "--iodepth=4",
        "--fallocate=none",
    ]);
    fio.arg(format!("--bs={CHUNK}")).arg(format!("--offset={HOME_BYTES}"));
    fio.arg(format!("--size={}", options.size.as_u64() - HOME_BYTES));
    fio.arg(format!("--rate={}", 2 * options.source_rate.as_u64()));
    fio.arg(format!("--filename={}", file.display()));
    fio
}

/// Writes to what is absent, and the same writes again: it is home by then.
fn write_twice(socket: &Path) -> Result<Sample> {
    let absent = fio::parse(&child::run(&mut random_writes(socket))?.stdout, true)?;
    let home = fio::parse(&child::run(&mut random_writes(socket))?.stdout, true)?;
    Ok(vec![
        (Metric::lower(WRITE_ABSENT_P50, Unit::Micros), absent.p50_micros),
        (Metric::lower(WRITE_HOME_P50, Unit::Micros), home.p50_micros),
        (Metric::lower(WRITE_ABSENT_P99, Unit::Micros), absent.p99_micros),
        (Metric::lower(WRITE_HOME_P99, Unit::Micros), home.p99_micros),
    ])
}

fn fio_on(socket: &Path) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=j", "--ioengine=nbd", "--output-format=json", "--bs=4k"]);
    fio.arg(format!("--uri=nbd+unix:///{}?socket={}", ours::EXPORT, socket.display()));
    fio
}

fn random_reads(socket: &Path) -> Command {
    let mut fio = fio_on(socket);
    fio.args(["--rw=randread", "--iodepth=4", "--time_based"]);
    fio.arg(format!("--runtime={}", PATIENCE.as_secs()));
    fio
}

/// Each block at most once; the same ones each time.
fn random_writes(socket: &Path) -> Command {
    let mut fio = fio_on(socket);
    fio.args(["--rw=randwrite", "--iodepth=1", "--randrepeat=1"]);
    fio.arg(format!("--size={WRITTEN_TO}")).arg(format!("--io_size={WRITTEN}"));
    fio
}

/// Data that shrinks to about half, no chunk like another.
fn write_image(path: &Path, size: u64) -> Result<()> {
    fill(File::create(path).with_context(|| format!("cannot make {}", path.display()))?, size)
}

/// Writes the first `size` bytes, in place.
fn fill(file: File, size: u64) -> Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut random = Random(42);
    for _ in 0..size / 16 {
        out.write_all(&random.next().to_le_bytes())?;
        out.write_all(b"lifeboot")?;
    }
    out.into_inner().context("cannot write the disk")?.sync_all()?;
    Ok(())
}

/// Numbers that look random, and are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
