//! One disk of a capture: what stands at each of its places, told by many threads.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::CaptureShared;
use crate::codec::StoredChunk;
use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::manifest::{DiskEntry, DiskStats};
use crate::map::builder::MapBuilder;
use crate::map::geometry::Geometry;
use crate::map::{DiskMap, LOST, MapEntry};
use crate::name::DiskName;
use crate::record::RecordKind;

/// What became of a chunk that was put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Put {
    /// It is new, and was stored.
    New,
    /// Somebody had stored it already.
    Known,
}

pub(crate) struct DiskShared {
    capture: Arc<CaptureShared>,
    pub(super) name: DiskName,
    geometry: Geometry,
    parent: Option<DiskMap>,
    map: MapBuilder,
    /// It began as a disk that the repository has: what is put replaces something.
    is_over: bool,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    data_chunks: AtomicU64,
    zero_chunks: AtomicU64,
    new_chunks: AtomicU64,
    new_bytes: AtomicU64,
    new_stored_bytes: AtomicU64,
}

impl DiskShared {
    pub(super) fn new(
        capture: Arc<CaptureShared>,
        name: DiskName,
        geometry: Geometry,
        parent: Option<DiskMap>,
    ) -> Self {
        let map = MapBuilder::new(geometry);
        Self { capture, name, geometry, parent, map, is_over: false, counts: Counts::default() }
    }

    /// A disk that is `base`, which `stats` tells of, but for what will be put.
    pub(super) fn over(
        capture: Arc<CaptureShared>,
        name: DiskName,
        base: DiskMap,
        stats: &DiskStats,
    ) -> Result<Self> {
        let geometry = base.geometry();
        let counts = Counts {
            data_chunks: AtomicU64::new(stats.data_chunks),
            zero_chunks: AtomicU64::new(stats.zero_chunks),
            ..Counts::default()
        };
        let map = MapBuilder::over(geometry, base.clone())?;
        Ok(Self { capture, name, geometry, parent: Some(base), map, is_over: true, counts })
    }

    /// Counts places of which `data` hold data now and the others zeroes, and which stood for `replaced` chunks
    /// of data before, where anything stood there.
    fn count(&self, places: u64, data: u64, replaced: u64) {
        self.counts.data_chunks.fetch_add(data, Ordering::Relaxed);
        self.counts.zero_chunks.fetch_add(places - data, Ordering::Relaxed);
        if self.is_over {
            self.counts.data_chunks.fetch_sub(replaced, Ordering::Relaxed);
            self.counts.zero_chunks.fetch_sub(places - replaced, Ordering::Relaxed);
        }
    }

    pub(super) fn finish(&self) -> Result<DiskEntry> {
        let map =
            self.map.finish(&*self.capture).map_err(|error| error.within(format!("disk {}", self.name)))?;
        Ok(DiskEntry {
            name: self.name.clone(),
            size: self.geometry.size(),
            chunk_size: self.geometry.chunk_size(),
            map,
            stats: self.stats(),
        })
    }

    fn stats(&self) -> DiskStats {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        DiskStats {
            data_chunks: read(&self.counts.data_chunks),
            zero_chunks: read(&self.counts.zero_chunks),
            new_chunks: read(&self.counts.new_chunks),
            new_bytes: read(&self.counts.new_bytes),
            new_stored_bytes: read(&self.counts.new_stored_bytes),
        }
    }
}

/// Takes the content of one disk. Share it or clone it: all threads put side by side, in any order, each place once.
#[derive(Clone)]
pub struct DiskWriter(Arc<DiskShared>);

impl DiskWriter {
    pub(super) fn new(shared: Arc<DiskShared>) -> Self {
        Self(shared)
    }

    /// The disk's name.
    pub fn name(&self) -> &DiskName {
        &self.0.name
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.0.geometry.size()
    }

    /// Bytes of a chunk; the disk's last may be shorter.
    pub fn chunk_size(&self) -> u32 {
        self.0.geometry.chunk_size()
    }

    /// How many chunks the disk has, zeroes counted.
    pub fn chunk_count(&self) -> u64 {
        self.0.geometry.chunk_count()
    }

    /// Bytes of chunk `index`.
    ///
    /// # Panics
    /// If the disk has no such chunk.
    pub fn chunk_len(&self, index: u64) -> usize {
        self.0.geometry.chunk_len(index)
    }

    /// What stood there in the parent; none without a parent or past its end.
    ///
    /// # Errors
    /// `Damaged` where the parent's map is.
    pub fn parent_entry(&self, index: u64) -> Result<Option<MapEntry>> {
        match &self.0.parent {
            Some(parent) if index < parent.chunk_count() => parent.entry(index).map(Some),
            _ => Ok(None),
        }
    }

    /// Whether the chunk need not be stored again.
    ///
    /// # Errors
    /// When the index cannot be asked.
    pub fn known(&self, id: &ChunkId) -> Result<bool> {
        self.0.capture.known(id)
    }

    /// Says that these chunks are zeroes.
    ///
    /// # Errors
    /// `InvalidInput` past the end of the disk, or where something was put already.
    pub fn put_zero(&self, chunks: Range<u64>) -> Result<()> {
        let count = chunks.end.saturating_sub(chunks.start);
        let replaced = self.0.map.put_zero(chunks, &*self.0.capture)?;
        self.0.count(count, 0, replaced);
        Ok(())
    }

    /// Says that what stands at `index` cannot be had: no chunk that stood there before does in its place.
    ///
    /// # Errors
    /// `InvalidInput` past the end of the disk, or where something was put already.
    pub fn put_lost(&self, index: u64) -> Result<()> {
        let replaced = self.0.map.put(index, LOST, &*self.0.capture)?;
        self.0.count(1, 1, replaced);
        Ok(())
    }

    /// Says that the chunk `id` stands at `index`, if the repository has it already; false, and nothing said, if it does not:
    /// then encode it and [`DiskWriter::put_chunk`].
    ///
    /// # Errors
    /// `InvalidInput` past the end of the disk, or where something was put already.
    pub fn put_known(&self, index: u64, id: &ChunkId) -> Result<bool> {
        // Even a chunk of the parent is looked up: no snapshot names what the index does not have.
        if !self.0.capture.known(id)? {
            return Ok(false);
        }
        let replaced = self.0.map.put(index, *id, &*self.0.capture)?;
        self.0.count(1, 1, replaced);
        Ok(true)
    }

    /// Says that the chunk `id` stands at `index`, and stores it if it is new.
    ///
    /// # Errors
    /// `InvalidInput` past the end of the disk, where something was put already, or for a chunk of another length than stands there;
    /// `NoSpace` and others when writing failed, which ends the whole capture.
    pub fn put_chunk(&self, index: u64, id: &ChunkId, chunk: &StoredChunk<'_>) -> Result<Put> {
        let disk = &*self.0;
        if index >= disk.geometry.chunk_count() || disk.geometry.chunk_len(index) != chunk.plain_len as usize
        {
            return Err(Error::invalid(format!(
                "{} bytes cannot be chunk {index} of disk {}",
                chunk.plain_len, disk.name
            )));
        }
        let new = disk.capture.store(id, chunk, RecordKind::CHUNK)?;
        let replaced = disk.map.put(index, *id, &*disk.capture)?;
        disk.count(1, 1, replaced);
        if !new {
            return Ok(Put::Known);
        }
        disk.counts.new_chunks.fetch_add(1, Ordering::Relaxed);
        disk.counts.new_bytes.fetch_add(chunk.plain_len.into(), Ordering::Relaxed);
        disk.counts.new_stored_bytes.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
        Ok(Put::New)
    }

    /// What was put so far.
    pub fn stats(&self) -> DiskStats {
        self.0.stats()
    }
}
