//! Mistakes that a restore engine could make. The crash tests have the engine make each one, and
//! must then see it lose data. In a build without tests nobody can ask for one, and asking costs nothing.

/// One mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Mistake {
    /// A flush writes the journal, and then syncs the target.
    JournalBeforeData,
    /// A flush notes what is home after it synced the target.
    NoteAfterSync,
    /// A sync that failed is tried again, and believed.
    RetriedSync,
    /// A block's bit reaches the journal's device when it is set, as it may where the journal is mapped.
    MappedJournal,
    /// A fill writes without holding its chunk.
    FillWithoutHold,
    /// A trim is rounded to the blocks that it touches.
    TrimRoundedOutward,
    /// On a resumed session zero chunks are taken to be zero on the target.
    ZeroAssumedOnResume,
    /// `V` is set before the write has ended.
    HomeBeforeCompletion,
    /// The guest hears of its write before `V` is set.
    AckBeforeHome,
    /// `V` is set before `G`.
    HomeBeforeGuest,
    /// The live file is believed after a failed sync.
    LiveFileAfterFailedSync,
    /// The live file is believed after a reboot.
    LiveFileAfterReboot,
    /// A journal of another disk of the same size is taken.
    ForeignJournal,
    /// A chunk that could not be fetched is served as zeroes.
    ReadErrorAsZeroes,
    /// A flush is acknowledged without the journal's sync.
    JournalUnsynced,
    /// A write to part of an absent block does not bring the block's chunk home first.
    PartialWithoutFill,
    /// What a frozen view holds is overwritten without a copy.
    OverwrittenInView,
    /// A session is frozen while changes are under way.
    FrozenUnderWrites,
    /// The copies of a view's chunk are taken before the target is read.
    CopiesTakenFirst,
    /// A chunk is given out before its hash was checked. The source makes it, not the engine.
    #[cfg(test)]
    ServedUnverified,
}

#[cfg(test)]
mod made {
    //! What the mistakes need that the engine does not have.

    use std::ops::Range;

    use crate::live::device::LiveDevice;
    use crate::live::journal::Entry;
    use crate::live::session::Session;

    impl Session {
        /// Blocks whose bits are set some time after the guest heard of its write.
        pub(in crate::live) fn later(&self, blocks: Range<u64>) {
            self.late.lock().push(blocks);
        }

        pub(in crate::live) fn catch_up(&self) {
            for blocks in std::mem::take(&mut *self.late.lock()) {
                self.map.mark_home(blocks);
            }
        }
    }

    impl LiveDevice {
        /// What a mapped journal does: its pages reach the device when they like, before any sync.
        pub(in crate::live) async fn leak_to_journal(&self) {
            let Ok(mut committer) = self.session.committer.try_lock() else { return };
            let runs = self.session.map.note();
            let journal = &mut committer.journal;
            let map = &self.session.map;
            let stable = |runs: &_| map.mark_stable(runs);
            let entry = Entry { runs: &runs, complete: false, is_synced: true };
            let leaked = journal.append(&*self.journal, entry, &map.p(), &map.g(), stable).await;
            if let Err(error) = leaked {
                self.session.poison(&error);
            }
        }
    }
}

#[cfg(not(test))]
mod made {
    //! Nothing: no mistake is made.

    use std::ops::Range;

    use crate::live::device::LiveDevice;
    use crate::live::session::Session;

    #[allow(clippy::unused_self, reason = "the same calls as in tests")]
    impl Session {
        #[inline]
        pub(in crate::live) fn later(&self, _blocks: Range<u64>) {}

        #[inline]
        pub(in crate::live) const fn catch_up(&self) {}
    }

    #[allow(clippy::unused_self, reason = "the same call as in tests")]
    impl LiveDevice {
        #[inline]
        pub(in crate::live) async fn leak_to_journal(&self) {}
    }
}
