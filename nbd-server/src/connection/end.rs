//! How connections end.

use std::{fmt, io};

use super::stall::Stalled;

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    Disconnected,
    PeerClosed,
    NotARequest,
    PayloadTooLong,
    Stalled(Stalled),
    Stopping,
    Socket(io::Error),
    /// What was said to be in memory could not be sent, in the middle of a reply.
    File(io::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disconnected => f.write_str("the client said goodbye"),
            Self::PeerClosed => f.write_str("the client closed the connection"),
            Self::NotARequest => f.write_str("the client sent something that is not a request"),
            Self::PayloadTooLong => f.write_str("the client announced a payload that is too long"),
            Self::Stalled(waited) => write!(f, "the client took no replies, or sent no payload, {waited}"),
            Self::Stopping => f.write_str("the server is ending"),
            Self::Socket(error) => write!(f, "the socket failed: {error}"),
            Self::File(error) => write!(f, "the disk could not be read in the middle of a reply: {error}"),
        }
    }
}
