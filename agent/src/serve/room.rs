//! How far the requests of all clients fetch ahead of what they have taken.
//!
//! A request of 32 MiB would else have all of its chunks decoded before the first is taken, and a request of 4 KiB a chunk of
//! 4 MiB: the memory for requests in flight bounds what is asked for, and not what is fetched for it.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of chunks that reads of all clients have asked for and not taken yet.
pub(super) const READ_BYTES: u32 = 32 << 20;
/// The same of what clients only want to be in memory. It is room of its own: no read waits for a guess.
const CACHED_BYTES: u32 = 16 << 20;

/// The room that all disks of a server share.
#[derive(Clone, Debug)]
pub(super) struct Rooms {
    pub(super) reads: Room,
    pub(super) caching: Room,
}

impl Rooms {
    pub(super) fn new() -> Self {
        Self { reads: Room::new(READ_BYTES), caching: Room::new(CACHED_BYTES) }
    }
}

/// Room for so many bytes. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Room {
    free: Arc<Semaphore>,
    bytes: u32,
}

/// The place of a chunk that a request waits for, free again when this is dropped. Requests that wait for the same chunk have one each.
#[derive(Debug)]
pub(super) struct Place(#[expect(dead_code, reason = "it is held, not read")] OwnedSemaphorePermit);

impl Room {
    fn new(bytes: u32) -> Self {
        Self { free: Arc::new(Semaphore::new(bytes as usize)), bytes }
    }

    /// A place for a chunk of so many bytes, if there is one and nobody waits for it.
    pub(super) fn try_take(&self, len: u64) -> Option<Place> {
        Arc::clone(&self.free).try_acquire_many_owned(self.places(len)).ok().map(Place)
    }

    /// A place for a chunk of so many bytes, in the order of asking. Only for who has none: those who wait for each other's
    /// would wait for ever.
    pub(super) async fn take(&self, len: u64) -> Place {
        let taken = Arc::clone(&self.free).acquire_many_owned(self.places(len)).await;
        Place(taken.expect("it is never closed"))
    }

    /// What a chunk takes: one that is larger than all takes all.
    fn places(&self, len: u64) -> u32 {
        u32::try_from(len).map_or(self.bytes, |len| len.min(self.bytes))
    }
}
