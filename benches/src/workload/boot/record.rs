//! Records a boot trace: a real guest boots under QEMU from an nbdkit that logs what it is asked for.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::machine::Machine;
use crate::child::{self, Server};
use crate::peers;
use crate::report::{Metric, Report, Side, Unit};
use crate::trace;

/// Boots the guest in `guest` once, writes its trace to `out`.
pub(super) fn run(guest: &Path, out: &Path, scratch: &TempDir, report: &mut Report) -> Result<()> {
    child::require("nbdkit")?;
    let disk = guest.join("disk.raw");
    ensure!(disk.is_file(), "{} does not exist", disk.display());
    report.scratch_is(scratch.path());
    let (socket, log) = (scratch.path().join("log.sock"), scratch.path().join("nbdkit.log"));
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.arg("-f").arg("-U").arg(&socket).args(["--filter=log", "--filter=cow", "file"]).arg(&disk);
    nbdkit.arg(format!("logfile={}", log.display()));
    report.ran("nbdkit", child::line(&nbdkit));
    let mut server = Server::listening(&mut nbdkit, &socket)?;

    let drive =
        format!("file=nbd+unix:///{}?socket={},format=raw,if=virtio", peers::EXPORT, socket.display());
    let begin = Instant::now();
    let machine = Machine::start(guest, &drive, scratch.path(), report)?;
    let booted = begin.elapsed();
    drop(machine);
    ensure!(server.ended()?.is_none(), "nbdkit ended early: {}", server.stderr()?);
    drop(server);

    let log = std::fs::read_to_string(&log).context("nbdkit left no log")?;
    let recorded = trace::from_nbdkit_log(&log);
    ensure!(!recorded.is_empty(), "nbdkit's log has no request");
    std::fs::write(out, trace::to_lines(&recorded))
        .with_context(|| format!("cannot write {}", out.display()))?;
    let mut tell = |title: &str, unit, value| {
        report.record(&Metric::lower(title, unit), "the guest", Side::Reference, value)
    };
    tell("until the guest was up", Unit::Seconds, booted.as_secs_f64());
    tell("requests", Unit::Count, recorded.len() as f64);
    tell("distinct bytes read", Unit::Bytes, trace::distinct_bytes_read(&recorded) as f64);
    for kib in [64, 128, 256, 512, 1024] {
        let bytes = trace::distinct_chunk_bytes(&recorded, kib << 10);
        tell(&format!("distinct bytes in chunks of {kib} KiB"), Unit::Bytes, bytes as f64);
    }
    Ok(())
}
