//! The live-restore engine: serves a disk at once from its backup, and copies it home behind the guest.
//!
//! It is generic over its storage (any [`block::BlockDevice`]), its source ([`ChunkSource`]) and its
//! clock, so that the very same code runs on files in production and on the simulated disk in the crash tests.

mod bits;
mod clock;
mod commit;
#[cfg(test)]
mod crash;
mod device;
mod error;
mod extents;
mod fetch;
mod fill;
mod holds;
mod join;
mod journal;
mod limit;
mod live_file;
mod map;
mod mistakes;
mod peek;
mod plan;
mod read;
mod session;
mod source;
mod stats;
mod write;
mod zero;

pub use clock::{Clock, TokioClock};
pub use device::LiveDevice;
pub use error::{Error, ErrorKind, Result};
pub use journal::{BlockRun, JournalLayout, SessionId};
pub use limit::RateLimit;
pub use live_file::{BootId, LiveWords};
pub use peek::{Peek, peek};
pub use session::{Identity, Resumed, Session, SessionOptions, SessionParts};
pub use source::{
    ChunkData, ChunkSource, DiskLayout, FetchFuture, RunData, SourceError, SourceErrorKind, Urgency,
};
pub use stats::{Phase, StatsSnapshot};
