//! Taking back what the background asked for, because it is to be slower: what has begun is left to end.

use super::chunk_store::{ChunkStore, Key};
use super::piece::{Piece, RunSlot, Waiter};
use super::pool::{Shared, State};
use crate::live::Urgency;

/// What no guest waits for, nor will in a moment: the more urgent first.
const UNHURRIED: [Urgency; 2] = [Urgency::Expected, Urgency::Background];

impl<S: ChunkStore> Shared<S> {
    pub(super) fn withdraw(&self, disk: u32) {
        let mut state = self.state.lock();
        let State { queue, located, .. } = &mut *state;
        // A single fetch is somebody's who has no other way to it.
        let may = |key: Key, waiters: &[Waiter]| key.disk == disk && waiters.iter().all(Waiter::is_run);
        let mut waiters = Vec::new();
        for urgency in UNHURRIED {
            let found = std::mem::take(&mut located[urgency.lane()]).into_iter();
            let may_go =
                |piece: &Piece<S::Place>| piece.chunks.iter().all(|(key, _)| may(*key, queue.waiters(*key)));
            let (back, kept): (Vec<_>, Vec<_>) = found.partition(may_go);
            located[urgency.lane()] = kept;
            // The last that was found would have been fetched first.
            for (key, _) in back.into_iter().rev().flat_map(|piece| piece.chunks) {
                waiters.extend(queue.finish(key));
            }
            waiters.extend(queue.withdraw(urgency, may));
        }
        drop(state);
        for waiter in waiters {
            if let Waiter::Run(RunSlot { run, slot }) = waiter {
                run.withdraw(slot);
            }
        }
    }

    pub(super) fn waiting_bytes(&self, disk: u32) -> u64 {
        let state = self.state.lock();
        let queued = UNHURRIED.into_iter().flat_map(|urgency| state.queue.queued(urgency));
        let found = UNHURRIED.into_iter().flat_map(|urgency| &state.located[urgency.lane()]);
        let found = found.flat_map(|piece| piece.chunks.iter().map(|(key, _)| *key));
        let of_disk = queued.chain(found).filter(|key| key.disk == disk);
        of_disk.map(|key| self.store.plain_len(key) as u64).sum()
    }
}
