//! The disk of an export whose addresses are bound before its session is open.

use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use block::{BlockDevice, Error, ErrorKind, OpenDevice, Result};

use crate::live::LiveDisk;

/// A disk that is put in before the server runs.
#[derive(Default)]
pub(super) struct LateDisk(OnceLock<Arc<LiveDisk>>);

impl LateDisk {
    /// The disk is this one.
    ///
    /// # Panics
    /// Where it was put in before.
    pub(super) fn put(&self, disk: Arc<LiveDisk>) {
        assert!(self.0.set(disk).is_ok(), "an export has one disk");
    }
}

impl OpenDevice for LateDisk {
    fn open(&self) -> Result<Rc<dyn BlockDevice>> {
        match self.0.get() {
            Some(disk) => OpenDevice::open(&**disk),
            None => Err(Error::new(ErrorKind::Shutdown, "the session is not open yet")),
        }
    }
}
