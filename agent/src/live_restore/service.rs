//! A running agent, as whoever is asked something through its sockets sees it: its disks, and what they share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::Engine;
use nbd_server::ListenAddress;
use repository::Repository;

use super::record::SessionRecord;
use super::report;
use super::state_dir::StateDir;
use crate::cli::{Context, Failure, Interrupt};
use crate::live::{LiveDisk, Session, StatsSnapshot};
use crate::source::{FetchPool, FetchStats, RepositoryStore};
use crate::status::Status;

/// An agent that serves.
pub(crate) struct Service {
    /// How this run was called, and how it talks.
    #[allow(dead_code, reason = "for requests that concern the whole agent")]
    pub(crate) context: Context,
    /// By what its disks are read and written.
    #[allow(dead_code, reason = "for requests that open disks")]
    pub(crate) engine: Engine,
    /// The repository, unless it cannot be had and is not needed.
    #[allow(dead_code, reason = "for requests that read it or write to it")]
    pub(crate) repository: Option<Repository>,
    pub(super) interrupt: Interrupt,
    pub(super) disks: Vec<ServedDisk>,
    pub(super) is_ending: AtomicBool,
}

/// One of its disks.
pub(crate) struct ServedDisk {
    /// What its session is, as of this start.
    pub(crate) record: SessionRecord,
    /// Where its session is kept.
    pub(crate) state: StateDir,
    /// The session and what opens it on any thread.
    pub(crate) disk: Arc<LiveDisk>,
    /// What fetches; nothing does for a session that does without its repository.
    pub(crate) pool: Option<Arc<FetchPool<RepositoryStore>>>,
    /// Where it is served.
    pub(crate) addresses: Vec<ListenAddress>,
    /// Bytes brought home a second, lately.
    pub(super) rate: AtomicU64,
}

impl Service {
    /// The disks, in the order of their exports.
    pub(crate) fn disks(&self) -> &[ServedDisk] {
        &self.disks
    }

    /// Fails once the agent is about to end: whatever takes long gives up then, in order.
    ///
    /// # Errors
    /// [`crate::cli::Interrupted`] or a [`Failure`].
    #[allow(dead_code, reason = "for requests that take long")]
    pub(crate) fn check_ending(&self) -> anyhow::Result<()> {
        self.interrupt.check()?;
        if self.is_ending.load(Ordering::Relaxed) {
            return Err(Failure::new("the agent is ending", "start it again, then ask again").into());
        }
        Ok(())
    }
}

impl ServedDisk {
    /// The session.
    pub(crate) fn session(&self) -> &Arc<Session> {
        self.disk.session()
    }

    /// How far it is.
    pub(crate) fn status(&self) -> Status {
        self.status_of(&self.session().stats())
    }

    pub(super) fn status_of(&self, stats: &StatsSnapshot) -> Status {
        let uri = self.uris().into_iter().next();
        report::status(&self.record, uri, stats, self.fetched(), self.rate.load(Ordering::Relaxed))
    }

    /// Where it is served.
    pub(super) fn uris(&self) -> Vec<String> {
        self.addresses.iter().map(|address| address.uri(&self.record.disk)).collect()
    }

    pub(super) fn fetched(&self) -> FetchStats {
        self.pool.as_deref().map(FetchPool::stats).unwrap_or_default()
    }
}
