//! An agent takes the place of another one: the same command, with `--take-over`.
//!
//! The sockets that clients come to never stop to listen: they are sent to the successor over the session's `control.sock`. The
//! order, in which nobody's request fails and no session has two agents (docs/nbd.md, "Hand-over"):
//!
//! 1. the successor finds its sessions, their snapshot and its disks in the repository. It locks and changes nothing;
//! 2. it asks for the agent's place. The agent compares the sessions, keeps saves and moves away, and sends its sockets;
//! 3. the successor looks at its sockets, its targets and their journals, changing nothing, and says `go`. Until then the agent
//!    serves, whatever becomes of the successor;
//! 4. the agent accepts nothing more, finishes what is in flight, leaves what comes later to clients that connect again, parks its
//!    sessions, lets their locks go, and ends;
//! 5. the successor, who sees that end as the connection's, resumes the sessions and accepts.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use block::Engine;
use nbd_server::{Listener, ServerOptions, handover};
use repository::DiskEntry;

use super::control::{self, Reply, Request, TakeOver};
use super::open::Wish;
use super::order::Wanted;
use super::service::Service;
use crate::cli::{Failure, Interrupt, UsageError};
use crate::source::zero_chunks;

/// How long the other end may take to say a thing that it knows.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a successor may look at what it was sent.
const PATIENCE_BEFORE_GO: Duration = Duration::from_secs(60);
/// How long whoever is about to end, or to take the place, may take for it, and how often it is looked whether it has.
pub(super) const PATIENCE_WITH_OTHERS: Duration = Duration::from_secs(30);
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(20);
const GO: &str = "go";

/// Who takes the agent's place: it sees the end of this process as that of the connection.
#[derive(Debug)]
pub(crate) struct Heir {
    _stream: UnixStream,
    _sockets: Vec<Arc<Listener>>,
}

/// The agent whose place is to be taken: it serves, and waits for a word.
#[derive(Debug)]
pub(super) struct Predecessor {
    stream: UnixStream,
    pid: u32,
}

/// Reads of the repository what opening the session is going to read: while another agent serves, nothing is lost where
/// that cannot be had.
pub(super) fn check_repository(wish: &Wish<'_>, disk: &DiskEntry) -> anyhow::Result<()> {
    let map = wish.repository()?.disk_map(disk)?;
    let copies = wish.fallbacks;
    let read = zero_chunks(&map);
    let read = read.or_else(|error| copies.or_else(error, |copy| zero_chunks(&map.through(copy))));
    read.context("cannot read the map of the snapshot's disk")?;
    Ok(())
}

/// Has the place of the agent that serves these disks, or `None` where nobody serves them. One that is about to end, or to give its
/// place to somebody else, is waited for, and whoever has it then is asked.
///
/// # Errors
/// Where it is not given, or nobody is done in time.
pub(super) fn place(
    wanted: &[Wanted],
    listen: &[nbd_server::ListenAddress],
    options: &ServerOptions,
    engine: Engine,
    interrupt: &Interrupt,
) -> anyhow::Result<Option<(Predecessor, Vec<Listener>)>> {
    let begun = Instant::now();
    loop {
        if let Some(place) = ask(wanted, listen, options)? {
            return Ok(Some(place));
        }
        match check_parked(wanted, engine, interrupt) {
            Err(error) if begun.elapsed() >= PATIENCE_WITH_OTHERS => return Err(error),
            Err(_) => {}
            Ok(()) => return Ok(None),
        }
        interrupt.check()?;
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Fails where somebody still has the lock of one of these disks. It is let go at once: whoever opens the session takes it.
fn check_parked(wanted: &[Wanted], engine: Engine, interrupt: &Interrupt) -> anyhow::Result<()> {
    for Wanted { target, state, .. } in wanted {
        if target.exists() && state.record()?.is_some() {
            super::rest::lock_target_within(state, target, engine, Duration::ZERO, interrupt)?;
        }
    }
    Ok(())
}

/// Asks the agent that serves these disks for its place; `None` where there is none, or it is about to end.
///
/// # Errors
/// Where it does not give it, and goes on; where it serves elsewhere than was asked for.
fn ask(
    wanted: &[Wanted],
    listen: &[nbd_server::ListenAddress],
    options: &ServerOptions,
) -> anyhow::Result<Option<(Predecessor, Vec<Listener>)>> {
    let mut sessions = Vec::new();
    let mut stream = None;
    for wanted in wanted {
        sessions.extend(wanted.state.record()?.map(|record| record.session));
        if stream.is_none() {
            stream = control::connect(wanted.state.path())?;
        }
    }
    let Some(stream) = stream else { return Ok(None) };
    let dir = wanted.first().map_or(Path::new(""), |wanted| wanted.state.path());
    let no_answer = || format!("the agent of the session in {} does not give its place", dir.display());
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = serde_json::to_string(&Request::TakeOver { sessions })?;
    let sent = handover::send_line(&stream, &request, &[]);
    let (line, sockets) = match sent.and_then(|()| handover::receive_line(&stream)) {
        // It is about to end, or just did.
        Ok((line, _)) if line.is_empty() => return Ok(None),
        Err(error) if control::is_gone(&error) => return Ok(None),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            return Err(control::silent(dir, error));
        }
        answered => answered.with_context(no_answer)?,
    };
    let reply: Reply = serde_json::from_str(&line).with_context(no_answer)?;
    let given: TakeOver = match reply {
        Reply::Done { result } => serde_json::from_value(result).with_context(no_answer)?,
        Reply::Failed { message, advice: Some(advice) } => return Err(Failure::new(message, advice).into()),
        Reply::Failed { message, advice: None } => anyhow::bail!(message),
        Reply::Working | Reply::Progress { .. } => anyhow::bail!("{}: it is not understood", no_answer()),
    };
    let listeners = handover::adopt(sockets, &given.sockets, &options.access)?;
    handover::check_addresses(listen, &listeners).map_err(|why| {
        UsageError::new(format!("{why}: give the same --listen; its clients know no other address"))
    })?;
    Ok(Some((Predecessor { stream, pid: given.pid }, listeners)))
}

impl Predecessor {
    /// Its process id.
    pub(super) const fn pid(&self) -> u32 {
        self.pid
    }

    /// Has it end, and waits for that.
    ///
    /// # Errors
    /// Where it was gone before it heard of it.
    pub(super) fn end(self) -> anyhow::Result<()> {
        handover::send_line(&self.stream, GO, &[]).with_context(|| {
            format!("the agent with the process id {} was gone before its place was taken", self.pid)
        })?;
        handover::wait_for_end(&self.stream);
        Ok(())
    }
}

/// Answers who wants to take the agent's place, on a thread of its own: it ends with that conversation, or the process.
pub(super) fn answer(stream: UnixStream, service: Arc<Service>, sessions: Vec<String>) {
    let answer = move || {
        if let Err(error) = converse(stream, &service, &sessions) {
            tracing::warn!(error = format_args!("{error:#}"), "nobody took this agent's place: it goes on");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("take-over".into()).spawn(answer) {
        tracing::warn!(%error, "a successor cannot be answered");
    }
}

fn converse(stream: UnixStream, service: &Arc<Service>, sessions: &[String]) -> anyhow::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let turn = service.succession.try_lock();
    if turn.is_none() || service.is_succeeded() || service.check_ending().is_err() {
        // A successor that hears nothing waits for who comes after us.
        return Ok(());
    }
    let sockets = match look(service, sessions) {
        Ok(sockets) => sockets,
        Err(error) => {
            let (message, advice) = crate::cli::told(&error);
            send(&stream, &Reply::Failed { message, advice }, &[])?;
            return Err(error);
        }
    };
    // One that is being saved is not, and the machine of one that is being moved goes elsewhere.
    let open = service.disks().iter().filter(|disk| disk.handed_over().is_none());
    let saving = open.map(super::service::ServedDisk::begin_saving);
    let saving = match saving.collect::<anyhow::Result<Vec<_>>>() {
        Ok(saving) => saving,
        Err(error) => {
            let (message, advice) = crate::cli::told(&error);
            send(&stream, &Reply::Failed { message, advice }, &[])?;
            return Err(error);
        }
    };
    let given = TakeOver { pid: std::process::id(), sockets: handover::describe(&sockets) };
    send(&stream, &Reply::Done { result: serde_json::to_value(given)? }, &sockets)?;
    stream.set_read_timeout(Some(PATIENCE_BEFORE_GO))?;
    let (line, _) = handover::receive_line(&stream).context("the successor said nothing")?;
    anyhow::ensure!(line == GO, "the successor left");
    drop(saving);
    sockets.iter().for_each(|socket| socket.leave_file());
    service.succeeded_by(Heir { _stream: stream, _sockets: sockets });
    Ok(())
}

/// Whether this agent's place may be taken for these sessions; then the sockets that its clients come to.
fn look(service: &Service, sessions: &[String]) -> anyhow::Result<Vec<Arc<Listener>>> {
    // What a machine was moved onto needs nobody any more, and may be named or not.
    let (over, open): (Vec<_>, Vec<_>) =
        service.disks().iter().partition(|disk| disk.handed_over().is_some());
    let is_over = |session: &str| over.iter().any(|disk| disk.record.session == session);
    let mut ours: Vec<&str> = open.iter().map(|disk| disk.record.session.as_str()).collect();
    let mut theirs: Vec<&str> =
        sessions.iter().map(String::as_str).filter(|session| !is_over(session)).collect();
    ours.sort_unstable();
    theirs.sort_unstable();
    if ours != theirs {
        let targets = open.iter().map(|disk| disk.record.target.display().to_string());
        return Err(Failure::new(
            format!(
                "the agent with the process id {} serves other disks than are to be taken over",
                std::process::id()
            ),
            format!("name all of its targets, and no others: {}", targets.collect::<Vec<_>>().join(", ")),
        )
        .into());
    }
    if !service.may_be_succeeded {
        return Err(Failure::new(
            "this agent is `lifeboot boot`, and QEMU is its child: nobody can take its place",
            "end the machine, or wait until it was moved onto its disks",
        )
        .into());
    }
    let sockets = service.listeners.iter().map(Weak::upgrade).collect::<Option<Vec<_>>>();
    sockets
        .ok_or_else(|| Failure::new("the agent is ending", "run the same command when it has ended").into())
}

fn send(stream: &UnixStream, reply: &Reply, sockets: &[Arc<Listener>]) -> anyhow::Result<()> {
    let line = serde_json::to_string(reply).map_err(io::Error::other)?;
    handover::send_line(stream, &line, sockets).context("the successor went away")
}
