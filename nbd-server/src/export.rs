//! What is served under a name.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use block::OpenDevice;
use proto::wire::{Cut, MAX_NAME_BYTES, MetaContext};

use crate::{Error, ErrorKind, Result};

/// Further names of an export, which may be known only when the server runs.
pub trait ExportNames: Send + Sync {
    /// The names by which it can be had beside its own, at most 4096 bytes each.
    fn further(&self) -> Vec<String>;

    /// Why it can no longer be had by this name, in at most 4096 bytes: the client is told, and the log. `None` of a name
    /// that was never its.
    fn why_refused(&self, name: &str) -> Option<String>;
}

/// A disk served over NBD.
#[derive(Clone)]
pub struct Export {
    /// Its name, at most 4096 bytes. The first export also answers to the empty name.
    pub name: String,
    /// Further names, and former ones.
    pub names: Option<Arc<dyn ExportNames>>,
    /// A text for people, at most 4096 bytes; may be empty.
    pub description: String,
    /// Whether writes are refused, though the device might take them.
    pub read_only: bool,
    /// The name of the bitmap of what was written, if the device keeps one: the context `qemu:dirty-bitmap:NAME`.
    pub dirty_bitmap: Option<String>,
    /// Opens the disk, once on each shard that needs it.
    pub device: Arc<dyn OpenDevice>,
}

impl Export {
    /// A writable export without description.
    pub fn new(name: impl Into<String>, device: Arc<dyn OpenDevice>) -> Self {
        Self {
            name: name.into(),
            names: None,
            description: String::new(),
            read_only: false,
            dirty_bitmap: None,
            device,
        }
    }

    pub(crate) fn further_names(&self) -> Vec<String> {
        self.names.as_ref().map(|names| names.further()).unwrap_or_default()
    }

    pub(crate) fn is_named(&self, name: &str) -> bool {
        self.name == name || self.further_names().iter().any(|further| further == name)
    }

    pub(crate) fn contexts(&self) -> Vec<MetaContext> {
        let mut contexts = vec![MetaContext::Allocation, MetaContext::Depth];
        contexts.extend(self.dirty_bitmap.clone().map(MetaContext::DirtyBitmap));
        contexts
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

/// Checks that every export can be named on the wire, and no two alike.
pub(crate) fn check(exports: &[Export]) -> Result<()> {
    let invalid = |context: String| Err(Error::new(ErrorKind::InvalidExport, context));
    if exports.is_empty() {
        return invalid("there is nothing to serve".to_owned());
    }
    let mut names = HashSet::new();
    for export in exports {
        let bitmap = export.dirty_bitmap.as_deref().unwrap_or_default();
        for text in [export.name.as_str(), &export.description, bitmap] {
            if text.len() > MAX_NAME_BYTES - "qemu:dirty-bitmap:".len() || text.contains('\0') {
                return invalid(format!("\"{}\" is too long or no text for NBD", Cut(text)));
            }
        }
        if !names.insert(export.name.as_str()) {
            return invalid(format!("two exports are named \"{}\"", Cut(&export.name)));
        }
    }
    if exports.iter().skip(1).any(|export| export.name.is_empty()) {
        return invalid("only the first export may have the empty name".to_owned());
    }
    Ok(())
}
