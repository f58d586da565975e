//! Where the files of a repository are: the few operations that it needs, so that a simulated file system can stand in for a real one.
//!
//! Paths are relative to the repository, with `/`: `packs/0123.pack`. A file is created in `tmp/`, appended to, synced, and published
//! under its name, which it never had before; then its directory is synced. Nothing is ever changed in place.

pub mod directory;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// How a new file will be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteHint {
    /// A few kilobytes, or nothing to win: through the page cache.
    Small,
    /// Large pieces of [`BULK_ALIGN`]ed memory and length: past the page cache, so that the sync at the end has little left to do.
    Bulk,
}

/// What the memory and the length of each piece of a bulk file are multiples of.
pub const BULK_ALIGN: usize = 4096;

/// A place for files.
///
/// Errors are the operating system's; the caller knows what it was doing and says so.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Creates a file that is not there yet, for appending.
    fn create(&self, path: &str, hint: WriteHint) -> io::Result<Box<dyn WriteFile>>;

    /// Opens a file for reading. It stays readable through the handle after it was removed.
    fn open(&self, path: &str) -> io::Result<Arc<dyn ReadFile>>;

    /// Gives a synced file its name in another directory; `AlreadyExists` if that is taken.
    fn publish(&self, from: &str, to: &str) -> io::Result<()>;

    /// Makes the names in a directory durable. The directory of the repository itself is `""`.
    fn sync_dir(&self, dir: &str) -> io::Result<()>;

    /// Makes a directory.
    fn create_dir(&self, dir: &str) -> io::Result<()>;

    /// The names in a directory, in no order.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;

    /// Whether nothing is in a directory. Storages that need not list all of it answer sooner.
    fn is_empty(&self, dir: &str) -> io::Result<bool> {
        Ok(self.list(dir)?.is_empty())
    }

    /// Removes a file.
    fn remove(&self, path: &str) -> io::Result<()>;

    /// How to name a path to a person.
    fn describe(&self, path: &str) -> PathBuf;
}

/// A file that is being written.
pub trait WriteFile: Send {
    /// Writes all of `bytes` at the end.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Returns once all that was appended is on stable storage.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file that is complete.
pub trait ReadFile: Send + Sync {
    /// Its length in bytes.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`; `UnexpectedEof` if the file ends before.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// Reads a whole file of at most `limit` bytes; `None` if it is longer.
pub(crate) fn read_all(storage: &dyn Storage, path: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let file = storage.open(path)?;
    let len = file.len_bytes()?;
    if len > limit {
        return Ok(None);
    }
    let mut bytes = vec![0; len as usize];
    file.read_at(&mut bytes, 0)?;
    Ok(Some(bytes))
}
