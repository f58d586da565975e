//! What `lifeboot-nbd` does with its arguments. Whoever reads what it prints may leave, or not read at all: it serves all the same.

mod arguments;

use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use block::{Engine, FileDisk, FileOptions};
use nbd_server::handover::{Arrival, Departure, MeetingPoint};
use nbd_server::hangup::{Asks, Hangup};
use nbd_server::log_queue::LogQueue;
use nbd_server::stdio::Stdio;
use nbd_server::{Export, LateRequests, ListenAddress, Server, ServerHandle, ServerOptions, TlsServer};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

pub(crate) use arguments::Arguments;

/// So many files are open at most beside the server's: the disk, the signals' event loop, the log, a meeting point.
const FILES: usize = 12;

/// Serves until it is told to end, the one connection has ended, or a successor has taken over.
pub(crate) fn serve(arguments: &Arguments, log: &LogQueue) -> Result<()> {
    let addresses = if arguments.stdio { Vec::new() } else { arguments.addresses() };
    let engine = Engine::choose(arguments.io_engine)?;
    Server::check_open_files(shards(arguments), FILES)?;
    let options = FileOptions::new(engine).read_only(arguments.read_only).direct(arguments.direct.into());
    let disk = FileDisk::open(&arguments.file, options)?;
    let identity = identity(arguments, &disk)?;
    let export = Export {
        read_only: arguments.read_only,
        description: arguments.file.display().to_string(),
        ..Export::new(arguments.name.clone(), Arc::new(disk))
    };
    // Where somebody may take over, clients are to come again rather than to hear of our end.
    let late = if arguments.handover.is_some() { LateRequests::Leave } else { LateRequests::Refuse };
    let options = arguments.listen.options(late)?;
    let tls = options.tls.clone();
    if arguments.stdio {
        let (connection, output) = Stdio::take()?.into_parts();
        let server = Server::of_connection(connection, vec![export], options)?;
        let served = run(arguments, log, server, engine, None, tls);
        output.finish();
        return served;
    }
    match &arguments.handover {
        None => run(arguments, log, Server::bind(&addresses, vec![export], options)?, engine, None, tls),
        Some(path) => {
            let (server, point) = succeed(path, &identity, &addresses, export, options)?;
            run(arguments, log, server, engine, Some((point, identity)), tls)
        }
    }
}

/// Takes over from the server that is at the meeting point, or is the first one there.
fn succeed(
    path: &Path,
    identity: &str,
    addresses: &[ListenAddress],
    export: Export,
    options: ServerOptions,
) -> Result<(Server, MeetingPoint)> {
    match MeetingPoint::arrive(path, identity, addresses, &options.access)? {
        Arrival::First(point) => Ok((Server::bind(addresses, vec![export], options)?, point)),
        Arrival::Successor(successor) => {
            let succession = successor.take_over()?;
            tracing::info!("the server before has ended: this one goes on");
            Ok((Server::listening(succession.listeners, vec![export], options)?, succession.point))
        }
    }
}

/// What is served, in one line: only a server of the same is succeeded.
fn identity(arguments: &Arguments, disk: &FileDisk) -> Result<String> {
    use std::os::unix::fs::MetadataExt as _;
    let path = &arguments.file;
    let metadata = std::fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    // Of a device what it is, of a file which it is.
    let (kind, number) = match metadata.rdev() {
        0 => ("file", format!("{}:{}", metadata.dev(), metadata.ino())),
        device => ("device", device.to_string()),
    };
    let access = if arguments.read_only { "read-only" } else { "read-write" };
    Ok(format!("{:?} of {} bytes, {kind} {number}, {access}", arguments.name, disk.size()))
}

fn shards(arguments: &Arguments) -> usize {
    match arguments.shards {
        0 => Server::default_shards(),
        shards => shards,
    }
}

fn run(
    arguments: &Arguments,
    log: &LogQueue,
    server: Server,
    engine: Engine,
    meeting: Option<(MeetingPoint, String)>,
    tls: Option<TlsServer>,
) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("no event loop")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        // It stays taken, though nobody waits for it: beyond a limit of file sizes a write fails, and no more.
        drop(signal(SignalKind::from_raw(libc::SIGXFSZ)).context("cannot take SIGXFSZ")?);
        let start = Hangup::at_start();
        let hangups = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
        let handle = server.run(shards(arguments), engine)?;
        let (departs, departed) = oneshot::channel::<Departure>();
        if let Some((point, identity)) = &meeting {
            point.wait(identity.clone(), &handle.listeners(), |departure| {
                // Nobody waits for it where we are ending anyway.
                let _ = departs.send(departure);
            })?;
        }
        // Whoever gave us the socket knows where it is, and its stdout may be ours.
        if !arguments.stdio && !arguments.listen.is_given() {
            let secure = tls.as_ref().is_some_and(TlsServer::is_required);
            say_addresses(&handle, &arguments.name, secure);
        }
        let mut departure = None;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = handle.ending() => {}
            () = hung_up(tls.as_ref(), start, hangups) => {}
            Ok(successor) = departed => departure = Some(successor),
        }
        handle.shutdown();
        handle.join()?;
        if departure.is_some() {
            log.put(b"lifeboot-nbd: handed over to a new server\n");
        }
        // Its end is what the successor waits for: after the last operation of ours.
        drop(departure);
        Ok(())
    })
}

/// Prints where clients find the server. Without a reader of these lines it is served all the same.
fn say_addresses(handle: &ServerHandle, name: &str, secure: bool) {
    let uris = handle.addresses().iter().map(|address| format!("{}\n", address.uri_over(name, secure)));
    let mut stdout = io::stdout().lock();
    let said = stdout.write_all(uris.collect::<String>().as_bytes()).and_then(|()| stdout.flush());
    match said {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            tracing::warn!(%error, "the addresses cannot be printed; they are served all the same");
        }
        _ => {}
    }
}

/// Sees to each SIGHUP, until one asks the program to end.
async fn hung_up(tls: Option<&TlsServer>, start: Hangup, mut hangups: Signal) {
    while hangups.recv().await.is_some() {
        match (start.asks(tls.is_some()), tls) {
            (Asks::Reload, Some(tls)) => tls.reload_and_say(),
            (Asks::End, _) => return,
            (Asks::Reload | Asks::Nothing, _) => {}
        }
    }
}
