//! The ids of many chunks at once, which vector units compute side by side.
//!
//! | bytes of the input | what |
//! |---|---|
//! | | each chunk: length (2); its bytes; where the input ends before them, zeroes |

use repository::{ChunkId, chunk_ids};

use crate::input::Input;

const MAX_CHUNKS: usize = 40;
const MAX_LEN: usize = 1 << 12;

/// The ids of many chunks at once are those of each by itself, whatever their number and lengths.
pub fn ids(data: &[u8]) {
    let mut input = Input::new(data);
    let mut chunks = Vec::new();
    while !input.is_empty() && chunks.len() < MAX_CHUNKS {
        let len = usize::from(input.u16()) % (MAX_LEN + 1);
        // Memory of exactly this length: a sanitizer sees what is read beyond it.
        let mut chunk = vec![0; len].into_boxed_slice();
        let content = input.bytes(len);
        chunk[..content.len()].copy_from_slice(content);
        chunks.push(chunk);
    }
    let borrowed: Vec<&[u8]> = chunks.iter().map(|chunk| &**chunk).collect();
    let alone: Vec<ChunkId> = borrowed.iter().map(|chunk| ChunkId::of(chunk)).collect();
    assert_eq!(chunk_ids(&borrowed), alone);
}

/// Many of one length; all lengths about the edges of a block; none.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let chunks = |lens: &[u16]| {
        let chunk = |(number, len): (u8, &u16)| {
            let mut chunk = len.to_be_bytes().to_vec();
            chunk.extend(std::iter::repeat_n(number, usize::from(*len)));
            chunk
        };
        (1..).zip(lens).flat_map(chunk).collect::<Vec<u8>>()
    };
    vec![chunks(&[200; 17]), chunks(&[0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 0]), chunks(&[64])]
}
