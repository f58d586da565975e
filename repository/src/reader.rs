//! Reading stored bytes: single chunks, or ranges that hold several neighbours.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::id::PackId;
use crate::pack::open::OpenPacks;
use crate::record::Location;

/// Reads stored bytes from packs, which it keeps open (a bounded number). Share it or clone it: all threads read side by side.
#[derive(Clone)]
pub struct ChunkReader(Arc<OpenPacks>);

impl ChunkReader {
    pub(crate) fn new(packs: Arc<OpenPacks>) -> Self {
        Self(packs)
    }

    /// Reads the stored bytes of one chunk into `stored`, whose former content is replaced.
    ///
    /// # Errors
    /// `Damaged` if the pack is missing, cut short or not a pack; `Io` where reading failed.
    pub fn read_stored(&self, at: &Location, stored: &mut Vec<u8>) -> Result<()> {
        stored.resize(at.stored_len as usize, 0);
        self.0.read(at.pack, at.offset.into(), stored)
    }

    /// Fills `out` with the bytes of a pack from `offset`.
    ///
    /// # Errors
    /// As for [`ChunkReader::read_stored`].
    pub fn read_stored_range(&self, pack: PackId, offset: u64, out: &mut [u8]) -> Result<()> {
        self.0.read(pack, offset, out)
    }
}

/// How far neighbours are joined into one read.
#[derive(Clone, Copy, Debug)]
pub struct FetchLimits {
    /// No read is longer, but for a single chunk that is.
    pub max_len: usize,
    /// So many bytes that nobody wants are read along rather than beginning another read.
    pub max_gap: usize,
}

impl Default for FetchLimits {
    /// For a local disk: 2 MiB at once, gaps of 64 KiB.
    fn default() -> Self {
        Self { max_len: 2 << 20, max_gap: 64 << 10 }
    }
}

/// One read that serves several chunks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fetch {
    /// The pack.
    pub pack: PackId,
    /// Where in it, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: usize,
    /// Which of the items that were planned it serves.
    pub items: Range<usize>,
}

impl Fetch {
    /// Where in the bytes of this read the stored bytes of one of its items are.
    pub fn place(&self, at: &Location) -> Range<usize> {
        let start = (u64::from(at.offset) - self.offset) as usize;
        start..start + at.stored_len as usize
    }
}

/// Joins neighbours into reads. `items` are in the order of their locations; duplicates are fine.
pub fn plan_fetches<T>(items: &[T], location: impl Fn(&T) -> &Location, limits: FetchLimits) -> Vec<Fetch> {
    let mut fetches: Vec<Fetch> = Vec::new();
    for (at, item) in items.iter().enumerate() {
        let location = location(item);
        let start = u64::from(location.offset);
        if let Some(last) = fetches.last_mut()
            && last.pack == location.pack
            && last.offset <= start
            && start <= last.offset + (last.len + limits.max_gap) as u64
        {
            let len = last.len.max((location.end() - last.offset) as usize);
            if len <= limits.max_len {
                (last.len, last.items.end) = (len, at + 1);
                continue;
            }
        }
        fetches.push(Fetch {
            pack: location.pack,
            offset: start,
            len: location.stored_len as usize,
            items: at..at + 1,
        });
    }
    fetches
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Codec, KeyRef, RecordKind};
    use proptest::prelude::*;

    fn location(pack: u8, offset: u32, stored_len: u32) -> Location {
        Location {
            pack: PackId::from_bytes([pack; 16]),
            offset,
            stored_len,
            plain_len: 65536,
            crc: 0,
            codec: Codec::ZSTD,
            key: KeyRef::NONE,
            kind: RecordKind::CHUNK,
        }
    }

    #[test]
    fn neighbours_join_and_far_ones_do_not() {
        let items = [
            location(1, 64, 100),
            location(1, 164, 100),
            location(1, 300, 50),
            location(1, 9000, 1),
            location(2, 9001, 1),
        ];
        let fetches = plan_fetches(&items, |item| item, FetchLimits { max_len: 1000, max_gap: 50 });
        let spans: Vec<_> =
            fetches.iter().map(|fetch| (fetch.offset, fetch.len, fetch.items.clone())).collect();
        assert_eq!(spans, [(64, 286, 0..3), (9000, 1, 3..4), (9001, 1, 4..5)]);
    }

    proptest! {
        #[test]
        fn every_item_is_served_by_exactly_one_read_within_the_limits(
            spans in proptest::collection::vec((0u8..3, 64u32..5000, 1u32..300), 0..60)
        ) {
            let mut items: Vec<Location> = spans.into_iter().map(|(p, o, l)| location(p, o, l)).collect();
            items.sort_unstable();
            let fetches = plan_fetches(&items, |item| item, FetchLimits { max_len: 1000, max_gap: 64 });
            let mut next = 0;
            for fetch in fetches {
                prop_assert_eq!(fetch.items.start, next);
                next = fetch.items.end;
                prop_assert!(fetch.len <= 1000);
                for item in &items[fetch.items.clone()] {
                    prop_assert_eq!(item.pack, fetch.pack);
                    prop_assert!(fetch.place(item).end <= fetch.len);
                }
            }
            prop_assert_eq!(next, items.len());
        }
    }
}
