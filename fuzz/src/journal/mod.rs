//! The journal of a live-restore, byte for byte as docs/format.md and its module have it.

mod checkpoint;
mod header;
mod log;

pub use checkpoint::{checkpoint, seeds as checkpoint_seeds};
pub use header::{header, seeds as header_seeds};
pub use log::{log, seeds as log_seeds};

use agent::live::SessionId;

const PAGE: usize = 4096;
const SESSION: SessionId = SessionId([9; 16]);

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// Puts the checksum of a page into its last four bytes.
fn seal(page: &mut [u8]) {
    let crc = crc32fast::hash(&page[..PAGE - 4]);
    put(page, PAGE - 4, &crc.to_le_bytes());
}
