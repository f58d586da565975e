//! Directories in a place that others use too.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::Path;

/// Makes a directory that nobody else can write to, or takes the one that is there; false where that is somebody else's, or
/// others may write to it.
///
/// # Errors
/// What the operating system says.
pub(crate) fn make(dir: &Path) -> io::Result<bool> {
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => return Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let found = std::fs::symlink_metadata(dir)?;
    let user = rustix::process::geteuid().as_raw();
    Ok(found.is_dir() && found.uid() == user && found.mode() & 0o022 == 0)
}
