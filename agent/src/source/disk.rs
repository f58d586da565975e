//! One disk of a pool, as the restore engine and the read-only exports see it.

use std::ops::Range;
use std::sync::Arc;

use super::{ChunkStore, FetchPool, Key};
use crate::live::{ChunkData, ChunkSource, DiskLayout, FetchFuture, RunData, SourceError, Urgency};

/// Which chunks of a disk are all zeroes: one bit each, in memory, because every request asks.
#[derive(Clone, Debug)]
pub struct ZeroChunks {
    words: Vec<u64>,
}

impl ZeroChunks {
    /// A disk of `count` chunks that are all zero.
    #[must_use]
    pub fn all(count: u64) -> Self {
        let words = usize::try_from(count.div_ceil(64)).expect("a bit for each chunk fits in memory");
        Self { words: vec![u64::MAX; words] }
    }

    /// This chunk holds data.
    ///
    /// # Panics
    /// Where the disk has no such chunk.
    pub fn set_data(&mut self, chunk: u64) {
        self.words[(chunk / 64) as usize] &= !(1 << (chunk % 64));
    }

    /// Whether a chunk is all zeroes. Beyond the disk there is nothing but zeroes.
    #[must_use]
    pub fn contains(&self, chunk: u64) -> bool {
        self.words.get((chunk / 64) as usize).is_none_or(|word| word & (1 << (chunk % 64)) != 0)
    }
}

/// A disk whose chunks come from a pool.
pub struct DiskSource<S: ChunkStore> {
    pool: Arc<FetchPool<S>>,
    disk: u32,
    layout: DiskLayout,
    zero: ZeroChunks,
}

impl<S: ChunkStore> DiskSource<S> {
    /// Disk number `disk` of the pool's store.
    #[must_use]
    pub const fn new(pool: Arc<FetchPool<S>>, disk: u32, layout: DiskLayout, zero: ZeroChunks) -> Self {
        Self { pool, disk, layout, zero }
    }

    /// A chunk that needs no fetch.
    #[must_use]
    pub fn cached(&self, chunk: u64) -> Option<ChunkData> {
        self.pool.cached(Key { disk: self.disk, chunk })
    }

    /// The pool that it fetches from.
    #[must_use]
    pub const fn pool(&self) -> &Arc<FetchPool<S>> {
        &self.pool
    }
}

impl<S: ChunkStore> ChunkSource for DiskSource<S> {
    fn layout(&self) -> DiskLayout {
        self.layout
    }

    fn is_zero(&self, chunk: u64) -> bool {
        self.zero.contains(chunk)
    }

    fn fetch(&self, chunk: u64, urgency: Urgency) -> FetchFuture<'_, Result<ChunkData, SourceError>> {
        self.pool.fetch(Key { disk: self.disk, chunk }, urgency)
    }

    fn fetch_run(&self, chunks: Range<u64>, urgency: Urgency) -> FetchFuture<'_, RunData> {
        self.pool.fetch_run(self.disk, chunks, urgency)
    }

    fn join(&self, chunk: u64, urgency: Urgency) -> Option<FetchFuture<'_, Result<ChunkData, SourceError>>> {
        self.pool.join(Key { disk: self.disk, chunk }, urgency)
    }

    fn prefetch_bytes(&self) -> u64 {
        self.pool.prefetch_bytes()
    }

    fn withdraw(&self) {
        self.pool.withdraw(self.disk);
    }

    fn waiting_bytes(&self) -> u64 {
        self.pool.waiting_bytes(self.disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_zero_until_they_are_said_to_hold_data() {
        let mut zero = ZeroChunks::all(130);
        zero.set_data(0);
        zero.set_data(129);
        let data: Vec<u64> = (0..200).filter(|chunk| !zero.contains(*chunk)).collect();
        assert_eq!(data, [0, 129]);
    }
}
