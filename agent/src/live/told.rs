//! Lines of the log that clients can provoke: one of each kind in a while. Pure: moments are given.

use std::time::Duration;

/// A line is logged once in so much time.
const INTERVAL: Duration = Duration::from_secs(10);

/// One kind of line.
#[derive(Debug, Default)]
pub(super) struct Told {
    last: Option<Duration>,
    left_out: u64,
}

impl Told {
    /// Whether this one may be logged: then how many were left out since the last.
    pub(super) fn admit(&mut self, now: Duration) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_sub(last) < INTERVAL) {
            self.left_out += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_line_every_ten_seconds_with_its_number() {
        let mut told = Told::default();
        let admitted: Vec<_> = (0..25).map(|second| told.admit(Duration::from_secs(second))).collect();
        let lines: Vec<_> = admitted.iter().flatten().copied().collect();
        assert_eq!(lines, [0, 9, 9]);
        assert!(admitted[0].is_some() && admitted[10].is_some() && admitted[20].is_some());
    }
}
