//! `lifeboot-nbd`: serves one raw file or block device over NBD, for comparison with nbdkit and qemu-nbd.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use block::{DirectIo, Engine, FileDisk, FileOptions, IoEngine};
use clap::{Parser, ValueEnum};
use nbd_server::{Export, ListenAddress, Server, ServerOptions};
use tokio::signal::unix::{SignalKind, signal};

/// Serve a raw file or block device over NBD
#[derive(Debug, Parser)]
#[command(name = "lifeboot-nbd", version)]
struct Arguments {
    /// The raw file or block device
    file: PathBuf,

    /// Where to listen: unix:PATH or tcp:HOST:PORT; may be repeated
    #[arg(long, required = true, value_name = "ADDRESS")]
    listen: Vec<ListenAddress>,

    /// Refuse writes
    #[arg(long)]
    read_only: bool,

    /// Whether to go around the page cache
    #[arg(long, value_enum, default_value_t = Direct::Off)]
    direct: Direct,

    /// The way of doing I/O: auto, uring or threads
    #[arg(long, default_value_t = IoEngine::Auto, value_name = "ENGINE")]
    io_engine: IoEngine,

    /// Threads that serve; 0 is one for each core
    #[arg(long, default_value_t = 0, value_name = "N")]
    shards: usize,

    /// The export's name; it also answers to the empty name
    #[arg(long, default_value = "", value_name = "NAME")]
    name: String,

    /// Say more on stderr; given twice, say it of every connection
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Direct {
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

fn main() -> ExitCode {
    // clap ends the process itself, with 2, where the arguments make no sense.
    let arguments = Arguments::parse();
    let level = match arguments.verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        _ => tracing::Level::DEBUG,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    match serve(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The messages of the crates beneath say their causes themselves.
            eprintln!("lifeboot-nbd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> Result<()> {
    let engine = Engine::choose(arguments.io_engine)?;
    let options = FileOptions::new(engine).read_only(arguments.read_only).direct(arguments.direct.into());
    let disk = FileDisk::open(&arguments.file, options)?;
    let export = Export {
        read_only: arguments.read_only,
        description: arguments.file.display().to_string(),
        ..Export::new(arguments.name.clone(), Arc::new(disk))
    };
    let server = Server::bind(&arguments.listen, vec![export], ServerOptions::default())?;
    let shards = match arguments.shards {
        0 => thread::available_parallelism().map_or(1, usize::from),
        shards => shards,
    };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("no event loop")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let handle = server.run(shards, engine)?;
        for address in handle.addresses() {
            println!("{}", address.uri(&arguments.name));
        }
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        handle.shutdown();
        Ok(handle.join()?)
    })
}
