//! A checkpoint, page and body.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | bit 0: magic, session, the body's length and both checksums are made to fit |
//! | 0 | bits 4 to 7: blocks of a chunk, a power of two |
//! | 1, 2 | blocks of the disk, in units of 64, and the lowest six bits so many fewer |
//! | 3..55 | the first 52 bytes of the page |
//! | 55.. | the body |

use agent::live::DiskLayout;
use agent::live::fuzzing::{self, Home};

use super::{PAGE, SESSION, put, seal};
use crate::input::Input;
use crate::memory::bounded;

const FIELDS: usize = 52;

/// A checkpoint: it is applied whole or not at all; little memory is held; nothing beyond the disk is home, and nothing is the
/// guest's that is not home; written again it says the same, because `G` is that of whole chunks already.
pub fn checkpoint(data: &[u8]) {
    let mut input = Input::new(data);
    let mode = input.u8();
    let fit = mode & 1 != 0;
    let number = u64::from(input.u16());
    let blocks = (number * 64 + 64).saturating_sub(number & 63).max(1);
    let mut bytes = vec![0; PAGE];
    let fields = input.bytes(FIELDS);
    bytes[..fields.len()].copy_from_slice(fields);
    let body = input.rest();
    if fit {
        put(&mut bytes, 0, b"LBCKPT\x02\n");
        put(&mut bytes, 16, &SESSION.0);
        put(&mut bytes, 40, &(body.len() as u64).to_le_bytes());
        put(&mut bytes, 48, &crc32fast::hash(body).to_le_bytes());
        seal(&mut bytes);
    }
    bytes.extend_from_slice(body);
    let disk = disk(blocks, mode);
    let bitmaps = blocks.div_ceil(64) as usize * 8;
    let read = bounded(bitmaps, 8, 4096, || fuzzing::checkpoint(&bytes, SESSION, disk));
    let Some((generation, home)) = read else { return };
    assert!(home.p.iter().zip(&home.g).all(|(p, g)| g & !p == 0), "the guest's, and not home");
    let rest = blocks % 64;
    if rest != 0 {
        assert_eq!(home.p.last().map_or(0, |word| word >> rest), 0, "home, and beyond the disk");
    }
    let again = fuzzing::encode_checkpoint_of(SESSION, disk, generation, &home);
    assert_eq!(fuzzing::checkpoint(&again, SESSION, disk), Some((generation, home)), "it does not come back");
}

/// A disk of so many blocks, whose chunks are as large as `mode` says.
fn disk(blocks: u64, mode: u8) -> DiskLayout {
    DiskLayout { size: blocks * 4096, chunk_size: 4096 << (mode >> 4) }
}

/// Checkpoints of small disks: nothing home, everything, some.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (p, g) in [(0, 0), (u64::MAX, 0), (u64::MAX, u64::MAX), (0xff00, 0x0f00)] {
        // Two words, the last of them not whole; and a segment and a bit.
        for number in [1_u16, 600] {
            let blocks = u64::from(number) * 64 + 64 - u64::from(number & 63);
            let words = blocks.div_ceil(64) as usize;
            let home = Home { p: vec![p; words], g: vec![g; words] };
            for mode in [0, 1, 0x41, 0x71] {
                let bytes = fuzzing::encode_checkpoint_of(SESSION, disk(blocks, mode), 6, &home);
                let body_len = u64::from_le_bytes(bytes[40..48].try_into().expect("eight bytes")) as usize;
                let head = [&[mode][..], &number.to_be_bytes(), &bytes[..FIELDS]].concat();
                seeds.push([&head[..], &bytes[PAGE..PAGE + body_len]].concat());
            }
        }
    }
    seeds
}
