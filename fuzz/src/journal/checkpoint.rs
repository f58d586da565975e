//! A checkpoint, page and body.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | bit 0: magic, session, the body's length and both checksums are made to fit |
//! | 1, 2 | blocks of the disk, in units of 64, and the lowest six bits so many fewer |
//! | 3..55 | the first 52 bytes of the page |
//! | 55.. | the body |

use agent::live::fuzzing::{self, Home};

use super::{PAGE, SESSION, put, seal};
use crate::input::Input;
use crate::memory::bounded;

const FIELDS: usize = 52;

/// A checkpoint: it is applied whole or not at all; little memory is held; nothing beyond the disk is home, and nothing is the
/// guest's that is not home; written again it says the same.
pub fn checkpoint(data: &[u8]) {
    let mut input = Input::new(data);
    let fit = input.u8() & 1 != 0;
    let number = u64::from(input.u16());
    let blocks = (number * 64 + 64).saturating_sub(number & 63).max(1);
    let mut bytes = vec![0; PAGE];
    let fields = input.bytes(FIELDS);
    bytes[..fields.len()].copy_from_slice(fields);
    let body = input.rest();
    if fit {
        put(&mut bytes, 0, b"LBCKPT\x01\n");
        put(&mut bytes, 16, &SESSION.0);
        put(&mut bytes, 40, &(body.len() as u64).to_le_bytes());
        put(&mut bytes, 48, &crc32fast::hash(body).to_le_bytes());
        seal(&mut bytes);
    }
    bytes.extend_from_slice(body);
    let bitmaps = blocks.div_ceil(64) as usize * 8;
    let read = bounded(bitmaps, 8, 4096, || fuzzing::checkpoint(&bytes, SESSION, blocks));
    let Some((generation, home)) = read else { return };
    assert!(home.p.iter().zip(&home.g).all(|(p, g)| g & !p == 0), "the guest's, and not home");
    let rest = blocks % 64;
    if rest != 0 {
        assert_eq!(home.p.last().map_or(0, |word| word >> rest), 0, "home, and beyond the disk");
    }
    let again = fuzzing::encode_checkpoint_of(SESSION, blocks, generation, &home);
    assert_eq!(
        fuzzing::checkpoint(&again, SESSION, blocks),
        Some((generation, home)),
        "it does not come back"
    );
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
            let bytes = fuzzing::encode_checkpoint_of(SESSION, blocks, 6, &home);
            let body_len = u64::from_le_bytes(bytes[40..48].try_into().expect("eight bytes")) as usize;
            for mode in [0, 1] {
                let head = [&[mode][..], &number.to_be_bytes(), &bytes[..FIELDS]].concat();
                seeds.push([&head[..], &bytes[PAGE..PAGE + body_len]].concat());
            }
        }
    }
    seeds
}
