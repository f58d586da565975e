//! The live-restore engine: serves a disk at once from its backup, and copies it home behind the guest.
//!
//! It is generic over its storage (any [`block::BlockDevice`]), its source ([`ChunkSource`]) and its
//! clock, so that the very same code runs on files in production and on the simulated disk in the crash tests.
//!
//! # Use
//! 1. [`Session::create`], or [`Session::resume`] where the journal is one (any thread, once; the target's lock is held).
//! 2. On each shard [`Session::device`] over that shard's own handles: it is what NBD serves. Clones share everything.
//! 3. On each shard a few [`LiveDevice::fill_worker`]s; on one of them [`LiveDevice::commit_worker`].
//! 4. [`Session::stats`], [`Session::set_limit`] from anywhere, at any time.
//! 5. To leave: stop the server, [`Session::stop_workers`], let the workers end, [`LiveDevice::park`].
//!
//! # States
//! A session is *filling*, then perhaps *complete*; from either it may become *poisoned* or *parked*, and from
//! these it only comes back as a new one, resumed. A block is absent (its truth is in the backup) or home (on
//! the target), and never goes back while the session lives. Three bits say more:
//!
//! | bit | where | says |
//! |---|---|---|
//! | `V` | live file | the target holds the truth |
//! | `P` | memory, from the journal | so does stable storage, and the journal says so |
//! | `G` | live file | the guest changed it (or began to) |
//!
//! A chunk is *whole* when all of its blocks are home.
//!
//! # Orders, and why
//! - **Read**: home from the target, else from the backup. `V` is read first; what is decoded and no longer listed
//!   is home. An answer from the backup for a block that came home meanwhile is right: that write overlapped this read.
//! - **Write**: the chunks of blocks that are written in part and absent come home; then a shared hold of each chunk
//!   that is not whole; `G`; the target; `V`; the holds end; the answer. `G` is first because a write that is cut
//!   off may have changed a block that was home. No hold where every block is home already: fills never touch those.
//! - **Fill**: fetched, decoded and verified without a hold; then the chunk alone; the blocks whose `V` is clear
//!   are written, and no others; `V`; the hold ends. So a guest's write either has set `V` before, or has not begun.
//! - **Flush**: the runs of `V` since the last flush are noted; the target is synced; the runs are appended to the
//!   journal; it is synced; `P`; the answer. Noting after the sync would promise what was written during it;
//!   the journal first would promise what is not stable. `V` is set, and its run listed, under one
//!   lock, so that whoever finds a bit set by another and answers because of it is followed by a noting that lists it.
//! - **A failed sync** marks the live file before anybody hears of it; then everything fails, reads too: the kernel may
//!   have dropped what it could not write, and a guest that did not flush would read old data.
//! - **Completion** is a flush whose record says so. **Parking** waits for changes under way, flushes, and writes a
//!   checkpoint that says that nothing is missing, and that `G` is exact.
//! - **Resuming** from the journal alone makes every block of `P` one of `G` as well: an unflushed write to a
//!   block that was home may have reached the target, and no record speaks of it. Too much in `G` is harmless.
//! - **A frozen view** (`frozen`) holds all changes for as long as those under way take, and from then on has each change of what
//!   is in it copied first. While there is none, a write looks at one flag.
//! - **A target is checked before it is believed** (`fingerprint`): chunks that the journal calls home and that the
//!   guest never wrote must be those of the snapshot. It comes before the first write to the journal, the live file or
//!   the target, so that a refused target and its session stay as they were.
//!
//! Bounds: holds exist for chunks in use alone; decoded chunks wait up to
//! [`SessionOptions::decoded_bytes`], beyond that a miss writes its own home; a worker has one piece in hand; `V`, `G` and
//! `P` take a bit a block each (32 MiB for 1 TiB).

mod asked;
mod begin;
mod bits;
mod clock;
mod commit;
#[cfg(test)]
mod crash;
mod damage;
mod device;
mod disk;
mod error;
mod extents;
mod fetch;
mod fill;
mod fingerprint;
mod frozen;
mod holds;
mod join;
mod journal;
mod limit;
mod live_file;
mod map;
mod mistakes;
#[cfg(test)]
mod models;
mod pace;
mod parts;
mod peek;
mod plan;
mod read;
#[cfg(test)]
mod recorded;
mod session;
mod source;
mod stats;
mod streams;
mod strip;
mod sync;
#[cfg(test)]
mod tests;
mod told;
mod write;
mod zero;

pub use asked::Recorded;
pub use clock::{Clock, TokioClock};
pub use damage::DamagedRun;
pub use device::LiveDevice;
pub use disk::LiveDisk;
pub use error::{Error, ErrorKind, Result};
pub use frozen::{AtRest, Frozen, FrozenOptions, FrozenReader, RestParts, Still, Taken};
#[doc(hidden)]
pub use journal::fuzzing;
pub use journal::{BlockRun, JournalLayout, SessionId};
pub use limit::RateLimit;
pub use live_file::{BootId, LiveWords};
pub use parts::{ChunkCheck, Identity, Resumed, SessionOptions, SessionParts, WrittenPast};
pub use peek::{Peek, check_header, is_live_file_believable, peek};
pub use session::Session;
pub use source::{
    ChunkData, ChunkSource, DiskLayout, FetchFuture, RunData, SourceError, SourceErrorKind, Urgency,
};
pub use stats::{Phase, StatsSnapshot};
pub use strip::Cell;
