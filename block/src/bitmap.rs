//! A bitmap that many threads set and read without a lock, in memory of its own or in a mapped file.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::MappedFile;

/// Bits of a word.
const WORD: u64 = 64;

/// A fixed number of bits, all clear at first, each set and read on its own.
///
/// Setting a bit is a release and seeing it set an acquire: whoever sees the bit sees what its setter
/// did before. Ranges of bits are not changed at one instant.
#[derive(Debug)]
pub struct AtomicBitmap {
    words: Words,
    len: u64,
}

#[derive(Debug)]
enum Words {
    Own(Box<[AtomicU64]>),
    Mapped { first: NonNull<AtomicU64>, count: usize, _file: Arc<MappedFile> },
}

// SAFETY: the words are atomics, reached through shared references only; `Mapped` keeps its mapping alive.
unsafe impl Send for AtomicBitmap {}
// SAFETY: as above.
unsafe impl Sync for AtomicBitmap {}

impl AtomicBitmap {
    /// `len` clear bits in fresh memory, of which only what is touched takes room.
    #[must_use]
    pub fn new(len: u64) -> Self {
        let words = vec![0u64; Self::words_for(len)].into_boxed_slice();
        let pointer = Box::into_raw(words) as *mut [AtomicU64];
        // SAFETY: the allocation was just given up, and `AtomicU64` has the size, alignment and bit
        // validity of `u64` on every 64-bit target; `const` below checks the alignment.
        let words = unsafe { Box::from_raw(pointer) };
        const { assert!(align_of::<AtomicU64>() == align_of::<u64>()) };
        Self { words: Words::Own(words), len }
    }

    /// `len` bits that stand in a mapped file from byte `offset` on, as they are there: bit `i` is bit
    /// `i % 64` of the native word `i / 64`.
    ///
    /// # Panics
    /// Where the words do not lie within the mapping, or `offset` is no multiple of 8.
    #[must_use]
    pub fn mapped(file: Arc<MappedFile>, offset: usize, len: u64) -> Self {
        let words = file.words(offset, Self::words_for(len));
        let (first, count) = (NonNull::from(words).cast(), words.len());
        Self { words: Words::Mapped { first, count, _file: file }, len }
    }

    fn words_for(len: u64) -> usize {
        usize::try_from(len.div_ceil(WORD)).expect("a bitmap fits in the address space")
    }

    /// The number of bits.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bits at all.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The words, for saving them whole.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        match &self.words {
            Words::Own(words) => words,
            // SAFETY: `mapped` took them from a slice of the mapping, which `_file` keeps in place.
            Words::Mapped { first, count, .. } => unsafe {
                std::slice::from_raw_parts(first.as_ptr(), *count)
            },
        }
    }

    /// Whether `bit` is set.
    ///
    /// # Panics
    /// Beyond the last bit.
    #[must_use]
    pub fn get(&self, bit: u64) -> bool {
        assert!(bit < self.len, "bit {bit} of {}", self.len);
        self.load(bit / WORD) >> (bit % WORD) & 1 == 1
    }

    /// Sets `bits`. Returns how many of them were clear.
    ///
    /// # Panics
    /// Beyond the last bit.
    pub fn set_range(&self, bits: Range<u64>) -> u64 {
        self.masks(bits)
            .map(|(word, mask)| {
                let word = &self.words()[word];
                // Reading first spares a word that is set already from being written, and its page, where it is
                // mapped, from becoming dirty.
                if word.load(Ordering::Acquire) & mask == mask {
                    return 0;
                }
                u64::from((mask & !word.fetch_or(mask, Ordering::Release)).count_ones())
            })
            .sum()
    }

    /// Clears `bits`. Returns how many of them were set.
    ///
    /// # Panics
    /// Beyond the last bit.
    pub fn clear_range(&self, bits: Range<u64>) -> u64 {
        self.masks(bits)
            .map(|(word, mask)| {
                u64::from((mask & self.words()[word].fetch_and(!mask, Ordering::AcqRel)).count_ones())
            })
            .sum()
    }

    /// Whether all of `bits` are set; true of none.
    ///
    /// # Panics
    /// Beyond the last bit.
    #[must_use]
    pub fn is_all_set(&self, bits: Range<u64>) -> bool {
        self.masks(bits).all(|(word, mask)| self.load(word as u64) & mask == mask)
    }

    /// Whether all of `bits` are clear; true of none.
    ///
    /// # Panics
    /// Beyond the last bit.
    #[must_use]
    pub fn is_all_clear(&self, bits: Range<u64>) -> bool {
        self.masks(bits).all(|(word, mask)| self.load(word as u64) & mask == 0)
    }

    /// The first set bit at or after `from`.
    #[must_use]
    pub fn first_set(&self, from: u64) -> Option<u64> {
        self.first(from, self.len, true)
    }

    /// The first clear bit at or after `from`.
    #[must_use]
    pub fn first_clear(&self, from: u64) -> Option<u64> {
        self.first(from, self.len, false)
    }

    /// The first bit of this value in `from..end`.
    fn first(&self, from: u64, end: u64, value: bool) -> Option<u64> {
        let mut at = from;
        while at < end {
            let word = self.load(at / WORD);
            let wanted = if value { word } else { !word } >> (at % WORD);
            if wanted != 0 {
                let bit = at + u64::from(wanted.trailing_zeros());
                return (bit < end).then_some(bit);
            }
            at = (at / WORD + 1) * WORD;
        }
        None
    }

    /// `bits` as runs of one value, in order and without gaps. Of bits that change meanwhile, each is
    /// given as it was at some time.
    ///
    /// # Panics
    /// Beyond the last bit.
    pub fn runs(&self, bits: Range<u64>) -> impl Iterator<Item = (Range<u64>, bool)> + '_ {
        assert!(bits.end <= self.len, "bits {bits:?} of {}", self.len);
        let mut at = bits.start;
        std::iter::from_fn(move || {
            if at >= bits.end {
                return None;
            }
            let (start, value) = (at, self.get(at));
            // At least one bit, should it have changed since.
            at = self.first(start + 1, bits.end, !value).unwrap_or(bits.end);
            Some((start..at, value))
        })
    }

    /// How many bits are set.
    #[must_use]
    pub fn count_ones(&self) -> u64 {
        self.words().iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    /// How many of `bits` are set.
    ///
    /// # Panics
    /// Beyond the last bit.
    #[must_use]
    pub fn count_ones_in(&self, bits: Range<u64>) -> u64 {
        self.masks(bits).map(|(word, mask)| u64::from((self.load(word as u64) & mask).count_ones())).sum()
    }

    fn load(&self, word: u64) -> u64 {
        self.words()[word as usize].load(Ordering::Acquire)
    }

    /// The words that `bits` touch, each with the mask of those bits in it.
    fn masks(&self, bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> + use<> {
        assert!(bits.end <= self.len, "bits {bits:?} of {}", self.len);
        let words = if bits.is_empty() { 0..0 } else { bits.start / WORD..(bits.end - 1) / WORD + 1 };
        words.map(move |word| {
            let low = bits.start.saturating_sub(word * WORD);
            let high = (bits.end - word * WORD).min(WORD);
            let mask = (u64::MAX << low) & (u64::MAX >> (WORD - high));
            (word as usize, mask)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_mapped_bitmap_is_what_the_file_holds() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let mapping = Arc::new(MappedFile::map(&file, 8192).unwrap());
        let bitmap = AtomicBitmap::mapped(Arc::clone(&mapping), 4096, 100);
        assert_eq!(bitmap.set_range(60..70), 10);
        drop(bitmap);
        let again = AtomicBitmap::mapped(Arc::new(MappedFile::map(&file, 8192).unwrap()), 4096, 100);
        assert_eq!(again.runs(0..100).filter(|run| run.1).collect::<Vec<_>>(), [(60..70, true)]);
    }

    #[test]
    #[should_panic(expected = "bits 60..65 of 64")]
    fn bits_beyond_the_last_are_refused() {
        AtomicBitmap::new(64).set_range(60..65);
    }

    #[test]
    fn the_unused_bits_of_the_last_word_are_never_found() {
        let bitmap = AtomicBitmap::new(70);
        bitmap.set_range(0..70);
        assert_eq!(bitmap.first_clear(0), None);
        assert_eq!(bitmap.first_clear(69), None);
        assert_eq!(bitmap.first_set(70), None);
    }

    proptest! {
        #[test]
        fn behaves_like_a_vector_of_bools(
            len in 1u64..300,
            changes in proptest::collection::vec((any::<bool>(), any::<u64>(), any::<u64>()), 0..20),
            query in (any::<u64>(), any::<u64>()),
        ) {
            let bitmap = AtomicBitmap::new(len);
            let mut model = vec![false; len as usize];
            let bounds = |a: u64, b: u64| { let (a, b) = (a % (len + 1), b % (len + 1)); a.min(b)..a.max(b) };
            for (value, a, b) in changes {
                let bits = bounds(a, b);
                let slice = &mut model[bits.start as usize..bits.end as usize];
                let changed = slice.iter().filter(|&&bit| bit != value).count() as u64;
                slice.fill(value);
                let said = if value { bitmap.set_range(bits) } else { bitmap.clear_range(bits) };
                prop_assert_eq!(said, changed);
            }
            let count = |bits: &Range<u64>| model[bits.start as usize..bits.end as usize].iter().filter(|&&bit| bit).count() as u64;
            let bits = bounds(query.0, query.1);
            prop_assert_eq!(bitmap.count_ones(), count(&(0..len)));
            prop_assert_eq!(bitmap.count_ones_in(bits.clone()), count(&bits));
            prop_assert_eq!(bitmap.is_all_set(bits.clone()), count(&bits) == bits.end - bits.start);
            prop_assert_eq!(bitmap.is_all_clear(bits.clone()), count(&bits) == 0);
            let find = |value| (bits.start..len).find(|&bit| model[bit as usize] == value);
            prop_assert_eq!(bitmap.first_set(bits.start), find(true));
            prop_assert_eq!(bitmap.first_clear(bits.start), find(false));
            let mut at = bits.start;
            let mut last = None;
            for (run, value) in bitmap.runs(bits.clone()) {
                prop_assert_eq!(run.start, at);
                prop_assert!(!run.is_empty() && last != Some(value), "runs are as long as they can be");
                prop_assert!(run.clone().all(|bit| model[bit as usize] == value));
                at = run.end;
                last = Some(value);
            }
            prop_assert_eq!(at, bits.end);
        }
    }
}
