//! The asking end, for our own verbs.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::request::Afterwards;
use super::{Reply, Request, short_path};
use crate::cli::{Failure, Interrupt};
use crate::status::Status;

/// How long the agent may be silent: it says at least every second that it is at work.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to say what came of a request that is not wanted any more.
const CANCEL_PATIENCE: Duration = Duration::from_secs(5);
/// A longer line is refused.
const MAX_REPLY_BYTES: u64 = 4 << 20;

/// Asks the agent that serves the session in `dir`; `None` where no agent runs, or it ended while it was asked.
///
/// # Errors
/// Where an agent is there and does not answer; a [`Failure`] where it could not do what it was asked.
pub fn ask<T: DeserializeOwned>(dir: &Path, request: &Request) -> anyhow::Result<Option<T>> {
    ask_telling(dir, request, |_| Ok(()))
}

/// How far the session in `dir` is, where an agent serves it.
///
/// # Errors
/// As [`ask`].
pub fn ask_status(dir: &Path) -> anyhow::Result<Option<Status>> {
    ask(dir, &Request::Status)
}

/// As [`ask`]; `tell` is given what the agent says of its progress, and is called with nothing about once a second at
/// least. Where it fails, this does too; the agent goes on with what it was asked.
///
/// # Errors
/// As [`ask`], and what `tell` says.
pub fn ask_telling<T: DeserializeOwned>(
    dir: &Path,
    request: &Request,
    tell: impl FnMut(Option<Value>) -> anyhow::Result<()>,
) -> anyhow::Result<Option<T>> {
    converse(dir, request, None, tell)
}

/// As [`ask_telling`]; once `interrupt` is raised the agent is told that it is not wanted any more, and still asked what came of it: it
/// may have been done by then.
///
/// # Errors
/// As [`ask_telling`], and [`crate::cli::Interrupted`] where it was given up, or the agent does not say in time.
pub(crate) fn ask_unless_interrupted<T: DeserializeOwned>(
    dir: &Path,
    request: &Request,
    interrupt: &Interrupt,
    tell: impl FnMut(Option<Value>) -> anyhow::Result<()>,
) -> anyhow::Result<Option<T>> {
    converse(dir, request, Some(interrupt), tell)
}

fn converse<T: DeserializeOwned>(
    dir: &Path,
    request: &Request,
    interrupt: Option<&Interrupt>,
    mut tell: impl FnMut(Option<Value>) -> anyhow::Result<()>,
) -> anyhow::Result<Option<T>> {
    let Some(stream) = connect(dir)? else { return Ok(None) };
    let no_answer = |error| silent(dir, error);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    if let Err(error) = say(&stream, request)
        && !is_gone(&error)
    {
        return Err(no_answer(error));
    }
    let mut lines = BufReader::new(&stream);
    let mut cancelled = None;
    loop {
        if let Some(interrupted) = interrupt.and_then(|interrupt| interrupt.check().err()) {
            let (since, _) = cancelled.get_or_insert_with(|| {
                // Where that cannot be said it has ended, and its last line says how.
                let _ = say(&stream, &Afterwards::Cancel);
                (Instant::now(), interrupted)
            });
            if since.elapsed() >= CANCEL_PATIENCE {
                return Err(anyhow::Error::new(interrupted).context(format!(
                    "the agent of the session in {} was told to give it up, and has not said whether it did",
                    dir.display()
                )));
            }
        }
        let mut line = Vec::new();
        match (&mut lines).take(MAX_REPLY_BYTES).read_until(b'\n', &mut line) {
            Ok(_) => {}
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(no_answer(error)),
        }
        if line.is_empty() {
            // It ended while we asked.
            return Ok(None);
        }
        let reply: Reply = serde_json::from_slice(&line)
            .with_context(|| format!("the agent of the session in {} is not understood", dir.display()))?;
        match reply {
            Reply::Working => tell(None)?,
            Reply::Progress { progress } => tell(Some(progress))?,
            Reply::Done { result } => return Ok(Some(serde_json::from_value(result)?)),
            Reply::Failed { message, advice } => {
                return Err(match (cancelled, advice) {
                    (Some((_, interrupted)), _) => interrupted.into(),
                    (None, Some(advice)) => Failure::new(message, advice).into(),
                    (None, None) => anyhow!(message),
                });
            }
        }
    }
}

/// Sends a line.
fn say(mut stream: &UnixStream, what: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(what)?;
    text.push(b'\n');
    stream.write_all(&text)
}

/// That an agent is there, and says nothing.
pub(in crate::live_restore) fn silent(dir: &Path, error: io::Error) -> anyhow::Error {
    Failure::new(
        format!("the agent of the session in {} does not answer", dir.display()),
        "it may be stopped (SIGSTOP, a debugger), or its host overloaded; nothing was changed: ask again when it goes on",
    )
    .because(error)
    .into()
}

/// Connects to the agent that serves the session in `dir`, if there is one.
pub(in crate::live_restore) fn connect(dir: &Path) -> anyhow::Result<Option<UnixStream>> {
    let connected = short_path(dir).and_then(|(_dir, short)| UnixStream::connect(short));
    match connected {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => {
            Err(error).with_context(|| format!("cannot ask the agent of the session in {}", dir.display()))
        }
    }
}

/// Whether an error says that no agent is there, or is there any more.
pub(in crate::live_restore) fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused | NotADirectory | BrokenPipe | ConnectionReset)
}
