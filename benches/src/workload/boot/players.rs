//! Who boots: ours, QEMU's own way, nbdkit's filters, the slow source itself, and everything local as the floor.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use crate::child::{self, Finished, Server};
use crate::contest::Contender;
use crate::ours::{self, Programs};
use crate::peers::{self, EXPORT, Pace};
use crate::qmp::Qmp;
use crate::report::Side;

/// A way to boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// live-restore as one uses it, with the trace of a start from an earlier snapshot.
    Live,
    /// The first start of a machine: nobody knows what it will read.
    LiveFirst,
    /// live-restore with its background off.
    LiveOnDemand,
    /// A qcow2 overlay with copy-on-read, and block-stream behind it.
    Overlay,
    /// nbdkit keeping what was read, its scan filter reading ahead.
    Scan,
    /// The slow source, each read fetched when it comes.
    Direct,
    /// The image itself: no source at all.
    Local,
}

/// In the order of the table.
pub(super) const EVERYONE: [Who; 7] =
    [Who::Live, Who::LiveFirst, Who::LiveOnDemand, Who::Overlay, Who::Scan, Who::Direct, Who::Local];

/// lifeboot live-restore, as one uses it.
pub(crate) const LIVE: &str = "lifeboot live-restore";
/// The same without a trace.
pub(crate) const FIRST: &str = "lifeboot, first start (no trace)";
/// The same without its background.
pub(crate) const ON_DEMAND: &str = "lifeboot, background off";
/// QEMU's own way.
pub(crate) const OVERLAY: &str = "qcow2 overlay, copy-on-read, block-stream";

impl Contender for Who {
    fn name(&self) -> &str {
        match self {
            Self::Live => LIVE,
            Self::LiveFirst => FIRST,
            Self::LiveOnDemand => ON_DEMAND,
            Self::Overlay => OVERLAY,
            Self::Scan => "nbdkit scan, cow-on-read",
            Self::Direct => "the slow source directly",
            Self::Local => "everything local (floor)",
        }
    }

    fn side(&self) -> Side {
        match self {
            Self::Live | Self::LiveFirst | Self::LiveOnDemand => Side::Ours,
            Self::Overlay | Self::Scan | Self::Direct => Side::Peer,
            Self::Local => Side::Reference,
        }
    }
}

impl Who {
    /// The programs that this way needs beside ours.
    pub(super) fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Live | Self::LiveFirst | Self::LiveOnDemand => &[],
            Self::Overlay => &["nbdkit", "qemu-img", "qemu-storage-daemon"],
            Self::Scan | Self::Direct | Self::Local => &["nbdkit"],
        }
    }
}

/// The servers of one way to boot, up and running. The front is ended first.
pub(super) struct Set {
    front: Server,
    _source: Option<Server>,
    ours: bool,
    /// The export's name.
    pub(super) export: &'static str,
    /// Where the guest connects.
    pub(super) socket: PathBuf,
    /// The command of the front.
    pub(super) line: String,
}

impl Set {
    /// Ends the servers; ours is asked to, and says what it did.
    pub(super) fn finish(self) -> Result<Option<Finished>> {
        if self.ours { self.front.terminate().map(Some) } else { Ok(None) }
    }
}

/// Starts the servers of one way to boot in `dir`.
pub(super) fn start(
    who: Who,
    programs: &Programs,
    repo: &Path,
    image: &Path,
    pace: Pace,
    dir: &Path,
) -> Result<Set> {
    let socket = dir.join("front.sock");
    let source_socket = dir.join("source.sock");
    let source = match who {
        Who::Overlay | Who::Scan | Who::Direct => {
            Some(Server::listening(&mut peers::slow_source(image, &source_socket, pace), &source_socket)?)
        }
        Who::Live | Who::LiveFirst | Who::LiveOnDemand | Who::Local => None,
    };
    let mut command = match who {
        Who::Live | Who::LiveFirst | Who::LiveOnDemand => {
            let mut command = programs.live_restore(repo, &dir.join("target.raw"), &socket)?;
            command.arg(format!("--source-rate={}", pace.bytes_per_second));
            command.arg(format!("--source-delay={}ms", pace.delay.as_millis()));
            if who == Who::LiveOnDemand {
                command.arg("--no-background");
            }
            if who != Who::Live {
                command.arg("--no-trace");
            }
            command
        }
        Who::Overlay => overlay(&source_socket, &socket, dir)?,
        Who::Scan => peers::nbdkit_scan_over(&source_socket, &socket),
        Who::Direct => peers::nbdkit_over(&source_socket, &socket),
        Who::Local => peers::nbdkit_local(image, &socket),
    };
    let line = child::line(&command);
    let front = Server::listening(&mut command, &socket)?;
    if who == Who::Overlay {
        Qmp::connect(&dir.join("qmp.sock"))?
            .execute("block-stream", json!({ "job-id": "stream", "device": "overlay" }))?;
    }
    let export = if who.side() == Side::Ours { ours::EXPORT } else { EXPORT };
    Ok(Set { front, _source: source, ours: who.side() == Side::Ours, export, socket, line })
}

/// Brings a whole disk to a qcow2 by block-stream; the command. It ends when nothing is needed of the source any more.
pub(crate) fn stream_whole(image: &Path, pace: Pace, dir: &Path) -> Result<String> {
    let (socket, source_socket) = (dir.join("front.sock"), dir.join("source.sock"));
    let _source = Server::listening(&mut peers::slow_source(image, &source_socket, pace), &source_socket)?;
    let mut command = overlay(&source_socket, &socket, dir)?;
    let line = child::line(&command);
    let mut front = Server::listening(&mut command, &socket)?;
    let mut qmp = Qmp::connect(&dir.join("qmp.sock"))?;
    qmp.execute("block-stream", json!({ "job-id": "stream", "device": "overlay" }))?;
    loop {
        let jobs = qmp.execute("query-block-jobs", json!({}))?;
        if jobs.as_array().is_some_and(Vec::is_empty) {
            break;
        }
        if let Some(status) = front.ended()? {
            anyhow::bail!("qemu-storage-daemon ended with {status}: {}", front.stderr()?);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Ok(line)
}

/// qemu-storage-daemon with the graph that a guest would have: copy-on-read over a qcow2 over the source.
fn overlay(source: &Path, socket: &Path, dir: &Path) -> Result<Command> {
    let (image, qmp) = (dir.join("overlay.qcow2"), dir.join("qmp.sock"));
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
    create.arg(format!("nbd+unix:///?socket={}", source.display())).arg(&image);
    child::run(&mut create).context("cannot make the overlay")?;
    let mut daemon = Command::new("qemu-storage-daemon");
    daemon.arg("--chardev").arg(format!("socket,id=qmp,path={},server=on,wait=off", qmp.display()));
    daemon.args(["--monitor", "chardev=qmp"]);
    let nodes = [
        format!("driver=nbd,node-name=source,read-only=on,server.type=unix,server.path={}", source.display()),
        "driver=raw,node-name=base,read-only=on,file=source".to_owned(),
        format!("driver=file,node-name=overlay-file,filename={}", image.display()),
        "driver=qcow2,node-name=overlay,file=overlay-file,backing=base".to_owned(),
        "driver=copy-on-read,node-name=disk,file=overlay".to_owned(),
    ];
    for node in nodes {
        daemon.arg("--blockdev").arg(node);
    }
    daemon.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
    daemon.arg("--export").arg(format!("type=nbd,id=export,node-name=disk,name={EXPORT},writable=on"));
    Ok(daemon)
}
