//! Memory that the kernel has back as soon as it is not used any more.
//!
//! An allocator keeps what was freed between pieces that are in use, and what a thousand connections had at their worst would stay. Until
//! a page is written to it costs nothing.

use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// So many bytes, zeroes at first.
pub(super) struct Pages(MmapMut);

impl Pages {
    /// # Panics
    /// Where there is no memory, as with every allocation.
    pub(super) fn new(len: usize) -> Self {
        Self(MmapMut::map_anon(len).expect("there is memory for a connection"))
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
