//! A segment of the index.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | what is made to fit: bit 0 the header; bit 1 the trailer's magic, id and rest; bit 2 the pages' CRCs; bit 3 the number of pages |
//! | 1.. | pages: length (2), and so many of their first bytes; the rest of a page is zeroes |

use std::sync::Arc;

use repository::{ChunkId, fuzzing};

use super::files::{Bytes, Memory};
use super::{PAGE, entries, has, header, put, u32_at};
use crate::input::Input;
use crate::memory::bounded;

const ID: [u8; 16] = [2; 16];
const MAX_PAGES: usize = 24;
const ROOM: usize = PAGE - 4;
const MAX_PACK_LEN: u64 = 128 << 20;

/// The file that an input stands for.
fn file(data: &[u8]) -> Vec<u8> {
    let mut input = Input::new(data);
    let mode = input.u8();
    let mut pages: Vec<[u8; PAGE]> = Vec::new();
    while !input.is_empty() && pages.len() < MAX_PAGES {
        let len = usize::from(input.u16()).min(PAGE);
        let mut page = [0; PAGE];
        let content = input.bytes(len);
        page[..content.len()].copy_from_slice(content);
        pages.push(page);
    }
    if has(mode, 3) && pages.len() > 1 {
        let last = pages.len() - 1;
        let trailer = pages[last];
        let entry_pages = u32_at(&trailer, 8).div_ceil(72) as usize;
        let wanted = entry_pages
            .saturating_add(u32_at(&trailer, 16).div_ceil(255) as usize)
            .saturating_add(u32_at(&trailer, 20).div_ceil(127) as usize)
            .saturating_add(2);
        pages.insert(last, [0; PAGE]);
        pages.resize(wanted.min(MAX_PAGES), [0; PAGE]);
        pages.pop();
        pages.push(trailer);
    }
    if let (true, Some(first)) = (has(mode, 0), pages.first_mut()) {
        first.fill(0);
        put(first, 0, &header(b"INDX", ID));
    }
    if let (true, Some(last)) = (has(mode, 1), pages.last_mut()) {
        put(last, 0, b"LBIXTAIL");
        put(last, 24, &ID);
        last[40..].fill(0);
    }
    if has(mode, 2) {
        for (number, page) in (0_u32..).zip(&mut pages) {
            let content = [&number.to_le_bytes(), &page[..ROOM]].concat();
            put(page, ROOM, &crc32fast::hash(&content).to_le_bytes());
        }
    }
    pages.concat()
}

/// The input that stands for this file.
fn input(mode: u8, file: &[u8]) -> Vec<u8> {
    let mut input = vec![mode];
    for page in file.chunks(PAGE) {
        let content = if mode == 0 { page } else { &page[..page.len().min(ROOM)] };
        let len = content.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        input.extend((len as u16).to_be_bytes());
        input.extend_from_slice(&content[..len]);
    }
    input
}

/// A segment of the index: little memory is held for any; looking for ids ends, and finds places that can be, in packs
/// that it names; ids come in order; and where all of it checks out, everything that it has is found.
pub fn index(data: &[u8]) {
    let bytes = file(data);
    let source = Arc::new(Bytes::new(&bytes));
    // Pages that stay in the cache are those of this file and of 64 MiB of others; the allowance is for this one.
    bounded(bytes.len(), 8, 64 << 10, || {
        let Ok(segment) = fuzzing::Segment::open(source, ID) else { return };
        let packs = segment.packs();
        let ids = segment.scan();
        if let Ok(ids) = &ids {
            assert!(ids.is_sorted_by(|a, b| a < b), "ids out of order");
            assert_eq!(ids.len() as u64, segment.entries());
        }
        let wanted = ids.iter().flatten().copied().take(8);
        let strangers = [[0; 32], [0xff; 32], [0x80; 32]].map(ChunkId::from_bytes);
        for id in wanted.chain(strangers) {
            let Ok(Some(at)) = segment.find(&id) else { continue };
            assert!(at.offset >= 64 && at.end() <= MAX_PACK_LEN && at.plain_len <= 16 << 20, "{at:?}");
            if let Ok(packs) = &packs {
                assert!(packs.contains(&at.pack), "a pack that the segment does not have");
            }
        }
        if segment.check_all().is_ok() {
            assert!(packs.is_ok());
            for id in ids.expect("they were read once more") {
                assert!(segment.find(&id).is_ok_and(|at| at.is_some()), "an entry is not found");
            }
        }
    });
}

/// Segments that were written, as they are, and to be made to fit whatever becomes of them.
///
/// # Panics
/// Where a segment cannot be written to memory.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (count, per_pack) in [(0, 1), (3, 2), (200, 20)] {
        let mut all = entries(count, per_pack);
        all.sort_unstable();
        let memory = Memory::default();
        let path = fuzzing::write_segment(Arc::new(memory.clone()), ID, &all).expect("memory is never full");
        let file = memory.read(&path).expect("it was written");
        let modes: &[u8] = if count > 10 { &[0b0111] } else { &[0, 0b0111, 0b1111] };
        for mode in modes {
            let input = input(*mode, &file);
            assert!(self::file(&input) == file, "an input stands for the file it was made from");
            seeds.push(input);
        }
    }
    seeds
}
