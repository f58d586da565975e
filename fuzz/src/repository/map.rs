//! A node of a disk map.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | what is made to fit: bit 0 the head; bit 1 the number of ids |
//! | 1.. | the node |

use repository::{ChunkId, fuzzing};

use super::{has, put};
use crate::memory::bounded;

const HEAD: usize = 16;
const ID: usize = 32;

/// The node that an input stands for.
fn node(mode: u8, bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if has(mode, 0) && bytes.len() >= HEAD {
        let slots: u16 = if bytes[6] == 0 { 1024 } else { 256 };
        put(&mut bytes, 0, b"LBMP\x01\0");
        bytes[7] = 0;
        put(&mut bytes, 8, &slots.to_le_bytes());
        bytes[12..16].fill(0);
    }
    if has(mode, 1) && bytes.len() > HEAD {
        let bitmap = usize::from(u16::from_le_bytes([bytes[8], bytes[9]])) / 8;
        bytes.resize(bytes.len().max(HEAD + bitmap), 0);
        let present: u32 = bytes[HEAD..HEAD + bitmap].iter().map(|byte| byte.count_ones()).sum();
        put(&mut bytes, 10, &(present as u16).to_le_bytes());
        bytes.resize(HEAD + bitmap + present as usize * ID, 7);
    }
    bytes
}

/// A node of a disk map: little memory is held; its slots and the list of those that hold something agree; it encodes to
/// the bytes that were read, so no two nodes mean the same.
pub fn map(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    let bytes = node(*mode, bytes);
    bounded(bytes.len(), 4, 4096, || drop(fuzzing::MapNode::decode(&bytes)));
    let Ok(node) = fuzzing::MapNode::decode(&bytes) else { return };
    let slots = node.slots();
    let from_slots: Vec<_> =
        (0..).zip(&slots).filter_map(|(slot, id): (u64, _)| id.map(|id| (slot, id))).collect();
    assert_eq!(node.present(), from_slots);
    assert!(!from_slots.is_empty(), "a node of zeroes is absent");
    assert!(node.encode().as_ref() == Some(&bytes), "other bytes were read");
}

/// Nodes that were written, as they are, and to be made to fit whatever becomes of them.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let id = |number: u32| ChunkId::of(&number.to_le_bytes());
    let picks: [&[u32]; 2] = [&[0], &[3, 4, 5, 255]];
    let mut seeds = Vec::new();
    for level in [0, 3] {
        for pick in picks {
            let slots = (0..256).map(|slot| pick.contains(&slot).then(|| id(slot))).collect();
            let node = fuzzing::encode_node(level, slots).expect("something is present");
            seeds.extend([0, 3].map(|mode| [&[mode], &node[..]].concat()));
        }
    }
    seeds
}
