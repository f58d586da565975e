//! The parsers of single files, for the fuzz targets in `fuzz/`. Not an interface: nothing else may use it.

use std::sync::{Arc, OnceLock};

use crate::config::Config;
use crate::error::Result;
use crate::id::{ChunkId, PackId, SegmentId};
use crate::index::build::SegmentWriter;
use crate::index::page::PageCache;
use crate::index::segment;
use crate::leases::Lease;
use crate::manifest::Manifest;
use crate::map::geometry::slots;
use crate::map::node::{self, Node};
use crate::name::SnapshotName;
use crate::pack::format;
use crate::record::{Location, Record};
use crate::storage::{ReadFile, Storage};

/// Parses what stands under the name `name`.
pub fn manifest(bytes: &[u8], name: &SnapshotName) -> Result<Manifest> {
    Manifest::decode(bytes, name)
}

/// The file of a manifest.
pub fn encode_manifest(manifest: &Manifest) -> Result<Vec<u8>> {
    manifest.encode()
}

/// Parses a configuration.
pub fn config(bytes: &[u8]) -> Result<Config> {
    Config::decode(bytes)
}

/// The file of a configuration.
pub fn encode_config(config: &Config) -> Result<Vec<u8>> {
    config.encode()
}

/// Parses the lease of the session `session`.
pub fn lease(bytes: &[u8], session: &str) -> Result<Lease> {
    Lease::decode(bytes, session)
}

/// The file of a lease.
pub fn encode_lease(lease: &Lease) -> Result<Vec<u8>> {
    lease.encode()
}

/// The name of the snapshot whose manifest is in this file, and the name of that file.
pub fn snapshot_of_file(name: &SnapshotName, file: &str) -> Option<(SnapshotName, String)> {
    SnapshotName::from_file_name(name.group(), file).map(|name| (name.clone(), name.file_name()))
}

/// What a pack says about itself.
#[derive(Debug)]
pub struct PackEnd {
    /// What it holds, in its order.
    pub entries: Vec<(ChunkId, Location)>,
    /// Where the stored bytes end.
    pub data_end: u64,
    /// All that follows them, encoded anew.
    pub end: Vec<u8>,
}

/// Reads the end of the pack `id`.
pub fn pack_end(file: &dyn ReadFile, id: PackId) -> Result<PackEnd> {
    let table = format::read_end(file, id)?;
    let entries = table.records.iter().map(|record| (record.chunk_id(), record.location(id))).collect();
    let end = format::encode_end(id, table.data_end, &table.records);
    Ok(PackEnd { entries, data_end: table.data_end, end })
}

/// All that follows the stored bytes of a pack of these things.
pub fn encode_pack_end(id: PackId, data_end: u64, entries: &[(ChunkId, Location)]) -> Vec<u8> {
    let records: Vec<Record> = entries.iter().map(|(chunk, at)| record(chunk, at, 0)).collect();
    format::encode_end(id, data_end, &records)
}

fn record(id: &ChunkId, at: &Location, pack: u32) -> Record {
    Record {
        id: *id.as_bytes(),
        pack: pack.into(),
        offset: at.offset.into(),
        stored_len: at.stored_len.into(),
        plain_len: at.plain_len.into(),
        crc: at.crc.into(),
        codec: at.codec.0,
        key: at.key.0,
        kind: at.kind.0,
        reserved: 0,
    }
}

/// A node of a disk map.
#[derive(Debug)]
pub struct MapNode(Node);

impl MapNode {
    /// Parses it.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        Node::decode(bytes).map(Self)
    }

    /// What its slots hold, all of them, in order.
    pub fn slots(&self) -> Vec<Option<ChunkId>> {
        (0..slots(self.0.level())).map(|slot| self.0.slot(slot)).collect()
    }

    /// The slots that hold something.
    pub fn present(&self) -> Vec<(u64, ChunkId)> {
        self.0.present().collect()
    }

    /// Its bytes, encoded anew.
    pub fn encode(&self) -> Option<Vec<u8>> {
        node::encode(self.0.level(), self.slots())
    }
}

/// The bytes of a node with these slots, of which there are as many as the level has, or fewer.
pub fn encode_node(level: u8, slots: Vec<Option<ChunkId>>) -> Option<Vec<u8>> {
    node::encode(level, slots)
}

/// A segment of the index.
pub struct Segment(segment::Segment);

impl Segment {
    /// Opens the segment `id`.
    pub fn open(file: Arc<dyn ReadFile>, id: [u8; 16]) -> Result<Self> {
        static CACHE: OnceLock<Arc<PageCache>> = OnceLock::new();
        let cache = CACHE.get_or_init(|| Arc::new(PageCache::new()));
        segment::Segment::open(file, segment_id(id), cache.clone()).map(Self)
    }

    /// How many entries it says that it has.
    pub fn entries(&self) -> u64 {
        self.0.entries()
    }

    /// Looks an id up.
    pub fn find(&self, id: &ChunkId) -> Result<Option<Location>> {
        self.0.find(id)
    }

    /// All packs that it names.
    pub fn packs(&self) -> Result<Vec<PackId>> {
        self.0.packs()
    }

    /// All ids that it has, in order.
    pub fn scan(&self) -> Result<Vec<ChunkId>> {
        let mut scan = self.0.scan();
        std::iter::from_fn(|| scan.next().transpose()).map(|record| Ok(record?.chunk_id())).collect()
    }

    /// Reads all of its pages and checks that every entry is found: as verifying does.
    pub fn check_all(&self) -> Result<()> {
        self.0.packs()?;
        self.0.check_all()
    }
}

fn segment_id(id: [u8; 16]) -> SegmentId {
    PackId::from_bytes(id).to_string().parse().expect("ids of packs and segments print alike")
}

/// Writes the segment `id` of these entries, which are in the order of their ids; the path of its file.
pub fn write_segment(
    storage: Arc<dyn Storage>,
    id: [u8; 16],
    entries: &[(ChunkId, Location)],
) -> Result<String> {
    let mut packs: Vec<PackId> = entries.iter().map(|(_, at)| at.pack).collect();
    packs.sort_unstable();
    packs.dedup();
    let mut writer = SegmentWriter::create(storage, segment_id(id), entries.len() as u64)?;
    for (chunk, at) in entries {
        let number = packs.binary_search(&at.pack).expect("every pack is in the table") as u32;
        writer.push(&record(chunk, at, number))?;
    }
    writer.seal(&packs)?.publish()?;
    Ok(crate::index::path(segment_id(id)))
}
