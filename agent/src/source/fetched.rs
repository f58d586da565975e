//! How much was fetched for each disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

/// What was fetched for a disk since its pool began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchStats {
    /// Stored bytes that arrived.
    pub stored_bytes: u64,
    /// Plain bytes of the chunks that were had from them.
    pub plain_bytes: u64,
}

/// The counts, by the disks' numbers. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Fetched(Arc<RwLock<Vec<Counts>>>);

#[derive(Debug, Default)]
struct Counts {
    stored_bytes: AtomicU64,
    plain_bytes: AtomicU64,
}

impl Fetched {
    /// A further disk.
    pub(super) fn push(&self) {
        self.0.write().push(Counts::default());
    }

    pub(super) fn add_stored(&self, disk: u32, bytes: usize) {
        if let Some(counts) = self.0.read().get(disk as usize) {
            counts.stored_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    pub(super) fn add_plain(&self, disk: u32, bytes: usize) {
        if let Some(counts) = self.0.read().get(disk as usize) {
            counts.plain_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// What was fetched for the disk with this number.
    pub(super) fn of(&self, disk: u32) -> FetchStats {
        let counts = self.0.read();
        counts.get(disk as usize).map_or_else(FetchStats::default, |counts| FetchStats {
            stored_bytes: counts.stored_bytes.load(Ordering::Relaxed),
            plain_bytes: counts.plain_bytes.load(Ordering::Relaxed),
        })
    }
}
