//! What a server is told when it is made, and what its peers may cost.

use std::time::Duration;

use proto::wire::MAX_PAYLOAD_BYTES;

use crate::{Access, TlsServer};

/// What peers may cost. Every limit holds from the start; there is no way to have none.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How long a whole handshake may take, from the connection to the start of transmission.
    pub handshake_timeout: Duration,
    /// How many connections may be open. One more is closed at once.
    pub connections: usize,
    /// How many of them may be in their handshake. One more takes the place of the oldest that has had a second, or is
    /// closed at once.
    pub half_open: usize,
    /// The longest READ or WRITE in bytes; no more than the protocol's portable 32 MiB.
    pub request_bytes: u32,
    /// How many requests of one connection may be in flight.
    pub requests_in_flight: usize,
    /// The memory in bytes for the data of all requests in flight on all connections. One connection has at most a
    /// quarter of it, or one request.
    pub memory_bytes: u64,
    /// How long a peer that takes (almost) none of its replies, or sends none of a payload that it announced, may
    /// hold memory that another one waits for.
    pub patience_when_wanted: Duration,
    /// How long such a peer is kept where nobody waits for its memory. Its client may be a virtual machine whose process is
    /// stopped, and which goes on as if nothing had been, so this is long.
    pub stall_timeout: Duration,
    /// How long a shutdown waits for what is in flight before it closes the connections.
    pub shutdown_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            connections: 256,
            half_open: 64,
            request_bytes: MAX_PAYLOAD_BYTES,
            requests_in_flight: 128,
            memory_bytes: 256 << 20,
            patience_when_wanted: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(3600),
            shutdown_grace: Duration::from_secs(5),
        }
    }
}

/// What becomes of requests that come when the server is ending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LateRequests {
    /// They fail with ESHUTDOWN, so that a client knows at once.
    #[default]
    Refuse,
    /// They are left unanswered, and so is what the device gave up because it is ending: the connection just closes.
    /// A client that reconnects (QEMU with `reconnect-delay`) sends them again, and its guest sees no error.
    Leave,
}

/// How a server serves.
#[derive(Clone, Debug, Default)]
pub struct ServerOptions {
    /// What peers may cost.
    pub limits: Limits,
    /// Who may connect, and over what.
    pub access: Access,
    /// What becomes of requests that come when the server is ending.
    pub late_requests: LateRequests,
    /// TLS, on or required; off where there is none.
    pub tls: Option<TlsServer>,
}
