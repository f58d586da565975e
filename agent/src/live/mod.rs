//! The live-restore engine: serves a disk at once from its backup, and copies it home behind the guest.
//!
//! It is generic over its storage (any [`block::BlockDevice`]), its source ([`ChunkSource`]) and its
//! clock, so that the very same code runs on files in production and on the simulated disk in the crash tests.

mod source;

pub use source::{
    ChunkData, ChunkSource, DiskLayout, FetchFuture, RunData, SourceError, SourceErrorKind, Urgency,
};
