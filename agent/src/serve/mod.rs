//! `lifeboot serve`: snapshots as NBD exports, one per disk. Read-only, or with `--scratch` writable
//! into files that are forgotten at the end.

mod device;
mod exports;
mod room;
mod scratch;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use block::{Engine, IoEngine};
use nbd_server::args::ListenArgs;
use nbd_server::{LateRequests, Server, ServerHandle};
use repository::Repository;
use serde::Serialize;

use crate::cli::{Context, Outcome, UsageError, Verb};
use crate::output::Output;
use crate::source::{FetchPool, RepositoryStore, SourceArgs};
use crate::trace::look_for_the_last_time;

/// How often the command looks for Ctrl-C.
const TICK: Duration = Duration::from_millis(50);
/// How often it is looked whether clients that may write have settled: what they read while they started is kept.
const TRACE_INTERVAL: Duration = Duration::from_secs(2);

/// Serve snapshots over NBD, one export per disk
///
/// An export is called SNAPSHOT/DISK, as in web01@2026-11-21T00:33:12Z/disk0, and web01@latest/disk0 for
/// the newest of a group. The first one also answers to the empty name. Without SNAPSHOT all of the
/// repository is served. It runs until Ctrl-C.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot serve -r /backup web01@latest --listen unix:/run/web01.sock
  qemu-img compare disk.raw 'nbd+unix:///?socket=/run/web01.sock'")]
pub struct Args {
    /// Which snapshots, or disks of them: GROUP@TIME[/DISK] or GROUP@latest[/DISK]
    #[arg(value_name = "SNAPSHOT")]
    snapshots: Vec<String>,

    /// Let clients write, into files in this directory that have no name and are gone at the end. What a machine reads
    /// of a disk while it starts is kept with the group, for the next live-restore
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,

    /// How disks are read and written: auto, uring or threads
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    io_engine: IoEngine,

    #[command(flatten)]
    source: SourceArgs,

    // Last: its heading is over all that follows.
    #[command(flatten)]
    listen: ListenArgs,
}

#[derive(Serialize)]
struct Ready<'a> {
    event: &'static str,
    exports: &'a [ExportLine],
}

#[derive(Serialize)]
struct ExportLine {
    name: String,
    size: u64,
    uris: Vec<String>,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let addresses = self.listen.addresses().map_err(UsageError::new)?;
        let repository = Repository::open(context.repository_path()?)?;
        if let Some(dir) = &self.scratch {
            scratch::check(dir)?;
        }
        let interrupt = context.interrupt()?;
        let options = self.listen.options(LateRequests::Refuse)?;
        if let Some(tls) = options.tls.clone() {
            interrupt.on_hangup(move || tls.reload_and_say());
        }
        let secure = options.access.tls_is_required;
        let engine = Engine::choose(self.io_engine)?;
        let wanted = exports::wanted(&repository, &self.snapshots)?;
        let store = RepositoryStore::new(repository.clone());
        let pool = FetchPool::start(store, self.source.pool_options())
            .context("cannot start the fetching threads")?;
        let pool = Arc::new(pool);
        let scratch = self.scratch.as_deref().map(|dir| (dir, engine));
        let (exports, recordings) = exports::open(wanted, &pool, &repository, scratch)?;
        let sizes: Vec<(String, u64)> =
            exports.iter().map(|export| (export.export.name.clone(), export.size)).collect();
        let exports = exports.into_iter().map(|export| export.export).collect();
        let server = Server::bind(&addresses, exports, options)?;
        let handle = server.run(Server::default_shards(), engine)?;
        if let Err(error) = say_ready(&context.output().for_service(), &handle, &sizes, secure) {
            // Clients come all the same.
            tracing::debug!(error = format_args!("{error:#}"), "nobody listens");
        }
        // Without systemd there is nobody to tell.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        let mut looked_at = Instant::now();
        // Where the server ends by itself, `join` says why.
        while !interrupt.is_raised() && !handle.is_ending() {
            std::thread::sleep(TICK);
            if looked_at.elapsed() >= TRACE_INTERVAL {
                looked_at = Instant::now();
                recordings.iter().for_each(|recording| recording.look(false));
            }
        }
        handle.shutdown();
        pool.close_later();
        handle.join()?;
        look_for_the_last_time(move || recordings.iter().for_each(|recording| recording.look(true)));
        Ok(Outcome::Done)
    }
}

fn say_ready(
    output: &Output,
    handle: &ServerHandle,
    exports: &[(String, u64)],
    secure: bool,
) -> anyhow::Result<()> {
    let lines: Vec<ExportLine> = exports
        .iter()
        .map(|(name, size)| ExportLine {
            name: name.clone(),
            size: *size,
            uris: handle.addresses().iter().map(|address| address.uri_over(name, secure)).collect(),
        })
        .collect();
    output.event(&Ready { event: "ready", exports: &lines })?;
    for line in &lines {
        for uri in &line.uris {
            output.line(format_args!("{}  {}  {uri}", line.name, crate::output::human_size(line.size)))?;
        }
    }
    output.line("serving; Ctrl-C ends it")
}
