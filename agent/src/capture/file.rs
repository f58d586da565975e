//! Sources that are files and block devices, watched for changes while they are read.

use std::fs::{File, Metadata};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::cli::Failure;

/// A raw disk image or a block device.
#[derive(Debug)]
pub(super) struct FileSource {
    path: PathBuf,
    file: File,
    state: State,
}

/// What would be different if somebody had written to the source.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    File {
        size: u64,
        modified: (i64, i64),
    },
    /// `written` counts the requests to write that the kernel has done; `None` where it does not count.
    Device {
        size: u64,
        written: Option<u64>,
    },
}

impl FileSource {
    /// Opens a source for reading, and remembers what state it is in.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(super) fn open(path: PathBuf) -> anyhow::Result<Self> {
        let shown = path.display();
        // Before it is opened: to open a FIFO is to wait for its writer.
        let metadata = std::fs::metadata(&path).with_context(|| format!("cannot read the source {shown}"))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "a directory" } else { "neither a file nor a block device" };
            return Err(Failure::new(
                format_args!("the source {shown} is {what}"),
                "name a raw disk image, a block device or an NBD URI; files of the machine's configuration go with --attach",
            )
            .into());
        }
        let file = File::open(&path).with_context(|| format!("cannot read the source {shown}"))?;
        let state = State::of(&file).with_context(|| format!("cannot look at the source {shown}"))?;
        Ok(Self { path, file, state })
    }

    /// Its size when it was opened.
    pub(super) const fn size(&self) -> u64 {
        self.state.size()
    }

    /// How the source changed since it was opened, in words; `None` where it did not.
    pub(super) fn change(&self) -> anyhow::Result<Option<String>> {
        let now = State::of(&self.file)
            .with_context(|| format!("cannot look at the source {}", self.path.display()))?;
        Ok(self.state.difference(&now))
    }

    /// The path it was named by.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its size now.
    pub(super) fn size_now(&self) -> anyhow::Result<u64> {
        Ok(State::of(&self.file)?.size())
    }

    /// Reads until `buf` is full or the source ends; how many bytes it read.
    pub(super) fn read_up_to(&self, mut buf: &mut [u8], offset: u64) -> anyhow::Result<usize> {
        let mut read = 0;
        while !buf.is_empty() {
            let reading = || format!("cannot read the source {}", self.path.display());
            let len = self.file.read_at(buf, offset + read as u64).with_context(reading)?;
            if len == 0 {
                break;
            }
            read += len;
            buf = &mut buf[len..];
        }
        Ok(read)
    }
}

impl AsFd for FileSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl State {
    fn of(file: &File) -> anyhow::Result<Self> {
        let metadata = file.metadata()?;
        if metadata.file_type().is_block_device() {
            let size = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?;
            return Ok(Self::Device { size, written: requests_to_write(&metadata) });
        }
        Ok(Self::File { size: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }

    const fn size(&self) -> u64 {
        match self {
            Self::File { size, .. } | Self::Device { size, .. } => *size,
        }
    }

    fn difference(&self, now: &Self) -> Option<String> {
        if self == now {
            return None;
        }
        if self.size() != now.size() {
            return Some(format!("its size went from {} to {} bytes", self.size(), now.size()));
        }
        Some("it was written to".to_owned())
    }
}

/// How many requests to write the kernel has done on a block device.
fn requests_to_write(metadata: &Metadata) -> Option<u64> {
    let device = metadata.rdev();
    let path = format!("/sys/dev/block/{}:{}/stat", libc::major(device), libc::minor(device));
    writes_in_stat(&std::fs::read_to_string(path).ok()?)
}

/// The fifth number of a block device's `stat`.
fn writes_in_stat(stat: &str) -> Option<u64> {
    stat.split_whitespace().nth(4)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_was_written_to_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.raw");
        std::fs::write(&path, [1; 4096]).unwrap();
        let source = FileSource::open(path.clone()).unwrap();
        assert_eq!(source.change().unwrap(), None);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(source.change().unwrap().as_deref(), Some("it was written to"));
        file.set_len(8192).unwrap();
        assert_eq!(source.change().unwrap().as_deref(), Some("its size went from 4096 to 8192 bytes"));
    }

    #[test]
    fn the_kernels_count_of_writes_is_the_fifth_number() {
        let stat = "  10 0 80 1 42 0 336 5 0 6 6 0 0 0 0 0 0\n";
        assert_eq!(writes_in_stat(stat), Some(42));
        assert_eq!(writes_in_stat("1 2"), None);
    }
}
