//! Reading a segment: finding one id by filter and interpolation, or all records in order.

use std::sync::Arc;

use zerocopy::FromBytes;

use super::build::{BLOCKS_PER_PAGE, MAX_ENTRIES, PACKS_PER_PAGE, RECORDS_PER_PAGE, TRAILER_MAGIC, Trailer};
use super::filter::{self, BLOCK_LEN};
use super::page::{self, PAGE_LEN, Page, PageCache};
use crate::codec::MAX_PLAIN_LEN;
use crate::error::{Error, Result};
use crate::header::{self, FileKind, HEADER_LEN};
use crate::id::{ChunkId, PackId, SegmentId};
use crate::record::{Location, RECORD_LEN, Record};
use crate::storage::ReadFile;

/// How often the place of an id is guessed from its neighbours before bisection takes over.
const GUESSES: usize = 4;
/// What encryption may add to the plain length.
const MAX_OVERHEAD: usize = 4096;
/// How many pages are read at once when all are.
const SCAN_PAGES: u32 = 256;

/// An open segment.
pub(crate) struct Segment {
    id: SegmentId,
    file: Arc<dyn ReadFile>,
    cache: Arc<PageCache>,
    owner: u64,
    entries: u64,
    packs: u32,
    blocks: u32,
    entry_pages: u32,
    pack_pages: u32,
}

impl Segment {
    pub(crate) fn open(file: Arc<dyn ReadFile>, id: SegmentId, cache: Arc<PageCache>) -> Result<Self> {
        let damaged = |how: &str| Error::damaged(format!("index segment {id} {how}"));
        let len = file.len_bytes().map_err(|error| Error::io("cannot read an index segment", error))?;
        let pages = len / PAGE_LEN as u64;
        if pages < 2 || pages > u64::from(u32::MAX) || !len.is_multiple_of(PAGE_LEN as u64) {
            return Err(damaged("has a length that none has: it is cut short or was added to"));
        }
        let first = page::read(&*file, 0)?;
        header::check(&first.content()[..HEADER_LEN], FileKind::Index, *id.as_bytes())?;
        let last = page::read(&*file, pages as u32 - 1)?;
        let (trailer, rest) =
            Trailer::ref_from_prefix(last.content()).map_err(|_| damaged("has no trailer"))?;
        let (entries, packs, blocks) = (trailer.entries.get(), trailer.packs.get(), trailer.blocks.get());
        let ours = trailer.magic == TRAILER_MAGIC && trailer.id == *id.as_bytes();
        let clean = rest.iter().chain(&first.content()[HEADER_LEN..]).all(|byte| *byte == 0);
        let entry_pages = entries.div_ceil(RECORDS_PER_PAGE as u64);
        let pack_pages = packs.div_ceil(PACKS_PER_PAGE as u32);
        let wanted =
            2 + entry_pages + u64::from(pack_pages) + u64::from(blocks.div_ceil(BLOCKS_PER_PAGE as u32));
        if !ours || !clean || entries > MAX_ENTRIES || blocks == 0 || wanted != pages {
            return Err(damaged("is cut short, or its trailer is another's"));
        }
        let owner = cache.owner();
        Ok(Self {
            id,
            file,
            cache,
            owner,
            entries,
            packs,
            blocks,
            entry_pages: entry_pages as u32,
            pack_pages,
        })
    }

    pub(crate) fn id(&self) -> SegmentId {
        self.id
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    fn page(&self, number: u32) -> Result<Arc<Page>> {
        self.cache.page(self.owner, &*self.file, number)
    }

    /// The records of the entry page `number`, counted from 0.
    fn records<'a>(&self, number: u32, page: &'a [u8]) -> Result<&'a [Record]> {
        let before = u64::from(number) * RECORDS_PER_PAGE as u64;
        let here = (self.entries - before).min(RECORDS_PER_PAGE as u64) as usize;
        <[Record]>::ref_from_bytes(&page[..here * RECORD_LEN])
            .map_err(|_| Error::damaged(format!("index segment {} has a broken page", self.id)))
    }

    /// Where this segment says that a chunk is.
    pub(crate) fn find(&self, id: &ChunkId) -> Result<Option<Location>> {
        let block = filter::block_of(id, self.blocks);
        let filter_page = 1 + self.entry_pages + self.pack_pages + block / BLOCKS_PER_PAGE as u32;
        let page = self.page(filter_page)?;
        let at = block as usize % BLOCKS_PER_PAGE * BLOCK_LEN;
        if !filter::may_contain(&page.content()[at..at + BLOCK_LEN], id) {
            return Ok(None);
        }
        match self.search(id)? {
            Some(record) => self.location(&record).map(Some),
            None => Ok(None),
        }
    }

    fn search(&self, id: &ChunkId) -> Result<Option<Record>> {
        let key = id.prefix();
        let (mut low, mut high) = (0, self.entry_pages);
        let (mut low_key, mut high_key) = (0, u64::MAX);
        let mut probes = 0;
        while low < high {
            let guess = if probes < GUESSES {
                let part = u128::from(key.saturating_sub(low_key)) * u128::from(high - low);
                low + (part / (u128::from(high_key.saturating_sub(low_key)) + 1)) as u32
            } else {
                low + (high - low) / 2
            };
            probes += 1;
            let guess = guess.min(high - 1);
            let page = self.page(1 + guess)?;
            let records = self.records(guess, page.content())?;
            let (Some(first), Some(last)) = (records.first(), records.last()) else { return Ok(None) };
            if id.as_bytes() < &first.id {
                (high, high_key) = (guess, first.chunk_id().prefix());
            } else if id.as_bytes() > &last.id {
                (low, low_key) = (guess + 1, last.chunk_id().prefix());
            } else {
                let found = records.binary_search_by(|record| record.id.cmp(id.as_bytes()));
                return Ok(found.ok().map(|at| records[at]));
            }
        }
        Ok(None)
    }

    fn location(&self, record: &Record) -> Result<Location> {
        let number = record.pack.get();
        if number >= self.packs {
            return Err(Error::damaged(format!(
                "index segment {} names a pack that it does not have",
                self.id
            )));
        }
        let page = self.page(1 + self.entry_pages + number / PACKS_PER_PAGE as u32)?;
        let at = number as usize % PACKS_PER_PAGE * 16;
        let pack = PackId::from_bytes(page.content()[at..at + 16].try_into().expect("16 bytes"));
        let location = record.location(pack);
        let fits = location.plain_len as usize <= MAX_PLAIN_LEN
            && location.stored_len as usize <= MAX_PLAIN_LEN + MAX_OVERHEAD
            && location.offset as usize >= HEADER_LEN
            && location.end() <= crate::pack::format::MAX_LEN
            && record.reserved == 0;
        if !fits {
            return Err(Error::damaged(format!("index segment {} has an entry that cannot be", self.id)));
        }
        Ok(location)
    }

    /// All packs that it names.
    pub(crate) fn packs(&self) -> Result<Vec<PackId>> {
        let mut packs = Vec::with_capacity(self.packs as usize);
        for number in 0..self.pack_pages {
            let page = page::read(&*self.file, 1 + self.entry_pages + number)?;
            let here = (self.packs as usize - packs.len()).min(PACKS_PER_PAGE);
            let ids = page.content().chunks_exact(16).take(here);
            packs.extend(ids.map(|id| PackId::from_bytes(id.try_into().expect("16 bytes"))));
        }
        if !packs.is_sorted() {
            return Err(Error::damaged(format!("index segment {} has packs out of order", self.id)));
        }
        Ok(packs)
    }

    /// All records, in order, past the cache.
    pub(crate) fn scan(&self) -> Scan<'_> {
        Scan { segment: self, next_page: 0, buffer: Vec::new(), at: 0, last: None }
    }

    /// Goes through all records, past the cache.
    pub(crate) fn for_each(&self, mut each: impl FnMut(&Record, &Location)) -> Result<()> {
        let mut scan = self.scan();
        while let Some(record) = scan.next()? {
            each(&record, &self.location(&record)?);
        }
        Ok(())
    }

    /// Reads every page past the cache, whether or not anything needs it, and checks that each entry can be found.
    pub(crate) fn check_all(&self) -> Result<()> {
        let filter_from = 1 + self.entry_pages + self.pack_pages;
        let filter = (0..self.blocks.div_ceil(BLOCKS_PER_PAGE as u32))
            .map(|number| page::read(&*self.file, filter_from + number))
            .collect::<Result<Vec<_>>>()?;
        let mut hidden = 0u64;
        self.for_each(|record, _| {
            let id = record.chunk_id();
            let block = filter::block_of(&id, self.blocks) as usize;
            let at = block % BLOCKS_PER_PAGE * BLOCK_LEN;
            let page = &filter[block / BLOCKS_PER_PAGE];
            hidden += u64::from(!filter::may_contain(&page.content()[at..at + BLOCK_LEN], &id));
        })?;
        if hidden > 0 {
            return Err(Error::damaged(format!(
                "the filter of index segment {} hides {hidden} entries",
                self.id
            )));
        }
        Ok(())
    }
}

/// Goes through a segment's records.
pub(crate) struct Scan<'a> {
    segment: &'a Segment,
    next_page: u32,
    buffer: Vec<Record>,
    at: usize,
    last: Option<ChunkId>,
}

impl Scan<'_> {
    pub(crate) fn next(&mut self) -> Result<Option<Record>> {
        if self.at == self.buffer.len() {
            if self.next_page == self.segment.entry_pages {
                return Ok(None);
            }
            self.load()?;
        }
        let record = self.buffer[self.at];
        self.at += 1;
        if self.last >= Some(record.chunk_id()) {
            return Err(Error::damaged(format!("index segment {} is out of order", self.segment.id)));
        }
        self.last = Some(record.chunk_id());
        Ok(Some(record))
    }

    fn load(&mut self) -> Result<()> {
        let segment = self.segment;
        let count = (segment.entry_pages - self.next_page).min(SCAN_PAGES);
        let mut bytes = vec![0; count as usize * PAGE_LEN];
        segment
            .file
            .read_at(&mut bytes, u64::from(1 + self.next_page) * PAGE_LEN as u64)
            .map_err(|error| Error::io(format!("cannot read index segment {}", segment.id), error))?;
        self.buffer.clear();
        self.at = 0;
        for page in bytes.chunks_exact(PAGE_LEN) {
            page::check(1 + self.next_page, page)?;
            self.buffer.extend_from_slice(segment.records(self.next_page, page)?);
            self.next_page += 1;
        }
        Ok(())
    }
}
