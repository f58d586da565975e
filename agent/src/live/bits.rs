//! One bit per block over words that somebody else owns: the heap, or a mapped file.
//!
//! Bits are set with `Release` and read with `Acquire`: whoever sees a block's bit also sees what
//! was done before it was set.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::sync::point;

/// A view of a bitmap.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bits<'a> {
    words: &'a [AtomicU64],
    len: u64,
}

/// The words that `len` bits need.
pub(super) const fn words_for(len: u64) -> usize {
    len.div_ceil(64) as usize
}

/// Words of zeroes on the heap. Their memory is not touched before it is used.
pub(super) fn zeroed_words(count: usize) -> Box<[AtomicU64]> {
    let words: Vec<u64> = vec![0; count];
    words.into_iter().map(AtomicU64::new).collect()
}

impl<'a> Bits<'a> {
    pub(super) fn new(words: &'a [AtomicU64], len: u64) -> Self {
        assert_eq!(words.len(), words_for(len), "a bitmap of {len} bits");
        Self { words, len }
    }

    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    pub(super) const fn word_count(&self) -> usize {
        self.words.len()
    }

    pub(super) fn word(&self, index: usize) -> u64 {
        point();
        self.words[index].load(Ordering::Acquire)
    }

    /// The word in which every bit of the bitmap is set: all ones but in the last.
    pub(super) const fn full_word(&self, index: usize) -> u64 {
        let rest = self.len % 64;
        if index + 1 == self.words.len() && rest != 0 { (1 << rest) - 1 } else { u64::MAX }
    }

    /// Sets all bits that are set in `other`, which is as long.
    pub(super) fn or(&self, other: &Bits<'_>) {
        for index in 0..self.word_count() {
            self.or_word(index, other.word(index));
        }
    }

    /// Sets bits of one word; the number of those that were clear.
    pub(super) fn or_word(&self, index: usize, bits: u64) -> u64 {
        let word = &self.words[index];
        point();
        if word.load(Ordering::Acquire) & bits == bits {
            return 0;
        }
        point();
        u64::from((bits & !word.fetch_or(bits, Ordering::AcqRel)).count_ones())
    }

    /// Sets every bit of `range`; the number of those that were clear.
    pub(super) fn set(&self, range: Range<u64>) -> u64 {
        self.masks(range).map(|(index, mask)| self.or_word(index, mask)).sum()
    }

    /// Clears all.
    pub(super) fn clear_all(&self) {
        for word in self.words {
            // A page that was never written stays unallocated.
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Release);
            }
        }
    }

    pub(super) fn contains(&self, bit: u64) -> bool {
        self.word((bit / 64) as usize) >> (bit % 64) & 1 != 0
    }

    /// Whether every bit of `range` is set.
    pub(super) fn all(&self, range: Range<u64>) -> bool {
        self.masks(range).all(|(index, mask)| self.word(index) & mask == mask)
    }

    /// Whether any bit of `range` is set.
    pub(super) fn any(&self, range: Range<u64>) -> bool {
        self.masks(range).any(|(index, mask)| self.word(index) & mask != 0)
    }

    pub(super) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    /// The runs of equal bits that make up `range`, in order.
    pub(super) fn runs(self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, bool)> + 'a {
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let start = at;
            let value = self.contains(start);
            at = self.end_of_run(start, range.end, value);
            Some((start..at, value))
        })
    }

    fn end_of_run(&self, start: u64, end: u64, value: bool) -> u64 {
        let mut at = start;
        while at < end {
            let word = self.word((at / 64) as usize);
            let others = if value { !word } else { word } >> (at % 64);
            if others != 0 {
                return (at + u64::from(others.trailing_zeros())).min(end);
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    fn masks(&self, range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
        assert!(range.end <= self.len, "blocks {range:?} of {}", self.len);
        let words = if range.is_empty() { 0..0 } else { range.start / 64..range.end.div_ceil(64) };
        words.map(move |word| {
            let from = range.start.saturating_sub(word * 64);
            let to = (range.end - word * 64).min(64);
            let below = if to == 64 { u64::MAX } else { (1 << to) - 1 };
            (word as usize, below & (u64::MAX << from))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bitmap_behaves_like_a_vector_of_booleans(
            len in 1_u64..400,
            ranges in prop::collection::vec((0_u64..400, 0_u64..400), 0..8),
        ) {
            let words = zeroed_words(words_for(len));
            let bits = Bits::new(&words, len);
            let mut model = vec![false; len as usize];
            for (a, b) in ranges {
                let range = a.min(b).min(len)..a.max(b).min(len);
                let clear = model[range.start as usize..range.end as usize].iter().filter(|&&bit| !bit).count();
                prop_assert_eq!(bits.set(range.clone()), clear as u64);
                model[range.start as usize..range.end as usize].fill(true);
                prop_assert!(bits.all(range));
            }
            prop_assert_eq!(bits.count(), model.iter().filter(|&&bit| bit).count() as u64);
            let mut from_runs = Vec::new();
            for (run, value) in bits.runs(0..len) {
                prop_assert!(!run.is_empty());
                prop_assert_eq!(bits.any(run.clone()), value);
                prop_assert_eq!(bits.all(run.clone()), value);
                from_runs.extend(run.map(|_| value));
            }
            prop_assert_eq!(from_runs, model);
        }
    }
}
