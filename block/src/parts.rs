//! One buffer written by several threads at once, each its own part.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::AlignedBuf;

struct Whole {
    /// The start of the memory of `buf`, which stays where it is until `buf` is dropped or taken.
    memory: *mut u8,
    buf: AlignedBuf,
}

// SAFETY: `memory` points into `buf`, which may move between threads; the parts reach disjoint
// ranges of it, and nobody reaches `buf` itself before the last part is gone.
unsafe impl Send for Whole {}
// SAFETY: as above: sharing `Whole` gives access to nothing; only a part does, to its own range.
unsafe impl Sync for Whole {}

/// A part of an [`AlignedBuf`] that was [split](BufPart::split): its holder alone reads and writes it.
pub struct BufPart {
    whole: Arc<Whole>,
    start: usize,
    len: usize,
}

impl BufPart {
    /// Splits `buf` into neighbouring parts of these lengths.
    ///
    /// # Panics
    /// Where the lengths do not add up to the buffer's.
    #[must_use]
    pub fn split(mut buf: AlignedBuf, lengths: &[usize]) -> Vec<Self> {
        assert_eq!(lengths.iter().sum::<usize>(), buf.len(), "parts that do not make up the buffer");
        let whole = Arc::new(Whole { memory: buf.as_mut_ptr(), buf });
        let mut start = 0;
        lengths
            .iter()
            .map(|&len| {
                let part = Self { whole: Arc::clone(&whole), start, len };
                start += len;
                part
            })
            .collect()
    }

    /// The buffer again, from all of its parts in any order.
    ///
    /// # Panics
    /// Where a part is missing or belongs to another buffer.
    #[must_use]
    pub fn join(parts: Vec<Self>) -> AlignedBuf {
        let whole = parts.first().map(|part| Arc::clone(&part.whole)).expect("a buffer has a part");
        assert!(parts.iter().all(|part| Arc::ptr_eq(&part.whole, &whole)), "a part of another buffer");
        drop(parts);
        Arc::into_inner(whole).expect("every part was given back").buf
    }
}

impl Deref for BufPart {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies within the buffer, whose bytes are initialised and live as long as
        // `whole`; it belongs to this part alone, so `&self` excludes every writer.
        unsafe { std::slice::from_raw_parts(self.whole.memory.add(self.start), self.len) }
    }
}

impl DerefMut for BufPart {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only reference to the range.
        unsafe { std::slice::from_raw_parts_mut(self.whole.memory.add(self.start), self.len) }
    }
}

impl std::fmt::Debug for BufPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BufPart").field("start", &self.start).field("len", &self.len).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_written_by_several_threads_make_up_the_buffer() {
        let parts = BufPart::split(AlignedBuf::zeroed(10_000), &[4096, 4096, 1808]);
        let parts: Vec<BufPart> = std::thread::scope(|scope| {
            let writers: Vec<_> = parts
                .into_iter()
                .enumerate()
                .map(|(number, mut part)| {
                    scope.spawn(move || {
                        part.fill(number as u8 + 1);
                        part
                    })
                })
                .collect();
            writers.into_iter().rev().map(|writer| writer.join().unwrap()).collect()
        });
        let buf = BufPart::join(parts);
        assert_eq!((buf[0], buf[4095], buf[4096], buf[8192], buf[9999]), (1, 1, 2, 3, 3));
    }

    #[test]
    #[should_panic(expected = "every part was given back")]
    fn a_buffer_is_not_whole_while_somebody_holds_a_part() {
        let mut parts = BufPart::split(AlignedBuf::zeroed(2), &[1, 1]);
        let _held = parts.pop();
        let _ = BufPart::join(parts);
    }
}
