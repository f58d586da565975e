//! Capturing a snapshot: what is new goes into packs, what is known is only named, and the manifest is the commit.

mod disk;
pub(crate) mod publish;

pub use disk::{DiskWriter, Put};

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use jiff::Timestamp;
use parking_lot::Mutex;

use crate::capture::disk::DiskShared;
use crate::capture::publish::{Publisher, remove_temporary, sync_dir};
use crate::codec::{ChunkEncoder, DEFAULT_LEVEL, MAX_PLAIN_LEN, StoredChunk};
use crate::error::{Error, Result};
use crate::id::{ChunkId, fill_random};
use crate::index;
use crate::manifest::{Attachment, DiskEntry, Manifest, Snapshot, SnapshotMeta};
use crate::map::DiskMap;
use crate::map::builder::NodeSink;
use crate::map::geometry::Geometry;
use crate::name::{DiskName, GroupName, SnapshotName};
use crate::pack::format::TARGET_LEN;
use crate::pack::writer::{Failure, PackWriter};
use crate::record::{Codec, KeyRef, RecordKind};
use crate::repository::{Repository, TEMPORARY};
use crate::snapshots;
use crate::storage::WriteHint;

/// After so many new records a capture publishes an index for them and forgets them.
const INDEX_BATCH: usize = 512 << 10;
/// How many tries a second's name is worth before something else must be wrong.
const MAX_NAME_TRIES: usize = 100_000;

/// How to capture.
#[derive(Clone, Copy, Debug)]
pub struct CaptureOptions {
    /// The snapshot's time; the present if none is given. If the group has a snapshot of that second, the next free second is taken.
    pub time: Option<Timestamp>,
    /// A pack is closed once it holds so many bytes, at most 64 MiB.
    pub pack_len: u64,
    /// After so many new records an index is published for them.
    pub index_batch: usize,
    /// Merge index segments afterwards when there are many.
    pub merge: bool,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        Self { time: None, pack_len: TARGET_LEN, index_batch: INDEX_BATCH, merge: true }
    }
}

/// The ids that this capture has stored and that no index names yet.
pub(crate) struct NewIds {
    shards: Vec<Mutex<HashSet<ChunkId>>>,
}

impl NewIds {
    const SHARDS: usize = 64;

    fn new() -> Self {
        Self { shards: (0..Self::SHARDS).map(|_| Mutex::default()).collect() }
    }

    fn shard(&self, id: &ChunkId) -> &Mutex<HashSet<ChunkId>> {
        &self.shards[usize::from(id.as_bytes()[0]) % Self::SHARDS]
    }

    /// Whether nobody else had put it there.
    fn insert(&self, id: &ChunkId) -> bool {
        self.shard(id).lock().insert(*id)
    }

    fn contains(&self, id: &ChunkId) -> bool {
        self.shard(id).lock().contains(id)
    }

    pub(crate) fn forget(&self, ids: impl Iterator<Item = ChunkId>) {
        for id in ids {
            self.shard(&id).lock().remove(&id);
        }
    }
}

/// What the writers of a capture's disks share.
pub(crate) struct CaptureShared {
    repository: Repository,
    new_ids: Arc<NewIds>,
    packs: PackWriter,
}

impl CaptureShared {
    /// Whether the repository has this chunk, or this capture has stored it already.
    fn known(&self, id: &ChunkId) -> Result<bool> {
        if self.new_ids.contains(id) {
            return Ok(true);
        }
        match self.repository.index().locate(id) {
            Ok(found) => Ok(found.is_some()),
            Err(error) => {
                // Stored once more it is found again, whatever has become of the index.
                tracing::debug!(%id, %error, "stored again because the index is damaged");
                Ok(false)
            }
        }
    }

    /// Stores what is not known yet; whether it was new.
    fn store(&self, id: &ChunkId, chunk: &StoredChunk<'_>, kind: RecordKind) -> Result<bool> {
        if self.known(id)? || !self.new_ids.insert(id) {
            return Ok(false);
        }
        self.packs.append(id, chunk, kind)?;
        Ok(true)
    }
}

impl NodeSink for CaptureShared {
    fn put_node(&self, bytes: Vec<u8>) -> Result<ChunkId> {
        let id = ChunkId::of(&bytes);
        let chunk = StoredChunk {
            bytes: &bytes,
            plain_len: bytes.len() as u32,
            crc: crc32fast::hash(&bytes),
            codec: Codec::PLAIN,
            key: KeyRef::NONE,
        };
        self.store(&id, &chunk, RecordKind::MAP_NODE)?;
        Ok(id)
    }
}

/// One capture. Dropped without [`CaptureWriter::commit`], it leaves nothing that anybody could see.
pub struct CaptureWriter {
    shared: Arc<CaptureShared>,
    group: GroupName,
    options: CaptureOptions,
    time: Timestamp,
    disks: Vec<Arc<DiskShared>>,
    attachments: Vec<Attachment>,
}

impl CaptureWriter {
    pub(crate) fn begin(repository: Repository, group: GroupName, options: CaptureOptions) -> Result<Self> {
        let new_ids = Arc::new(NewIds::new());
        let storage = repository.storage().clone();
        let publisher =
            Publisher::new(storage.clone(), repository.index().clone(), new_ids.clone(), options.index_batch);
        let packs =
            PackWriter::start(storage, publisher, options.pack_len.min(TARGET_LEN), Failure::default())?;
        let shared = Arc::new(CaptureShared { repository, new_ids, packs });
        let time = options.time.unwrap_or_else(Timestamp::now);
        Ok(Self { shared, group, options, time, disks: Vec::new(), attachments: Vec::new() })
    }

    /// Adds a disk. Every chunk of it must be put, in any order and by any thread, before the commit.
    ///
    /// A parent of another chunk size is of no use and is left aside.
    ///
    /// # Errors
    /// `InvalidInput` for a name that was used, or a size or chunk size that cannot be.
    pub fn begin_disk(
        &mut self,
        name: DiskName,
        size: u64,
        chunk_size: u32,
        parent: Option<DiskMap>,
    ) -> Result<DiskWriter> {
        if self.disks.iter().any(|disk| disk.name == name) {
            return Err(Error::invalid(format!("two disks are called {name}")));
        }
        let parent = parent.filter(|parent| parent.chunk_size() == chunk_size);
        let disk =
            Arc::new(DiskShared::new(self.shared.clone(), name, Geometry::new(size, chunk_size)?, parent));
        self.disks.push(disk.clone());
        Ok(DiskWriter::new(disk))
    }

    /// Adds a disk that is one of this repository's but for what is put: the places that changed, in any order and by
    /// any thread. It costs in proportion to them, and shares all else. What is not put is not looked up again: the
    /// snapshot that `base` belongs to names it.
    ///
    /// # Errors
    /// `InvalidInput` for a name that was used; `Damaged` where the base's map is.
    pub fn begin_disk_over(&mut self, name: DiskName, base: &DiskEntry) -> Result<DiskWriter> {
        if self.disks.iter().any(|disk| disk.name == name) {
            return Err(Error::invalid(format!("two disks are called {name}")));
        }
        let map = self.shared.repository.disk_map(base)?;
        let disk = Arc::new(DiskShared::over(self.shared.clone(), name, map, &base.stats)?);
        self.disks.push(disk.clone());
        Ok(DiskWriter::new(disk))
    }

    /// Adds something that rides along, such as the configuration of the virtual machine.
    ///
    /// # Errors
    /// `InvalidInput` for a name that was used, or more than 16 MiB.
    pub fn add_attachment(&mut self, name: DiskName, bytes: &[u8]) -> Result<()> {
        if self.attachments.iter().any(|other| other.name == name) {
            return Err(Error::invalid(format!("two attachments are called {name}")));
        }
        if bytes.len() > MAX_PLAIN_LEN {
            return Err(Error::invalid(format!("attachment {name} has {} bytes", bytes.len()))
                .hint(format!("an attachment has at most {MAX_PLAIN_LEN} bytes; larger things are disks")));
        }
        let sha256 = ChunkId::of(bytes);
        if !bytes.is_empty() {
            let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL)?;
            self.shared.store(&sha256, &encoder.encode(bytes)?, RecordKind::ATTACHMENT)?;
        }
        self.attachments.push(Attachment { name, size: bytes.len() as u64, sha256 });
        Ok(())
    }

    /// Makes the snapshot: once this returns it is on stable storage, and before that nobody sees it.
    ///
    /// # Errors
    /// `InvalidInput` if nothing was captured or part of a disk was not put; else what went wrong while writing. There is no snapshot then.
    pub fn commit(mut self, meta: SnapshotMeta) -> Result<Snapshot> {
        if self.disks.is_empty() && self.attachments.is_empty() {
            return Err(Error::invalid("there is nothing to capture"));
        }
        let disks = self.disks.iter().map(|disk| disk.finish()).collect::<Result<Vec<_>>>()?;
        let attachments = std::mem::take(&mut self.attachments);
        let name = SnapshotName::new(self.group.clone(), self.time);
        let manifest = Manifest::new(&name, meta, disks, attachments);
        // What cannot be a manifest is found before anything is published.
        manifest.encode()?;
        self.shared.packs.commit()?;
        let snapshot = Snapshot::new(self.write_manifest(manifest)?);
        if self.options.merge
            && let Err(error) = index::merge::merge(self.shared.repository.index())
        {
            tracing::warn!(%error, "the snapshot is complete, but index segments could not be merged");
        }
        Ok(snapshot)
    }

    /// Publishes the manifest under the first free second from its time on.
    fn write_manifest(&self, mut manifest: Manifest) -> Result<Manifest> {
        let storage = &**self.shared.repository.storage();
        let dir = snapshots::group_dir(&self.group);
        match storage.create_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("cannot make the group's directory", error).at(storage.describe(&dir)));
            }
            _ => {}
        }
        sync_dir(storage, snapshots::DIR)?;
        for _ in 0..MAX_NAME_TRIES {
            let name = manifest.name();
            let path = snapshots::path(&name);
            let mut random = [0; 8];
            fill_random(&mut random)?;
            let temporary = format!("{TEMPORARY}/{:016x}.manifest", u64::from_le_bytes(random));
            let bytes = manifest.encode()?;
            let written = (|| {
                let mut file = storage.create(&temporary, WriteHint::Small)?;
                file.append(&bytes)?;
                file.sync()?;
                storage.publish(&temporary, &path)
            })();
            match written {
                Ok(()) => {
                    sync_dir(storage, &dir)?;
                    return Ok(manifest);
                }
                Err(error) => {
                    remove_temporary(storage, &temporary);
                    if error.kind() != io::ErrorKind::AlreadyExists {
                        return Err(Error::io("cannot write the manifest", error).at(storage.describe(&path)));
                    }
                }
            }
            manifest.time = self.free_second(&name)?.time();
        }
        Err(Error::invalid(format!("the group {} has no free second left", self.group)))
    }

    /// The first second after a name that is taken which is not, as far as the directory tells.
    fn free_second(&self, taken: &SnapshotName) -> Result<SnapshotName> {
        let names = self.shared.repository.snapshot_names(&self.group)?;
        let mut next = taken.next()?;
        while names.binary_search(&next).is_ok() {
            next = next.next()?;
        }
        Ok(next)
    }
}

impl Drop for CaptureWriter {
    fn drop(&mut self) {
        self.shared.packs.abort();
    }
}
