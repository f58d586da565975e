//! What to read in which order: pure planning over a stretch of a disk's map.

use std::collections::HashMap;
use std::ops::Range;

use repository::{ChunkId, Fetch, FetchLimits, Location, MapEntry, plan_fetches};

/// A chunk to be brought back, and every place of the stretch where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) id: ChunkId,
    pub(super) at: Location,
    /// The first place where it stands; also the only one, nearly always.
    pub(super) index: u64,
    pub(super) more: Vec<u64>,
}

/// A chunk that stands in a stretch, before it is known where it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) id: ChunkId,
    pub(super) places: Vec<u64>,
}

/// What stands in a stretch.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Survey {
    /// The distinct chunks, in the order of their first places.
    pub(super) named: Vec<Named>,
    /// Runs of zeroes.
    pub(super) zeroes: Vec<Range<u64>>,
    /// Runs of what the snapshot says is lost.
    pub(super) lost: Vec<Range<u64>>,
}

/// What stands in the stretch that begins at chunk `first`.
pub(super) fn survey(first: u64, entries: &[MapEntry]) -> Survey {
    let mut named: Vec<Named> = Vec::new();
    let mut known: HashMap<ChunkId, usize> = HashMap::new();
    let (mut zeroes, mut lost) = (Vec::new(), Vec::new());
    for (index, entry) in (first..).zip(entries) {
        match entry {
            MapEntry::Zero => add(&mut zeroes, index),
            MapEntry::Lost => add(&mut lost, index),
            MapEntry::Chunk(id) => {
                let at = *known.entry(*id).or_insert(named.len());
                match named.get_mut(at) {
                    Some(chunk) => chunk.places.push(index),
                    None => named.push(Named { id: *id, places: vec![index] }),
                }
            }
        }
    }
    Survey { named, zeroes, lost }
}

fn add(runs: &mut Vec<Range<u64>>, index: u64) {
    match runs.last_mut() {
        Some(run) if run.end == index => run.end += 1,
        _ => runs.push(index..index + 1),
    }
}

/// Sorts what is wanted by where it is stored, and joins neighbours into reads.
pub(super) fn order(wanted: &mut [Wanted]) -> Vec<Fetch> {
    wanted.sort_unstable_by(|a, b| a.at.cmp(&b.at).then(a.index.cmp(&b.index)));
    plan_fetches(wanted, |wanted| &wanted.at, FetchLimits { max_len: 2 << 20, max_gap: 64 << 10 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_that_stands_twice_is_wanted_once() {
        let (a, b) = (ChunkId::of(b"a"), ChunkId::of(b"b"));
        let entries = [
            MapEntry::Zero,
            MapEntry::Chunk(a),
            MapEntry::Chunk(b),
            MapEntry::Chunk(a),
            MapEntry::Zero,
            MapEntry::Zero,
            MapEntry::Lost,
            MapEntry::Lost,
        ];
        let Survey { named, zeroes, lost } = survey(10, &entries);
        assert_eq!(lost, vec![16..18; 1]);
        assert_eq!(named, [Named { id: a, places: vec![11, 13] }, Named { id: b, places: vec![12] }]);
        assert_eq!(zeroes, [10..11, 14..16]);
    }
}
