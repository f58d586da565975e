//! Who serves, and how each is started for a cell.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

pub(crate) use super::cells::Cache;
use super::cells::{Cell, Transport};
use crate::child::{self, Server};
use crate::contest::Contender;
use crate::endpoint::Endpoint;
use crate::no_disk::NoDisk;
use crate::peers::{self, EXPORT, NbdServer, Serving};
use crate::report::Side;
use crate::workload::Common;

/// A server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Ours,
    Nbdkit,
    QemuThreads,
    QemuUring,
    NbdServer,
    /// No disk at all, and no program: what the client leaves to any server.
    Nobody,
}

/// All of them, ours first.
pub(crate) const EVERYONE: [Who; 6] =
    [Who::Ours, Who::Nbdkit, Who::QemuThreads, Who::QemuUring, Who::NbdServer, Who::Nobody];

impl Contender for Who {
    fn name(&self) -> &str {
        match self {
            Self::Ours => "lifeboot-nbd",
            Self::Nbdkit => "nbdkit file",
            Self::QemuThreads => "qemu-nbd threads",
            Self::QemuUring => "qemu-nbd io_uring",
            Self::NbdServer => "nbd-server",
            Self::Nobody => "no disk at all",
        }
    }

    fn side(&self) -> Side {
        match self {
            Self::Ours => Side::Ours,
            Self::Nobody => Side::Reference,
            _ => Side::Peer,
        }
    }
}

impl Who {
    /// The program that it is, if it is one.
    pub(crate) fn program(self) -> Option<&'static str> {
        match self {
            Self::Ours => Some("lifeboot-nbd"),
            Self::Nbdkit => Some("nbdkit"),
            Self::QemuThreads | Self::QemuUring => Some("qemu-nbd"),
            Self::NbdServer => Some("nbd-server"),
            Self::Nobody => None,
        }
    }

    /// nbdkit's file plugin and nbd-server have no O_DIRECT; and where there is no disk there is only the way to it.
    pub(super) fn takes_part(self, cell: &Cell) -> bool {
        match self {
            Self::Ours | Self::QemuThreads | Self::QemuUring => true,
            Self::Nbdkit | Self::NbdServer => cell.cache != Cache::Direct,
            Self::Nobody => cell.cache == Cache::Page && cell.transport == Transport::Unix,
        }
    }
}

/// Where the servers of a cell listen.
pub(super) fn endpoint(transport: Transport, dir: &Path) -> Result<Endpoint> {
    match transport {
        Transport::Unix => Ok(Endpoint::Unix(dir.join("bench.sock"))),
        Transport::Tcp => Endpoint::free_port(None),
        Transport::Tls => Endpoint::free_port(Some(dir.to_owned())),
    }
}

/// How a server of `file` is to be started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start<'a> {
    pub(crate) cache: Cache,
    pub(crate) file: &'a Path,
    pub(crate) at: &'a Endpoint,
    /// More arguments for ours.
    pub(crate) ours_arg: &'a [String],
    /// What runs the server: nothing, or a program that looks at it.
    pub(crate) prefix: &'a [String],
}

/// Starts a server; returns it with the command that was run.
pub(crate) fn start(common: &Common, who: Who, start: Start<'_>) -> Result<(Box<dyn Serving>, String)> {
    let Start { cache, file, at, ours_arg, prefix } = start;
    let is_direct = cache == Cache::Direct;
    let qemu_cache = if is_direct { "none" } else { "writeback" };
    let command = match who {
        Who::Ours => {
            let mut command = Command::new(common.programs.path("lifeboot-nbd")?);
            command.arg(file).arg("--name").arg(EXPORT);
            command.arg(if is_direct { "--direct=on" } else { "--direct=off" });
            match at {
                Endpoint::Unix(socket) => command.arg(format!("--listen=unix:{}", socket.display())),
                Endpoint::Tcp { port, .. } => command.arg(format!("--listen=tcp:127.0.0.1:{port}")),
            };
            if let Some(dir) = at.tls() {
                command.arg("--tls=required").arg(format!("--tls-creds={}", dir.display()));
            }
            command.args(ours_arg);
            command
        }
        Who::Nbdkit => peers::nbdkit_file(file, at),
        Who::QemuThreads => peers::qemu_nbd(file, at, qemu_cache, "threads"),
        Who::QemuUring => peers::qemu_nbd(file, at, qemu_cache, "io_uring"),
        Who::NbdServer => {
            let dir = file.parent().unwrap_or(Path::new("."));
            let (server, line) = NbdServer::start(file, at, dir, prefix)?;
            return Ok((Box::new(server), line));
        }
        Who::Nobody => {
            let socket = at.socket().context("without a disk only a unix socket is served")?;
            let server = NoDisk::start(socket, std::fs::metadata(file)?.len())?;
            return Ok((Box::new(server), "(within lifeboot-bench)".to_owned()));
        }
    };
    let mut command = child::below(prefix, command);
    let line = child::line(&command);
    Ok((Box::new(Server::listening(&mut command, at.clone())?), line))
}
