//! Building a map from entries that come in any order, from any thread. A leaf is encoded once its last entry came.
//!
//! A map *over* another begins as that one. Only leaves in which something is put are read from it, and made anew at the
//! end: so it costs in proportion to what is put, and all other nodes are shared.

use std::ops::Range;

use parking_lot::Mutex;

use super::DiskMap;
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
    /// The map that this one began as.
    base: Option<DiskMap>,
}

enum Leaf {
    Untouched,
    Open(Box<OpenLeaf>),
    Done(Option<ChunkId>),
    /// As the base has it.
    Base(Option<ChunkId>),
}

struct OpenLeaf {
    seen: [u64; WORDS],
    seen_count: u64,
    /// Allocated with the first chunk: a leaf of zeroes needs none.
    ids: Vec<Option<ChunkId>>,
}

impl OpenLeaf {
    fn new(ids: Vec<Option<ChunkId>>) -> Self {
        Self { seen: [0; WORDS], seen_count: 0, ids }
    }

    fn put_node(&self, sink: &impl NodeSink) -> Result<Option<ChunkId>> {
        node::encode(0, self.ids.iter().copied()).map(|bytes| sink.put_node(bytes)).transpose()
    }
}

impl MapBuilder {
    pub(crate) fn new(geometry: Geometry) -> Self {
        let leaves = (0..geometry.leaf_count()).map(|_| Mutex::new(Leaf::Untouched)).collect();
        Self { geometry, leaves, base: None }
    }

    /// Begins as `base`: whatever is not put stays as it is there.
    ///
    /// # Errors
    /// `Damaged` where an inner node of the base is.
    pub(crate) fn over(geometry: Geometry, base: DiskMap) -> Result<Self> {
        let leaves = base.leaf_ids()?.into_iter().map(|id| Mutex::new(Leaf::Base(id))).collect();
        Ok(Self { geometry, leaves, base: Some(base) })
    }

    /// Says that a chunk stands at `index`; how many chunks of data of the base (one or none) it takes the place of.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such place, or something was put there already; `Damaged` where the base is.
    pub(crate) fn put(&self, index: u64, id: ChunkId, sink: &impl NodeSink) -> Result<u64> {
        if index >= self.geometry.chunk_count() {
            return Err(self.no_such_place(index));
        }
        self.put_in_leaf(index / LEAF_SLOTS, index % LEAF_SLOTS..index % LEAF_SLOTS + 1, Some(id), sink)
    }

    /// Says that these chunks are zeroes; how many chunks of data of the base they take the place of.
    pub(crate) fn put_zero(&self, range: Range<u64>, sink: &impl NodeSink) -> Result<u64> {
        let mut replaced = 0;
        if range.end > self.geometry.chunk_count() {
            return Err(self.no_such_place(range.end));
        }
        let mut at = range.start;
        while at < range.end {
            let number = at / LEAF_SLOTS;
            let end = range.end.min((number + 1) * LEAF_SLOTS);
            replaced +=
                self.put_in_leaf(number, at - number * LEAF_SLOTS..end - number * LEAF_SLOTS, None, sink)?;
            at = end;
        }
        Ok(replaced)
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
    ) -> Result<u64> {
        let mut leaf = self.leaves[number as usize].lock();
        let twice = || Error::invalid(format!("chunk {} was put twice", number * LEAF_SLOTS + places.start));
        if let (Leaf::Untouched, None) = (&*leaf, id)
            && places == (0..self.leaf_places(number))
        {
            *leaf = Leaf::Done(None);
            return Ok(0);
        }
        match *leaf {
            Leaf::Untouched => *leaf = Leaf::Open(Box::new(OpenLeaf::new(Vec::new()))),
            Leaf::Base(None) => *leaf = Leaf::Open(Box::new(OpenLeaf::new(vec![None; LEAF_SLOTS as usize]))),
            Leaf::Base(Some(_)) => {
                let base = self.base.as_ref().expect("its leaf stands here").leaf(number)?;
                let slots = (0..LEAF_SLOTS).map(|slot| base.as_ref().and_then(|leaf| leaf.slot(slot)));
                *leaf = Leaf::Open(Box::new(OpenLeaf::new(slots.collect())));
            }
            Leaf::Open(_) | Leaf::Done(_) => {}
        }
        let Leaf::Open(open) = &mut *leaf else { return Err(twice()) };
        let mut replaced = 0;
        for place in places.clone() {
            let (word, bit) = (&mut open.seen[(place / 64) as usize], 1 << (place % 64));
            if *word & bit != 0 {
                return Err(twice());
            }
            *word |= bit;
            open.seen_count += 1;
            if open.ids.is_empty() {
                if id.is_none() {
                    continue;
                }
                open.ids = vec![None; LEAF_SLOTS as usize];
            }
            let before = std::mem::replace(&mut open.ids[place as usize], id);
            replaced += u64::from(before.is_some());
        }
        if open.seen_count == self.leaf_places(number) {
            let id = open.put_node(sink)?;
            *leaf = Leaf::Done(id);
        }
        Ok(replaced)
    }

    /// The root, once every place was put; none for a disk of zeroes.
    ///
    /// # Errors
    /// `InvalidInput` if a place was left out.
    pub(crate) fn finish(&self, sink: &impl NodeSink) -> Result<Option<ChunkId>> {
        let mut nodes = Vec::with_capacity(self.leaves.len());
        for (number, leaf) in self.leaves.iter().enumerate() {
            match &*leaf.lock() {
                Leaf::Done(id) | Leaf::Base(id) => nodes.push(*id),
                Leaf::Open(open) if self.base.is_some() => nodes.push(open.put_node(sink)?),
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
