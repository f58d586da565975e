//! How often each thing that the stories are about really happened.

use std::fmt;

macro_rules! kinds {
    ($($kind:ident,)*) => {
        /// A thing that happens in stories.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Kind { $($kind,)* }

        impl Kind {
            pub(super) const ALL: &[Self] = &[$(Self::$kind,)*];
        }
    };
}

kinds! {
    // Polls by the executor, and what they make up.
    Step, Story, Life,
    // How a life ends.
    PowerCut, Kill, Parking, PowerCutAfterParking, Poisoned, FailedStart,
    // In the middle of what it ends.
    PowerCutInStart, KillInStart,
    PowerCutInFlush, KillInFlush,
    PowerCutInCheckpoint, KillInCheckpoint,
    PowerCutInCompletion, KillInCompletion,
    PowerCutInParking, KillInParking,
    // How the next one finds the session.
    Created, ResumedParked, ResumedAgentDied, ResumedHostDied, ResumedSyncFailed, ResumedLiveFileLost,
    Completed, AnotherSnapshotRefused,
    // Saving.
    Frozen, FrozenCopied, FrozenFailed, FrozenAtRest,
    // Who works in a life.
    SeveralConnections, SeveralShards, NoFillWorker,
    // What guests do.
    Read, FastRead, ReadOfBackup, Write, FastWrite, UnalignedWrite, FuaWrite, Flush, Trim, ZeroUnmap, ZeroAllocate,
    FuaZero, Prefetch, Extents,
    // What goes wrong at the source.
    SourceAway, SourceOutage, SourceBack, ChunkMissing, ChunkDamaged, ChunkMended,
    // At the target.
    TargetReadError, TargetWriteError, TargetSyncError, TargetNoSpace, TargetFull,
    // At the journal.
    JournalWriteError, JournalSyncError,
    // What a cache and a queue did.
    LostAtPowerCut, KeptAtPowerCut, TornAtPowerCut, LandedAfterKill, LostInFailedSync,
}

/// Counts by [`Kind`].
#[derive(Clone)]
pub(super) struct Tally([u64; Kind::ALL.len()]);

impl Default for Tally {
    fn default() -> Self {
        Self([0; Kind::ALL.len()])
    }
}

impl Tally {
    pub(super) const fn count(&mut self, kind: Kind, times: u64) {
        self.0[kind as usize] += times;
    }

    pub(super) const fn of(&self, kind: Kind) -> u64 {
        self.0[kind as usize]
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, count)| *sum += count);
    }

    /// What never happened.
    pub(super) fn missing(&self) -> Vec<Kind> {
        Kind::ALL.iter().copied().filter(|&kind| self.of(kind) == 0).collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, &kind) in Kind::ALL.iter().enumerate() {
            let between = if index == 0 { "" } else { ", " };
            write!(f, "{between}{kind:?} {}", self.of(kind))?;
        }
        Ok(())
    }
}
