//! The peers that serve disks over NBD, each started the way that its own manual advises for this work.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::child::{self, Server};
use crate::endpoint::Endpoint;

/// The export's name everywhere; nbd-server needs one, the others take any.
pub(crate) const EXPORT: &str = "vda";

/// How a source is slowed, for ours and for the peers alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pace {
    /// Bytes a second; 0 is no limit.
    pub(crate) bytes_per_second: u64,
    /// What each fetch waits, others being in flight meanwhile.
    pub(crate) delay: Duration,
}

/// nbdkit's file plugin.
pub(crate) fn nbdkit_file(file: &Path, at: &Endpoint) -> Command {
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.arg("-f");
    match at {
        Endpoint::Unix(socket) => nbdkit.arg("-U").arg(socket),
        Endpoint::Tcp { port, .. } => nbdkit.args(["-i", "127.0.0.1"]).arg(format!("--port={port}")),
    };
    if let Some(dir) = at.tls() {
        nbdkit.arg("--tls=require").arg(format!("--tls-certificates={}", dir.display()));
    }
    nbdkit.arg("file").arg(file);
    nbdkit
}

/// A copy-on-write layer over nbdkit's file plugin: everything local, and the file is left alone.
pub(crate) fn nbdkit_local(file: &Path, socket: &Path) -> Command {
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.arg("-f").arg("-U").arg(socket).args(["--filter=cow", "file"]).arg(file);
    nbdkit
}

/// A read-only source held to a pace: nbdkit with its `delay` and `rate` filters.
///
/// The rate filter lets 2 seconds' worth through at once unless told otherwise, which is more than a boot reads;
/// at a tenth of a second it holds the rate (checked: 1 GiB at 100 MB/s takes 10.65 s).
pub(crate) fn slow_source(file: &Path, socket: &Path, pace: Pace) -> Command {
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.arg("-f").arg("-r").arg("-U").arg(socket);
    nbdkit.args(["--filter=delay", "--filter=rate", "file"]).arg(file);
    nbdkit.arg(format!("rdelay={}ms", pace.delay.as_millis()));
    if pace.bytes_per_second > 0 {
        nbdkit.arg(format!("rate={}", pace.bytes_per_second * 8)).arg("burstiness=0.1");
    }
    nbdkit
}

/// A writable layer over an NBD source that fetches each read when it comes and keeps nothing of it.
pub(crate) fn nbdkit_over(source: &Path, socket: &Path) -> Command {
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.arg("-f").arg("-U").arg(socket).args(["--filter=cow", "nbd"]);
    nbdkit.arg(format!("socket={}", source.display()));
    nbdkit
}

/// The same, but what was read is kept, and `scan` reads ahead through the whole disk.
pub(crate) fn nbdkit_scan_over(source: &Path, socket: &Path) -> Command {
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.arg("-f").arg("-U").arg(socket).args(["--filter=scan", "--filter=cow", "nbd"]);
    nbdkit.arg(format!("socket={}", source.display())).args(["cow-on-read=true", "cow-on-cache=true"]);
    nbdkit
}

/// qemu-nbd with that cache mode (`writeback`, `none`) and I/O engine (`threads`, `io_uring`).
pub(crate) fn qemu_nbd(file: &Path, at: &Endpoint, cache: &str, aio: &str) -> Command {
    let mut qemu_nbd = Command::new("qemu-nbd");
    qemu_nbd.args(["-t", "-e", "0", "-f", "raw", "-x", EXPORT, "--discard=unmap"]);
    match at {
        Endpoint::Unix(socket) => qemu_nbd.arg("-k").arg(socket),
        Endpoint::Tcp { port, .. } => qemu_nbd.args(["-b", "127.0.0.1"]).arg(format!("--port={port}")),
    };
    if let Some(dir) = at.tls() {
        let credentials =
            format!("tls-creds-x509,id=tls,endpoint=server,verify-peer=off,dir={}", dir.display());
        qemu_nbd.args(["--object", &credentials, "--tls-creds=tls"]);
    }
    qemu_nbd.arg(format!("--cache={cache}")).arg(format!("--aio={aio}")).arg(file);
    qemu_nbd
}

/// nbd-server, which goes into the background and forks for each connection, so it is ended by its pid file.
#[derive(Debug)]
pub(crate) struct NbdServer {
    pid_file: PathBuf,
}

impl NbdServer {
    /// Starts it, below `prefix`, with a configuration in `dir`; returns it with the command that was run.
    pub(crate) fn start(file: &Path, at: &Endpoint, dir: &Path, prefix: &[String]) -> Result<(Self, String)> {
        let (config, pid_file) = (dir.join("nbd-server.conf"), dir.join("nbd-server.pid"));
        let mut generic = match at {
            Endpoint::Unix(socket) => format!("\tunixsock = {}\n", socket.display()),
            Endpoint::Tcp { port, .. } => format!("\tlistenaddr = 127.0.0.1\n\tport = {port}\n"),
        };
        if let Some(dir) = at.tls() {
            for (key, name) in [
                ("certfile", "server-cert.pem"),
                ("keyfile", "server-key.pem"),
                ("cacertfile", "ca-cert.pem"),
            ] {
                writeln!(generic, "\t{key} = {}", dir.join(name).display())?;
            }
            generic.push_str("\tforce_tls = true\n");
        }
        let text = format!(
            "[generic]\n{generic}[{EXPORT}]\n\texportname = {}\n\tflush = true\n\tfua = true\n\ttrim = true\n",
            file.display()
        );
        std::fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let mut command = Command::new("nbd-server");
        command.arg("-C").arg(&config).arg("-p").arg(&pid_file);
        let mut command = child::below(prefix, command);
        child::run(&mut command)?;
        let server = Self { pid_file };
        for _ in 0..2000 {
            if at.answers() && server.pid().is_some() {
                return Ok((server, child::line(&command)));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        anyhow::bail!("nbd-server does not listen: {}", at.uri(EXPORT))
    }

    fn pid(&self) -> Option<rustix::process::Pid> {
        let text = std::fs::read_to_string(&self.pid_file).ok()?;
        rustix::process::Pid::from_raw(text.trim().parse().ok()?)
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            // Nobody is left to hear of an error here.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            for _ in 0..1000 {
                if rustix::process::test_kill_process(pid).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Anything that serves a disk until it is dropped.
pub(crate) trait Serving {
    /// The process that clients connect to.
    fn pid(&self) -> Option<u32>;

    /// Asks it to end, and waits until it has.
    fn end(self: Box<Self>) -> Result<()>;
}

impl Serving for Server {
    fn pid(&self) -> Option<u32> {
        Some(Self::pid(self))
    }

    fn end(self: Box<Self>) -> Result<()> {
        self.terminate().map(drop)
    }
}

impl Serving for NbdServer {
    fn pid(&self) -> Option<u32> {
        Self::pid(self).map(|pid| pid.as_raw_nonzero().get().unsigned_abs())
    }

    fn end(self: Box<Self>) -> Result<()> {
        drop(self);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slow_source_is_paced_in_bits_and_hardly_bursts() {
        let pace = Pace { bytes_per_second: 100_000_000, delay: Duration::from_millis(5) };
        let line = child::line(&slow_source(Path::new("d.raw"), Path::new("s"), pace));
        assert!(line.ends_with("file d.raw rdelay=5ms rate=800000000 burstiness=0.1"), "{line}");
    }

    #[test]
    fn no_rate_is_no_rate_filter_setting() {
        let pace = Pace { bytes_per_second: 0, delay: Duration::from_millis(5) };
        assert!(!child::line(&slow_source(Path::new("d.raw"), Path::new("s"), pace)).contains("rate="));
    }
}
