//! The one error of this crate: a kind to match on, what was being done to what, and the cause.

use std::fmt;
use std::sync::Arc;

/// The result of everything here that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// TCP beyond this machine, without TLS.
    Insecure,
    /// An address that is none, or that nobody could use.
    InvalidAddress,
    /// Somebody serves there already.
    AddressInUse,
    /// The permissions forbid it.
    NotPermitted,
    /// Exports without names of their own, of the same name, or of names that the protocol cannot carry.
    InvalidExport,
    /// Certificates or keys that cannot be used.
    InvalidCredentials,
    /// A server that a client talks to refused, or is not what it must be.
    Peer,
    /// A server that a client talks to refused one request. The next one may go well.
    Refused,
    /// A thread of the server ended by a panic.
    Panicked,
    /// Anything else that the operating system reported.
    Io,
}

/// A failure of the server as a whole. What befalls one connection ends that connection, is
/// logged, and is never seen here.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    #[source]
    source: Option<Arc<std::io::Error>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, context: impl fmt::Display) -> Self {
        Self { kind, context: context.to_string(), source: None }
    }

    pub(crate) fn io(context: impl fmt::Display, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::AddrInUse => ErrorKind::AddressInUse,
            std::io::ErrorKind::PermissionDenied => ErrorKind::NotPermitted,
            _ => ErrorKind::Io,
        };
        Self { kind, context: format!("{context}: {source}"), source: Some(Arc::new(source)) }
    }

    /// What kind of failure it was.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }
}
