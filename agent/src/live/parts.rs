//! What a session is made of, and what may be chosen for it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::clock::Clock;
use super::live_file::{BootId, LiveWords};
use super::source::ChunkSource;

/// What a restore is of and to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The snapshot's disk, by a name that means one content for ever (with its map's root, say). A journal
    /// that names another is refused.
    pub snapshot: String,
    /// The target as it was called when the session began: for people. Whether a target is the session's
    /// is for the session's owner to know, and for [`ChunkCheck`] to prove.
    pub target: String,
}

/// Tells a chunk of the snapshot's disk by its bytes, from the disk map alone: nothing is fetched.
pub trait ChunkCheck: Send + Sync {
    /// Whether `bytes` are those of `chunk`, which is not all zeroes. `None` where that cannot be told.
    fn is_chunk(&self, chunk: u64, bytes: &[u8]) -> Option<bool>;
}

/// What may be chosen for a session.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// How long a guest's read waits for a source that is out of reach before it fails.
    pub source_timeout: Duration,
    /// The background fetches and writes pieces of this many bytes; at least one chunk.
    pub piece_bytes: u64,
    /// The journal is brought up to date whenever this many bytes came home.
    pub commit_bytes: u64,
    /// The journal is brought up to date this often by [`super::LiveDevice::commit_worker`].
    pub commit_interval: Duration,
    /// Decoded bytes that wait to be written home. When they are as many, a miss writes its own home.
    pub decoded_bytes: u64,
    /// Bytes a second that the background may take; 0 is no limit.
    pub limit: u64,
    /// Whether the background brings home what nobody asked for.
    pub background: bool,
    /// What the slowest hundredth of guests' requests that need nothing of the source should stay within: the background
    /// steps back for it.
    pub guest_p99: Option<Duration>,
    /// Pages of the journal's log, where it must not be 4096.
    pub log_pages: Option<u32>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            source_timeout: Duration::from_secs(30),
            piece_bytes: 1 << 20,
            commit_bytes: 256 << 20,
            commit_interval: Duration::from_secs(3),
            decoded_bytes: 32 << 20,
            limit: 0,
            background: true,
            guest_p99: None,
            log_pages: None,
        }
    }
}

/// What a session is made of.
pub struct SessionParts {
    /// What is restored, and to where.
    pub identity: Identity,
    /// Where absent chunks come from.
    pub source: Arc<dyn ChunkSource>,
    /// By what the engine waits.
    pub clock: Arc<dyn Clock>,
    /// The live file's words, as many as [`LiveWords::count_for`] says.
    pub live: LiveWords,
    /// The running kernel.
    pub boot: BootId,
    /// The kernel that the session's last agent served under, where that is known.
    pub last_boot: Option<BootId>,
    /// By what a target is checked when a session is resumed; without it nothing is checked.
    pub check: Option<Arc<dyn ChunkCheck>>,
    /// What is known of writes to the target past the session.
    pub written_past: WrittenPast,
    /// Chunks in the order in which the background should fetch them, as runs of neighbours. What is
    /// left out comes afterwards.
    pub plan: Vec<Range<u64>>,
    /// The boot trace: chunks that guests will probably ask for, in that order.
    pub trace: Vec<u64>,
    /// What may be chosen.
    pub options: SessionOptions,
}

/// What is known of writes to a target past its session since that was served last.
///
/// A machine may be started from a target that is wholly home: that is what it was made for. What it writes then is in no journal. Where
/// that may have been so all that is home counts as written by the guest, and is in every later backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrittenPast {
    /// There were none.
    No,
    /// The target is not as it was when the session was parked last, which says something only if it was not served since.
    Yes,
    /// Nothing tells.
    Unknown,
}

impl WrittenPast {
    /// Whether all that is home counts as written by the guest, of a session that had ended so; `is_whole` where all of the
    /// disk is home.
    pub(super) fn counts(self, ended: Resumed, is_whole: bool) -> bool {
        match self {
            Self::No => false,
            Self::Yes if ended == Resumed::Parked => true,
            Self::Yes | Self::Unknown => is_whole,
        }
    }
}

/// How a session had ended that was resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumed {
    /// It had been parked: everything is there.
    Parked,
    /// The agent had died, the kernel had not: everything acknowledged is there, flushed or not.
    AgentDied,
    /// The host had gone down: everything flushed is there.
    HostDied,
    /// A sync had failed: everything flushed before it is there.
    SyncFailed,
    /// The agent had died, the kernel had not, and the live file is missing or damaged: everything flushed is
    /// there, and what was not may be gone under a guest that lives and does not know it.
    LiveFileLost,
}

impl Resumed {
    /// What a journal and a live file tell of how a session had ended; see docs/durability.md.
    pub(super) fn told_by(
        is_parked: bool,
        believes_live_file: bool,
        is_poisoned: bool,
        last_boot: Option<BootId>,
        boot: BootId,
    ) -> Self {
        if is_parked {
            Self::Parked
        } else if believes_live_file {
            Self::AgentDied
        } else if is_poisoned {
            Self::SyncFailed
        } else if last_boot == Some(boot) {
            Self::LiveFileLost
        } else {
            Self::HostDied
        }
    }

    /// Whether only what was flushed is known to be there. What the guest wrote is then known only to be among
    /// the blocks that are home, so all of these count as written by it.
    #[must_use]
    pub const fn is_from_journal_alone(self) -> bool {
        matches!(self, Self::HostDied | Self::SyncFailed | Self::LiveFileLost)
    }
}
