//! A file mapped into memory for several threads, and several lives of a process, to share.

mod lost;

use std::ffi::CString;
use std::fs::File;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

use crate::{Error, ErrorKind, Result};
use lost::Listed;

/// The first bytes of a file, shared with every other mapping of it and reached as atomic words
/// alone. What is stored is in the kernel's hands at once and outlives the process, but not the machine.
///
/// The file must not be made shorter while it is mapped, and its room must be allocated before
/// (`fallocate`): touching a page that the file system cannot provide ends the process (SIGBUS), with the file's last words
/// where it has any.
#[derive(Debug)]
pub struct MappedFile {
    memory: NonNull<u8>,
    len: usize,
    /// Goes before the memory does.
    listed: Option<Listed>,
}

// SAFETY: the memory is reached as atomics only, through shared references.
unsafe impl Send for MappedFile {}
// SAFETY: as above.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps the first `len` bytes of `file`, for reading and writing.
    ///
    /// # Errors
    /// `InvalidRange` where `len` is zero or the file is shorter; `Io` where the kernel refuses.
    pub fn map(file: &File, len: usize) -> Result<Self> {
        Self::map_as(file, len, MapFlags::SHARED)
    }

    /// Maps the first `len` bytes of `file`, which need be open for reading only: what is stored stays in this mapping.
    ///
    /// # Errors
    /// As [`MappedFile::map`].
    pub fn map_read_only(file: &File, len: usize) -> Result<Self> {
        // Not without the right to write: atomic loads, but for relaxed ones, are undefined on memory that is read-only.
        Self::map_as(file, len, MapFlags::PRIVATE)
    }

    fn map_as(file: &File, len: usize, flags: MapFlags) -> Result<Self> {
        let failed = |source| Error::io(format_args!("map {len} bytes of a file"), source);
        let size = file.metadata().map_err(failed)?.len();
        if len == 0 || size < len as u64 {
            let context = format_args!("map {len} bytes of a file that has {size}");
            return Err(Error::new(ErrorKind::InvalidRange, context));
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours. Other
        // processes may change what it holds at any time, which atomics allow.
        let memory = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, 0) };
        let memory = memory.map_err(|errno| failed(errno.into()))?;
        let memory = NonNull::new(memory.cast()).expect("mmap returns no null mapping");
        Ok(Self { memory, len, listed: None })
    }

    /// With these last words: they go to stderr, as they are, and the process ends with exit code 1, where a page of the file cannot
    /// be had any more, because the storage below has failed. An empty file is made at `mark` before that.
    #[must_use]
    pub fn with_last_words(mut self, words: String, mark: Option<&Path>) -> Self {
        let mark = mark.and_then(|mark| CString::new(mark.as_os_str().as_encoded_bytes()).ok());
        self.listed = Listed::new(self.memory.as_ptr().addr(), self.len, words, mark);
        self
    }

    /// How many bytes are mapped.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Never: a mapping has at least one byte.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// `count` words from byte `offset`.
    ///
    /// # Panics
    /// Where they do not lie within the mapping, or `offset` is no multiple of 8.
    #[must_use]
    pub fn words(&self, offset: usize, count: usize) -> &[AtomicU64] {
        assert!(offset.is_multiple_of(align_of::<AtomicU64>()), "words at odd byte {offset}");
        let fits =
            count.checked_mul(8).and_then(|len| len.checked_add(offset)).is_some_and(|end| end <= self.len);
        assert!(fits, "{count} words from byte {offset} of a mapping of {} bytes", self.len);
        // SAFETY: the range lies within the mapping (asserted), is aligned (the mapping begins at a page),
        // and lives as long as `self`. Any bits are a valid word.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(offset).cast(), count) }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        self.listed = None;
        // SAFETY: the mapping was made by `map` with this length, and nobody borrows from `self` any more.
        let unmapped = unsafe { rustix::mm::munmap(self.memory.as_ptr().cast(), self.len) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "a mapped file could not be unmapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::atomic::Ordering;

    use super::*;

    /// Set in the child of the test below to the file that it is to lose.
    const FILE: &str = "LIFEBOOT_TEST_LOST_FILE";

    #[test]
    fn a_process_that_loses_its_file_says_its_last_words_leaves_the_mark_and_fails() {
        let name =
            "mapped::tests::a_process_that_loses_its_file_says_its_last_words_leaves_the_mark_and_fails";
        if let Some(path) = std::env::var_os(FILE) {
            let file =
                File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
            file.set_len(8192).unwrap();
            let others = MappedFile::map(&file, 8192).unwrap().with_last_words("wrong".to_owned(), None);
            drop(others);
            let mark = Path::new(&path).with_extension("lost");
            let words = "the file is gone\n  buy another one\n".to_owned();
            let mapped = MappedFile::map(&file, 8192).unwrap().with_last_words(words, Some(&mark));
            // To the kernel the same as a file system that fails: there is no such page.
            file.set_len(0).unwrap();
            mapped.words(4096, 1)[0].store(1, Ordering::Relaxed);
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("live");
        let mut child = Command::new(std::env::current_exe().unwrap());
        let ended = child.args(["--exact", name, "--nocapture"]).env(FILE, &file).output().unwrap();
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(said.contains("the file is gone\n  buy another one\n") && !said.contains("wrong"), "{said}");
        assert!(file.with_extension("lost").exists());
    }

    #[test]
    fn a_process_that_loses_another_file_ends_as_it_would_have() {
        use std::os::unix::process::ExitStatusExt as _;
        let name = "mapped::tests::a_process_that_loses_another_file_ends_as_it_would_have";
        if let Some(path) = std::env::var_os(FILE) {
            let file =
                File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
            file.set_len(8192).unwrap();
            let _other = MappedFile::map(&file, 4096).unwrap().with_last_words("wrong".to_owned(), None);
            let mapped = MappedFile::map(&file, 8192).unwrap();
            file.set_len(4096).unwrap();
            mapped.words(4096, 1)[0].store(1, Ordering::Relaxed);
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap());
        let ended = child.args(["--exact", name, "--nocapture"]).env(FILE, dir.path().join("live"));
        let ended = ended.output().unwrap();
        assert_eq!(ended.status.signal(), Some(libc::SIGBUS), "{ended:?}");
        assert!(!String::from_utf8_lossy(&ended.stderr).contains("wrong"), "{ended:?}");
    }
}
