//! Byte ranges of a disk, and their relation to blocks.

/// The grain at which a restore knows where a byte lives: 4096 bytes.
pub const BLOCK_SIZE: u64 = 4096;

/// `len` bytes from `start`. Never wraps: `start + len` fits in 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// The range of `len` bytes from `start`, or `None` where its end does not fit in 64 bits.
    #[must_use]
    pub const fn new(start: u64, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(_) => Some(Self { start, len }),
            None => None,
        }
    }

    /// The range from `start` up to, and without, `end`; empty where `end <= start`.
    #[must_use]
    pub const fn from_bounds(start: u64, end: u64) -> Self {
        Self { start, len: end.saturating_sub(start) }
    }

    /// The first byte.
    #[must_use]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// The first byte after the range.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start + self.len
    }

    /// Whether the range holds no byte.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether the range lies within a disk of `size` bytes.
    #[must_use]
    pub const fn fits(self, size: u64) -> bool {
        self.end() <= size
    }

    /// What both ranges cover; empty where they do not touch.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self::from_bounds(self.start.max(other.start), self.end().min(other.end()))
    }

    /// Whether both bounds are multiples of `alignment`.
    #[must_use]
    pub const fn is_aligned(self, alignment: u64) -> bool {
        self.start.is_multiple_of(alignment) && self.len.is_multiple_of(alignment)
    }

    /// The smallest range with bounds at multiples of `alignment` that covers this one.
    ///
    /// `None` where the rounded end does not fit in 64 bits.
    #[must_use]
    pub const fn aligned_outward(self, alignment: u64) -> Option<Self> {
        let start = self.start - self.start % alignment;
        match self.end().checked_next_multiple_of(alignment) {
            Some(end) => Some(Self { start, len: end - start }),
            None => None,
        }
    }

    /// The largest range with bounds at multiples of `alignment` inside this one; may be empty.
    #[must_use]
    pub const fn aligned_inward(self, alignment: u64) -> Self {
        let end = self.end() - self.end() % alignment;
        match self.start.checked_next_multiple_of(alignment) {
            Some(start) if start <= end => Self { start, len: end - start },
            _ => Self { start: end, len: 0 },
        }
    }

    /// The numbers of the units of `unit` bytes that this range touches.
    #[must_use]
    pub const fn units(self, unit: u64) -> std::ops::Range<u64> {
        if self.len == 0 {
            let at = self.start / unit;
            return at..at;
        }
        self.start / unit..(self.end() - 1) / unit + 1
    }

    /// The part of this range in each unit of `unit` bytes that it touches, in order.
    pub fn split(self, unit: u64) -> impl Iterator<Item = (u64, Self)> {
        self.units(unit).map(move |number| {
            let start = (number * unit).max(self.start);
            let end = (number * unit).saturating_add(unit).min(self.end());
            (number, Self::from_bounds(start, end))
        })
    }
}

impl std::fmt::Display for ByteRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "bytes {}..{}", self.start, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_wraps_is_none() {
        assert_eq!(ByteRange::new(u64::MAX, 2), None);
        assert!(ByteRange::new(u64::MAX, 0).is_some());
    }

    #[test]
    fn rounding_inward_of_less_than_one_unit_is_empty() {
        let range = ByteRange::new(4097, 4096).unwrap();
        assert!(range.aligned_inward(4096).is_empty());
        assert_eq!(range.aligned_outward(4096), ByteRange::new(4096, 8192));
    }

    #[test]
    fn split_covers_the_range_once() {
        let range = ByteRange::new(1000, 9000).unwrap();
        let parts: Vec<_> = range.split(4096).collect();
        assert_eq!(parts.iter().map(|(_, part)| part.len()).sum::<u64>(), 9000);
        assert_eq!(parts.first().map(|(n, part)| (*n, part.start())), Some((0, 1000)));
        assert_eq!(parts.last().map(|(n, part)| (*n, part.end())), Some((2, 10000)));
        assert_eq!(ByteRange::new(8192, 0).unwrap().split(4096).count(), 0);
    }
}
