//! The disk map: which chunk, or zeroes, stands at each place of a disk. A hash tree, of which snapshots share what is equal.

pub(crate) mod builder;
pub(crate) mod geometry;
pub(crate) mod node;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::map::geometry::{Geometry, INNER_SLOTS, LEAF_SLOTS};
use crate::map::node::Node;
use crate::repository::Repository;

/// What stands at one place of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapEntry {
    /// Zeroes; nothing is stored for it.
    Zero,
    /// This chunk.
    Chunk(ChunkId),
    /// What stood here could not be captured, and nobody has it: see [`Error::lost`].
    Lost,
}

/// What stands in a leaf for [`MapEntry::Lost`]. It is in no index.
pub(crate) const LOST: ChunkId = ChunkId::from_bytes([0xff; 32]);

/// The map of one disk of one snapshot. Its nodes are read when they are needed, and kept in the repository's cache.
#[derive(Clone)]
pub struct DiskMap {
    repository: Repository,
    geometry: Geometry,
    root: Option<ChunkId>,
}

impl DiskMap {
    pub(crate) fn new(repository: Repository, geometry: Geometry, root: Option<ChunkId>) -> Self {
        Self { repository, geometry, root }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The same map, read from another repository that holds it too: nodes are found by what they hold.
    pub fn through(&self, repository: &Repository) -> Self {
        Self { repository: repository.clone(), ..self.clone() }
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.geometry.size()
    }

    /// Bytes of a chunk; the disk's last may be shorter.
    pub fn chunk_size(&self) -> u32 {
        self.geometry.chunk_size()
    }

    /// How many chunks the disk has, zeroes counted.
    pub fn chunk_count(&self) -> u64 {
        self.geometry.chunk_count()
    }

    /// Bytes of chunk `index`.
    ///
    /// # Panics
    /// If the disk has no such chunk.
    pub fn chunk_len(&self, index: u64) -> usize {
        self.geometry.chunk_len(index)
    }

    /// The root of the tree; none for a disk of zeroes. Disks of the same size and chunk size with the same root are equal.
    pub fn root(&self) -> Option<ChunkId> {
        self.root
    }

    /// What stands at chunk `index`.
    ///
    /// # Errors
    /// `InvalidInput` past the end of the disk; `Damaged` where the map is.
    pub fn entry(&self, index: u64) -> Result<MapEntry> {
        self.check_range(&(index..index + 1))?;
        let leaf = self.leaf(index / LEAF_SLOTS)?;
        Ok(entry_of(leaf.as_deref(), index % LEAF_SLOTS))
    }

    /// What stands at each of these chunks, in order.
    ///
    /// # Errors
    /// As for [`DiskMap::entry`].
    pub fn entries(&self, range: Range<u64>) -> Result<Vec<MapEntry>> {
        self.check_range(&range)?;
        let mut entries = Vec::with_capacity((range.end - range.start) as usize);
        let mut at = range.start;
        while at < range.end {
            let number = at / LEAF_SLOTS;
            let end = range.end.min((number + 1) * LEAF_SLOTS);
            let leaf = self.leaf(number)?;
            entries.extend((at..end).map(|index| entry_of(leaf.as_deref(), index % LEAF_SLOTS)));
            at = end;
        }
        Ok(entries)
    }

    /// Where the two disks may differ: ranges of chunks, in order, that do not touch. What the trees share is not read.
    ///
    /// # Errors
    /// `InvalidInput` if the disks have another size or chunk size; `Damaged` where one of the maps is.
    pub fn changed_since(&self, before: &DiskMap) -> Result<Vec<Range<u64>>> {
        if self.geometry != before.geometry {
            return Err(Error::invalid("only maps of one size and chunk size can be compared"));
        }
        let mut changed: Vec<Range<u64>> = Vec::new();
        self.compare(self.geometry.root_level(), 0, (self.root, before.root), &mut |index| match changed
            .last_mut()
        {
            Some(last) if last.end == index => last.end += 1,
            _ => changed.push(index..index + 1),
        })?;
        Ok(changed)
    }

    fn compare(
        &self,
        level: u8,
        number: u64,
        (ours, theirs): (Option<ChunkId>, Option<ChunkId>),
        found: &mut impl FnMut(u64),
    ) -> Result<()> {
        if ours == theirs {
            return Ok(());
        }
        let load = |id: Option<ChunkId>| id.map(|id| self.repository.node_of_level(level, &id)).transpose();
        let (ours, theirs) = (load(ours)?, load(theirs)?);
        let slots = geometry::slots(level);
        for slot in 0..slots {
            let child = |node: &Option<Arc<Node>>| node.as_ref().and_then(|node| node.slot(slot));
            let pair = (child(&ours), child(&theirs));
            if pair.0 == pair.1 {
                continue;
            }
            let below = number * slots + slot;
            if !self.geometry.has(level, below) {
                return Err(Error::damaged("a disk map goes on past the end of its disk"));
            }
            if level == 0 { found(below) } else { self.compare(level - 1, below, pair, found)? }
        }
        Ok(())
    }

    fn check_range(&self, range: &Range<u64>) -> Result<()> {
        if range.start > range.end || range.end > self.chunk_count() {
            return Err(Error::invalid(format!("chunks {range:?} of a disk of {}", self.chunk_count())));
        }
        Ok(())
    }

    /// The ids of all leaves; none where all is zero. No leaf is read for it.
    pub(crate) fn leaf_ids(&self) -> Result<Vec<Option<ChunkId>>> {
        let mut ids = vec![self.root];
        for level in (1..=self.geometry.root_level()).rev() {
            let mut below = Vec::with_capacity(ids.len() * INNER_SLOTS as usize);
            for id in ids {
                let node = id.map(|id| self.repository.node_of_level(level, &id)).transpose()?;
                below.extend((0..INNER_SLOTS).map(|slot| node.as_ref().and_then(|node| node.slot(slot))));
            }
            ids = below;
        }
        ids.truncate(self.geometry.leaf_count() as usize);
        Ok(ids)
    }

    /// The leaf of that number; none where all is zero.
    pub(crate) fn leaf(&self, number: u64) -> Result<Option<Arc<Node>>> {
        let Some(mut id) = self.root else { return Ok(None) };
        let mut level = self.geometry.root_level();
        loop {
            let node = self.repository.node_of_level(level, &id)?;
            if level == 0 {
                return Ok(Some(node));
            }
            match node.slot(self.geometry.slot_of(number, level)) {
                Some(child) => (id, level) = (child, level - 1),
                None => return Ok(None),
            }
        }
    }
}

fn entry_of(leaf: Option<&Node>, slot: u64) -> MapEntry {
    match leaf.and_then(|leaf| leaf.slot(slot)) {
        None => MapEntry::Zero,
        Some(LOST) => MapEntry::Lost,
        Some(id) => MapEntry::Chunk(id),
    }
}

impl fmt::Debug for DiskMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskMap").field("geometry", &self.geometry).field("root", &self.root).finish()
    }
}
