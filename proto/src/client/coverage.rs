//! Which bytes of a READ were told already.

use std::collections::BTreeMap;

/// How many separate pieces are kept: a server that tears a reply into more is not believed.
const MAX_PIECES: usize = 1 << 16;

/// Disjoint, merged ranges: the start and the end of each, in bytes from the request's offset.
#[derive(Clone, Debug, Default)]
pub(super) struct Coverage {
    ranges: BTreeMap<u64, u64>,
}

impl Coverage {
    /// Adds a range that is not empty; `false` where it overlaps what is there, or is one piece too many.
    pub(super) fn add(&mut self, start: u64, end: u64) -> bool {
        if self.ranges.len() >= MAX_PIECES {
            return false;
        }
        let before = self.ranges.range(..end).next_back().map(|(start, end)| (*start, *end));
        let mut merged = (start, end);
        if let Some((before_start, before_end)) = before {
            if before_end > start {
                return false;
            }
            if before_end == start {
                merged.0 = before_start;
            }
        }
        if let Some(after_end) = self.ranges.remove(&end) {
            merged.1 = after_end;
        }
        self.ranges.insert(merged.0, merged.1);
        true
    }

    /// Whether every byte up to `len` was added.
    pub(super) fn is_whole(&self, len: u64) -> bool {
        len == 0 || self.ranges.get(&0) == Some(&len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_any_order_make_the_whole() {
        let mut coverage = Coverage::default();
        assert!(coverage.add(20, 30));
        assert!(coverage.add(0, 10));
        assert!(!coverage.is_whole(30));
        assert!(coverage.add(10, 20));
        assert!(coverage.is_whole(30));
        assert_eq!(coverage.ranges.len(), 1);
    }

    #[test]
    fn an_overlap_on_either_side_is_noticed() {
        let mut coverage = Coverage::default();
        assert!(coverage.add(10, 20));
        for (start, end) in [(10, 20), (19, 25), (5, 11), (0, 30), (12, 13)] {
            assert!(!coverage.add(start, end), "{start}..{end}");
        }
        assert!(coverage.add(20, 21) && coverage.add(9, 10));
    }
}
