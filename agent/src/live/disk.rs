//! A session's disk as servers open it: once on each shard, over that shard's own handles.

use std::rc::Rc;
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind, OpenDevice, Result};

use super::device::LiveDevice;
use super::session::Session;

/// A session with its target and its journal, to be opened on any thread.
pub struct LiveDisk {
    session: Arc<Session>,
    target: Arc<dyn OpenDevice>,
    journal: Arc<dyn OpenDevice>,
}

impl LiveDisk {
    /// The disk of `session`, whose target and journal these are.
    #[must_use]
    pub fn new(session: Arc<Session>, target: Arc<dyn OpenDevice>, journal: Arc<dyn OpenDevice>) -> Self {
        Self { session, target, journal }
    }

    /// The session that all handles share.
    #[must_use]
    pub const fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// A handle for the calling thread.
    ///
    /// # Errors
    /// Where the target or the journal cannot be opened here, or [`Session::device`] refuses them.
    pub fn device(&self) -> Result<LiveDevice> {
        let (target, journal) = (self.target.open()?, self.journal.open()?);
        self.session.device(target, journal).map_err(|error| Error::new(ErrorKind::Io, error))
    }
}

impl OpenDevice for LiveDisk {
    fn open(&self) -> Result<Rc<dyn BlockDevice>> {
        Ok(Rc::new(self.device()?))
    }
}
