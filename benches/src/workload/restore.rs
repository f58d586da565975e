//! `restore`: the disk back into a new raw file, by `restore`, by an undisturbed `live-restore`, and by qemu-img.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use clap::Args;

use super::{Common, boot, capture, remove, settle};
use crate::child::{self, Finished};
use crate::contest::Contender;
use crate::ours;
use crate::peers::Pace;
use crate::report::{Metric, Report, Side, Unit};

/// What `restore` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The raw image that is captured first and then restored
    #[arg(default_value = "target/guest/disk.raw")]
    pub(crate) image: PathBuf,
    /// Leave out live-restore
    #[arg(long)]
    pub(crate) no_live: bool,
    /// Bytes a second that the source yields, to ours and to block-stream; 0 is no limit
    #[arg(long, default_value = "0", value_name = "RATE")]
    pub(crate) source_rate: ByteSize,
    /// What each fetch from the source waits, in milliseconds
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pub(crate) source_delay: u64,
}

impl Options {
    /// As the figures need it.
    pub(crate) const fn for_figures(image: PathBuf, source_rate: ByteSize, source_delay: u64) -> Self {
        Self { image, no_live: false, source_rate, source_delay }
    }

    fn pace(&self) -> Pace {
        Pace { bytes_per_second: self.source_rate.as_u64(), delay: Duration::from_millis(self.source_delay) }
    }

    fn is_slow(&self) -> bool {
        self.source_rate.as_u64() > 0 || self.source_delay > 0
    }
}

/// The title of the cell of times.
pub(crate) const TIME: &str = "time to restore";
/// The title of the cell of times that end when the target is on stable storage.
pub(crate) const STABLE: &str = "the same until it is on stable storage";
/// The title of the cell of rates.
pub(crate) const RATE: &str = "rate, of the image's data";
/// The title of the cell of memory.
pub(crate) const MEMORY: &str = "peak memory of restore";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// Ours, offline.
    Restore,
    /// Ours, live, with no client: the background alone.
    Live,
    /// qemu-img at its fastest.
    QemuImg,
    /// QEMU's own way over a slow source: a qcow2 overlay, and block-stream until it needs the source no more.
    BlockStream,
}

impl Contender for Who {
    fn name(&self) -> &str {
        match self {
            Self::Restore => "lifeboot restore",
            Self::Live => "lifeboot live-restore, undisturbed",
            Self::QemuImg => "qemu-img convert -W -m 16",
            Self::BlockStream => "qcow2 overlay, block-stream",
        }
    }

    fn side(&self) -> Side {
        match self {
            Self::QemuImg | Self::BlockStream => Side::Peer,
            Self::Restore | Self::Live => Side::Ours,
        }
    }
}

/// Runs the workload.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    child::require("qemu-img")?;
    let mut report = common.report("restore");
    let image = &options.image;
    let data = {
        use std::os::unix::fs::MetadataExt;
        let metadata =
            std::fs::metadata(image).with_context(|| format!("cannot read the image {}", image.display()))?;
        (metadata.blocks() * 512).min(metadata.len()) as f64
    };
    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let (repo, qcow2) = (scratch.path().join("repo"), scratch.path().join("disk.qcow2"));
    child::run(&mut common.programs.init(&repo)?)?;
    child::run(&mut common.programs.capture(&repo, image, None)?)?;
    child::run(&mut capture::to_qcow2(image, &qcow2))?;

    // Over a slow source the peer is the one that can use it as well.
    let peer = if options.is_slow() { Who::BlockStream } else { Who::QemuImg };
    let mut players = vec![Who::Restore, peer];
    if !options.no_live {
        players.insert(1, Who::Live);
    }
    common.contest().run(&mut report, &players, |who, turn, report| {
        let dir = scratch.path().join("turn");
        remove(&dir)?;
        std::fs::create_dir(&dir)?;
        settle();
        let target = dir.join("target.raw");
        let mut command = match who {
            Who::Restore => common.programs.restore(&repo, &target)?,
            Who::Live => {
                let mut command = common.programs.live_restore(&repo, &target, &dir.join("live.sock"))?;
                command.args(["--exit-when-done", "--no-trace"]);
                command
            }
            Who::QemuImg => to_raw(&qcow2, &target),
            Who::BlockStream => {
                let begin = Instant::now();
                let line = boot::players::stream_whole(image, options.pace(), &dir)?;
                let seconds = begin.elapsed().as_secs_f64();
                report.ran(who.name(), line);
                remove(&dir)?;
                return Ok(vec![
                    (Metric::lower(TIME, Unit::Seconds), seconds),
                    (Metric::higher(RATE, Unit::BytesPerSecond), data / seconds),
                ]);
            }
        };
        if options.is_slow() {
            command.arg(format!("--source-rate={}", options.source_rate.as_u64()));
            command.arg(format!("--source-delay={}ms", options.source_delay));
        }
        report.ran(who.name(), child::line(&command));
        let begin = Instant::now();
        let finished = child::run(&mut command)?;
        std::fs::File::open(&target)?.sync_all()?;
        let stable = begin.elapsed().as_secs_f64();
        if *who == Who::Live {
            check_completed(&finished)?;
        }
        if turn.round.is_none() {
            // The warm-up round is not timed, so this is where the result is checked.
            compare(image, &target)?;
        }
        remove(&dir)?;
        let seconds = finished.elapsed.as_secs_f64();
        Ok(vec![
            (Metric::lower(TIME, Unit::Seconds), seconds),
            (Metric::lower(STABLE, Unit::Seconds), stable),
            (Metric::higher(RATE, Unit::BytesPerSecond), data / seconds),
            (Metric::lower(MEMORY, Unit::Bytes), finished.peak_memory as f64),
        ])
    })?;
    report.notes.push(
        "lifeboot verifies the SHA-256 of every chunk and has synced the target when it is done; qemu-img does neither"
            .into(),
    );
    Ok(report)
}

/// That a live-restore did not merely end.
pub(crate) fn check_completed(finished: &Finished) -> Result<()> {
    ensure!(
        !ours::events(&finished.stdout, "complete").is_empty(),
        "live-restore ended without the event `complete`: {}",
        finished.stdout.lines().last().unwrap_or("it said nothing")
    );
    Ok(())
}

fn to_raw(qcow2: &Path, target: &Path) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-W", "-m", "16", "-f", "qcow2", "-O", "raw"]).arg(qcow2).arg(target);
    command
}

/// That two raw images hold the same bytes.
pub(crate) fn compare(image: &Path, target: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["compare", "-q", "-f", "raw", "-F", "raw"]).arg(image).arg(target);
    child::run(&mut command).context("the restored disk differs from the image")?;
    Ok(())
}
