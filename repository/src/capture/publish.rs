//! From sealed packs to an index that names them: the order that a power cut cannot turn round.

use std::io;
use std::sync::Arc;

use crate::capture::NewIds;
use crate::error::{Error, Result};
use crate::id::SegmentId;
use crate::index::build::SegmentWriter;
use crate::index::{self, Index};
use crate::pack::{self, writer::SealedPack};
use crate::record::Record;
use crate::storage::Storage;

/// Publishes in batches: packs get their names once they are synced, their directory is synced, and only then an index names them.
///
/// Dropped, it removes the packs that it still has, which no index names.
pub(crate) struct Publisher {
    storage: Arc<dyn Storage>,
    index: Arc<Index>,
    new_ids: Arc<NewIds>,
    sealed: Vec<SealedPack>,
    records: usize,
    /// Sealed records are published once there are so many, so that a capture needs little memory however long it is.
    batch: usize,
}

impl Publisher {
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        index: Arc<Index>,
        new_ids: Arc<NewIds>,
        batch: usize,
    ) -> Self {
        Self { storage, index, new_ids, sealed: Vec::new(), records: 0, batch }
    }

    /// Takes charge of a pack, and of how its sync went.
    pub(crate) fn add(&mut self, pack: SealedPack, synced: io::Result<()>) -> Result<()> {
        let path = self.storage.describe(&pack.path);
        self.records += pack.records.len();
        self.sealed.push(pack);
        synced.map_err(|error| Error::io("cannot sync a pack", error).at(path))?;
        if self.records >= self.batch { self.publish() } else { Ok(()) }
    }

    /// Publishes what is left, and makes durable whatever index this capture may have relied upon.
    pub(crate) fn commit(&mut self) -> Result<()> {
        if self.sealed.is_empty() {
            // Another capture's segment may be visible and not yet durable; a manifest that leans on it must not come first.
            return sync_dir(&*self.storage, index::DIR);
        }
        self.publish()
    }

    fn publish(&mut self) -> Result<()> {
        // What may find the disk full comes first, while all of it can still be taken back.
        let mut packs: Vec<_> = self.sealed.iter().map(|pack| pack.id).collect();
        packs.sort_unstable();
        let mut records: Vec<Record> = Vec::with_capacity(self.records);
        for pack in &mut self.sealed {
            let number = packs.binary_search(&pack.id).expect("it is one of them");
            records
                .extend(std::mem::take(&mut pack.records).iter().map(|record| record.in_pack(number as u32)));
        }
        self.records = 0;
        records.sort_unstable_by_key(|record| record.id);
        let id = SegmentId::after(None)?;
        let mut segment = SegmentWriter::create(self.storage.clone(), id, records.len() as u64)?;
        for record in &records {
            segment.push(record)?;
        }
        let segment = segment.seal(&packs)?;

        for pack in &mut self.sealed {
            let to = pack::path(pack.id);
            self.storage
                .publish(&pack.path, &to)
                .map_err(|error| Error::io("cannot name a pack", error).at(self.storage.describe(&to)))?;
            pack.path = to;
        }
        sync_dir(&*self.storage, pack::DIR)?;
        let published = segment.publish();
        if published.is_ok() || self.storage.open(&index::path(id)).is_ok() {
            // An index names them, so they stay.
            self.sealed.clear();
        }
        published?;
        self.index.add(id)?;
        self.new_ids.forget(records.iter().map(Record::chunk_id));
        Ok(())
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        for pack in &self.sealed {
            remove_temporary(&*self.storage, &pack.path);
        }
    }
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(storage: &dyn Storage, dir: &str) -> Result<()> {
    storage
        .sync_dir(dir)
        .map_err(|error| Error::io("cannot sync a directory", error).at(storage.describe(dir)))
}

/// Removes what is of no more use; a leftover does no harm.
pub(crate) fn remove_temporary(storage: &dyn Storage, path: &str) {
    match storage.remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %storage.describe(path).display(), %error, "a temporary file stays behind");
        }
        _ => {}
    }
}
