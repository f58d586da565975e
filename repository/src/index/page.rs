//! Pages of an index segment: each carries the checksum of itself and its place; those in use are cached.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::sync::Cache;

use crate::error::{Error, Result};
use crate::storage::ReadFile;

pub(crate) const PAGE_LEN: usize = 4096;
/// What a page holds beside its checksum.
pub(crate) const PAGE_ROOM: usize = PAGE_LEN - 4;
/// How many pages stay in memory: 64 MiB.
const CACHED_PAGES: usize = 16384;

/// A page whose checksum was compared.
pub(crate) struct Page([u8; PAGE_LEN]);

impl Page {
    pub(crate) fn content(&self) -> &[u8] {
        &self.0[..PAGE_ROOM]
    }
}

/// The CRC-32 of a page's number and content.
fn crc(number: u32, content: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.update(content);
    hasher.finalize()
}

/// Puts the checksum at the end of a page.
pub(crate) fn seal(number: u32, page: &mut [u8; PAGE_LEN]) {
    let crc = crc(number, &page[..PAGE_ROOM]);
    page[PAGE_ROOM..].copy_from_slice(&crc.to_le_bytes());
}

/// Checks a page that was read.
pub(crate) fn check(number: u32, page: &[u8]) -> Result<()> {
    let (content, stated) = page.split_at(PAGE_ROOM);
    if stated != crc(number, content).to_le_bytes() {
        return Err(Error::damaged(format!(
            "page {number} of the index segment does not match its checksum"
        )));
    }
    Ok(())
}

/// Reads one page past the cache.
pub(crate) fn read(file: &dyn ReadFile, number: u32) -> Result<Page> {
    let mut page = Page([0; PAGE_LEN]);
    file.read_at(&mut page.0, u64::from(number) * PAGE_LEN as u64)
        .map_err(|error| Error::io(format!("cannot read page {number} of an index segment"), error))?;
    check(number, &page.0)?;
    Ok(page)
}

/// Pages of all segments, by a number that each open segment has of its own.
pub(crate) struct PageCache {
    pages: Cache<(u64, u32), Arc<Page>>,
    next_owner: AtomicU64,
}

impl PageCache {
    pub(crate) fn new() -> Self {
        Self { pages: Cache::new(CACHED_PAGES), next_owner: AtomicU64::new(0) }
    }

    pub(crate) fn owner(&self) -> u64 {
        self.next_owner.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn page(&self, owner: u64, file: &dyn ReadFile, number: u32) -> Result<Arc<Page>> {
        if let Some(page) = self.pages.get(&(owner, number)) {
            return Ok(page);
        }
        let page = Arc::new(read(file, number)?);
        self.pages.insert((owner, number), page.clone());
        Ok(page)
    }
}
