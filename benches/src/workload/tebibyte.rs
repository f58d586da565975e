//! `tebibyte`: a sparse disk of 1 TiB, random writes, `kill -9`, and a new start, again and again.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use super::{Common, kill};
use crate::child::{self, Server};
use crate::ours;
use crate::report::{Metric, Report, Side, Unit};

/// What `tebibyte` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The seconds that fio writes for before each kill
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub(crate) seconds: u32,
    /// How often the agent is killed
    #[arg(long, default_value_t = 3)]
    pub(crate) kills: u32,
}

/// The title of the cell of restarts.
pub(crate) const RESTART: &str = "1 TiB: from restart to the first answer";
/// The title of the cell of memory.
pub(crate) const MEMORY: &str = "1 TiB: peak memory";
/// The title of the cell of the journal.
pub(crate) const JOURNAL: &str = "1 TiB: the journal";
/// Who is measured.
pub(crate) const NAME: &str = "lifeboot live-restore";

const SIZE: u64 = 1 << 40;
/// Data in the middle of nothing.
const DATA: u64 = 64 << 20;

/// Runs the workload.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    child::require("fio")?;
    let mut report = common.report("tebibyte");
    report.rounds = options.kills as usize;
    report.warm_up = false;
    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let dir = scratch.path();
    let (image, repo, target, socket) =
        (dir.join("disk.raw"), dir.join("repo"), dir.join("target.raw"), dir.join("live.sock"));
    write_image(&image)?;
    child::run(&mut common.programs.init(&repo)?)?;
    child::run(&mut common.programs.capture(&repo, &image, None)?)?;
    let live_restore = || -> Result<Command> {
        let mut command = common.programs.live_restore(&repo, &target, &socket)?;
        // Something stays absent until the last kill.
        command.args(["--source-rate=64KiB", "--no-trace"]);
        Ok(command)
    };
    report.ran(NAME, child::line(&live_restore()?));
    let mut agent = Server::listening(&mut live_restore()?, &socket)?;
    for round in 0..options.kills {
        let mut fio = Command::new("fio");
        fio.args(["--name=j", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--time_based"]);
        fio.arg(format!("--uri=nbd+unix:///{}?socket={}", ours::EXPORT, socket.display()));
        fio.arg(format!("--runtime={}", options.seconds)).arg(format!("--randseed={round}"));
        child::run(&mut fio)?;
        let peak_memory = agent.kill()?.peak_memory as f64;
        let restarted = Instant::now();
        agent = Server::start(&mut live_restore()?)?;
        kill::first_answer(&mut agent, &socket, restarted)?;
        let answered = restarted.elapsed().as_secs_f64();
        let journal = std::fs::metadata(journal(&target)).context("there is no journal")?.size() as f64;
        report.record(&Metric::lower(RESTART, Unit::Seconds), NAME, Side::Ours, answered);
        report.record(&Metric::lower(MEMORY, Unit::Bytes), NAME, Side::Ours, peak_memory);
        report.record(&Metric::lower(JOURNAL, Unit::Bytes), NAME, Side::Ours, journal);
        eprintln!("kill {}/{}: answered after {:.0} ms", round + 1, options.kills, answered * 1e3);
    }
    // To park it, all that was written would have to reach the disk, and nothing of that is measured.
    agent.kill()?;
    Ok(report)
}

fn journal(target: &Path) -> std::path::PathBuf {
    let mut dir = target.as_os_str().to_owned();
    dir.push(".lifeboot");
    Path::new(&dir).join("journal")
}

fn write_image(path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(SIZE)?;
    let mut state = 42_u64;
    let mut bytes = vec![0; 1 << 20];
    for at in (0..DATA).step_by(bytes.len()) {
        for word in bytes.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all_at(&bytes, SIZE / 3 / 4096 * 4096 + at)?;
    }
    Ok(())
}
