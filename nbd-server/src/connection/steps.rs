//! A long range in bounded steps. One operation of the device on all of it would keep others waiting for as long as it takes (a file
//! is locked while the kernel punches a hole into it), and a connection that is gone could not take it back.

use std::time::Duration;

use block::ByteRange;

/// Steps end at multiples of it, so that nothing is rounded at their edges.
const UNIT: u64 = 16 << 20;
const FIRST: u64 = 16 * UNIT;
const LONGEST: u64 = 256 * UNIT;
/// After a quicker step the next is twice as long.
const QUICK: Duration = Duration::from_millis(10);
/// After a slower step the next is half as long.
const SLOW: Duration = Duration::from_millis(100);

/// What is still to be done of a range.
#[derive(Debug)]
pub(super) struct Steps {
    left: ByteRange,
    size: u64,
}

impl Steps {
    pub(super) const fn new(range: ByteRange) -> Self {
        Self { left: range, size: FIRST }
    }

    /// Whether the range is short enough to be done at once.
    pub(super) const fn is_one(&self) -> bool {
        self.left.len() <= FIRST
    }

    pub(super) fn next(&mut self) -> Option<ByteRange> {
        if self.left.is_empty() {
            return None;
        }
        let start = self.left.start();
        let end = (start - start % UNIT).saturating_add(self.size).min(self.left.end());
        self.left = ByteRange::from_bounds(end, self.left.end());
        Some(ByteRange::from_bounds(start, end))
    }

    /// How long the last step took.
    pub(super) fn took(&mut self, time: Duration) {
        if time < QUICK {
            self.size = (self.size * 2).min(LONGEST);
        } else if time > SLOW {
            self.size = (self.size / 2).max(UNIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(range: ByteRange, took: Duration) -> Vec<ByteRange> {
        let mut steps = Steps::new(range);
        let mut all = Vec::new();
        while let Some(step) = steps.next() {
            all.push(step);
            steps.took(took);
        }
        all
    }

    #[test]
    fn steps_cover_the_range_and_meet_at_whole_units() {
        let range = ByteRange::from_bounds(12_345, (1 << 40) + 77);
        for took in [Duration::ZERO, Duration::from_millis(50), Duration::from_secs(1)] {
            let steps = all(range, took);
            assert_eq!(steps[0].start(), range.start());
            assert_eq!(steps[steps.len() - 1].end(), range.end());
            for pair in steps.windows(2) {
                assert_eq!(pair[0].end(), pair[1].start());
                assert!(pair[0].end().is_multiple_of(UNIT) && !pair[0].is_empty());
                assert!(pair[0].len() <= LONGEST);
            }
        }
    }

    #[test]
    fn quick_steps_grow_and_slow_ones_shrink() {
        let range = ByteRange::from_bounds(0, 1 << 40);
        assert!(all(range, Duration::ZERO).len() < 270);
        let slow = all(range, Duration::from_secs(1));
        assert_eq!(slow[slow.len() - 1].len(), UNIT);
    }

    #[test]
    fn the_end_of_the_number_line_is_no_obstacle() {
        let range = ByteRange::from_bounds(u64::MAX - 5, u64::MAX);
        assert_eq!(all(range, Duration::ZERO), [range]);
    }
}
