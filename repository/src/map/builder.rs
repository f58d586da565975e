//! Building a map from entries that come in any order, from any thread. A leaf is encoded once its last entry came.

use std::ops::Range;

use parking_lot::Mutex;

use super::geometry::{Geometry, INNER_SLOTS, LEAF_SLOTS, slots};
use super::node;
use crate::error::{Error, Result};
use crate::id::ChunkId;

const WORDS: usize = LEAF_SLOTS as usize / 64;

/// Where finished nodes go.
pub(crate) trait NodeSink {
    fn put_node(&self, bytes: Vec<u8>) -> Result<ChunkId>;
}

/// The map of a disk that is being captured.
pub(crate) struct MapBuilder {
    geometry: Geometry,
    leaves: Vec<Mutex<Leaf>>,
}

enum Leaf {
    Untouched,
    Open(Box<OpenLeaf>),
    Done(Option<ChunkId>),
}

struct OpenLeaf {
    seen: [u64; WORDS],
    seen_count: u64,
    /// Allocated with the first chunk: a leaf of zeroes needs none.
    ids: Vec<Option<ChunkId>>,
}

impl MapBuilder {
    pub(crate) fn new(geometry: Geometry) -> Self {
        let leaves = (0..geometry.leaf_count()).map(|_| Mutex::new(Leaf::Untouched)).collect();
        Self { geometry, leaves }
    }

    /// Says that a chunk stands at `index`.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such place, or something was put there already.
    pub(crate) fn put(&self, index: u64, id: ChunkId, sink: &impl NodeSink) -> Result<()> {
        if index >= self.geometry.chunk_count() {
            return Err(self.no_such_place(index));
        }
        self.put_in_leaf(index / LEAF_SLOTS, index % LEAF_SLOTS..index % LEAF_SLOTS + 1, Some(id), sink)
    }

    /// Says that these chunks are zeroes.
    pub(crate) fn put_zero(&self, range: Range<u64>, sink: &impl NodeSink) -> Result<()> {
        if range.end > self.geometry.chunk_count() {
            return Err(self.no_such_place(range.end));
        }
        let mut at = range.start;
        while at < range.end {
            let number = at / LEAF_SLOTS;
            let end = range.end.min((number + 1) * LEAF_SLOTS);
            self.put_in_leaf(number, at - number * LEAF_SLOTS..end - number * LEAF_SLOTS, None, sink)?;
            at = end;
        }
        Ok(())
    }

    fn no_such_place(&self, index: u64) -> Error {
        Error::invalid(format!("chunk {index} of a disk of {}", self.geometry.chunk_count()))
    }

    /// How many places the leaf has on this disk.
    fn leaf_places(&self, number: u64) -> u64 {
        (self.geometry.chunk_count() - number * LEAF_SLOTS).min(LEAF_SLOTS)
    }

    fn put_in_leaf(
        &self,
        number: u64,
        places: Range<u64>,
        id: Option<ChunkId>,
        sink: &impl NodeSink,
    ) -> Result<()> {
        let mut leaf = self.leaves[number as usize].lock();
        let twice = || Error::invalid(format!("chunk {} was put twice", number * LEAF_SLOTS + places.start));
        if let (Leaf::Untouched, None) = (&*leaf, id)
            && places == (0..self.leaf_places(number))
        {
            *leaf = Leaf::Done(None);
            return Ok(());
        }
        if let Leaf::Untouched = *leaf {
            *leaf = Leaf::Open(Box::new(OpenLeaf { seen: [0; WORDS], seen_count: 0, ids: Vec::new() }));
        }
        let Leaf::Open(open) = &mut *leaf else { return Err(twice()) };
        for place in places.clone() {
            let (word, bit) = (&mut open.seen[(place / 64) as usize], 1 << (place % 64));
            if *word & bit != 0 {
                return Err(twice());
            }
            *word |= bit;
            open.seen_count += 1;
            if let Some(id) = id {
                if open.ids.is_empty() {
                    open.ids = vec![None; LEAF_SLOTS as usize];
                }
                open.ids[place as usize] = Some(id);
            }
        }
        if open.seen_count == self.leaf_places(number) {
            let bytes = node::encode(0, open.ids.iter().copied());
            *leaf = Leaf::Done(bytes.map(|bytes| sink.put_node(bytes)).transpose()?);
        }
        Ok(())
    }

    /// The root, once every place was put; none for a disk of zeroes.
    ///
    /// # Errors
    /// `InvalidInput` if a place was left out.
    pub(crate) fn finish(&self, sink: &impl NodeSink) -> Result<Option<ChunkId>> {
        let mut nodes = Vec::with_capacity(self.leaves.len());
        for (number, leaf) in self.leaves.iter().enumerate() {
            match &*leaf.lock() {
                Leaf::Done(id) => nodes.push(*id),
                Leaf::Untouched | Leaf::Open(_) => {
                    return Err(Error::invalid(format!(
                        "not every chunk from {} on was put",
                        number as u64 * LEAF_SLOTS
                    )));
                }
            }
        }
        for level in 1..=self.geometry.root_level() {
            debug_assert_eq!(slots(level), INNER_SLOTS);
            nodes = nodes
                .chunks(INNER_SLOTS as usize)
                .map(|below| {
                    node::encode(level, below.iter().copied()).map(|bytes| sink.put_node(bytes)).transpose()
                })
                .collect::<Result<_>>()?;
        }
        Ok(nodes.first().copied().flatten())
    }
}
