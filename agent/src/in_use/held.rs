//! What became of a file that a process has open, whatever its path leads to by now.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::is_same;

/// What is known of such a file.
#[derive(Debug)]
pub(crate) enum Held {
    /// It is a device, which is there by whatever node.
    Device,
    /// It has this name.
    Called(PathBuf),
    /// It has another name than the one that it was opened by; this leads to it.
    Unnamed(PathBuf),
    /// It has none any more; this leads to it.
    Removed(PathBuf),
}

impl Held {
    /// Of the file `ours`, which is open as `held`, a path below `/proc`. `None` where that cannot be read.
    pub(crate) fn of(held: &Path, ours: &Metadata) -> Option<Self> {
        if ours.file_type().is_block_device() {
            return Some(Self::Device);
        }
        let called = fs::read_link(held).ok()?;
        let is_there = fs::metadata(&called).is_ok_and(|there| is_same(&there, ours));
        Some(match is_there {
            true => Self::Called(called),
            false if ours.nlink() == 0 => Self::Removed(held.to_owned()),
            false => Self::Unnamed(held.to_owned()),
        })
    }
}

/// What is open, and not what stands at the path that it was opened by.
pub(crate) fn metadata_of(file: impl AsFd) -> io::Result<Metadata> {
    File::from(file.as_fd().try_clone_to_owned()?).metadata()
}
