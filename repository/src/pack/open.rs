//! Packs that are open for reading: a bounded number of descriptors, shared by all readers.

use std::io;
use std::sync::Arc;

use quick_cache::sync::Cache;

use crate::error::{Error, ErrorKind, Result};
use crate::header::{self, FileKind, HEADER_LEN};
use crate::id::PackId;
use crate::storage::{ReadFile, Storage};

/// How many packs stay open at once.
const OPEN_PACKS: usize = 128;

pub(crate) struct OpenPacks {
    storage: Arc<dyn Storage>,
    open: Cache<PackId, Arc<dyn ReadFile>>,
}

impl OpenPacks {
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage, open: Cache::new(OPEN_PACKS) }
    }

    /// The pack's file, its header checked.
    pub(crate) fn file(&self, id: PackId) -> Result<Arc<dyn ReadFile>> {
        if let Some(file) = self.open.get(&id) {
            return Ok(file);
        }
        let file =
            self.open_checked(id).map_err(|error| error.at(self.storage.describe(&super::path(id))))?;
        self.open.insert(id, file.clone());
        Ok(file)
    }

    fn open_checked(&self, id: PackId) -> Result<Arc<dyn ReadFile>> {
        let file = self.storage.open(&super::path(id)).map_err(|error| {
            let error = Error::io(format!("cannot open pack {id}"), error);
            // It is named by an index, so it must be there.
            if error.kind() == ErrorKind::NotFound {
                return error
                    .kind_is(ErrorKind::Damaged)
                    .hint("the pack is missing; verify says what it held");
            }
            error
        })?;
        let mut bytes = [0; HEADER_LEN];
        file.read_at(&mut bytes, 0).map_err(|error| Error::io(format!("cannot read pack {id}"), error))?;
        header::check(&bytes, FileKind::Pack, *id.as_bytes())?;
        Ok(file)
    }

    /// Fills `buf` with the bytes of a pack from `offset`.
    pub(crate) fn read(&self, id: PackId, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file(id)?.read_at(buf, offset).map_err(|error| {
            // Another file may stand there by the next time: mounted again, or put back whole.
            self.open.remove(&id);
            let what = if error.kind() == io::ErrorKind::UnexpectedEof {
                // The same for all that the pack lacks.
                format!("pack {id} is cut short")
            } else {
                format!("cannot read {} bytes at {offset} of pack {id}", buf.len())
            };
            Error::io(what, error).at(self.storage.describe(&super::path(id)))
        })
    }
}
