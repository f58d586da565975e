//! `capture`: a disk into a fresh repository, and again with nothing changed, beside qemu-img, restic and borg.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use super::{Common, bytes_under, remove, settle};
use crate::child::{self, Finished};
use crate::contest::{Contender, Sample};
use crate::report::{Absent, Metric, Report, Side, Unit};

/// What `capture` takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The raw image to capture
    #[arg(default_value = "target/guest/disk.raw")]
    pub(crate) image: PathBuf,
    /// Leave out restic and borg, which take several times as long
    #[arg(long)]
    pub(crate) no_backup_tools: bool,
}

/// The title of the cell of times.
pub(crate) const TIME: &str = "time to capture";
/// The title of the cell of stored bytes.
pub(crate) const STORED: &str = "stored";
/// The title of the cell of memory.
pub(crate) const MEMORY: &str = "peak memory of capture";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// Ours, into a fresh repository.
    Fresh,
    /// Ours, into a repository that holds the very same disk.
    Again,
    /// qemu-img at its fastest.
    QemuImg,
    Restic,
    Borg,
}

const EVERYONE: [Who; 5] = [Who::Fresh, Who::Again, Who::QemuImg, Who::Restic, Who::Borg];

impl Contender for Who {
    fn name(&self) -> &str {
        match self {
            Self::Fresh => "lifeboot, fresh repository",
            Self::Again => "lifeboot, nothing changed",
            Self::QemuImg => "qemu-img convert -W -m 16, zstd",
            Self::Restic => "restic",
            Self::Borg => "borg, zstd 1",
        }
    }

    fn side(&self) -> Side {
        if matches!(self, Self::Fresh | Self::Again) { Side::Ours } else { Side::Peer }
    }
}

impl Who {
    fn program(self) -> Option<&'static str> {
        match self {
            Self::Fresh | Self::Again => None,
            Self::QemuImg => Some("qemu-img"),
            Self::Restic => Some("restic"),
            Self::Borg => Some("borg"),
        }
    }
}

/// Runs the workload.
pub(crate) fn run(common: &Common, options: &Options) -> Result<Report> {
    let mut report = common.report("capture");
    let image = &options.image;
    std::fs::metadata(image).with_context(|| format!("cannot read the image {}", image.display()))?;
    let mut present = Vec::new();
    for who in EVERYONE {
        let missing = who.program().filter(|program| child::find(program).is_none());
        let reason = match (who, missing) {
            (_, Some(program)) => format!("{program} is not installed"),
            (Who::Restic | Who::Borg, None) if options.no_backup_tools => "left out as asked".to_owned(),
            _ => {
                present.push(who);
                continue;
            }
        };
        report.absent.push(Absent { contender: who.name().to_owned(), reason });
    }

    let scratch = common.scratch()?;
    report.scratch_is(scratch.path());
    let known = scratch.path().join("known");
    child::run(&mut common.programs.init(&known)?)?;
    child::run(&mut common.programs.capture(&known, image, None)?)?;
    common.contest().run(&mut report, &present, |who, _, report| {
        let dir = scratch.path().join("turn");
        remove(&dir)?;
        std::fs::create_dir(&dir)?;
        settle();
        let out = if *who == Who::Again { known.clone() } else { dir.join("out") };
        let before = if *who == Who::Again { bytes_under(&out)? } else { 0 };
        let finished = capture(common, *who, image, &out, &dir, report)?;
        let stored = (bytes_under(&out)? - before) as f64;
        remove(&dir)?;
        Ok(sample(&finished, stored))
    })?;
    report.notes.push(
        "lifeboot hashes everything and has synced all of it when it says that it is done; qemu-img does neither".into(),
    );
    Ok(report)
}

fn sample(finished: &Finished, stored: f64) -> Sample {
    vec![
        (Metric::lower(TIME, Unit::Seconds), finished.elapsed.as_secs_f64()),
        (Metric::lower(STORED, Unit::Bytes), stored),
        (Metric::lower(MEMORY, Unit::Bytes), finished.peak_memory as f64),
    ]
}

fn capture(
    common: &Common,
    who: Who,
    image: &Path,
    out: &Path,
    dir: &Path,
    report: &mut Report,
) -> Result<Finished> {
    let mut command = match who {
        Who::Fresh => {
            child::run(&mut common.programs.init(out)?)?;
            common.programs.capture(out, image, None)?
        }
        Who::Again => common.programs.capture(out, image, None)?,
        Who::QemuImg => to_qcow2(image, out),
        Who::Restic => {
            let restic = |arguments: &[&str]| {
                let mut restic = Command::new("restic");
                restic
                    .env("RESTIC_PASSWORD", "bench")
                    .args(["--no-cache", "-q", "-r"])
                    .arg(out)
                    .args(arguments);
                restic
            };
            child::run(&mut restic(&["init"]))?;
            let mut backup = restic(&["backup"]);
            backup.arg(image);
            backup
        }
        Who::Borg => {
            let borg = || {
                let mut borg = Command::new("borg");
                borg.env("BORG_BASE_DIR", dir).env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
                borg
            };
            child::run(borg().args(["init", "-e", "none"]).arg(out))?;
            let mut archive = out.as_os_str().to_owned();
            archive.push("::bench");
            let mut create = borg();
            create.args(["create", "--sparse", "-C", "zstd,1"]).arg(archive).arg(image);
            create
        }
    };
    report.ran(who.name(), child::line(&command));
    child::run(&mut command)
}

/// qemu-img's fastest way to a compressed image: out of order, 16 requests at once.
pub(crate) fn to_qcow2(image: &Path, out: &Path) -> Command {
    let mut command = Command::new("qemu-img");
    command.args([
        "convert",
        "-W",
        "-m",
        "16",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "compression_type=zstd",
    ]);
    command.arg(image).arg(out);
    command
}
