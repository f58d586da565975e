//! Mistakes that a restore engine could make. The crash tests and the model checks have the engine make each one, and
//! must then see it fail. In a build without tests nobody can ask for one, and asking costs nothing.
//!
//! A mistake is made by everything that runs on the thread that asked for it, until that ends.

/// One mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Mistake {
    // Flush and commit.
    /// A flush writes the journal, and then syncs the target.
    JournalBeforeData,
    /// A flush notes what is home after it synced the target.
    NoteAfterSync,
    /// A flush that finds nothing new in the map does not sync the target.
    SyncOnlyWhereNew,
    /// A flush is answered by a sync that had begun before it arrived.
    SyncSharedTooLate,
    /// A flush is acknowledged without the journal's sync.
    JournalUnsynced,
    /// `P` is set before the journal is synced.
    StableBeforeJournal,
    /// A write with FUA is acknowledged as any other.
    FuaUnsynced,
    /// A sync that failed is tried again, and believed.
    RetriedSync,
    /// After a failed sync the target is read as before.
    ReadAfterFailedSync,
    /// The record that all is home is written before the target is synced.
    CompleteBeforeSync,
    /// Parking does not wait for changes under way.
    ParkWithoutWaiting,
    /// Parking writes its checkpoint without a flush.
    ParkWithoutFlush,
    /// A change is counted after it was seen that the session is open.
    ChangeCountedLate,

    // Fills and holds.
    /// A fill writes without holding its chunk.
    FillWithoutHold,
    /// A fill looks for absent blocks before it holds the chunk.
    LookBeforeHold,
    /// A fill writes every block of its chunk.
    FillOverHome,
    /// A fill writes what stands in the buffer of a run for a chunk that could not be had.
    FailedFetchFilled,
    /// A hold that ends is forgotten although others wait for it.
    HoldForgotten,
    /// The chunks of a fill are held in descending order.
    HoldsDescending,

    // Guests' changes.
    /// `V` is set before the write has ended.
    HomeBeforeCompletion,
    /// `V` is set for a write that failed.
    HomeAfterFailedWrite,
    /// `V` is set before the target was made zero.
    HomeBeforeZeroes,
    /// The hold of a write ends before `V` is set.
    HoldEndsBeforeHome,
    /// The guest hears of its write before `V` is set.
    AckBeforeHome,
    /// `V` is set before `G`.
    HomeBeforeGuest,
    /// A write that takes no waiting does not set `G`.
    FastWriteUnmarked,
    /// `V` is set, and then the run is listed for the next flush.
    BitBeforeList,
    /// A trim is rounded to the blocks that it touches.
    TrimRoundedOutward,
    /// A write to part of an absent block does not bring the block's chunk home first.
    PartialWithoutFill,

    // Views.
    /// A session is frozen while changes are under way.
    FrozenUnderWrites,
    /// What a frozen view holds is overwritten without a copy.
    OverwrittenInView,
    /// It is copied without holding the chunk's place in the view.
    CopiedWithoutHold,
    /// The copies of a view's chunk are taken before the target is read.
    CopiesTakenFirst,

    // Reads.
    /// A chunk that could not be fetched is served as zeroes.
    ReadErrorAsZeroes,
    /// What was decoded is served without a look at the map.
    DecodedBeforeMap,
    /// A chunk is given out before its hash was checked. The source makes it, not the engine.
    #[cfg(test)]
    ServedUnverified,

    // Starting.
    /// On a resumed session zero chunks are taken to be zero on the target.
    ZeroAssumedOnResume,
    /// On a first start zero chunks are taken to be zero on a target that is not.
    ZeroAssumedOnCreate,
    /// The live file is believed after a failed sync.
    LiveFileAfterFailedSync,
    /// The live file is believed after a reboot.
    LiveFileAfterReboot,
    /// A live file that is not believed is not emptied.
    LiveFileNotEmptied,
    /// The live file is in use before it says what the journal does.
    LiveFileBegunTooSoon,
    /// What the live file has and the journal has not is not committed after a resume.
    ResumeForgetsUncommitted,
    /// What the live file calls home counts as stable.
    StableFromLiveFile,
    /// A resumed session forgets what the journal says of `G`.
    GuestForgottenOnResume,
    /// After the loss of the host only what the journal says counts as written by the guest.
    UnflushedWritesForgotten,
    /// A resumed session leaves the journal saying that it was parked.
    ParkedForEver,
    /// A journal of another disk of the same size is taken.
    ForeignJournal,

    // The journal.
    /// A block's bit reaches the journal's device when it is set, as it may where the journal is mapped.
    MappedJournal,
    /// A checkpoint overwrites the newer place.
    CheckpointOverNewer,
    /// A checkpoint keeps the generation of the one before.
    GenerationNotRaised,
    /// The log begins anew before the checkpoint is synced.
    CheckpointUnsynced,
    /// The newest checkpoint counts as stable because it was read, although its sync may have failed.
    ReadTakenForStable,
    /// The header of a new journal stands before its first checkpoint.
    HeaderFirst,
}

#[cfg(test)]
pub(super) use made::{Making, forget_late};
pub(super) use made::{catch_up, later, makes, makes_mistakes};

#[cfg(not(test))]
mod made {
    //! Nothing: no mistake is made.

    use std::ops::Range;

    use super::Mistake;
    use crate::live::device::LiveDevice;
    use crate::live::map::BlockMap;

    /// Whether a test asked for this mistake. Never outside tests.
    #[inline]
    pub(in crate::live) const fn makes(_mistake: Mistake) -> bool {
        false
    }

    /// Whether a test asked for any mistake. Never outside tests.
    #[inline]
    pub(in crate::live) const fn makes_mistakes() -> bool {
        false
    }

    #[inline]
    pub(in crate::live) const fn later(_blocks: Range<u64>) {}

    #[inline]
    pub(in crate::live) const fn catch_up(_map: &BlockMap) {}

    #[allow(clippy::unused_self, reason = "the same call as in tests")]
    impl LiveDevice {
        #[inline]
        pub(in crate::live) async fn leak_to_journal(&self) {}

        #[inline]
        pub(in crate::live) async fn pause(&self) {}
    }
}

#[cfg(test)]
mod made {
    //! What the mistakes need that the engine does not have.

    use std::cell::{Cell, RefCell};
    use std::ops::Range;

    use block::AlignedBuf;

    use super::Mistake;
    use crate::live::device::LiveDevice;
    use crate::live::journal::Entry;
    use crate::live::map::BlockMap;

    thread_local! {
        static MADE: Cell<Option<Mistake>> = const { Cell::new(None) };
        /// Blocks whose bits are set some time after the guest heard of its write.
        static LATE: RefCell<Vec<Range<u64>>> = const { RefCell::new(Vec::new()) };
    }

    /// Whether a test asked for this mistake on this thread.
    pub(in crate::live) fn makes(mistake: Mistake) -> bool {
        MADE.get() == Some(mistake)
    }

    /// Whether a test asked for any mistake on this thread.
    pub(in crate::live) fn makes_mistakes() -> bool {
        MADE.get().is_some()
    }

    /// A mistake is made on this thread until this is dropped.
    #[derive(Debug)]
    pub(in crate::live) struct Making(());

    impl Making {
        pub(in crate::live) fn new(mistake: Option<Mistake>) -> Self {
            MADE.set(mistake);
            LATE.take();
            Self(())
        }
    }

    impl Drop for Making {
        fn drop(&mut self) {
            MADE.set(None);
            LATE.take();
        }
    }

    /// An agent died, and what it had put off with it.
    pub(in crate::live) fn forget_late() {
        LATE.take();
    }

    pub(in crate::live) fn later(blocks: Range<u64>) {
        LATE.with_borrow_mut(|late| late.push(blocks));
    }

    pub(in crate::live) fn catch_up(map: &BlockMap) {
        for blocks in LATE.take() {
            map.mark_home(blocks);
        }
    }

    impl LiveDevice {
        /// Gives others time between two steps that nothing comes between.
        pub(in crate::live) async fn pause(&self) {
            for _ in 0..8 {
                drop(self.target.read(0, AlignedBuf::zeroed(0)).await);
            }
        }

        /// What a mapped journal does: its pages reach the device when they like, before any sync.
        pub(in crate::live) async fn leak_to_journal(&self) {
            let Ok(mut committer) = self.session.committer.try_lock() else { return };
            let runs = self.session.map.note();
            let journal = &mut committer.journal;
            let map = &self.session.map;
            let stable = |runs: &_| map.mark_stable(runs);
            let entry = Entry { runs: &runs, complete: false };
            let leaked = journal.append(&*self.journal, entry, &map.p(), &map.g(), stable).await;
            if let Err(error) = leaked {
                self.session.poison(&error);
            }
        }
    }
}
