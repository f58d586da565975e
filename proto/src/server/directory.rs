//! What the handshake asks of the server that holds the exports.

use crate::wire::{ExportInfo, MetaContext};

/// Which export, as the server numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExportId(pub usize);

/// An export as LIST tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Its name.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
}

/// Why an export that exists is not given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It could not be opened.
    Unavailable,
    /// The server is ending.
    ShuttingDown,
}

/// The exports of a server.
pub trait Directory {
    /// Every export, without opening one.
    fn list(&self) -> Vec<Listing>;

    /// The export of this name, without opening it. The empty name is the only or the first one.
    fn find(&self, name: &str) -> Option<ExportId>;

    /// Why there is no export of this name, where more is to be said than that.
    fn why_absent(&self, name: &str) -> Option<String>;

    /// The metadata contexts of an export, without opening it.
    fn contexts(&self, export: ExportId) -> Vec<MetaContext>;

    /// What INFO and GO tell. The one call that may open the export; it is made only for a
    /// request that was checked.
    ///
    /// # Errors
    /// Where it cannot be given out.
    fn describe(&self, export: ExportId) -> Result<ExportInfo, Refusal>;
}
