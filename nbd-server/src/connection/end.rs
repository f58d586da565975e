//! How connections end.

use std::{fmt, io};

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    Disconnected,
    PeerClosed,
    NotARequest,
    PayloadTooLong,
    Stalled,
    Stopping,
    Socket(io::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disconnected => f.write_str("the client said goodbye"),
            Self::PeerClosed => f.write_str("the client closed the connection"),
            Self::NotARequest => f.write_str("the client sent something that is not a request"),
            Self::PayloadTooLong => f.write_str("the client announced a payload that is too long"),
            Self::Stalled => f.write_str("the client took no replies, or sent no payload, for too long"),
            Self::Stopping => f.write_str("the server is ending"),
            Self::Socket(error) => write!(f, "the socket failed: {error}"),
        }
    }
}
