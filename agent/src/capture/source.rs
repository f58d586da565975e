//! What a capture reads: named sources, checked before anything is read, and watched for changes meanwhile.

use std::fs::{File, Metadata};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context as _;
use repository::DiskName;

use super::format;
use crate::cli::Failure;

/// `[NAME=]SOURCE` on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SourceArg {
    name: Option<DiskName>,
    path: PathBuf,
}

impl FromStr for SourceArg {
    type Err = String;

    /// What stands before the first `=` is a name, unless it has a slash: `./a=b` is a path.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err("a source is a file or a block device".to_owned());
        }
        let (name, path) = match text.split_once('=') {
            Some((name, path)) if !name.contains('/') => {
                let name = name
                    .parse::<DiskName>()
                    .map_err(|error| format!("{error}; to name a file with = in its name, write ./{text}"))?;
                (Some(name), path)
            }
            _ => (None, text),
        };
        if path.is_empty() {
            return Err("there is no source after the =".to_owned());
        }
        if let Some((scheme, _)) = path.split_once("://") {
            return Err(format!(
                "sources of the kind {scheme}:// are not supported yet: name a file or a block device"
            ));
        }
        Ok(Self { name, path: path.into() })
    }
}

/// Gives each source its name: its own, or disk0, disk1, … by its place.
///
/// # Errors
/// Where two sources have one name.
pub(super) fn name_all(sources: Vec<SourceArg>) -> Result<Vec<(DiskName, PathBuf)>, String> {
    let mut named: Vec<(DiskName, PathBuf)> = Vec::with_capacity(sources.len());
    for (index, source) in sources.into_iter().enumerate() {
        let name = match source.name {
            Some(name) => name,
            None => format!("disk{index}").parse().expect("such a name has letters and digits only"),
        };
        if named.iter().any(|(other, _)| *other == name) {
            return Err(format!("two disks are called {name}: give them names, like root=a.raw data=b.raw"));
        }
        named.push((name, source.path));
    }
    Ok(named)
}

/// A source that can be read.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) name: DiskName,
    path: PathBuf,
    pub(super) size: u64,
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

impl Source {
    /// Opens a source for reading, and remembers what state it is in.
    ///
    /// # Errors
    /// Where it cannot be read, is empty, or is not the bytes of a disk (unless `as_raw`).
    pub(super) fn open(name: DiskName, path: PathBuf, as_raw: bool) -> anyhow::Result<Self> {
        let shown = path.display();
        // Before it is opened: to open a FIFO is to wait for its writer.
        let metadata = std::fs::metadata(&path).with_context(|| format!("cannot read the source {shown}"))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "a directory" } else { "neither a file nor a block device" };
            return Err(Failure::new(
                format_args!("the source {shown} is {what}"),
                "name a raw disk image or a block device; files of the machine's configuration go with --attach",
            )
            .into());
        }
        let file = File::open(&path).with_context(|| format!("cannot read the source {shown}"))?;
        let state = State::of(&file).with_context(|| format!("cannot look at the source {shown}"))?;
        let size = state.size();
        if size == 0 {
            return Err(Failure::new(
                format_args!("the source {shown} is empty: it has 0 bytes"),
                "name the file or device that holds the disk",
            )
            .into());
        }
        let mut head = [0; format::PROBE_LEN];
        let len = file.read_at(&mut head, 0).with_context(|| format!("cannot read the source {shown}"))?;
        if let Some(container) = format::container(&head[..len])
            && !as_raw
        {
            return Err(Failure::new(
                format_args!("the source {shown} is not a raw disk: it is {} data", container.name),
                container.advice(&path),
            )
            .into());
        }
        Ok(Self { name, path, size, file, state })
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

impl AsFd for Source {
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

    fn arg(text: &str) -> SourceArg {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_stands_before_the_first_equals_sign() {
        assert_eq!(arg("root=/a=b").path, PathBuf::from("/a=b"));
        assert_eq!(arg("root=/a=b").name.unwrap().as_str(), "root");
        assert_eq!(arg("./a=b"), SourceArg { name: None, path: "./a=b".into() });
        for bad in ["", "=x", "root=", "a b=x", "nbd://host/x", "root=nbd+unix:///?socket=s"] {
            assert!(bad.parse::<SourceArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn disks_without_a_name_are_numbered_by_their_place() {
        let named = name_all(vec![arg("a"), arg("data=b"), arg("c")]).unwrap();
        let names = named.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
        assert_eq!(names, ["disk0", "data", "disk2"]);
        assert!(name_all(vec![arg("disk1=a"), arg("b")]).unwrap_err().contains("disk1"));
    }

    #[test]
    fn a_source_that_was_written_to_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.raw");
        std::fs::write(&path, [1; 4096]).unwrap();
        let source = Source::open("root".parse().unwrap(), path.clone(), false).unwrap();
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
