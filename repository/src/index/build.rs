//! Writing a segment in one pass, from records that come in the order of their ids.

use std::sync::Arc;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::filter::{self, BLOCK_LEN};
use super::page::{self, PAGE_LEN, PAGE_ROOM};
use crate::aligned::AlignedBuf;
use crate::capture::publish::{remove_temporary, sync_dir};
use crate::error::{Error, Result};
use crate::header::{self, FileKind, HEADER_LEN};
use crate::id::{ChunkId, PackId, SegmentId};
use crate::record::{RECORD_LEN, Record};
use crate::storage::{Storage, WriteFile, WriteHint};

/// How many records a page holds.
pub(crate) const RECORDS_PER_PAGE: usize = PAGE_ROOM / RECORD_LEN;
/// How many pack ids a page holds.
pub(crate) const PACKS_PER_PAGE: usize = 255;
/// How many filter blocks a page holds.
pub(crate) const BLOCKS_PER_PAGE: usize = PAGE_ROOM / BLOCK_LEN;
/// No segment has more entries; larger ones are not merged.
pub(crate) const MAX_ENTRIES: u64 = 64 << 20;
pub(crate) const TRAILER_MAGIC: [u8; 8] = *b"LBIXTAIL";
/// What is written at once.
const PIECE_LEN: usize = 1 << 20;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Trailer {
    pub(crate) magic: [u8; 8],
    pub(crate) entries: U64,
    pub(crate) packs: U32,
    pub(crate) blocks: U32,
    pub(crate) id: [u8; 16],
}

/// A segment that is being written. Dropped, its file is removed.
pub(crate) struct SegmentWriter {
    file: Temporary,
    piece: AlignedBuf,
    page: [u8; PAGE_LEN],
    in_page: usize,
    next_page: u32,
    entries: u64,
    filter: Vec<u8>,
    last: Option<ChunkId>,
}

struct Temporary {
    storage: Arc<dyn Storage>,
    id: SegmentId,
    path: String,
    file: Option<Box<dyn WriteFile>>,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            remove_temporary(&*self.storage, &self.path);
        }
    }
}

impl Temporary {
    fn failed(&self, what: &str, error: std::io::Error) -> Error {
        Error::io(format!("cannot {what} an index segment"), error).at(self.storage.describe(&self.path))
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let file = self.file.as_mut().expect("not published yet");
        file.append(bytes).map_err(|error| self.failed("write", error))
    }
}

impl SegmentWriter {
    /// A segment of at most so many entries.
    pub(crate) fn create(storage: Arc<dyn Storage>, id: SegmentId, at_most: u64) -> Result<Self> {
        let path = format!("tmp/{id}.index");
        let large = at_most as usize * RECORD_LEN > PIECE_LEN;
        let hint = if large { WriteHint::Bulk } else { WriteHint::Small };
        let mut file = Temporary { storage, id, path, file: None };
        file.file =
            Some(file.storage.create(&file.path, hint).map_err(|error| file.failed("create", error))?);
        let filter = vec![0; filter::blocks_for(at_most) as usize * BLOCK_LEN];
        let mut writer = Self {
            file,
            piece: AlignedBuf::new(PIECE_LEN),
            page: [0; PAGE_LEN],
            in_page: 0,
            next_page: 0,
            entries: 0,
            filter,
            last: None,
        };
        writer.page[..HEADER_LEN].copy_from_slice(&header::encode(FileKind::Index, *id.as_bytes()));
        writer.end_page()?;
        Ok(writer)
    }

    /// Adds a record; another of the same id is left out.
    pub(crate) fn push(&mut self, record: &Record) -> Result<()> {
        let id = record.chunk_id();
        if self.last == Some(id) {
            return Ok(());
        }
        assert!(self.last < Some(id), "records come in the order of their ids");
        self.last = Some(id);
        let at = self.in_page * RECORD_LEN;
        self.page[at..at + RECORD_LEN].copy_from_slice(record.as_bytes());
        self.in_page += 1;
        self.entries += 1;
        let blocks = (self.filter.len() / BLOCK_LEN) as u32;
        let block = filter::block_of(&id, blocks) as usize * BLOCK_LEN;
        filter::insert(&mut self.filter[block..block + BLOCK_LEN], &id);
        if self.in_page == RECORDS_PER_PAGE { self.end_page() } else { Ok(()) }
    }

    fn end_page(&mut self) -> Result<()> {
        page::seal(self.next_page, &mut self.page);
        self.next_page += 1;
        self.in_page = 0;
        self.piece.fill(&self.page);
        self.page = [0; PAGE_LEN];
        if self.piece.is_full() {
            self.file.append(self.piece.bytes())?;
            self.piece.clear();
        }
        Ok(())
    }

    /// Writes the rest and syncs. `packs` is what the records' numbers refer to, in ascending order.
    pub(crate) fn seal(mut self, packs: &[PackId]) -> Result<SealedSegment> {
        if self.in_page > 0 {
            self.end_page()?;
        }
        for some in packs.chunks(PACKS_PER_PAGE) {
            for (room, pack) in self.page.chunks_exact_mut(16).zip(some) {
                room.copy_from_slice(pack.as_bytes());
            }
            self.end_page()?;
        }
        let filter = std::mem::take(&mut self.filter);
        for some in filter.chunks(BLOCKS_PER_PAGE * BLOCK_LEN) {
            self.page[..some.len()].copy_from_slice(some);
            self.end_page()?;
        }
        let trailer = Trailer {
            magic: TRAILER_MAGIC,
            entries: U64::new(self.entries),
            packs: U32::new(packs.len() as u32),
            blocks: U32::new((filter.len() / BLOCK_LEN) as u32),
            id: *self.file.id.as_bytes(),
        };
        self.page[..size_of::<Trailer>()].copy_from_slice(trailer.as_bytes());
        self.end_page()?;
        self.file.append(self.piece.bytes())?;
        let synced = self.file.file.as_mut().expect("not published yet").sync();
        synced.map_err(|error| self.file.failed("sync", error))?;
        Ok(SealedSegment(self.file))
    }
}

/// A segment that is complete and on stable storage, under a temporary name. Dropped, its file is removed.
pub(crate) struct SealedSegment(Temporary);

impl SealedSegment {
    /// Gives it its name, durably.
    pub(crate) fn publish(mut self) -> Result<()> {
        let to = super::path(self.0.id);
        let storage = self.0.storage.clone();
        storage
            .publish(&self.0.path, &to)
            .map_err(|error| Error::io("cannot name an index segment", error).at(storage.describe(&to)))?;
        self.0.file = None;
        sync_dir(&*storage, super::DIR)
    }
}
