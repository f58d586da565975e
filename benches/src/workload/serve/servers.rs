//! Who serves, and how each is started for a cell.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

pub(crate) use super::cells::Cache;
use super::cells::{Cell, Transport};
use crate::child::{self, Server};
use crate::contest::Contender;
use crate::endpoint::Endpoint;
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
}

/// All of them, ours first.
pub(crate) const EVERYONE: [Who; 5] =
    [Who::Ours, Who::Nbdkit, Who::QemuThreads, Who::QemuUring, Who::NbdServer];

impl Contender for Who {
    fn name(&self) -> &str {
        match self {
            Self::Ours => "lifeboot-nbd",
            Self::Nbdkit => "nbdkit file",
            Self::QemuThreads => "qemu-nbd threads",
            Self::QemuUring => "qemu-nbd io_uring",
            Self::NbdServer => "nbd-server",
        }
    }

    fn side(&self) -> Side {
        if *self == Self::Ours { Side::Ours } else { Side::Peer }
    }
}

impl Who {
    /// The program that it is.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Ours => "lifeboot-nbd",
            Self::Nbdkit => "nbdkit",
            Self::QemuThreads | Self::QemuUring => "qemu-nbd",
            Self::NbdServer => "nbd-server",
        }
    }

    /// nbdkit's file plugin and nbd-server have no O_DIRECT.
    pub(super) fn takes_part(self, cell: &Cell) -> bool {
        cell.cache != Cache::Direct || matches!(self, Self::Ours | Self::QemuThreads | Self::QemuUring)
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
            let mut command = Command::new(common.programs.path(who.program())?);
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
    };
    let mut command = child::below(prefix, command);
    let line = child::line(&command);
    Ok((Box::new(Server::listening(&mut command, at.clone())?), line))
}
