//! Records a boot trace: a real guest boots under QEMU from an nbdkit that logs what it is asked for.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::child::{self, Server};
use crate::peers;
use crate::report::{Metric, Report, Side, Unit};
use crate::trace;

/// How long a guest may take to boot under TCG.
const PATIENCE: Duration = Duration::from_secs(600);
/// What the guest's agent says on the second serial port when it is up (scripts/guest/agent).
const READY: &str = "guest ready";

/// Boots the guest in `guest` once, writes its trace to `out`.
pub(super) fn run(guest: &Path, out: &Path, scratch: &TempDir, report: &mut Report) -> Result<()> {
    let qemu_program = child::require("qemu-system-x86_64")?;
    child::require("nbdkit")?;
    let (disk, kernel, initrd) = (guest.join("disk.raw"), guest.join("vmlinuz"), guest.join("initrd.img"));
    for path in [&disk, &kernel, &initrd] {
        ensure!(path.is_file(), "{} does not exist", path.display());
    }
    report.scratch_is(scratch.path());
    let (socket, log) = (scratch.path().join("log.sock"), scratch.path().join("nbdkit.log"));
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.arg("-f").arg("-U").arg(&socket).args(["--filter=log", "--filter=cow", "file"]).arg(&disk);
    nbdkit.arg(format!("logfile={}", log.display()));
    report.ran("nbdkit", child::line(&nbdkit));
    let mut server = Server::listening(&mut nbdkit, &socket)?;

    let (console, agent) = (scratch.path().join("console.log"), scratch.path().join("agent.log"));
    let mut qemu = Command::new(qemu_program);
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "512", "-display", "none"]);
    qemu.args(["-no-reboot", "-nic", "none", "-monitor", "none"]);
    qemu.arg("-kernel").arg(&kernel).arg("-initrd").arg(&initrd);
    qemu.args(["-append", "root=/dev/vda rw console=ttyS0"]);
    qemu.arg("-drive");
    qemu.arg(format!("file=nbd+unix:///{}?socket={},format=raw,if=virtio", peers::EXPORT, socket.display()));
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
        std::thread::sleep(Duration::from_millis(100));
    }
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
