//! An export whose addresses are bound before its session is open.

use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use block::{BlockDevice, Error, ErrorKind, OpenDevice, Result};
use nbd_server::ExportNames;

use super::epoch;
use crate::live::LiveDisk;

/// An export whose disk and epoch are put in before the server runs.
pub(super) struct LateExport {
    name: String,
    opened: OnceLock<(Arc<LiveDisk>, u64)>,
}

impl LateExport {
    /// The export of the disk of this name.
    pub(super) fn of(name: &str) -> Self {
        Self { name: name.to_owned(), opened: OnceLock::new() }
    }

    /// The disk is this one, and its session is in this epoch.
    ///
    /// # Panics
    /// Where they were put in before.
    pub(super) fn put(&self, disk: Arc<LiveDisk>, epoch: u64) {
        assert!(self.opened.set((disk, epoch)).is_ok(), "a session is opened once");
    }
}

impl OpenDevice for LateExport {
    fn open(&self) -> Result<Rc<dyn BlockDevice>> {
        match self.opened.get() {
            Some((disk, _)) => OpenDevice::open(&**disk),
            None => Err(Error::new(ErrorKind::Shutdown, "the session is not open yet")),
        }
    }
}

impl ExportNames for LateExport {
    fn further(&self) -> Vec<String> {
        self.opened.get().map(|(_, epoch)| epoch::with_epoch(&self.name, *epoch)).into_iter().collect()
    }

    fn why_refused(&self, name: &str) -> Option<String> {
        let (_, epoch) = self.opened.get()?;
        epoch::why_refused(name, &self.name, *epoch)
    }
}
