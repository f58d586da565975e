//! `lifeboot status`: how far a live-restore is, asked from another terminal.

mod document;
mod remote;
mod report;
mod watch;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nbd_server::client::NbdUri;

use crate::cli::{Context, Failure, Outcome, Verb};
use crate::live_restore::{self, SessionRecord, StateDir};
use crate::output::{Align, Table, human_count, human_duration, human_size};

pub use document::{DamagedRange, Misses, Phase, Status};
pub use report::Report;

/// How long a server is given to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Show how far a live-restore is
///
/// Asks the agent that serves TARGET; where none runs, says what is known of its session. With --listen
/// the export is asked over NBD, from wherever it can be reached.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot status /var/lib/vm/web01.raw
  lifeboot status --watch /var/lib/vm/web01.raw
  lifeboot status --listen tcp:10.0.0.5:10809
  lifeboot status --listen 'nbds://host/?tls-certificates=/etc/pki/nbd'")]
pub struct Args {
    /// The target of the live-restore
    #[arg(value_name = "TARGET", required_unless_present = "listen", conflicts_with = "listen")]
    target: Option<PathBuf>,

    /// Where it is served: unix:PATH, tcp:HOST:PORT, or an NBD URI: nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH. With
    /// nbds: or nbds+unix: TLS is used, or nothing is; tls-certificates=DIR names the directory of ca-cert.pem and, where the
    /// server wants one, of client-cert.pem and client-key.pem; tls-hostname=NAME what its certificate must be for;
    /// tls-psk-file=FILE and tls-username=NAME a pre-shared key
    #[arg(short, long, value_name = "ADDRESS")]
    listen: Option<NbdUri>,

    /// The export to ask about, with --listen; the only or first one if neither this nor a URI names one
    #[arg(long, value_name = "NAME", requires = "listen")]
    export: Option<String>,

    /// Show it again each second, with each disk as a strip of what is home, until Ctrl-C: all disks of the agent,
    /// and on when it has ended or comes back. Not on a terminal a line for each disk; with --json a document on a line
    #[arg(short, long, conflicts_with = "listen")]
    watch: bool,

    /// Where sessions are kept, if not beside the target
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        match (&self.listen, &self.target) {
            (Some(uri), _) => {
                let export = self.export.clone().unwrap_or_else(|| uri.export.clone());
                show_remote(context, &NbdUri { export, ..uri.clone() })
            }
            (None, Some(target)) if self.watch => watch::watch(context, target, self.state.as_deref()),
            (None, Some(target)) => show_session(context, target, self.state.as_deref()),
            (None, None) => unreachable!("clap requires one of them"),
        }
    }
}

/// The session of a target.
///
/// # Errors
/// Where none is known, or its record cannot be read.
pub(crate) fn session_of(target: &Path, state: Option<&Path>) -> anyhow::Result<(StateDir, SessionRecord)> {
    let state = StateDir::of(target, state)?;
    let Some(record) = state.record()? else {
        return Err(Failure::new(
            format!("no live-restore to {} is known", target.display()),
            format!(
                "its session would be kept in {}; --state names another place, or the session's own directory in it",
                state.path().display()
            ),
        )
        .into());
    };
    Ok((state, record))
}

fn show_session(context: &Context, target: &Path, state: Option<&Path>) -> anyhow::Result<Outcome> {
    let (state, record) = session_of(target, state)?;
    let asked = live_restore::ask_status(state.path())
        .with_context(|| format!("the agent that serves {} does not answer", target.display()))?;
    let status = match asked {
        Some(status) => status,
        None => at_rest(&state, &record)?,
    };
    let output = context.output();
    output.document(&status)?;
    output.table(&table(&status))?;
    Ok(status.conclude(output))
}

/// What is known of a session that no agent serves.
fn at_rest(state: &StateDir, record: &SessionRecord) -> anyhow::Result<Status> {
    let mut status = live_restore::stopped_status(state, record)?;
    if status.phase != Phase::Complete {
        let kept = live_restore::kept_damage(state, record);
        (status.damaged_bytes, status.damaged) = (kept.damaged_bytes, kept.damaged);
    }
    Ok(status)
}

/// What a session is doing, for people.
fn state_of(status: &Status) -> &'static str {
    match status.phase {
        _ if status.moved && status.waiting.is_some() => {
            "handed over: a running machine was moved onto the session's target, which does not stand here"
        }
        _ if status.moved => {
            "handed over: a running machine was moved onto the target, which is a disk of its own"
        }
        _ if status.handed_over && status.pid.is_none() && status.waiting.is_some() => {
            "complete: a running machine was moved onto the session's target, or was about to be when the agent ended; that target does \
             not stand here"
        }
        _ if status.handed_over && status.pid.is_none() => {
            "complete: a running machine was moved onto the target, or was about to be when the agent ended; the same live-restore \
             command with --qmp asks its QEMU, and goes on"
        }
        _ if status.handed_over => "complete, and being handed over to the machine",
        Phase::Running if status.is_settled() => "running: all is home but what is damaged",
        Phase::Running if status.is_without_background() => {
            "running: nothing is copied in the background, only what guests ask for comes home"
        }
        Phase::Running => "running: copying home",
        Phase::Complete if status.pid.is_some() => "complete, and still served",
        Phase::Complete if status.waiting.is_some() => "was complete, and its target is not what it was",
        Phase::Complete => "complete",
        Phase::Stopped if status.waiting.is_some() => {
            "stopped: the same live-restore command goes on once this is mended"
        }
        Phase::Stopped if status.is_settled() => {
            "stopped: all is home but what is damaged; the same live-restore command asks for that again"
        }
        Phase::Stopped => "stopped: the same live-restore command goes on",
        Phase::Poisoned if status.pid.is_none() && status.waiting.is_some() => {
            "failed: a sync failed; the same live-restore command goes on once this is mended"
        }
        Phase::Poisoned => "failed: a sync failed; run the same command again",
    }
}

fn table(status: &Status) -> Table {
    let mut table = Table::new(&[("LIVE-RESTORE", Align::Left), ("", Align::Left)]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("state", state_of(status).to_owned());
    row("snapshot", format!("{}/{}", status.snapshot, status.disk));
    row("target", status.target.display().to_string());
    if let (Some(uri), Some(pid)) = (&status.uri, status.pid) {
        row("served at", uri.clone());
        row("agent", format!("process {pid}"));
    }
    row(
        "home",
        format!(
            "{:.1} %, {} of {}",
            status.percent(),
            human_size(status.home_bytes),
            human_size(status.size)
        ),
    );
    row("written by the guest", human_size(status.guest_bytes));
    if status.pid.is_some() {
        if status.is_coming_home() && status.waiting.is_none() {
            row("rate", format!("{}/s", human_size(status.bytes_per_second)));
        }
        if let Some(limit) = status.limit.filter(|limit| *limit > 0) {
            row("limit", format!("{}/s", human_size(limit)));
        }
        if let Some(seconds) = status.seconds_left {
            row("time left", human_duration(Duration::from_secs(seconds)));
        }
        row(
            "fetched",
            format!(
                "{}, {} decoded",
                human_size(status.fetched_bytes),
                human_size(status.fetched_plain_bytes)
            ),
        );
        let milliseconds = |us: u64| us as f64 / 1000.0;
        row(
            "misses",
            format!(
                "{}, {} waiting; p50 {:.1} ms, p99 {:.1} ms",
                status.misses.count,
                status.misses.waiting,
                milliseconds(status.misses.p50_us),
                milliseconds(status.misses.p99_us)
            ),
        );
    }
    for used in &status.fallbacks {
        let chunks = human_count(used.chunks, "chunk", "chunks");
        row(
            "from a copy",
            format!("{chunks}, {}, from {}", human_size(used.bytes), used.repository.display()),
        );
    }
    if let Some(why) = &status.waiting {
        let name = match status.pid {
            Some(_) => "waiting",
            None if status.handed_over => "the target",
            None => "in the way",
        };
        row(name, why.clone());
    }
    if let Some(loss) = &status.loss {
        row("may be lost", loss.clone());
    }
    if status.is_damaged() {
        let ranges = human_count(status.damaged.len() as u64, "range", "ranges");
        row("damaged", format!("{} in {ranges}, named below", human_size(status.damaged_bytes)));
    }
    table
}

fn show_remote(context: &Context, uri: &NbdUri) -> anyhow::Result<Outcome> {
    let status = remote::ask(uri, PATIENCE)?;
    let output = context.output();
    output.document(&status)?;
    // Only a live-restore tells what its guest wrote; another server's export has no session.
    let heading = if status.guest_bytes.is_some() { "LIVE-RESTORE" } else { "EXPORT" };
    let mut table = Table::new(&[(heading, Align::Left), ("", Align::Left)]);
    table.row(["export".to_owned(), status.export.clone()]);
    let percent = document::percent(status.home_bytes, status.size);
    table.row([
        "home".to_owned(),
        format!("{percent:.1} %, {} of {}", human_size(status.home_bytes), human_size(status.size)),
    ]);
    if let Some(bytes) = status.guest_bytes {
        table.row(["written by the guest".to_owned(), human_size(bytes)]);
    }
    output.table(&table)?;
    Ok(Outcome::Done)
}
