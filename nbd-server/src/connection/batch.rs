//! Replies side by side in one piece of memory, so that one send takes them all.

use super::pages::Pages;

/// How much fits, in bytes: four replies of 64 KiB, or two of 128, with their heads.
const CAPACITY: usize = (256 << 10) + 256;

/// Memory that is filled once with replies, and sent from its front.
pub(super) struct Batch {
    memory: Pages,
    start: usize,
    end: usize,
}

impl Batch {
    /// The longest run of bytes that an empty batch takes.
    pub(super) const MAX_RUN: usize = CAPACITY;

    pub(super) fn new() -> Self {
        Self { memory: Pages::new(CAPACITY), start: 0, end: 0 }
    }

    pub(super) fn has_room(&self, len: usize) -> bool {
        self.memory.len() - self.end >= len
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }

    /// How many bytes were ever put into it.
    pub(super) const fn filled_bytes(&self) -> usize {
        self.end
    }

    /// The next `len` bytes, for the caller to fill; they hold whatever was there before. They are part of the
    /// batch once [`Batch::commit`] says so.
    pub(super) fn reserve(&mut self, len: usize) -> &mut [u8] {
        &mut self.memory[self.end..self.end + len]
    }

    pub(super) fn commit(&mut self, len: usize) {
        assert!(self.has_room(len), "more was committed than was reserved");
        self.end += len;
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.reserve(bytes.len()).copy_from_slice(bytes);
        self.commit(bytes.len());
    }

    pub(super) fn advance(&mut self, len: usize) {
        assert!(len <= self.end - self.start, "more was sent than is there");
        self.start += len;
    }

    pub(super) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }
}
