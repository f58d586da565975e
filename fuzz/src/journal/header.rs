//! The header.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | bit 0: magic, version, block size and checksum are made to fit |
//! | 1.. | the page; where the input ends before it, zeroes |

use agent::live::{DiskLayout, fuzzing};

use super::{PAGE, SESSION, put, seal};
use crate::memory::bounded;

/// A journal's header: little memory is held; what is read can be written, and comes back the same.
pub fn header(data: &[u8]) {
    let Some((mode, content)) = data.split_first() else { return };
    let mut page = vec![0; PAGE];
    let len = content.len().min(PAGE);
    put(&mut page, 0, &content[..len]);
    if mode & 1 != 0 {
        put(&mut page, 0, b"LBJRNL\x02\n\x02\0\0\0\0\x10\0\0");
        seal(&mut page);
    }
    let Ok(again) = bounded(PAGE, 4, 16 << 10, || fuzzing::header(&page)) else { return };
    assert!(fuzzing::header(&again).is_ok_and(|third| third == again), "it does not come back");
    let end = again[..PAGE - 4].iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    assert_eq!(again[..end], page[..end], "other bytes were read");
}

/// Headers of a small and of a large disk.
///
/// # Panics
/// Never: the names are short.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (size, chunk_size) in [(4096, 65536), ((1 << 40) - 512, 4 << 20)] {
        let disk = DiskLayout { size, chunk_size };
        let page = fuzzing::encode_header(SESSION, disk, "web01@2026-11-21T00:33:12Z/disk0", "/größe.raw");
        let page = page.expect("the names are short");
        seeds.push([&[0], &page[..]].concat());
        seeds.push([&[1], &page[..128]].concat());
    }
    seeds
}
