//! Why a session could not be made, resumed, committed or parked.

use std::fmt;

/// The result of what a session does for its owner. What it does for a guest fails with [`block::Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The journal is no journal of ours.
    NotAJournal,
    /// The journal was written by a newer version.
    NewerFormat,
    /// The journal was written by an older version, whose journals are not read any more.
    OlderFormat,
    /// The journal is damaged: what it would say about the target may be too little.
    Damaged,
    /// The journal belongs to another session, snapshot or disk.
    Elsewhere,
    /// The target does not hold what the journal says.
    WrongTarget,
    /// The target or the journal's device cannot be used for this disk: size, alignment.
    Unsuitable,
    /// A sync failed: the session can no longer promise anything. It recovers when it is resumed.
    Poisoned,
    /// The target or the journal's device failed.
    Device(block::ErrorKind),
}

/// A failure of a session.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    #[source]
    source: Option<block::Error>,
}

impl Error {
    pub(super) fn new(kind: ErrorKind, context: impl fmt::Display) -> Self {
        Self { kind, context: context.to_string(), source: None }
    }

    /// What kind of failure it was.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl From<block::Error> for Error {
    fn from(source: block::Error) -> Self {
        let kind = match source.kind() {
            block::ErrorKind::Poisoned => ErrorKind::Poisoned,
            kind => ErrorKind::Device(kind),
        };
        Self { kind, context: source.to_string(), source: Some(source) }
    }
}
