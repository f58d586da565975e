//! Serves any [`block::BlockDevice`] over NBD, and has never heard of a backup.
//!
//! A [`Server`] is bound to addresses, then run on a number of shards: threads that each run one event
//! loop on which a connection lives with its socket and its device operations, without a hop to
//! another thread. [`ServerHandle`] ends it: nothing more is accepted, what is in flight is finished, and
//! every thread is joined.
//!
//! [`client`] is the other side, for whoever asks a server a few things.
//!
//! What a peer can make the server do is bounded by [`Limits`]; what the bytes mean is the `proto` crate's.

mod accept;
mod access;
mod address;
pub mod args;
mod budget;
pub mod client;
mod connection;
mod directory;
mod error;
mod export;
pub mod handover;
pub mod hangup;
mod listen;
mod log_limit;
pub mod log_queue;
mod options;
mod server;
mod shard;
mod slots;
mod socket;
pub mod stdio;
mod tls;

pub use access::{Access, Network};
pub use address::ListenAddress;
pub use error::{Error, ErrorKind, Result};
pub use export::{Export, ExportNames};
pub use listen::{Listener, StdListener, is_activated};
pub use options::{LateRequests, Limits, ServerOptions};
pub use server::{Monitor, Server, ServerHandle, Stats};
pub use shard::{ShardContext, ShardTask};
pub use tls::{Credentials, TlsArgs, TlsMode, TlsServer};
