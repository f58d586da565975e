//! One node of a map, and its bytes.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::{LEAF_SLOTS, slots};
use crate::error::{Error, Result};
use crate::header::{FORMAT_VERSION, newer};
use crate::id::ChunkId;

const MAGIC: [u8; 4] = *b"LBMP";
const ID_LEN: usize = 32;
const HEAD_LEN: usize = size_of::<Head>();
/// No node is longer.
pub(crate) const MAX_NODE_LEN: usize = HEAD_LEN + LEAF_SLOTS as usize / 8 + LEAF_SLOTS as usize * ID_LEN;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 4],
    version: U16,
    level: u8,
    reserved: u8,
    slots: U16,
    present: U16,
    reserved_more: U32,
}

/// A node: which of its slots have an id, and those ids.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Node {
    level: u8,
    words: Vec<u64>,
    /// How many slots before each word are present.
    before: Vec<u16>,
    ids: Vec<[u8; ID_LEN]>,
}

impl Node {
    pub(crate) fn level(&self) -> u8 {
        self.level
    }

    /// The id in a slot; none for zeroes.
    pub(crate) fn slot(&self, slot: u64) -> Option<ChunkId> {
        let (word, bit) = ((slot / 64) as usize, slot % 64);
        let present = *self.words.get(word)?;
        if present >> bit & 1 == 0 {
            return None;
        }
        let rank = usize::from(self.before[word]) + (present & ((1 << bit) - 1)).count_ones() as usize;
        Some(ChunkId::from_bytes(self.ids[rank]))
    }

    /// The slots that have an id, with it, in order.
    pub(crate) fn present(&self) -> impl Iterator<Item = (u64, ChunkId)> + '_ {
        let slots =
            (0..slots(self.level)).filter(|slot| self.words[(*slot / 64) as usize] >> (slot % 64) & 1 == 1);
        slots.zip(self.ids.iter().map(|id| ChunkId::from_bytes(*id)))
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let damaged = || Error::damaged("a node of a disk map is not what it should be");
        let (head, rest) = Head::ref_from_prefix(bytes).map_err(|_| damaged())?;
        if head.magic != MAGIC {
            return Err(damaged());
        }
        if head.version.get() != FORMAT_VERSION || head.reserved != 0 || head.reserved_more.get() != 0 {
            return Err(newer(format!("a map node has format version {}", head.version.get())));
        }
        let count = slots(head.level) as usize;
        let present = usize::from(head.present.get());
        if usize::from(head.slots.get()) != count
            || present == 0
            || rest.len() != count / 8 + present * ID_LEN
        {
            return Err(damaged());
        }
        let (bitmap, ids) = rest.split_at(count / 8);
        let words: Vec<u64> = bitmap
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
            .collect();
        let mut before = Vec::with_capacity(words.len());
        let mut sum = 0;
        for word in &words {
            before.push(sum);
            sum += word.count_ones() as u16;
        }
        if usize::from(sum) != present {
            return Err(damaged());
        }
        let ids = ids.chunks_exact(ID_LEN).map(|id| id.try_into().expect("32 bytes")).collect();
        Ok(Self { level: head.level, words, before, ids })
    }
}

/// The bytes of a node from the ids of its slots; none if all are zeroes.
pub(crate) fn encode(level: u8, ids: impl IntoIterator<Item = Option<ChunkId>>) -> Option<Vec<u8>> {
    let count = slots(level) as usize;
    let mut bytes = vec![0; HEAD_LEN + count / 8];
    let mut present = 0;
    for (slot, id) in ids.into_iter().enumerate() {
        assert!(slot < count, "a node has {count} slots");
        if let Some(id) = id {
            bytes[HEAD_LEN + slot / 8] |= 1 << (slot % 8);
            bytes.extend_from_slice(id.as_bytes());
            present += 1;
        }
    }
    let head = Head {
        magic: MAGIC,
        version: U16::new(FORMAT_VERSION),
        level,
        reserved: 0,
        slots: U16::new(count as u16),
        present: U16::new(present),
        reserved_more: U32::ZERO,
    };
    bytes[..HEAD_LEN].copy_from_slice(head.as_bytes());
    (present > 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_node_comes_back_as_it_was(
            level in 0u8..3, picks in proptest::collection::vec(any::<Option<u32>>(), 0..=256)
        ) {
            let ids: Vec<Option<ChunkId>> =
                picks.iter().map(|pick| pick.map(|n| ChunkId::of(&n.to_le_bytes()))).collect();
            match encode(level, ids.iter().copied()) {
                None => prop_assert!(ids.iter().all(Option::is_none)),
                Some(bytes) => {
                    prop_assert!(bytes.len() <= MAX_NODE_LEN);
                    let node = Node::decode(&bytes).unwrap();
                    for slot in 0..slots(level) {
                        prop_assert_eq!(node.slot(slot), ids.get(slot as usize).copied().flatten());
                    }
                    prop_assert_eq!(node.present().count(), ids.iter().flatten().count());
                    prop_assert!(Node::decode(&bytes[..bytes.len() - 1]).is_err());
                }
            }
        }

        #[test]
        fn no_bytes_make_a_node_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), level in 0u8..2) {
            let mut bytes = bytes;
            if let Some(head) = bytes.get_mut(..10) {
                head.copy_from_slice(&[b'L', b'B', b'M', b'P', 1, 0, level, 0, 0, if level == 0 { 4 } else { 1 }]);
            }
            if let Ok(node) = Node::decode(&bytes) {
                node.present().for_each(drop);
            }
        }
    }
}
