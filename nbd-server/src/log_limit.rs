//! Lines of the log that a peer can provoke: a few of them, and how many were left out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// One line in so much time; what comes in between is counted.
const INTERVAL: Duration = Duration::from_secs(10);

/// One kind of line.
#[derive(Debug, Default)]
pub(crate) struct LogLimit {
    /// How many lines more than one the interval has.
    further: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    /// Lines since then.
    logged: u64,
    left_out: u64,
}

impl LogLimit {
    /// One that lets so many lines through in the interval.
    pub(crate) fn of_lines(lines: u64) -> Self {
        Self { further: lines.saturating_sub(1), state: Mutex::default() }
    }

    /// Whether this one may be logged: then how many were left out since the last.
    pub(crate) fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        if state.last.is_some_and(|last| now.duration_since(last) < INTERVAL) {
            if state.logged > self.further {
                state.left_out += 1;
                return None;
            }
        } else {
            state.last = Some(now);
            state.logged = 0;
        }
        state.logged += 1;
        Some(std::mem::take(&mut state.left_out))
    }
}

/// What the whole server counts together, so that 10,000 connections do not fill a disk.
#[derive(Debug, Default)]
pub(crate) struct LogLimits {
    /// There is no place for a connection.
    pub(crate) full: LogLimit,
    /// A client comes from a network that is not allowed.
    pub(crate) denied: LogLimit,
    /// The system has no descriptor left.
    pub(crate) accepting: LogLimit,
    /// A handshake came to nothing for what the client did, or gave its place away.
    pub(crate) handshake: LogLimit,
    /// A handshake took too long.
    pub(crate) slow: LogLimit,
    /// A client that transmits stalled.
    pub(crate) stalled: LogLimit,
    /// A request failed, for a reason that the disk has.
    pub(crate) request: LogLimit,
    /// An export could not be opened.
    pub(crate) opening: LogLimit,
    /// An export was asked for that is none, or is refused.
    pub(crate) export: LogLimit,
    /// By export: requests that failed because there was no room on its disk.
    without_room: Mutex<BTreeMap<String, u64>>,
}

impl LogLimits {
    /// A request to an export failed because there was no room.
    pub(crate) fn lacks_room(&self, export: &str) {
        *self.without_room.lock().entry(export.to_owned()).or_default() += 1;
    }

    /// How many requests to an export failed because there was no room.
    pub(crate) fn without_room(&self, export: &str) -> u64 {
        self.without_room.lock().get(export).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_line_every_ten_seconds_with_its_number() {
        let limit = LogLimit::default();
        let begun = Instant::now();
        assert_eq!(limit.admit(begun), Some(0));
        for millis in 1..10_000 {
            assert_eq!(limit.admit(begun + Duration::from_millis(millis)), None);
        }
        assert_eq!(limit.admit(begun + INTERVAL), Some(9_999));
        assert_eq!(limit.admit(begun + 3 * INTERVAL), Some(0));
        let limit = LogLimit::of_lines(3);
        let admitted: Vec<_> =
            (0..5).map(|second| limit.admit(begun + Duration::from_secs(second))).collect();
        assert_eq!(admitted, [Some(0), Some(0), Some(0), None, None]);
        assert_eq!(limit.admit(begun + INTERVAL), Some(2));
    }
}
