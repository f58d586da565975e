//! Files in a local directory.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, RenameFlags};

use super::{BULK_ALIGN, ReadFile, Storage, WriteFile, WriteHint};

/// A [`Storage`] on a local directory.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
}

impl Directory {
    /// The storage in `root`, whether or not that exists.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        if path.is_empty() { self.root.clone() } else { self.root.join(path) }
    }
}

impl Storage for Directory {
    fn create(&self, path: &str, hint: WriteHint) -> io::Result<Box<dyn WriteFile>> {
        let path = self.path(path);
        if hint == WriteHint::Bulk
            && let Some(file) = create_direct(&path)?
        {
            return Ok(Box::new(Appender { file, len: 0, direct: true }));
        }
        let file = File::options().write(true).create_new(true).open(path)?;
        Ok(Box::new(Appender { file, len: 0, direct: false }))
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn ReadFile>> {
        Ok(Arc::new(Opened(File::open(self.path(path))?)))
    }

    fn publish(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (self.path(from), self.path(to));
        match rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE) {
            // Some network file systems cannot refuse to replace; a second name and the removal of the first can.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                fs::hard_link(&from, &to)?;
                fs::remove_file(&from)
            }
            done => Ok(done?),
        }
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        File::open(self.path(dir))?.sync_all()
    }

    fn create_dir(&self, dir: &str) -> io::Result<()> {
        fs::create_dir(self.path(dir))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path(dir))? {
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn is_empty(&self, dir: &str) -> io::Result<bool> {
        Ok(fs::read_dir(self.path(dir))?.next().transpose()?.is_none())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        fs::remove_file(self.path(path))
    }

    fn describe(&self, path: &str) -> PathBuf {
        self.path(path)
    }
}

/// Creates a file for direct I/O; none where the file system does not have it.
fn create_direct(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::DIRECT;
    match rustix::fs::open(path, flags, Mode::from_raw_mode(0o666)) {
        Ok(fd) => Ok(Some(File::from(fd))),
        Err(rustix::io::Errno::INVAL) => {
            // The refusal may come after the file was made.
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(None),
            }
        }
        Err(error) => Err(error.into()),
    }
}

struct Appender {
    file: File,
    len: u64,
    direct: bool,
}

impl WriteFile for Appender {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let aligned =
            bytes.as_ptr().addr().is_multiple_of(BULK_ALIGN) && bytes.len().is_multiple_of(BULK_ALIGN);
        if self.direct && !aligned {
            self.leave_direct()?;
        }
        match self.file.write_all_at(bytes, self.len) {
            // A device may want more alignment than a page: then the page cache does it.
            Err(error) if self.direct && error.raw_os_error() == Some(libc::EINVAL) => {
                self.leave_direct()?;
                self.file.write_all_at(bytes, self.len)?;
            }
            done => done?,
        }
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl Appender {
    fn leave_direct(&mut self) -> io::Result<()> {
        rustix::fs::fcntl_setfl(&self.file, OFlags::empty())?;
        self.direct = false;
        Ok(())
    }
}

struct Opened(File);

impl ReadFile for Opened {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_file_never_replaces_another() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Directory::new(dir.path());
        for (name, text) in [("a", "first"), ("b", "second")] {
            let mut file = storage.create(name, WriteHint::Small).unwrap();
            file.append(text.as_bytes()).unwrap();
            file.sync().unwrap();
        }
        storage.publish("a", "c").unwrap();
        let error = storage.publish("b", "c").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(dir.path().join("c")).unwrap(), b"first");
        storage.sync_dir("").unwrap();
    }

    #[test]
    fn a_bulk_file_takes_unaligned_pieces_too() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Directory::new(dir.path());
        let mut file = storage.create("bulk", WriteHint::Bulk).unwrap();
        file.append(&[1; 5000]).unwrap();
        file.append(&[2; 3]).unwrap();
        file.sync().unwrap();
        let mut back = [0; 5003];
        storage.open("bulk").unwrap().read_at(&mut back, 0).unwrap();
        assert_eq!((back[0], back[4999], back[5000]), (1, 1, 2));
        let past = storage.open("bulk").unwrap().read_at(&mut back, 1).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    }
}
