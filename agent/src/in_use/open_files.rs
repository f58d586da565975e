//! Who has a file open, from `/proc`: QEMU opens the target that a machine is to be moved onto before it takes a lock on it.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

/// Whether the process has `file` open, for reading and writing or not.
///
/// # Errors
/// Where its files may not be looked at, or it has ended.
pub(crate) fn has_open(process: u32, file: &Metadata) -> io::Result<bool> {
    let entries = std::fs::read_dir(format!("/proc/{process}/fd"))?;
    // Through /proc a file is the same whatever namespace its path is from.
    let mut files = entries.flatten().filter_map(|entry| std::fs::metadata(entry.path()).ok());
    Ok(files.any(|theirs| is_same(&theirs, file)))
}

/// A process that has `file` open, other than this one, of those whose files we may look at.
pub(super) fn opener(file: &Metadata) -> Option<u32> {
    let entries = std::fs::read_dir("/proc").ok()?.flatten();
    let mut processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes.find(|&process| process != std::process::id() && has_open(process, file).unwrap_or(false))
}

/// Whether both are of one file, or of one device by whatever node.
pub(crate) fn is_same(a: &Metadata, b: &Metadata) -> bool {
    if b.file_type().is_block_device() {
        return a.file_type().is_block_device() && a.rdev() == b.rdev();
    }
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}
