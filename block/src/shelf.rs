//! Large buffers for many threads: taken by one, dropped by another, and used again.
//!
//! An allocator keeps what a thread has freed for that thread. Where many take buffers, and others hold them for as long
//! as a cache does, each thread ends up with room for as many as it ever had at once: many times what is in use.
//! So the memory of these is one set's, and the kernel's again where the set has enough.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::{ALIGNMENT, AlignedBuf};

/// A set of buffers. Each comes back when it is dropped, on whatever thread, and waits for whoever needs one of its size.
#[derive(Debug)]
pub struct Shelf(Arc<Waiting>);

/// The buffers of a shelf that nobody uses.
#[derive(Debug)]
pub(crate) struct Waiting {
    most_bytes: usize,
    bufs: Mutex<Bufs>,
}

#[derive(Debug, Default)]
struct Bufs {
    bytes: usize,
    /// Whoever waits longest is first.
    bufs: VecDeque<AlignedBuf>,
}

impl Shelf {
    /// A shelf on which buffers of so many bytes wait at most; the memory of more goes back to the kernel.
    #[must_use]
    pub fn new(most_bytes: usize) -> Self {
        Self(Arc::new(Waiting { most_bytes, bufs: Mutex::default() }))
    }

    /// A buffer of `len` bytes, holding whatever was there before. Its capacity is a power of two, so that there are few sizes.
    #[must_use]
    pub fn take(&self, len: usize) -> AlignedBuf {
        let capacity = len.next_power_of_two().max(ALIGNMENT);
        let buf = self.0.take(capacity).unwrap_or_else(|| AlignedBuf::mapped(capacity));
        buf.into_shelved(len, Arc::clone(&self.0))
    }
}

impl Waiting {
    fn take(&self, capacity: usize) -> Option<AlignedBuf> {
        let mut waiting = self.bufs.lock();
        // The last one that came may still be in the processor's cache.
        let at = waiting.bufs.iter().rposition(|buf| buf.capacity() == capacity)?;
        waiting.bytes -= capacity;
        waiting.bufs.remove(at)
    }

    /// Takes back what [`Shelf::take`] gave, as a buffer of its own.
    pub(crate) fn give_back(&self, buf: AlignedBuf) {
        let mut waiting = self.bufs.lock();
        waiting.bytes += buf.capacity();
        waiting.bufs.push_back(buf);
        let mut too_many = Vec::new();
        while waiting.bytes > self.most_bytes {
            let oldest = waiting.bufs.pop_front().expect("bytes that wait are those of buffers");
            waiting.bytes -= oldest.capacity();
            too_many.push(oldest);
        }
        // Nobody waits while they are unmapped.
        drop(waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(shelf: &Shelf) -> Vec<usize> {
        let waiting = shelf.0.bufs.lock();
        assert_eq!(waiting.bytes, waiting.bufs.iter().map(AlignedBuf::capacity).sum::<usize>());
        waiting.bufs.iter().map(AlignedBuf::capacity).collect()
    }

    #[test]
    fn a_buffer_that_was_dropped_is_given_to_whoever_needs_its_size() {
        let shelf = Shelf::new(1 << 20);
        let mut buf = shelf.take(100_000);
        assert_eq!((buf.len(), buf.capacity()), (100_000, 128 << 10));
        buf.fill(7);
        let memory = buf.as_mut_ptr() as usize;
        std::thread::spawn(move || drop(buf)).join().unwrap();
        assert_eq!(waiting(&shelf), [128 << 10]);
        assert_ne!(shelf.take(64 << 10).as_mut_ptr() as usize, memory, "another size");
        let mut again = shelf.take(128 << 10);
        assert_eq!(again.as_mut_ptr() as usize, memory);
        assert_eq!(again[..100_000], [7; 100_000]);
        again.fill(8);
    }

    #[test]
    fn more_than_the_shelf_holds_is_the_kernels_the_oldest_first() {
        let shelf = Shelf::new(256 << 10);
        let sizes = [64 << 10, 64 << 10, 128 << 10, 4096, 64 << 10];
        let taken: Vec<_> = sizes.iter().map(|&len| shelf.take(len)).collect();
        drop(taken);
        assert_eq!(waiting(&shelf), [128 << 10, 4096, 64 << 10]);
        drop(shelf.take(1 << 20));
        assert_eq!(waiting(&shelf), [0; 0], "one that is larger than all that may wait");
    }

    #[test]
    fn a_buffer_outlives_its_shelf() {
        let shelf = Shelf::new(8 << 20);
        let mut large = shelf.take(3 << 20);
        drop((shelf.take(4096), shelf));
        assert!((large.as_mut_ptr() as usize).is_multiple_of(2 << 20) && large.iter().all(|&byte| byte == 0));
        large.fill(1);
    }
}
