//! The filter of a segment: a split-block Bloom filter over ids that are already evenly distributed.

use crate::id::ChunkId;

/// The bytes of a block: eight words, of which each id sets one bit.
pub(crate) const BLOCK_LEN: usize = 32;
const BITS_PER_ENTRY: u64 = 11;
const SALT: [u32; 8] =
    [0x47b6_137b, 0x4497_4d91, 0x8824_ad5b, 0xa2b7_289d, 0x7054_95c7, 0x2df1_424b, 0x9efc_4947, 0x5c6b_fb31];

/// How many blocks a segment of so many entries has.
pub(crate) fn blocks_for(entries: u64) -> u32 {
    (entries * BITS_PER_ENTRY).div_ceil(BLOCK_LEN as u64 * 8).max(1) as u32
}

fn word(id: &ChunkId, at: usize) -> u32 {
    u32::from_le_bytes(id.as_bytes()[at..at + 4].try_into().expect("four of 32 bytes"))
}

/// The block of an id.
pub(crate) fn block_of(id: &ChunkId, blocks: u32) -> u32 {
    ((u64::from(word(id, 8)) * u64::from(blocks)) >> 32) as u32
}

fn bits(id: &ChunkId) -> [u32; 8] {
    let hash = word(id, 12);
    SALT.map(|salt| 1 << (hash.wrapping_mul(salt) >> 27))
}

/// Puts an id into its block.
pub(crate) fn insert(block: &mut [u8], id: &ChunkId) {
    for (word, bit) in block.chunks_exact_mut(4).zip(bits(id)) {
        let with = u32::from_le_bytes((&*word).try_into().expect("four bytes")) | bit;
        word.copy_from_slice(&with.to_le_bytes());
    }
}

/// Whether an id may have been put into its block.
pub(crate) fn may_contain(block: &[u8], id: &ChunkId) -> bool {
    let words = block.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")));
    words.zip(bits(id)).all(|(word, bit)| word & bit != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_and_little_else() {
        const ENTRIES: u32 = 20_000;
        let blocks = blocks_for(ENTRIES.into());
        let mut filter = vec![0; blocks as usize * BLOCK_LEN];
        let id = |n: u32| ChunkId::of(&n.to_le_bytes());
        let range = |id: &ChunkId| {
            let at = block_of(id, blocks) as usize * BLOCK_LEN;
            at..at + BLOCK_LEN
        };
        for n in 0..ENTRIES {
            insert(&mut filter[range(&id(n))], &id(n));
        }
        let found = |n: u32| may_contain(&filter[range(&id(n))], &id(n));
        assert!((0..ENTRIES).all(found));
        let wrong = (ENTRIES..2 * ENTRIES).filter(|n| found(*n)).count();
        assert!(wrong < ENTRIES as usize / 40, "{wrong} of {ENTRIES} strangers pass");
    }
}
