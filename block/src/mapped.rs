//! A file mapped into memory for several threads, and several lives of a process, to share.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

use crate::{Error, ErrorKind, Result};

/// The first bytes of a file, shared with every other mapping of it and reached as atomic words
/// alone. What is stored is in the kernel's hands at once and outlives the process, but not the machine.
///
/// The file must not be made shorter while it is mapped, and its room must be allocated before
/// (`fallocate`): touching a page that the file system cannot provide ends the process (SIGBUS).
#[derive(Debug)]
pub struct MappedFile {
    memory: NonNull<u8>,
    len: usize,
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
        let failed = |source| Error::io(format_args!("map {len} bytes of a file"), source);
        let size = file.metadata().map_err(failed)?.len();
        if len == 0 || size < len as u64 {
            let context = format_args!("map {len} bytes of a file that has {size}");
            return Err(Error::new(ErrorKind::InvalidRange, context));
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours. Other
        // processes may change what it holds at any time, which atomics allow.
        let memory =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0) };
        let memory = memory.map_err(|errno| failed(errno.into()))?;
        let memory = NonNull::new(memory.cast()).expect("mmap returns no null mapping");
        Ok(Self { memory, len })
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
        // SAFETY: the mapping was made by `map` with this length, and nobody borrows from `self` any more.
        let unmapped = unsafe { rustix::mm::munmap(self.memory.as_ptr().cast(), self.len) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "a mapped file could not be unmapped");
        }
    }
}
