//! The command line.

use std::path::PathBuf;

use block::{DirectIo, IoEngine};
use clap::{CommandFactory, Parser, ValueEnum, error::ErrorKind};
use nbd_server::ListenAddress;
use nbd_server::args::ListenArgs;

/// Serve a raw file or block device over NBD
#[derive(Debug, Parser)]
#[command(name = "lifeboot-nbd", version)]
#[command(after_help = "\
Example: lifeboot-nbd --listen unix:/run/disk.sock disk.raw
         lifeboot-nbd --listen tcp:127.0.0.1:10809 --read-only /dev/vg/disk
         nbdinfo -- [ lifeboot-nbd --stdio disk.raw ]")]
pub(crate) struct Arguments {
    /// The raw file or block device
    pub(crate) file: PathBuf,

    /// Serve one connection on stdin and stdout, a socket or a pair of pipes, and end with it. Under a client that starts
    /// its server with a listening socket instead, serve the one that connects there
    #[arg(long, conflicts_with_all = ["listen", "handover"])]
    pub(crate) stdio: bool,

    /// Take over from the server that waits at this unix socket, which then ends, without an error for clients that
    /// reconnect; and wait there for the next one, started with the same arguments
    #[arg(long, value_name = "PATH")]
    pub(crate) handover: Option<PathBuf>,

    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,

    /// Whether to go around the page cache
    #[arg(long, value_enum, default_value_t = Direct::Off)]
    pub(crate) direct: Direct,

    /// The way of doing I/O: auto, uring or threads
    #[arg(long, default_value_t = IoEngine::Auto, value_name = "ENGINE")]
    pub(crate) io_engine: IoEngine,

    /// Threads that serve; 0 is two for each processor
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) shards: usize,

    /// The export's name; it also answers to the empty name
    #[arg(long, default_value = "", value_name = "NAME")]
    pub(crate) name: String,

    /// Say more on stderr; given twice, say it of every connection
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    #[command(flatten)]
    pub(crate) listen: ListenArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Direct {
    /// Around it where the file system allows
    Auto,
    /// Around it, or not at all
    On,
    /// Through it
    Off,
}

impl From<Direct> for DirectIo {
    fn from(direct: Direct) -> Self {
        match direct {
            Direct::Auto => Self::Auto,
            Direct::On => Self::On,
            Direct::Off => Self::Off,
        }
    }
}

impl Arguments {
    /// Where to listen; ends the process where the arguments make no sense, as clap does.
    pub(crate) fn addresses(&self) -> Vec<ListenAddress> {
        match self.listen.addresses() {
            Ok(addresses) => addresses,
            Err(why) => Self::command().error(ErrorKind::MissingRequiredArgument, why).exit(),
        }
    }
}
