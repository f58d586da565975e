//! Which chunks a view holds, and what is known of each of their blocks.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use block::{BLOCK_SIZE, ByteRange};

use crate::live::bits::{Bits, words_for, zeroed_words};
use crate::live::source::DiskLayout;

/// The chunks in which `G` was set. A chunk is named by its place among them.
pub(super) struct FrozenSet {
    disk: DiskLayout,
    chunks: Vec<u64>,
    blocks_per_chunk: u64,
    /// A bit for each block of each of the chunks: it was home.
    home: Box<[AtomicU64]>,
    /// A bit for each of the same: it was copied.
    copied: Box<[AtomicU64]>,
    /// A bit for each chunk: it was taken.
    taken: Box<[AtomicU64]>,
}

impl FrozenSet {
    /// The set of a disk of which these blocks are home, and these the guest's.
    pub(super) fn new(disk: DiskLayout, home: &Bits<'_>, guest: &Bits<'_>) -> Self {
        let blocks_per_chunk = u64::from(disk.chunk_size) / BLOCK_SIZE;
        let mut chunks: Vec<u64> = Vec::new();
        for word in 0..guest.word_count() {
            let mut bits = guest.word(word);
            while bits != 0 {
                let chunk = (word as u64 * 64 + u64::from(bits.trailing_zeros())) / blocks_per_chunk;
                chunks.push(chunk);
                // On to the next chunk's first block, or to the next word.
                let next = ((chunk + 1) * blocks_per_chunk).saturating_sub(word as u64 * 64);
                bits = if next >= 64 { 0 } else { bits & (u64::MAX << next) };
            }
        }
        // A chunk of more than 64 blocks is found once in each of its words.
        chunks.dedup();
        let count = chunks.len() as u64;
        let words = |bits: u64| zeroed_words(words_for(bits));
        let (per_block, per_chunk) = (count * blocks_per_chunk, count);
        let set = Self {
            disk,
            chunks,
            blocks_per_chunk,
            home: words(per_block),
            copied: words(per_block),
            taken: words(per_chunk),
        };
        for place in 0..set.chunks.len() {
            let blocks = set.blocks(place);
            for (run, _) in home.runs(blocks.clone()).filter(|(_, is_home)| *is_home) {
                set.home().set(set.bits_of(place, &run));
            }
        }
        set
    }

    pub(super) const fn disk(&self) -> DiskLayout {
        self.disk
    }

    pub(super) fn chunks(&self) -> &[u64] {
        &self.chunks
    }

    fn home(&self) -> Bits<'_> {
        Bits::new(&self.home, self.chunks.len() as u64 * self.blocks_per_chunk)
    }

    fn copied(&self) -> Bits<'_> {
        Bits::new(&self.copied, self.chunks.len() as u64 * self.blocks_per_chunk)
    }

    fn taken(&self) -> Bits<'_> {
        Bits::new(&self.taken, self.chunks.len() as u64)
    }

    /// The blocks of the chunk at a place.
    pub(super) fn blocks(&self, place: usize) -> Range<u64> {
        self.disk.chunk_range(self.chunks[place]).units(BLOCK_SIZE)
    }

    /// Where the bits of these blocks, which lie in the chunk at `place`, stand.
    fn bits_of(&self, place: usize, blocks: &Range<u64>) -> Range<u64> {
        let start = place as u64 * self.blocks_per_chunk;
        let first = self.blocks(place).start;
        start + blocks.start - first..start + blocks.end - first
    }

    /// The bytes of some blocks, up to the disk's end.
    pub(super) fn bytes(&self, blocks: &Range<u64>) -> ByteRange {
        ByteRange::from_bounds(blocks.start * BLOCK_SIZE, (blocks.end * BLOCK_SIZE).min(self.disk.size))
    }

    /// The places of the chunks that `blocks` touch.
    pub(super) fn members(&self, blocks: &Range<u64>) -> Range<usize> {
        if blocks.is_empty() {
            return 0..0;
        }
        let chunk_of = |block: u64| block / self.blocks_per_chunk;
        let start = self.chunks.partition_point(|&chunk| chunk < chunk_of(blocks.start));
        let end = self.chunks.partition_point(|&chunk| chunk <= chunk_of(blocks.end - 1));
        start..end
    }

    pub(super) fn is_taken(&self, place: usize) -> bool {
        self.taken().contains(place as u64)
    }

    pub(super) fn mark_taken(&self, place: usize) {
        self.taken().set(place as u64..place as u64 + 1);
    }

    /// Whether something of `blocks` in the chunk at `place` must be copied before it is changed.
    pub(super) fn needs_copy(&self, place: usize, blocks: &Range<u64>) -> bool {
        !self.uncopied(place, blocks).is_empty()
    }

    /// The runs of `blocks` in the chunk at `place` that were home, and are neither copied nor taken.
    pub(super) fn uncopied(&self, place: usize, blocks: &Range<u64>) -> Vec<Range<u64>> {
        if self.is_taken(place) {
            return Vec::new();
        }
        let all = self.blocks(place);
        let wanted = blocks.start.max(all.start)..blocks.end.min(all.end);
        self.runs(place, &wanted)
            .filter(|(_, state)| *state == BlockState::OnTarget)
            .map(|(run, _)| run)
            .collect()
    }

    pub(super) fn mark_copied(&self, place: usize, blocks: &Range<u64>) {
        self.copied().set(self.bits_of(place, blocks));
    }

    /// The runs of blocks of one state that make up `blocks`, which lie in the chunk at `place`.
    pub(super) fn runs(
        &self,
        place: usize,
        blocks: &Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, BlockState)> + '_ {
        let bits = self.bits_of(place, blocks);
        let (first_bit, first_block) = (bits.start, blocks.start);
        let block = move |bit: u64| bit - first_bit + first_block;
        self.home().runs(bits).flat_map(move |(run, is_home)| {
            let parts: Vec<_> = if is_home { self.copied().runs(run).collect() } else { vec![(run, false)] };
            parts.into_iter().map(move |(part, is_copied)| {
                let state = match (is_home, is_copied) {
                    (false, _) => BlockState::Absent,
                    (true, false) => BlockState::OnTarget,
                    (true, true) => BlockState::Copied,
                };
                (block(part.start)..block(part.end), state)
            })
        })
    }
}

/// Where the view's bytes of a block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockState {
    /// In the backup.
    Absent,
    /// Still on the target.
    OnTarget,
    /// Among the copies.
    Copied,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_set_is_the_chunks_with_any_block_of_the_guests() {
        for chunk_size in [4096_u32, 16384, 131_072, 1 << 20] {
            let disk = DiskLayout { size: 6 * (1 << 20) + 512, chunk_size };
            let blocks = disk.size.div_ceil(BLOCK_SIZE);
            let (home, guest) = (zeroed_words(words_for(blocks)), zeroed_words(words_for(blocks)));
            let (home, guest) = (Bits::new(&home, blocks), Bits::new(&guest, blocks));
            for run in [0..1, 63..65, 200..210, 700..701, blocks - 1..blocks] {
                guest.set(run);
            }
            home.set(205..300);
            let set = FrozenSet::new(disk, &home, &guest);
            let touches = |chunk: &u64| guest.any(disk.chunk_range(*chunk).units(BLOCK_SIZE));
            let expected: Vec<u64> = (0..disk.chunk_count()).filter(touches).collect();
            assert_eq!(set.chunks(), expected, "chunks of {chunk_size}");
            for place in 0..set.chunks().len() {
                for (run, state) in set.runs(place, &set.blocks(place)) {
                    let is_home = state == BlockState::OnTarget;
                    assert!(run.clone().all(|block| home.contains(block) == is_home), "{run:?} {state:?}");
                }
            }
            let place = set.members(&(205..206)).start;
            assert!(set.needs_copy(place, &(205..206)));
            set.mark_copied(place, &(205..206));
            assert!(!set.needs_copy(place, &(200..206)));
            assert!(set.members(&(400..401)).is_empty());
            assert_eq!(set.members(&(0..blocks)), 0..set.chunks().len());
        }
    }
}
