//! The snapshots: each manifest, each map, and whether every chunk that they name can be had.

use std::collections::HashSet;
use std::ops::Range;

use super::{Run, is_finding};
use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::manifest::{DiskEntry, Snapshot};
use crate::map::LOST;
use crate::map::geometry::{Geometry, LEAF_SLOTS, slots};
use crate::name::SnapshotName;
use crate::record::Location;

/// Nodes below which all is well, with the chunk size that they were walked for. Snapshots share most of theirs.
type Clean = HashSet<(ChunkId, u32)>;

pub(super) fn verify(run: &Run<'_>) -> Result<()> {
    super::packs::config_is_readable(run)?;
    let list = run.repository.snapshots(None)?;
    for (name, error) in &list.damaged {
        if !is_finding(error) {
            return Err(error.clone());
        }
        run.snapshot_damage(name, None, None, error);
    }
    let mut clean = Clean::new();
    for snapshot in &list.snapshots {
        for disk in &snapshot.manifest().disks {
            verify_disk(run, snapshot, disk, &mut clean)?;
        }
        for attachment in &snapshot.manifest().attachments {
            match run.repository.read_attachment(attachment) {
                Err(error) if is_finding(&error) => run.snapshot_damage(&snapshot.name(), None, None, &error),
                other => drop(other?),
            }
        }
        run.report.lock().snapshots += 1;
    }
    Ok(())
}

fn verify_disk(run: &Run<'_>, snapshot: &Snapshot, disk: &DiskEntry, clean: &mut Clean) -> Result<()> {
    let geometry = Geometry::new(disk.size, disk.chunk_size)?;
    let mut walk = Walk { run, name: snapshot.name(), disk, geometry, clean };
    if let Some(root) = disk.map {
        walk.node(geometry.root_level(), 0, root)?;
    }
    run.report.lock().disks += 1;
    Ok(())
}

struct Walk<'a, 'r> {
    run: &'a Run<'r>,
    name: SnapshotName,
    disk: &'a DiskEntry,
    geometry: Geometry,
    clean: &'a mut Clean,
}

impl Walk<'_, '_> {
    /// Whether all below this node is well.
    fn node(&mut self, level: u8, number: u64, id: ChunkId) -> Result<bool> {
        let key = (id, self.disk.chunk_size);
        if self.clean.contains(&key) {
            return Ok(true);
        }
        let chunks = self.chunks_below(level, number);
        let node = match self.run.repository.node_of_level(level, &id) {
            Ok(node) => node,
            Err(error) => return self.finding(chunks, error),
        };
        let mut well = true;
        for (slot, child) in node.present() {
            let below = number * slots(level) + slot;
            if level > 0 && !self.geometry.has(level, below) {
                // Not walked: a tree whose nodes name each other many times over has no end in sight.
                let error = Error::damaged("a disk map goes on past the end of its disk");
                well &= self.finding(self.chunks_below(level - 1, below), error)?;
                continue;
            }
            well &= if level > 0 { self.node(level - 1, below, child)? } else { self.chunk(below, child)? };
        }
        // The leaf with a short last chunk is right for disks of this size only.
        if well && chunks.end < self.geometry.chunk_count() {
            self.clean.insert(key);
        }
        Ok(well)
    }

    fn chunks_below(&self, level: u8, number: u64) -> Range<u64> {
        let span = (1..=level).fold(LEAF_SLOTS, |span, level| span.saturating_mul(slots(level)));
        number.saturating_mul(span)..(number + 1).saturating_mul(span)
    }

    fn chunk(&mut self, index: u64, id: ChunkId) -> Result<bool> {
        if index >= self.geometry.chunk_count() {
            let error = Error::damaged(format!("the map names a chunk {index} past the end of the disk"));
            return self.finding(index..index + 1, error);
        }
        if id == LOST {
            return self.finding(index..index + 1, Error::lost());
        }
        match self.run.repository.locate_needed(&id).and_then(|at| self.check(index, &id, &at)) {
            Ok(()) => Ok(true),
            Err(error) => self.finding(index..index + 1, error),
        }
    }

    fn check(&self, index: u64, id: &ChunkId, at: &Location) -> Result<()> {
        if at.plain_len as usize != self.geometry.chunk_len(index) {
            return Err(Error::damaged(format!(
                "chunk {id} has {} bytes, which do not fit here",
                at.plain_len
            )));
        }
        let lost = self.run.lost.lock().contains(&at.pack);
        if lost || self.run.bad.lock().contains(&(at.pack, at.offset)) {
            let path = self.run.repository.storage().describe(&crate::pack::path(at.pack));
            return Err(Error::damaged(format!("chunk {id} cannot be had from pack {}", at.pack)).at(path));
        }
        Ok(())
    }

    fn finding(&self, chunks: Range<u64>, error: Error) -> Result<bool> {
        if !is_finding(&error) {
            return Err(error);
        }
        let bytes = |chunk: u64| chunk.saturating_mul(self.disk.chunk_size.into()).min(self.disk.size);
        let range = bytes(chunks.start)..bytes(chunks.end);
        self.run.snapshot_damage(&self.name, Some(&self.disk.name), Some(range), &error);
        Ok(false)
    }
}
