//! The bytes of a checkpoint: which chunks are home, whole or in part, and which of them the guest wrote. Pure.
//!
//! A chunk is absent, whole, or home in part; only of the last kind are the blocks told apart. So the room of a
//! checkpoint follows from how many chunks can ever be home in part (see [`JournalLayout`]).

use block::AlignedBuf;

use super::format::{JournalLayout, PAGE, SessionId, is_sealed, put, seal, u32_at, u64_at};
use crate::live::bits::Bits;

const MAGIC: [u8; 8] = *b"LBCKPT\x02\n";
/// Chunks of one segment of a body.
const SEGMENT_CHUNKS: u64 = 4096;
/// What stands before the bitmaps of a segment.
const TAGS: usize = 3;
const NONE: u8 = 0;
const ALL: u8 = 1;
const BITMAP: u8 = 2;

/// What a checkpoint says beside its bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CheckpointFlags {
    /// The session ended in order: nothing was written after this.
    pub(super) parked: bool,
    /// The whole disk is home.
    pub(super) complete: bool,
}

/// A checkpoint whose page holds; its body is still to be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CheckpointHeader {
    pub(super) generation: u64,
    pub(super) flags: CheckpointFlags,
    pub(super) body_len: usize,
    body_crc: u32,
}

/// The most bytes that a body needs where at most `partial` of so many chunks are home in part.
pub(super) fn body_len_max(chunks: u64, chunk_blocks: u64, partial: u64) -> u64 {
    let segments = chunks.div_ceil(SEGMENT_CHUNKS);
    let bitmaps = chunks / SEGMENT_CHUNKS * (SEGMENT_CHUNKS / 8) + (chunks % SEGMENT_CHUNKS).div_ceil(8);
    segments * TAGS as u64 + 3 * bitmaps + partial.min(chunks) * chunk_blocks.div_ceil(8)
}

/// A whole checkpoint, page and body, padded to pages. `G` is noted only where `P` is, and for whole chunks.
pub(super) fn encode_checkpoint(
    session: SessionId,
    generation: u64,
    flags: CheckpointFlags,
    chunk_blocks: u64,
    p: &Bits<'_>,
    g: &Bits<'_>,
) -> AlignedBuf {
    let mut body = Vec::new();
    for segment in Segment::all(p.len(), chunk_blocks) {
        segment.encode(p, g, &mut body);
    }
    let mut buf = AlignedBuf::zeroed(PAGE + body.len().next_multiple_of(PAGE));
    let flags = u64::from(flags.parked) | u64::from(flags.complete) << 1;
    put(&mut buf, 0, &MAGIC);
    put(&mut buf, 8, &generation.to_le_bytes());
    put(&mut buf, 16, &session.0);
    put(&mut buf, 32, &flags.to_le_bytes());
    put(&mut buf, 40, &(body.len() as u64).to_le_bytes());
    put(&mut buf, 48, &crc32fast::hash(&body).to_le_bytes());
    seal(&mut buf[..PAGE]);
    put(&mut buf, PAGE, &body);
    buf
}

/// The page of a checkpoint, or `None` where it does not hold or is another session's.
pub(super) fn decode_checkpoint_header(
    page: &[u8],
    session: SessionId,
    layout: JournalLayout,
) -> Option<CheckpointHeader> {
    if page.len() != PAGE || !is_sealed(page) || page[..8] != MAGIC || page[16..32] != session.0 {
        return None;
    }
    let flags = u64_at(page, 32);
    let room = (layout.slot_pages as usize - 1) * PAGE;
    let body_len = usize::try_from(u64_at(page, 40)).ok().filter(|&len| len <= room)?;
    Some(CheckpointHeader {
        generation: u64_at(page, 8),
        flags: CheckpointFlags { parked: flags & 1 != 0, complete: flags & 2 != 0 },
        body_len,
        body_crc: u32_at(page, 48),
    })
}

impl CheckpointHeader {
    /// Sets in `p` and `g` what the body says. False where it does not hold; nothing is set then.
    pub(super) fn apply(&self, body: &[u8], chunk_blocks: u64, p: &Bits<'_>, g: &Bits<'_>) -> bool {
        if body.len() != self.body_len || crc32fast::hash(body) != self.body_crc {
            return false;
        }
        // The checksum holds, so what follows was written by `encode_checkpoint`; it is checked
        // once without effect all the same, because a wrong bit here costs a guest its data.
        walk(body, chunk_blocks, p, |_, _, _| ())
            && walk(body, chunk_blocks, p, |word, home, guest| {
                p.or_word(word, home);
                g.or_word(word, guest);
            })
    }
}

/// Some neighbouring chunks of a disk of `blocks` blocks.
#[derive(Clone, Copy)]
struct Segment {
    first_chunk: u64,
    chunks: u64,
    chunk_blocks: u64,
    blocks: u64,
}

impl Segment {
    fn all(blocks: u64, chunk_blocks: u64) -> impl Iterator<Item = Self> {
        let count = blocks.div_ceil(chunk_blocks);
        (0..count).step_by(SEGMENT_CHUNKS as usize).map(move |first_chunk| Self {
            first_chunk,
            chunks: SEGMENT_CHUNKS.min(count - first_chunk),
            chunk_blocks,
            blocks,
        })
    }

    const fn bitmap_len(self) -> usize {
        self.chunks.div_ceil(8) as usize
    }

    /// The bytes in which the blocks of a chunk are told apart.
    const fn chunk_len(self) -> usize {
        self.chunk_blocks.div_ceil(8) as usize
    }

    /// The words, each with the bits in it, of a chunk's blocks; a chunk has whole words or lies in one.
    fn words(self, chunk: u64) -> impl Iterator<Item = (usize, u64)> {
        let start = (self.first_chunk + chunk) * self.chunk_blocks;
        let end = (start + self.chunk_blocks).min(self.blocks);
        (start / 64..end.div_ceil(64)).map(move |word| {
            let (from, to) = (start.saturating_sub(word * 64), (end - word * 64).min(64));
            let below = if to == 64 { u64::MAX } else { (1 << to) - 1 };
            (word as usize, below & u64::MAX << from)
        })
    }

    /// All the words of its blocks.
    const fn all_words(self) -> std::ops::Range<usize> {
        let start = self.first_chunk * self.chunk_blocks;
        let end = start + self.chunks * self.chunk_blocks;
        let end = if end < self.blocks { end } else { self.blocks };
        (start / 64) as usize..end.div_ceil(64) as usize
    }

    fn encode(self, p: &Bits<'_>, g: &Bits<'_>, body: &mut Vec<u8>) {
        // Where chunks are smaller than a word, segments are whole words all the same.
        let words = || self.all_words();
        let is_untouched = || words().all(|word| g.word(word) & p.word(word) == 0);
        if words().all(|word| p.word(word) == p.full_word(word)) && is_untouched() {
            return body.extend([ALL, NONE, NONE]);
        }
        if words().all(|word| p.word(word) == 0) {
            return body.extend([NONE, NONE, NONE]);
        }
        let len = self.bitmap_len();
        let [mut whole, mut partial, mut guest] = [(); 3].map(|()| vec![0_u8; len]);
        let mut blocks = Vec::new();
        for chunk in 0..self.chunks {
            let (mut is_whole, mut is_home, mut is_guests) = (true, false, false);
            for (word, mask) in self.words(chunk) {
                let home = p.word(word) & mask;
                is_whole &= home == mask;
                is_home |= home != 0;
                is_guests |= g.word(word) & home != 0;
            }
            let (at, bit) = ((chunk / 8) as usize, 1 << (chunk % 8));
            if is_whole {
                whole[at] |= bit;
            } else if is_home {
                partial[at] |= bit;
                let end = blocks.len() + self.chunk_len();
                for (word, mask) in self.words(chunk) {
                    let bits = (p.word(word) & mask) >> mask.trailing_zeros();
                    blocks.extend_from_slice(&bits.to_le_bytes()[..self.chunk_len().min(8)]);
                }
                blocks.resize(end, 0);
            }
            if is_guests {
                guest[at] |= bit;
            }
        }
        let home: Vec<u8> = whole.iter().zip(&partial).map(|(whole, partial)| whole | partial).collect();
        let every = self.every();
        let tag = |bitmap: &[u8], all: &[u8]| match bitmap {
            bitmap if bitmap.iter().all(|&byte| byte == 0) => NONE,
            bitmap if bitmap == all => ALL,
            _ => BITMAP,
        };
        let tags = [tag(&whole, &every), tag(&partial, &every), tag(&guest, &home)];
        body.extend(tags);
        for (tag, bitmap) in tags.into_iter().zip([whole, partial, guest]) {
            if tag == BITMAP {
                body.extend(bitmap);
            }
        }
        body.extend(blocks);
    }

    /// The bitmap in which each of its chunks is set.
    fn every(self) -> Vec<u8> {
        let mut every = vec![u8::MAX; self.bitmap_len()];
        if let (Some(last), rest @ 1..) = (every.last_mut(), self.chunks % 8) {
            *last = (1 << rest) - 1;
        }
        every
    }

    /// Reads itself from the start of `body`, and returns the rest; `None` where it is none.
    fn decode<'a>(
        self,
        body: &'a [u8],
        p: &Bits<'_>,
        set: &mut impl FnMut(usize, u64, u64),
    ) -> Option<&'a [u8]> {
        let (&tags, mut rest) = body.split_first_chunk::<TAGS>()?;
        if matches!(tags, [ALL, NONE, NONE | ALL]) {
            for word in self.all_words() {
                let home = p.full_word(word);
                set(word, home, if tags[2] == ALL { home } else { 0 });
            }
            return Some(rest);
        }
        let every = self.every();
        let nothing = vec![0; every.len()];
        let mut bitmap = |tag: u8, all: &[u8]| match tag {
            NONE => Some(nothing.clone()),
            ALL => Some(all.to_vec()),
            BITMAP => {
                let (bitmap, after) = rest.split_at_checked(all.len())?;
                rest = after;
                Some(bitmap.to_vec())
            }
            _ => None,
        };
        let whole = bitmap(tags[0], &every)?;
        let partial = bitmap(tags[1], &every)?;
        let home: Vec<u8> = whole.iter().zip(&partial).map(|(whole, partial)| whole | partial).collect();
        let guest = bitmap(tags[2], &home)?;
        let is_within =
            |bitmap: &[u8], all: &[u8]| bitmap.iter().zip(all).all(|(bits, all)| bits & !all == 0);
        let is_either = whole.iter().zip(&partial).all(|(whole, partial)| whole & partial == 0);
        if !is_either || !is_within(&home, &every) || !is_within(&guest, &home) {
            return None;
        }
        for chunk in 0..self.chunks {
            let (at, bit) = ((chunk / 8) as usize, 1 << (chunk % 8));
            let mut blocks = None;
            if partial[at] & bit != 0 {
                let (bytes, after) = rest.split_at_checked(self.chunk_len())?;
                (blocks, rest) = (Some(bytes), after);
            } else if whole[at] & bit == 0 {
                continue;
            }
            for (index, (word, mask)) in self.words(chunk).enumerate() {
                let home = blocks.map_or(mask, |bytes| word_of(bytes, index) << mask.trailing_zeros() & mask);
                set(word, home, if guest[at] & bit != 0 { home } else { 0 });
            }
        }
        Some(rest)
    }
}

/// A word of a little-endian bitmap; beyond its end there are zeroes.
fn word_of(bytes: &[u8], index: usize) -> u64 {
    let mut word = [0; 8];
    let bytes = &bytes[(index * 8).min(bytes.len())..];
    let len = bytes.len().min(8);
    word[..len].copy_from_slice(&bytes[..len]);
    u64::from_le_bytes(word)
}

/// Tells `set` each word of the map of which the body says something, the bits of `P` in it, and those of `G`. False
/// where the body is none.
fn walk(mut body: &[u8], chunk_blocks: u64, p: &Bits<'_>, mut set: impl FnMut(usize, u64, u64)) -> bool {
    for segment in Segment::all(p.len(), chunk_blocks) {
        let Some(rest) = segment.decode(body, p, &mut set) else { return false };
        body = rest;
    }
    body.is_empty()
}
