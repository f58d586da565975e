//! Where snapshots are kept: chunks, packs, an index, disk maps and manifests on a directory. docs/format.md has every byte.
//!
//! A capture hashes chunks of a disk, stores those that the repository does not have, and commits a manifest:
//! [`Repository::begin_capture`], [`CaptureWriter::begin_disk`], [`DiskWriter`] with a [`ChunkEncoder`] per thread, [`CaptureWriter::commit`].
//! A restore resolves a name, walks the disk's map, plans its reads and decodes: [`Repository::resolve`], [`Repository::disk_map`],
//! [`Repository::locate_all`], [`plan_fetches`], [`ChunkReader`], a [`ChunkDecoder`] per thread.
//!
//! Everything is synchronous, `Send` and `Sync`. Nothing here knows of NBD, of devices, or of a clock but for naming things.
//!
//! # Who may do what beside whom
//! | | capture | restore, live-restore, serve | verify | merge of the index (ends a capture) |
//! |---|---|---|---|---|
//! | **capture** | yes: each writes files of its own; what both find new is stored twice | yes | yes | yes |
//! | **restore, live-restore, serve** | yes: manifests are complete when they are seen | yes | yes | yes: open segments stay readable, others are listed again |
//! | **verify** | yes: what is not named yet is not looked at | yes | yes | yes, as above |
//! | **merge** | yes | yes | yes | yes: both results are right |
//!
//! No operation takes a lock that another process waits for. Nothing removes packs or manifests; whoever brings that brings a
//! place in this table, and asks [`Repository::leases`] what live-restores need.

mod aligned;
mod capture;
mod codec;
mod config;
mod error;
mod frame;
#[doc(hidden)]
pub mod fuzzing;
mod hash;
mod header;
mod id;
mod index;
mod leases;
mod manifest;
mod map;
mod name;
mod pack;
mod reader;
mod record;
mod repository;
mod snapshots;
pub mod storage;
mod traces;
mod verify;

pub use capture::{CaptureOptions, CaptureWriter, DiskWriter, Put};
pub use codec::{ChunkDecoder, ChunkEncoder, DEFAULT_LEVEL, MAX_PLAIN_LEN, StoredChunk, Undecoded, is_zero};
pub use config::{Config, DEFAULT_CHUNK_SIZE, InitOptions};
pub use error::{Error, ErrorKind, Result};
pub use hash::chunk_ids;
pub use header::FORMAT_VERSION;
pub use id::{ChunkId, PackId};
pub use leases::{LEASE_SLACK, LEASE_SPAN, Lease, Leases};
pub use manifest::{
    Attachment, Consistency, DiskEntry, DiskStats, MAX_ATTACHMENTS, MAX_DISKS, MAX_NOTE_LEN, Manifest, Saved,
    SavedUpTo, Snapshot, SnapshotMeta,
};
pub use map::geometry::{MAX_CHUNK_SIZE, MAX_DISK_SIZE, MIN_CHUNK_SIZE};
pub use map::{DiskMap, MapEntry};
pub use name::{DiskName, GroupName, SnapshotName, SnapshotSpec, When};
pub use reader::{ChunkReader, Fetch, FetchLimits, plan_fetches};
pub use record::{Codec, KeyRef, Location, RecordKind};
pub use repository::Repository;
pub use snapshots::SnapshotList;
pub use traces::{MAX_TRACE_RUNS, TRACE_GRAIN, Trace};
pub use verify::{Damage, VerifyOptions, VerifyProgress, VerifyReport};
