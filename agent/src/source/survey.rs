//! What a disk's map says of all its chunks at once: which are zeroes, and in what order the others lie in packs.

use std::ops::Range;

use repository::{ChunkId, DiskMap, MapEntry, PackId, Repository};

use super::ZeroChunks;

/// How many map entries are looked at together.
const ENTRIES_AT_ONCE: u64 = 4096;

/// Which chunks of a disk are zeroes.
///
/// # Errors
/// Where the disk's map cannot be read, or is damaged.
pub fn zero_chunks(map: &DiskMap) -> repository::Result<ZeroChunks> {
    let mut zero = ZeroChunks::all(map.chunk_count());
    for_each_data_chunk(map, |chunk, _| {
        zero.set_data(chunk);
        Ok(())
    })?;
    Ok(zero)
}

/// The runs of neighbouring data chunks in the order in which they lie in packs. A chunk that the
/// index does not find, or that is lost, comes last: whoever fetches it learns why.
///
/// # Errors
/// Where the disk's map or the index cannot be read.
pub fn pack_order(repository: &Repository, map: &DiskMap) -> repository::Result<Vec<Range<u64>>> {
    let mut placed: Vec<(Option<(PackId, u32)>, u64)> = Vec::new();
    for_each_data_chunk(map, |chunk, id| {
        let location = id.map(|id| repository.locate(&id)).transpose()?.flatten();
        placed.push((location.map(|location| (location.pack, location.offset)), chunk));
        Ok(())
    })?;
    placed.sort_unstable_by_key(|(place, chunk)| (place.is_none(), *place, *chunk));
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (_, chunk) in placed {
        match runs.last_mut() {
            Some(run) if run.end == chunk => run.end += 1,
            _ => runs.push(chunk..chunk + 1),
        }
    }
    Ok(runs)
}

fn for_each_data_chunk(
    map: &DiskMap,
    mut visit: impl FnMut(u64, Option<ChunkId>) -> repository::Result<()>,
) -> repository::Result<()> {
    let mut at = 0;
    while at < map.chunk_count() {
        let end = (at + ENTRIES_AT_ONCE).min(map.chunk_count());
        for (chunk, entry) in (at..end).zip(map.entries(at..end)?) {
            match entry {
                MapEntry::Zero => {}
                MapEntry::Chunk(id) => visit(chunk, Some(id))?,
                MapEntry::Lost => visit(chunk, None)?,
            }
        }
        at = end;
    }
    Ok(())
}
