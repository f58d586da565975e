//! The fetching threads, which all disks of an agent share: one cache, one bound on what is in flight.

use std::cell::OnceCell;
use std::sync::Arc;

use anyhow::Context as _;
use repository::{DiskMap, Repository};

use crate::source::{FetchPool, FetchStats, PoolOptions, RepositoryStore};

/// The threads, started when the first disk needs them.
pub(super) struct SharedPool {
    options: PoolOptions,
    pool: OnceCell<Arc<FetchPool<RepositoryStore>>>,
}

impl SharedPool {
    /// None are started yet.
    pub(super) const fn new(options: PoolOptions) -> Self {
        Self { options, pool: OnceCell::new() }
    }

    /// Makes a disk of the repository known to the threads.
    ///
    /// # Errors
    /// Where the threads cannot be started.
    pub(super) fn add(&self, repository: &Repository, map: DiskMap) -> anyhow::Result<Fetching> {
        let pool = match self.pool.get() {
            Some(pool) => Arc::clone(pool),
            None => {
                let store = RepositoryStore::new(repository.clone());
                let pool =
                    FetchPool::start(store, self.options).context("cannot start the fetching threads")?;
                Arc::clone(self.pool.get_or_init(|| Arc::new(pool)))
            }
        };
        let disk = pool.store().add(map);
        Ok(Fetching { pool, disk })
    }
}

/// What fetches for one disk.
#[derive(Clone)]
pub(crate) struct Fetching {
    /// The threads, which other disks may share.
    pub(crate) pool: Arc<FetchPool<RepositoryStore>>,
    /// The disk's number there.
    pub(crate) disk: u32,
}

impl Fetching {
    /// What was fetched for this disk.
    pub(crate) fn stats(&self) -> FetchStats {
        self.pool.store().fetched(self.disk)
    }
}
