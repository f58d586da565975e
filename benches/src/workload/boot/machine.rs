//! A real guest under QEMU: from its start until it says that it is up.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::players::{self, Who};
use super::replay;
use crate::child::{self, Server};
use crate::contest::Contender;
use crate::peers::{self, Pace};
use crate::report::{Metric, Report, Side, Unit};
use crate::workload::{Common, remove, settle};

/// How long a guest may take to boot under TCG.
const PATIENCE: Duration = Duration::from_secs(600);
/// What the guest's agent says on the second serial port when it is up (scripts/guest/agent).
const READY: &str = "guest ready";

/// A guest that is up.
pub(super) struct Machine {
    _qemu: Server,
}

impl Machine {
    /// Boots the guest of `guest` (vmlinuz, initrd.img) from this drive, and waits until it is up.
    pub(super) fn start(guest: &Path, drive: &str, dir: &Path, report: &mut Report) -> Result<Self> {
        let program = child::require("qemu-system-x86_64")?;
        let (kernel, initrd) = (guest.join("vmlinuz"), guest.join("initrd.img"));
        for path in [&kernel, &initrd] {
            ensure!(path.is_file(), "{} does not exist", path.display());
        }
        let (console, agent) = (dir.join("console.log"), dir.join("agent.log"));
        let mut qemu = Command::new(program);
        qemu.args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "512",
            "-display",
            "none",
        ]);
        qemu.args(["-no-reboot", "-nic", "none", "-monitor", "none"]);
        qemu.arg("-kernel").arg(&kernel).arg("-initrd").arg(&initrd);
        qemu.args(["-append", "root=/dev/vda rw console=ttyS0"]);
        qemu.arg("-drive").arg(drive);
        for port in [&console, &agent] {
            qemu.arg("-serial").arg(format!("file:{}", port.display()));
        }
        report.ran("qemu", child::line(&qemu));
        let begin = Instant::now();
        let mut machine = Server::start(&mut qemu)?;
        while !std::fs::read_to_string(&agent).unwrap_or_default().contains(READY) {
            let last_words = || -> String {
                let text = std::fs::read(&console).unwrap_or_default();
                let text = String::from_utf8_lossy(&text).into_owned();
                text.lines().rev().take(3).collect::<Vec<_>>().join(" / ")
            };
            if let Some(status) = machine.ended()? {
                let stderr = machine.stderr()?;
                anyhow::bail!("QEMU ended with {status}: {stderr} {}", last_words());
            }
            ensure!(begin.elapsed() < PATIENCE, "the guest is not up after {PATIENCE:?}: {}", last_words());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { _qemu: machine })
    }
}

/// What `machine` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) boot: super::Options,
}

/// The title of the cell.
pub(crate) const READY_TIME: &str = "until the guest is up";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Served by one of the ways to boot.
    Served(Who),
    /// From a disk that is there.
    Local,
    /// Restored first.
    Restored,
}

const WAYS: [Way; 5] = [
    Way::Served(Who::Live),
    Way::Served(Who::LiveFirst),
    Way::Restored,
    Way::Served(Who::Overlay),
    Way::Local,
];

/// The floor.
pub(crate) const LOCAL: &str = "a local disk (floor)";

impl Contender for Way {
    fn name(&self) -> &str {
        match self {
            Self::Served(who) => who.name(),
            Self::Local => LOCAL,
            Self::Restored => "lifeboot restore, then boot",
        }
    }

    fn side(&self) -> Side {
        match self {
            Self::Served(who) => who.side(),
            Self::Local => Side::Reference,
            Self::Restored => Side::Ours,
        }
    }
}

/// Boots a real guest each way, over a slow source.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    let options = &options.boot;
    let guest = options.image.parent().context("the image is in a directory")?;
    let trace = super::trace_of(common, &options.image, options.trace.as_deref())?;
    let mut report = common.report("machine");
    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let (repo, earlier) = (scratch.path().join("repo"), scratch.path().join("earlier"));
    child::run(&mut common.programs.init(&repo)?)?;
    child::run(&mut common.programs.capture(&repo, &options.image, None)?)?;
    std::fs::create_dir(&earlier)?;
    let set = players::start(Who::Live, &common.programs, &repo, &options.image, options.pace(), &earlier)?;
    replay::run((&set.socket, set.export), &trace, Instant::now(), None)?;
    set.finish()?;
    remove(&earlier)?;
    let wanted = |way: &Way| {
        options.only.is_empty() || options.only.iter().any(|text| way.name().contains(text.as_str()))
    };
    let ways: Vec<Way> = WAYS.into_iter().filter(wanted).collect();
    common.contest().run(&mut report, &ways, |way, _, report| {
        let dir = scratch.path().join("turn");
        remove(&dir)?;
        std::fs::create_dir(&dir)?;
        settle();
        let begin = Instant::now();
        let (drive, set) = match way {
            Way::Served(who) => {
                let set =
                    players::start(*who, &common.programs, &repo, &options.image, options.pace(), &dir)?;
                let export = if who.side() == Side::Ours { "" } else { peers::EXPORT };
                let uri = format!("nbd+unix:///{export}?socket={}", set.socket.display());
                (format!("file={uri},format=raw,if=virtio"), Some(set))
            }
            Way::Local => {
                (format!("file={},format=raw,if=virtio,snapshot=on", options.image.display()), None)
            }
            Way::Restored => {
                let target = dir.join("target.raw");
                let mut restore = common.programs.restore(&repo, &target)?;
                let Pace { bytes_per_second, delay } = options.pace();
                restore.arg(format!("--source-rate={bytes_per_second}"));
                restore.arg(format!("--source-delay={}ms", delay.as_millis()));
                child::run(&mut restore)?;
                (format!("file={},format=raw,if=virtio", target.display()), None)
            }
        };
        let machine = Machine::start(guest, &drive, &dir, report)?;
        let seconds = begin.elapsed().as_secs_f64();
        drop(machine);
        if let Some(set) = set {
            set.finish()?;
        }
        remove(&dir)?;
        Ok(vec![(Metric::lower(READY_TIME, Unit::Seconds), seconds)])
    })?;
    Ok(report)
}
