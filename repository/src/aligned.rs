//! Memory aligned for direct I/O, without unsafe code: a little more than is needed, begun at the right place.

use crate::storage::BULK_ALIGN;

/// A buffer of a fixed capacity that is filled from the front.
pub(crate) struct AlignedBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
    capacity: usize,
}

impl AlignedBuf {
    /// `capacity` is a multiple of [`BULK_ALIGN`].
    pub(crate) fn new(capacity: usize) -> Self {
        assert!(capacity.is_multiple_of(BULK_ALIGN));
        let memory = vec![0; capacity + BULK_ALIGN];
        let start = memory.as_ptr().align_offset(BULK_ALIGN);
        assert!(start < BULK_ALIGN, "alignment is computed at run time");
        Self { memory, start, len: 0, capacity }
    }

    /// Takes as much of `bytes` as there is room for, and returns the rest.
    pub(crate) fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let (now, rest) = bytes.split_at(bytes.len().min(self.capacity - self.len));
        let at = self.start + self.len;
        self.memory[at..at + now.len()].copy_from_slice(now);
        self.len += now.len();
        rest
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len == self.capacity
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}
