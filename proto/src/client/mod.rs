//! The client's half: what a client asks, and what it must not believe of a server's bytes.
//!
//! A connection is a [`Handshake`] until [`Progress::Ready`]; from there a request is
//! [`crate::wire::RequestHeader::encode`]d, announced to [`Replies`], which takes apart what comes back.

mod coverage;
mod error;
mod greeting;
mod handshake;
mod replies;

pub use error::{HandshakeError, ReplyError};
pub use greeting::{Goal, Listed, Wish};
pub use handshake::{Connected, Handshake, Progress};
pub use replies::{Event, Replies};
