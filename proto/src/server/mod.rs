//! The server's half: what a server must make of a client's bytes, and the bytes of its answers.
//!
//! A connection is a [`Handshake`] until [`Step::Transmission`]; from there each
//! [`crate::wire::RequestHeader`] goes through an [`Admission`], and a [`ReplyEncoder`] makes the replies.

mod admission;
mod directory;
mod encode;
mod handshake;
mod options;
mod status;
mod tls;

pub use admission::{Admission, Command, Verdict};
pub use directory::{Directory, ExportId, Listing, Refusal};
pub use encode::{Head, ReplyEncoder};
pub use handshake::{Agreed, Ending, Handshake, Step};
pub use status::StatusBuilder;
pub use tls::TlsMode;
