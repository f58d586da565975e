//! Files in memory.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use repository::storage::{ReadFile, Storage, WriteFile, WriteHint};

/// A file in memory.
#[derive(Clone, Debug)]
pub(super) struct Bytes(pub(super) Arc<[u8]>);

impl Bytes {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }
}

impl ReadFile for Bytes {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = self.0.get(start..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// What a capture writes to, without directories: what a path names is there or it is not.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory(Arc<Mutex<BTreeMap<String, Vec<u8>>>>);

impl Memory {
    fn files(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.0.lock().expect("nobody panics while holding it")
    }

    /// The bytes of a file.
    pub(super) fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.files().get(path).cloned()
    }
}

impl Storage for Memory {
    fn create(&self, path: &str, _: WriteHint) -> io::Result<Box<dyn WriteFile>> {
        if self.files().insert(path.to_owned(), Vec::new()).is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        Ok(Box::new(Appender { memory: self.clone(), path: path.to_owned() }))
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn ReadFile>> {
        let bytes = self.read(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(Bytes::new(&bytes)))
    }

    fn publish(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.files();
        let bytes = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), bytes);
        Ok(())
    }

    fn sync_dir(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn create_dir(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let prefix = if dir.is_empty() { String::new() } else { format!("{dir}/") };
        let files = self.files();
        let names = files.keys().filter_map(|path| path.strip_prefix(&prefix));
        Ok(names.filter(|name| !name.contains('/')).map(str::to_owned).collect())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.files().remove(path).map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn describe(&self, path: &str) -> PathBuf {
        path.into()
    }
}

struct Appender {
    memory: Memory,
    path: String,
}

impl WriteFile for Appender {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut files = self.memory.files();
        files.get_mut(&self.path).ok_or(io::ErrorKind::NotFound)?.extend_from_slice(bytes);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}
