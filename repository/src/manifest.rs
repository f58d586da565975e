//! A snapshot's manifest: the commit of a capture, and all that hangs on it.

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::codec::MAX_PLAIN_LEN;
use crate::error::{Error, Result};
use crate::frame::{self, Document};
use crate::id::ChunkId;
use crate::map::geometry::Geometry;
use crate::name::{DiskName, GroupName, SnapshotName};

/// How many disks a snapshot may have.
pub const MAX_DISKS: usize = 256;
/// How many attachments a snapshot may have.
pub const MAX_ATTACHMENTS: usize = 256;
/// How long a note may be, in bytes.
pub const MAX_NOTE_LEN: usize = 4096;

/// How well the disks of a snapshot fit together in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Consistency {
    /// Nobody had the disks open for writing.
    Offline,
    /// One point in time, as a power cut would leave it.
    #[default]
    Crash,
    /// One point in time for which the applications were made ready.
    Application,
    /// The source was written to while it was read: what is here may never have existed.
    Changing,
}

/// What capturing a disk took.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskStats {
    /// Chunks that are not zeroes.
    pub data_chunks: u64,
    /// Chunks that are.
    pub zero_chunks: u64,
    /// Chunks that the repository did not have.
    pub new_chunks: u64,
    /// Plain bytes of those.
    pub new_bytes: u64,
    /// Bytes that they take in packs.
    pub new_stored_bytes: u64,
}

/// How much of what a guest was told is in what was saved of its live-restore.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SavedUpTo {
    /// Everything that the guest was told was written.
    Acknowledged,
    /// Everything that it had flushed, after the host went down or a sync failed; of what it wrote since, any part.
    Flushed,
}

/// Whose live-restore a snapshot was saved of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// The full name of the snapshot that was being restored.
    pub live_restore_of: String,
    /// How much of the guest's writes is in it.
    pub up_to: SavedUpTo,
}

/// One disk of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskEntry {
    /// Its name, distinct within the snapshot.
    pub name: DiskName,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// The root of its map; none if it is all zeroes.
    pub map: Option<ChunkId>,
    /// What capturing it took.
    pub stats: DiskStats,
}

/// Something that rides along, such as the configuration of the virtual machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// Its name, distinct within the snapshot.
    pub name: DiskName,
    /// Bytes.
    pub size: u64,
    /// The hash of its content.
    pub sha256: ChunkId,
}

/// What a snapshot is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    features: Vec<String>,
    /// The group.
    pub group: GroupName,
    /// When it was taken, whole seconds; with the group it is its name.
    pub time: Timestamp,
    /// The host that captured it.
    pub host: String,
    /// The program that captured it, with its version.
    pub tool: String,
    /// How well its disks fit together in time.
    pub consistency: Consistency,
    /// The snapshot of the same group that it was compared with.
    pub parent: Option<Timestamp>,
    /// Where it was saved of a live-restore: of which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved: Option<Saved>,
    /// What somebody wanted remembered about it.
    pub note: Option<String>,
    /// Its disks.
    pub disks: Vec<DiskEntry>,
    /// What rides along.
    pub attachments: Vec<Attachment>,
}

/// What whoever captures knows about the snapshot.
#[derive(Clone, Debug, Default)]
pub struct SnapshotMeta {
    /// The host that captured it.
    pub host: String,
    /// The program that captured it, with its version.
    pub tool: String,
    /// How well its disks fit together in time.
    pub consistency: Consistency,
    /// The snapshot of the same group that it was compared with.
    pub parent: Option<Timestamp>,
    /// Where it was saved of a live-restore: of which.
    pub saved: Option<Saved>,
    /// What somebody wants remembered about it.
    pub note: Option<String>,
}

impl Manifest {
    pub(crate) fn new(
        name: &SnapshotName,
        meta: SnapshotMeta,
        disks: Vec<DiskEntry>,
        attachments: Vec<Attachment>,
    ) -> Self {
        Self {
            features: Vec::new(),
            group: name.group().clone(),
            time: name.time(),
            host: meta.host,
            tool: meta.tool,
            consistency: meta.consistency,
            parent: meta.parent,
            saved: meta.saved,
            note: meta.note,
            disks,
            attachments,
        }
    }

    /// The snapshot's name.
    pub fn name(&self) -> SnapshotName {
        SnapshotName::new(self.group.clone(), self.time)
    }

    /// The sum of its disks' sizes in bytes.
    pub fn size(&self) -> u64 {
        self.disks.iter().map(|disk| disk.size).sum()
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        self.check().map_err(|how| Error::invalid(format!("this cannot be a snapshot: {how}")))?;
        frame::encode(Document::Manifest, self)
    }

    /// Parses what stands under the name `name`.
    pub(crate) fn decode(bytes: &[u8], name: &SnapshotName) -> Result<Self> {
        let manifest: Self = frame::decode(Document::Manifest, bytes)?;
        if manifest.group != *name.group() || manifest.time != name.time() {
            return Err(Error::damaged(format!(
                "the manifest of {} stands in the place of {name}",
                manifest.name()
            )));
        }
        manifest.check().map_err(|how| Error::damaged(format!("the manifest cannot be: {how}")))?;
        Ok(manifest)
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.disks.len() > MAX_DISKS || self.attachments.len() > MAX_ATTACHMENTS {
            return Err(format!("{} disks, {} attachments", self.disks.len(), self.attachments.len()));
        }
        if self.time.subsec_nanosecond() != 0 {
            return Err("its time is not in whole seconds".into());
        }
        if self.note.as_ref().is_some_and(|note| note.len() > MAX_NOTE_LEN) {
            return Err(format!("its note is longer than {MAX_NOTE_LEN} bytes"));
        }
        if !distinct(self.disks.iter().map(|disk| &disk.name)) {
            return Err("two of its disks have the same name".into());
        }
        if !distinct(self.attachments.iter().map(|attachment| &attachment.name)) {
            return Err("two of its attachments have the same name".into());
        }
        for disk in &self.disks {
            Geometry::new(disk.size, disk.chunk_size)
                .map_err(|error| format!("disk {}: {error}", disk.name))?;
        }
        match self.attachments.iter().find(|attachment| attachment.size > MAX_PLAIN_LEN as u64) {
            Some(large) => Err(format!("attachment {} is longer than {MAX_PLAIN_LEN} bytes", large.name)),
            None => Ok(()),
        }
    }
}

fn distinct<'a>(names: impl Iterator<Item = &'a DiskName>) -> bool {
    let mut names: Vec<_> = names.collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    names.len() == count
}

/// A snapshot that is in the repository. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    manifest: Arc<Manifest>,
}

impl Snapshot {
    pub(crate) fn new(manifest: Manifest) -> Self {
        Self { manifest: Arc::new(manifest) }
    }

    /// Its name.
    pub fn name(&self) -> SnapshotName {
        self.manifest.name()
    }

    /// All that is known about it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its disk of that name.
    ///
    /// # Errors
    /// `NotFound`, with the nearest names.
    pub fn disk(&self, name: &DiskName) -> Result<&DiskEntry> {
        self.manifest.disks.iter().find(|disk| disk.name == *name).ok_or_else(|| {
            let known = self.manifest.disks.iter().map(|disk| disk.name.as_str());
            crate::repository::not_found(format!("{} has no disk {name}", self.name()), name.as_str(), known)
        })
    }
}
