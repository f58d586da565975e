//! The stored bytes of a chunk.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | codec: the lowest two bits; bit 2: its key; bit 3: its CRC fits; bits 4, 5: the room around what is decoded |
//! | 1, 2 | its plain length |
//! | 3.. | the stored bytes |

use std::cell::RefCell;

use repository::{
    ChunkDecoder, ChunkEncoder, ChunkId, Codec, DEFAULT_LEVEL, KeyRef, Location, PackId, RecordKind,
    Undecoded,
};

use super::has;
use crate::input::Input;
use crate::memory::bounded;

const GUARD: u8 = 0xee;
/// zstd's context, which is kept from one chunk to the next.
const CONTEXT_BYTES: usize = 1 << 20;

thread_local! {
    static DECODER: RefCell<ChunkDecoder> = RefCell::new(ChunkDecoder::new().expect("there is memory"));
}

fn decode(at: &Location, stored: &[u8], id: &ChunkId, out: &mut [u8]) -> repository::Result<()> {
    DECODER.with_borrow_mut(|decoder| decoder.decode(at, stored, id, out))
}

/// The stored bytes of a chunk: nothing is written beyond the room for it, little memory is held, and only the chunk that
/// was asked for is ever given.
pub fn chunk(data: &[u8]) {
    let mut input = Input::new(data);
    let mode = input.u8();
    let plain_len = usize::from(input.u16());
    let stored = input.rest();
    let crc = crc32fast::hash(stored);
    let at = Location {
        pack: PackId::from_bytes([1; 16]),
        offset: 64,
        stored_len: stored.len() as u32,
        plain_len: plain_len as u32,
        crc: if has(mode, 3) { crc } else { !crc },
        codec: Codec(mode & 3),
        key: KeyRef(mode >> 2 & 1),
        kind: RecordKind::CHUNK,
    };
    let guard = usize::from(mode >> 4 & 3) * 16;
    let mut room = vec![GUARD; guard + plain_len + guard];
    let someone = ChunkId::from_bytes([5; 32]);
    let place = guard..guard + plain_len;
    bounded(0, 0, CONTEXT_BYTES, || {
        let result = decode(&at, stored, &someone, &mut room[place.clone()]);
        assert!(result.is_err(), "a chunk was given for another");
    });
    let beyond = room[..guard].iter().chain(&room[guard + plain_len..]);
    assert!(beyond.copied().all(|byte| byte == GUARD), "something was written beyond the room");
    // What it decodes to, if to anything, has a name, by which it can be asked for.
    let decoded = room[place.clone()].to_vec();
    let id = ChunkId::of(&decoded);
    room[place.clone()].fill(GUARD);
    let mut other = vec![GUARD; plain_len];
    let together = DECODER.with_borrow_mut(|decoder| {
        let (out, other) = (&mut room[place.clone()], &mut other[..]);
        let mut chunks = [
            Undecoded { at: &at, stored, id: &someone, out: other },
            Undecoded { at: &at, stored, id: &id, out },
        ];
        decoder.decode_each(&mut chunks).iter().map(Result::is_ok).collect::<Vec<_>>()
    });
    assert!(!together[0], "a chunk was given for another");
    assert!(!together[1] || room[place.clone()] == decoded[..], "the same bytes decode to something else");
    room[place.clone()].fill(GUARD);
    let alone = decode(&at, stored, &id, &mut room[place.clone()]).is_ok();
    assert_eq!(alone, together[1], "it matters whether a chunk is decoded among others");
    if decode(&at, stored, &id, &mut room[place.clone()]).is_ok() {
        assert!(room[place] == decoded[..], "the same bytes decode to something else");
        assert!(has(mode, 3) && mode & 0b110 == 0, "a wrong CRC, an unknown codec or key");
    }
}

/// Chunks as they are stored.
///
/// # Panics
/// Where there is no memory for zstd.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL).expect("there is memory");
    let counting: Vec<u8> = (0..5000_u32).flat_map(|number| (number / 7).to_le_bytes()).collect();
    let plain: [&[u8]; 4] = [&[7; 3000], b"\0", &counting, b"what does not shrink"];
    let mut seeds = Vec::new();
    for plain in plain {
        let stored = encoder.encode(plain).expect("not too long");
        let mut seed = vec![0b0011_1000 | stored.codec.0];
        seed.extend((plain.len() as u16).to_be_bytes());
        seed.extend_from_slice(stored.bytes);
        seeds.push(seed);
    }
    seeds
}
