//! How a run ends: its outcome, what a failure says, and the exit code.

use std::error::Error;
use std::fmt;
use std::io;
use std::process::ExitCode;

use block::ErrorKind;

use super::Interrupted;
use crate::output::{Output, StdoutClosed};

/// How a verb ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is done: exit code 0.
    Done,
    /// It is done, but something is damaged, and was named on stderr: exit code 3.
    Damaged,
}

impl Outcome {
    /// This, for work that is done, where `told` is how the telling of it on stdout went. A reader who has gone away changes
    /// nothing about it, damage least of all.
    ///
    /// # Errors
    /// Where stdout cannot be written: a [`Failure`] that says that it was `done` all the same, and what to do.
    pub(crate) fn once_told(
        self,
        told: anyhow::Result<()>,
        done: impl fmt::Display,
        advice: impl fmt::Display,
    ) -> anyhow::Result<Self> {
        match told {
            Ok(()) => Ok(self),
            Err(error) if is_closed_pipe(&error) => Ok(self),
            Err(error) => {
                let what = format!("{done} all the same; only the report of it is lost");
                Err(Failure::new(what, advice).because(error).into())
            }
        }
    }
}

const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 2;
const EXIT_DAMAGED: u8 = 3;
/// A shell reports a program that a signal ended as 128 and the signal's number.
const EXIT_SIGNAL_BASE: u8 = 128;

/// A failure that knows what to do about it.
#[derive(Debug)]
pub struct Failure {
    what: String,
    advice: String,
    source: Option<anyhow::Error>,
}

impl Failure {
    /// `what` failed, on what; `advice` says what to do.
    pub fn new(what: impl fmt::Display, advice: impl fmt::Display) -> Self {
        Self { what: what.to_string(), advice: advice.to_string(), source: None }
    }

    /// The same, because of `source`.
    #[must_use]
    pub fn because(mut self, source: impl Into<anyhow::Error>) -> Self {
        self.source = Some(source.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

/// The arguments make no sense together, or one is missing: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct UsageError {
    what: String,
}

impl UsageError {
    /// `what` is wrong with the arguments.
    pub fn new(what: impl fmt::Display) -> Self {
        Self { what: what.to_string() }
    }
}

/// Says how the run ended, and gives its exit code.
pub(super) fn conclude(output: &Output, result: anyhow::Result<Outcome>) -> ExitCode {
    let error = match result {
        Ok(Outcome::Done) => return ExitCode::SUCCESS,
        Ok(Outcome::Damaged) => return ExitCode::from(EXIT_DAMAGED),
        Err(error) => error,
    };
    if is_closed_pipe(&error) {
        // The reader of our output has seen enough: `lifeboot snapshots | head -1`.
        return ExitCode::SUCCESS;
    }
    let code = exit_code(&error);
    output.error(&message(&error), advice(&error).as_deref(), code);
    ExitCode::from(code)
}

/// What failed, with its causes, and what to do: for whoever is told by other means than our stderr.
pub(crate) fn told(error: &anyhow::Error) -> (String, Option<String>) {
    (message(error), advice(error))
}

fn exit_code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(interrupted) = cause.downcast_ref::<Interrupted>() {
            return EXIT_SIGNAL_BASE.saturating_add(interrupted.signal_number());
        }
        if cause.is::<UsageError>() {
            return EXIT_USAGE;
        }
    }
    // What the repository says of a name that was typed. As the cause of something else it may be about a file.
    match error.chain().next().and_then(|error| error.downcast_ref::<repository::Error>()) {
        Some(error) if error.kind() == repository::ErrorKind::InvalidInput => EXIT_USAGE,
        _ => EXIT_FAILED,
    }
}

/// Whether stdout was closed by its reader. Pipes of other kinds never end up in an [`StdoutClosed`].
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<StdoutClosed>())
}

/// The failure and its causes in one line. A cause that its effect has already told is not repeated.
fn message(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if message.ends_with(&text) {
            continue;
        }
        if !message.is_empty() {
            message.push_str(": ");
        }
        message.push_str(&text);
    }
    message
}

/// What to do where a file system is read-only.
pub(crate) const READ_ONLY_ADVICE: &str = "the kernel makes a file system read-only when its storage fails (`dmesg` tells): look after \
     that, mount it for writing, and try again; what only reads, like `lifeboot save` of a session, works meanwhile";

/// Whether something could not be written because its file system is read-only.
fn is_of_read_only_file_system(error: &anyhow::Error) -> bool {
    // A failure of a device has its cause in an `Arc`, to be cloned.
    type Shared = std::sync::Arc<dyn Error + Send + Sync>;
    error.chain().any(|cause| {
        let shared = cause.downcast_ref::<Shared>().and_then(|shared| shared.downcast_ref());
        let of_system = cause.downcast_ref::<io::Error>().or(shared);
        of_system.is_some_and(|cause| cause.kind() == io::ErrorKind::ReadOnlyFilesystem)
    })
}

fn advice(error: &anyhow::Error) -> Option<String> {
    let is_read_only = is_of_read_only_file_system(error);
    error.chain().find_map(|cause| {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return Some(failure.advice.clone());
        }
        // The repository's errors carry their advice in their own words.
        let kind = if let Some(error) = cause.downcast_ref::<block::Error>() {
            error.kind()
        } else {
            block::Error::io("", io::Error::from(cause.downcast_ref::<io::Error>()?.kind())).kind()
        };
        match kind {
            _ if is_read_only => Some(READ_ONLY_ADVICE.to_owned()),
            ErrorKind::NoSpace => Some("free some space there, then try again".to_owned()),
            ErrorKind::NotPermitted => {
                Some("check the owner and the permissions, or run it as root".to_owned())
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::*;

    #[test]
    fn a_cause_that_was_told_already_is_not_repeated() {
        let error = anyhow!("permission denied")
            .context("cannot open x: permission denied")
            .context("capture failed");
        assert_eq!(message(&error), "capture failed: cannot open x: permission denied");
    }

    #[test]
    fn the_advice_of_an_inner_failure_is_found() {
        let failure = Failure::new("disk full", "make room").because(anyhow!("ENOSPC"));
        let error = Err::<(), _>(failure).context("outer").unwrap_err();
        assert_eq!(advice(&error).as_deref(), Some("make room"));
        assert_eq!(message(&error), "outer: disk full: ENOSPC");
        assert_eq!(exit_code(&error), EXIT_FAILED);
    }

    #[test]
    fn whoever_cannot_write_to_a_read_only_file_system_is_not_sent_to_look_at_permissions() {
        let read_only = || io::Error::from(io::ErrorKind::ReadOnlyFilesystem);
        for error in [anyhow::Error::from(read_only()), block::Error::io("open x", read_only()).into()] {
            assert_eq!(advice(&error.context("cannot write x")).as_deref(), Some(READ_ONLY_ADVICE));
        }
        let denied = anyhow::Error::from(io::Error::from(io::ErrorKind::PermissionDenied));
        assert!(advice(&denied).unwrap().contains("the owner"));
    }

    #[test]
    fn work_that_is_done_stays_done_whatever_becomes_of_its_report() {
        let closed = || Err(StdoutClosed.into());
        assert_eq!(Outcome::Damaged.once_told(closed(), "it was made", "").unwrap(), Outcome::Damaged);
        let full = Err(anyhow!("no space left on device"));
        let error = Outcome::Done.once_told(full, "it was made", "look at it").unwrap_err();
        assert_eq!(
            message(&error),
            "it was made all the same; only the report of it is lost: no space left on device"
        );
        assert_eq!(advice(&error).as_deref(), Some("look at it"));
        assert_eq!(exit_code(&error), EXIT_FAILED);
    }

    #[test]
    fn usage_and_interrupts_have_their_own_exit_codes() {
        assert_eq!(exit_code(&UsageError::new("x").into()), EXIT_USAGE);
        let typed = || "web01".parse::<repository::SnapshotSpec>().unwrap_err();
        assert_eq!(exit_code(&typed().into()), EXIT_USAGE);
        assert_eq!(
            exit_code(&Failure::new("the session is damaged", "").because(typed()).into()),
            EXIT_FAILED
        );
        assert_eq!(exit_code(&anyhow::Error::from(Interrupted::by(2)).context("while reading")), 130);
    }
}
