//! The shape of a map: it follows from the disk's size and chunk size alone.

use crate::error::{Error, Result};

/// The smallest chunk size.
pub const MIN_CHUNK_SIZE: u32 = 64 << 10;
/// The largest chunk size.
pub const MAX_CHUNK_SIZE: u32 = 4 << 20;
/// The largest disk.
pub const MAX_DISK_SIZE: u64 = 256 << 40;

/// How many chunks a leaf covers.
pub(crate) const LEAF_SLOTS: u64 = 1024;
/// How many nodes an inner node covers.
pub(crate) const INNER_SLOTS: u64 = 256;

/// How many slots a node of that level has.
pub(crate) fn slots(level: u8) -> u64 {
    if level == 0 { LEAF_SLOTS } else { INNER_SLOTS }
}

/// A disk's size, cut into chunks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Geometry {
    size: u64,
    chunk_size: u32,
}

impl Geometry {
    /// # Errors
    /// `InvalidInput` for a chunk size that is not a power of two from 64 KiB to 4 MiB, or a disk larger than 256 TiB.
    pub(crate) fn new(size: u64, chunk_size: u32) -> Result<Self> {
        check_chunk_size(chunk_size)?;
        if size > MAX_DISK_SIZE {
            return Err(Error::invalid(format!("a disk of {size} bytes is too large"))
                .hint(format!("the largest has {MAX_DISK_SIZE} bytes")));
        }
        Ok(Self { size, chunk_size })
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn chunk_size(&self) -> u32 {
        self.chunk_size
    }

    pub(crate) fn chunk_count(&self) -> u64 {
        self.size.div_ceil(self.chunk_size.into())
    }

    pub(crate) fn chunk_len(&self, index: u64) -> usize {
        assert!(index < self.chunk_count(), "chunk {index} of {}", self.chunk_count());
        let from = index * u64::from(self.chunk_size);
        (self.size - from).min(self.chunk_size.into()) as usize
    }

    pub(crate) fn leaf_count(&self) -> u64 {
        self.chunk_count().div_ceil(LEAF_SLOTS)
    }

    /// The level of the root: 0 if that is a leaf.
    pub(crate) fn root_level(&self) -> u8 {
        let (mut level, mut nodes) = (0, self.leaf_count());
        while nodes > 1 {
            nodes = nodes.div_ceil(INNER_SLOTS);
            level += 1;
        }
        level
    }

    /// Whether what stands in slot `below` of the nodes of `level`, counted over all of them, is on the disk at all.
    pub(crate) fn has(&self, level: u8, below: u64) -> bool {
        let places = (0..level).fold(self.chunk_count(), |places, level| places.div_ceil(slots(level)));
        below < places
    }

    /// Which slot of its ancestor at `level` (1 or more) leads to the leaf `number`.
    pub(crate) fn slot_of(&self, number: u64, level: u8) -> u64 {
        number / INNER_SLOTS.pow(u32::from(level) - 1) % INNER_SLOTS
    }
}

/// # Errors
/// `InvalidInput` for what is not a power of two from 64 KiB to 4 MiB.
pub(crate) fn check_chunk_size(chunk_size: u32) -> Result<()> {
    if chunk_size.is_power_of_two() && (MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&chunk_size) {
        return Ok(());
    }
    Err(Error::invalid(format!("a chunk cannot have {chunk_size} bytes"))
        .hint("a chunk size is a power of two from 64 KiB to 4 MiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_follow_from_the_size() {
        let level = |size| Geometry::new(size, 64 << 10).unwrap().root_level();
        assert_eq!(level(0), 0);
        assert_eq!(level(1), 0);
        assert_eq!(level(64 << 20), 0);
        assert_eq!(level((64 << 20) + 1), 1);
        assert_eq!(level(16 << 30), 1);
        assert_eq!(level((16 << 30) + 1), 2);
        assert_eq!(level(4 << 40), 2);
        assert_eq!(level(MAX_DISK_SIZE), 3);
    }

    #[test]
    fn what_is_on_the_disk_follows_from_its_size_at_every_level() {
        let chunk = 64 << 10;
        let disk = Geometry::new(chunk * (LEAF_SLOTS * INNER_SLOTS + 1), chunk as u32).unwrap();
        assert_eq!(disk.root_level(), 2);
        for (level, places) in [(0, LEAF_SLOTS * INNER_SLOTS + 1), (1, INNER_SLOTS + 1), (2, 2)] {
            assert!(disk.has(level, places - 1) && !disk.has(level, places), "level {level}");
        }
    }

    #[test]
    fn the_last_chunk_is_what_remains() {
        let geometry = Geometry::new((64 << 10) + 5, 64 << 10).unwrap();
        assert_eq!((geometry.chunk_count(), geometry.chunk_len(0), geometry.chunk_len(1)), (2, 65536, 5));
        for bad in [0, 4096, 65537, 8 << 20] {
            assert!(Geometry::new(1, bad).is_err());
        }
        assert!(Geometry::new(MAX_DISK_SIZE + 1, 64 << 10).is_err());
    }
}
