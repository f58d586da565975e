//! Packs: immutable files of many chunks in the order of their capture, with a table of them at the end.

pub(crate) mod format;
pub(crate) mod open;
pub(crate) mod writer;

/// The directory of packs.
pub(crate) const DIR: &str = "packs";
const SUFFIX: &str = ".pack";

use crate::id::PackId;

/// The path of a pack.
pub(crate) fn path(id: PackId) -> String {
    format!("{DIR}/{id}{SUFFIX}")
}

/// The pack that a file of the directory is; none for a stranger.
pub(crate) fn id_of(file: &str) -> Option<PackId> {
    file.strip_suffix(SUFFIX)?.parse().ok()
}
