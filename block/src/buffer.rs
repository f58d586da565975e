//! Memory that the kernel may hold: page-aligned, owned, passed in and handed back.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::pool::Slot;
use crate::shelf::Waiting;
use crate::spare;

/// The alignment of every buffer: enough for `O_DIRECT` on any device with blocks of up to 4 KiB.
pub const ALIGNMENT: usize = 4096;

/// The size, and the alignment, from which memory may be had in huge pages.
const HUGE_PAGE: usize = 2 << 20;

/// An owned buffer whose memory starts at a multiple of [`ALIGNMENT`].
///
/// Its length may shrink and grow up to its capacity without moving its memory, so that one buffer
/// serves requests of many sizes.
pub struct AlignedBuf {
    memory: NonNull<u8>,
    capacity: usize,
    len: usize,
    home: Home,
}

/// Where a buffer's memory goes when the buffer is dropped.
enum Home {
    /// To the allocator.
    Allocator,
    /// To its place in a pool.
    Pool(Slot),
    /// To the spare ones.
    Spares,
    /// To the kernel: it was mapped for this buffer.
    Kernel,
    /// To its shelf.
    Shelf(Arc<Waiting>),
}

// SAFETY: the buffer owns its memory alone, be it its own or lent by a pool that any thread may
// give it back to; nothing in it is tied to a thread.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared references give out `&[u8]` only.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// A buffer of `len` zero bytes.
    ///
    /// # Panics
    /// Where `len` exceeds `isize::MAX` when rounded up to a page: a caller bounds it long before.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        let memory = if layout.size() >= HUGE_PAGE {
            let memory = Self::alloc_huge(layout);
            // SAFETY: `layout.size()` bytes were just allocated.
            unsafe { memory.write_bytes(0, layout.size()) };
            memory
        } else {
            // SAFETY: the layout's size is at least one page, so it is not zero.
            Self::non_null(unsafe { alloc_zeroed(layout) }, layout)
        };
        Self { memory, capacity: layout.size(), len, home: Home::Allocator }
    }

    /// A buffer that holds a copy of `bytes`.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Self {
        let len = bytes.len();
        let layout = Self::layout(len);
        let memory = if layout.size() >= HUGE_PAGE {
            Self::alloc_huge(layout)
        } else {
            // SAFETY: the layout's size is at least one page, so it is not zero.
            Self::non_null(unsafe { alloc(layout) }, layout)
        };
        // SAFETY: `layout.size() >= len` bytes were just allocated, apart from `bytes`. All are
        // initialised here, because `set_len` may uncover any of them.
        unsafe {
            memory.copy_from_nonoverlapping(NonNull::from(bytes).cast(), len);
            memory.add(len).write_bytes(0, layout.size() - len);
        }
        Self { memory, capacity: layout.size(), len, home: Home::Allocator }
    }

    /// A buffer of `len` zero bytes whose memory is the kernel's again as soon as it is dropped.
    pub(crate) fn mapped(len: usize) -> Self {
        let layout = Self::layout(len);
        Self { memory: Self::map(layout), capacity: layout.size(), len, home: Home::Kernel }
    }

    /// The memory of a pool's slot, lent until the buffer is dropped.
    pub(crate) fn from_slot(memory: NonNull<u8>, capacity: usize, len: usize, slot: Slot) -> Self {
        assert!(len <= capacity && capacity.is_multiple_of(ALIGNMENT));
        Self { memory, capacity, len, home: Home::Pool(slot) }
    }

    /// The same memory, `len` bytes of it, to be given to [`spare::give_back`] when it is dropped.
    pub(crate) fn into_spare(mut self, len: usize) -> Self {
        assert!(matches!(self.home, Home::Allocator));
        self.set_len(len);
        self.home = Home::Spares;
        self
    }

    /// The same memory, `len` bytes of it, to be given to [`Waiting::give_back`] when it is dropped.
    pub(crate) fn into_shelved(mut self, len: usize, shelf: Arc<Waiting>) -> Self {
        assert!(matches!(self.home, Home::Kernel));
        self.set_len(len);
        self.home = Home::Shelf(shelf);
        self
    }

    /// The place in a pool that its memory belongs to.
    pub(crate) const fn slot(&self) -> Option<&Slot> {
        match &self.home {
            Home::Pool(slot) => Some(slot),
            Home::Allocator | Home::Spares | Home::Kernel | Home::Shelf(_) => None,
        }
    }

    /// How many bytes it can hold: a multiple of [`ALIGNMENT`].
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes it `len` bytes long. What was beyond the old length keeps whatever was there before.
    ///
    /// # Panics
    /// Where `len` exceeds the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity, "a buffer of {} bytes cannot be {len} bytes long", self.capacity);
        self.len = len;
    }

    /// The address of its memory, valid and unmoved until the buffer is dropped.
    #[must_use]
    pub const fn as_mut_ptr(&mut self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// Lets the kernel take its memory, which is its own, where it needs some: each page then holds what it held or
    /// zeroes.
    pub(crate) fn offer_to_kernel(&mut self) {
        assert!(matches!(self.home, Home::Allocator));
        // SAFETY: the range is whole pages of ours alone, of private anonymous memory as the allocator has it. What
        // they hold may become zeroes, which is as initialised as what it was.
        let advised =
            unsafe { rustix::mm::madvise(self.as_mut_ptr().cast(), self.capacity, Advice::LinuxFree) };
        if let Err(error) = advised {
            tracing::trace!(%error, "the kernel was not offered a buffer's memory");
        }
    }

    /// Uninitialised memory on huge pages where there are some: a disk's driver takes only so many pieces
    /// of memory in one request, and 4 MiB in single pages are a thousand.
    fn alloc_huge(layout: Layout) -> NonNull<u8> {
        // SAFETY: the layout's size is not zero.
        let memory = Self::non_null(unsafe { alloc(layout) }, layout);
        let whole = layout.size() - layout.size() % HUGE_PAGE;
        // SAFETY: the range was just allocated, and is ours alone.
        unsafe { Self::want_huge(memory, whole) };
        memory
    }

    /// Zeroes of the kernel's, on huge pages where there are some.
    fn map(layout: Layout) -> NonNull<u8> {
        // The kernel aligns to pages only: what lies before and behind is given back.
        let more = if layout.align() > ALIGNMENT { layout.align() } else { 0 };
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        let len = layout.size() + more;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no memory of ours.
        let mapped = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags) };
        let mapped = Self::non_null(mapped.map_or(std::ptr::null_mut(), <*mut _>::cast), layout);
        if more == 0 {
            return mapped;
        }
        let before = mapped.align_offset(layout.align());
        // SAFETY: `before` is less than `more`, so all three parts lie within the mapping, which nobody uses yet.
        unsafe {
            let memory = mapped.add(before);
            Self::unmap(mapped, before);
            Self::unmap(memory.add(layout.size()), more - before);
            Self::want_huge(memory, layout.size());
            memory
        }
    }

    /// Gives mapped memory back to the kernel.
    ///
    /// # Safety
    /// It is whole pages of a mapping of ours that nobody uses any more.
    unsafe fn unmap(memory: NonNull<u8>, len: usize) {
        if len == 0 {
            return;
        }
        let memory = memory.as_ptr().cast();
        // SAFETY: as the caller has it.
        if let Err(error) = unsafe { rustix::mm::munmap(memory, len) } {
            // There are too many mappings to make two of one: then the pages go, and the addresses stay.
            tracing::debug!(%error, len, "a buffer could not be unmapped");
            // SAFETY: as the caller has it.
            let _ = unsafe { rustix::mm::madvise(memory, len, Advice::LinuxDontNeed) };
        }
    }

    /// # Safety
    /// The range is memory of ours.
    unsafe fn want_huge(memory: NonNull<u8>, len: usize) {
        // SAFETY: as the caller has it; the advice changes no contents.
        if let Err(error) = unsafe { rustix::mm::madvise(memory.as_ptr().cast(), len, Advice::LinuxHugepage) }
        {
            tracing::trace!(%error, "no huge pages for a buffer");
        }
    }

    fn non_null(memory: *mut u8, layout: Layout) -> NonNull<u8> {
        NonNull::new(memory).unwrap_or_else(|| handle_alloc_error(layout))
    }

    /// How memory for `len` bytes is had: whole pages, at least one.
    fn layout(len: usize) -> Layout {
        let capacity = len.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        let alignment = if capacity >= HUGE_PAGE { HUGE_PAGE } else { ALIGNMENT };
        Layout::from_size_align(capacity, alignment).expect("a buffer's size was bounded by its caller")
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.home, Home::Kernel) {
            Home::Pool(_) => {} // Dropping the slot gives the memory back to its pool.
            // SAFETY: `memory` was mapped with this capacity, and goes with this buffer.
            Home::Kernel => unsafe { Self::unmap(self.memory, self.capacity) },
            // SAFETY: `memory` came from the allocator with this very layout and is freed once.
            Home::Allocator => unsafe { dealloc(self.memory.as_ptr(), Self::layout(self.capacity)) },
            Home::Spares => {
                let Self { memory, capacity, len, .. } = *self;
                spare::give_back(Self { memory, capacity, len, home: Home::Allocator });
            }
            Home::Shelf(shelf) => {
                let Self { memory, capacity, len, .. } = *self;
                shelf.give_back(Self { memory, capacity, len, home: Home::Kernel });
            }
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len <= capacity` bytes are allocated and were initialised at allocation.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).field("capacity", &self.capacity).finish()
    }
}

// SAFETY: the memory never moves while the buffer lives, whatever becomes of the `AlignedBuf` value,
// and `len <= capacity` bytes of it are initialised.
unsafe impl tokio_uring::buf::IoBuf for AlignedBuf {
    fn stable_ptr(&self) -> *const u8 {
        self.memory.as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.len
    }

    fn bytes_total(&self) -> usize {
        self.len
    }
}

// SAFETY: as above; the buffer is the only owner of its memory.
unsafe impl tokio_uring::buf::IoBufMut for AlignedBuf {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.memory.as_ptr()
    }

    unsafe fn set_init(&mut self, _initialised: usize) {
        // All of it is initialised from the start.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_survives_a_change_of_length() {
        let mut buf = AlignedBuf::from_slice(&[7; 5000]);
        assert!((buf.as_mut_ptr() as usize).is_multiple_of(ALIGNMENT));
        assert_eq!(buf.capacity(), 8192);
        buf.set_len(10);
        buf.set_len(5000);
        assert_eq!(&buf[..], &[7; 5000]);
        buf.set_len(8192);
        assert_eq!(&buf[5000..], &[0; 3192], "what was never written is zero");
    }

    #[test]
    fn large_buffers_are_zero_or_what_was_given() {
        let mut zeroes = AlignedBuf::zeroed((5 << 20) + 1);
        assert!((zeroes.as_mut_ptr() as usize).is_multiple_of(HUGE_PAGE));
        assert!(zeroes.iter().all(|&byte| byte == 0));
        zeroes[5 << 20] = 9;
        let mut copy = AlignedBuf::from_slice(&zeroes);
        assert_eq!(copy[..], zeroes[..]);
        copy.set_len(copy.capacity());
        assert!(copy[(5 << 20) + 1..].iter().all(|&byte| byte == 0));
    }
}
