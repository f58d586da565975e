//! The fetching threads, which all disks of an agent share: one cache, one bound on what is in flight.

use std::cell::OnceCell;
use std::sync::Arc;

use anyhow::Context as _;
use repository::{DiskMap, Repository};

use crate::source::{FallbackUse, Fallbacks, FetchPool, FetchStats, PoolOptions, RepositoryStore};

/// The threads, started when the first disk needs them.
pub(super) struct SharedPool {
    options: PoolOptions,
    fallbacks: Fallbacks,
    pool: OnceCell<Arc<FetchPool<RepositoryStore>>>,
}

impl SharedPool {
    /// None are started yet.
    pub(super) fn new(options: PoolOptions, fallbacks: &Fallbacks) -> Self {
        Self { options, fallbacks: fallbacks.clone(), pool: OnceCell::new() }
    }

    /// Makes a disk of the repository known to the threads.
    ///
    /// # Errors
    /// Where the threads cannot be started.
    pub(super) fn add(&self, repository: &Repository, map: DiskMap) -> anyhow::Result<Fetching> {
        let pool = match self.pool.get() {
            Some(pool) => Arc::clone(pool),
            None => {
                let store = RepositoryStore::with_fallbacks(repository.clone(), self.fallbacks.clone());
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
    /// What came from copies of the repository, for all disks.
    pub(crate) fn fallbacks(&self) -> Vec<FallbackUse> {
        self.pool.store().fallbacks().used()
    }

    /// What each copy of the repository gave and did not give, for all disks.
    pub(super) fn use_of_each_fallback(&self) -> impl Iterator<Item = FallbackUse> {
        self.pool.store().fallbacks().use_of_each()
    }

    /// What was fetched for this disk.
    pub(crate) fn stats(&self) -> FetchStats {
        self.pool.store().fetched(self.disk)
    }
}
