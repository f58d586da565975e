//! How many bytes the background may have in flight.
//!
//! A guest's miss queues on the wire behind whatever the background asked for before it. Too little
//! in flight leaves the wire idle during each delay; too much makes the guest wait. The window aims
//! at the product of bandwidth and delay, the way delay-based congestion control does: it grows
//! while a fetch takes about as long as the quickest one lately, and shrinks when fetches begin to
//! wait for each other. Pure: latencies are given, nothing here reads a clock.

use std::time::Duration;

/// The least the window falls to, and where it begins: about one piece, so that the first latency is the path's own.
pub(super) const SMALLEST_WINDOW: u64 = 256 << 10;
/// The most the window grows to.
pub(super) const LARGEST_WINDOW: u64 = 32 << 20;
/// After so many fetches the quickest one is forgotten, since the path may have changed.
const FORGET_AFTER: u32 = 256;
/// What one fetch more or less changes.
const STEP: u64 = 128 << 10;

/// The background's window.
#[derive(Debug)]
pub(super) struct Window {
    size: u64,
    in_flight: u64,
    quickest: Option<Duration>,
    seen: u32,
}

impl Default for Window {
    fn default() -> Self {
        Self { size: SMALLEST_WINDOW, in_flight: 0, quickest: None, seen: 0 }
    }
}

impl Window {
    /// Whether another piece may be asked for. The first one always may.
    #[must_use]
    pub(super) const fn has_room(&self) -> bool {
        self.in_flight < self.size
    }

    /// A fetch of `len` bytes begins.
    pub(super) const fn begin(&mut self, len: u64) {
        self.in_flight += len;
    }

    /// A fetch of `len` bytes ended after `latency`.
    pub(super) fn end(&mut self, len: u64, latency: Duration) {
        let was_full = self.in_flight + STEP >= self.size;
        self.in_flight = self.in_flight.saturating_sub(len);
        self.seen += 1;
        if self.seen >= FORGET_AFTER {
            // What is in flight hides how quick the path is: half of it lets the queue run empty.
            self.seen = 0;
            self.quickest = None;
            self.size = (self.size / 2).max(SMALLEST_WINDOW);
        }
        let quickest = self.quickest.map_or(latency, |quickest| quickest.min(latency));
        self.quickest = Some(quickest);
        // Half as long again is queueing; less is noise.
        if latency > quickest + quickest / 2 {
            self.size = self.size.saturating_sub(STEP).max(SMALLEST_WINDOW);
        } else if was_full {
            self.size = (self.size + STEP).min(LARGEST_WINDOW);
        }
    }

    /// A fetch of `len` bytes failed; its time says nothing.
    pub(super) const fn cancel(&mut self, len: u64) {
        self.in_flight = self.in_flight.saturating_sub(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: u64 = 256 << 10;

    /// A wire of `rate` bytes a second after `delay`, kept as full as the window allows; returns the
    /// bytes in flight once it settled.
    fn settle(rate: f64, delay: f64) -> u64 {
        let mut window = Window::default();
        let mut wire_free = 0.0_f64;
        let mut flights: std::collections::VecDeque<(f64, f64)> = std::collections::VecDeque::new();
        let mut now = 0.0;
        for _ in 0..5000 {
            while window.has_room() {
                window.begin(PIECE);
                wire_free = wire_free.max(now + delay) + PIECE as f64 / rate;
                flights.push_back((now, wire_free));
            }
            let (begun, arrived) = flights.pop_front().unwrap();
            now = arrived;
            window.end(PIECE, Duration::from_secs_f64(arrived - begun));
        }
        window.size
    }

    #[test]
    fn the_window_settles_near_the_product_of_bandwidth_and_delay() {
        for (rate, delay) in [(100e6, 0.02), (100e6, 0.05), (400e6, 0.02)] {
            let product = rate * delay;
            let size = settle(rate, delay) as f64;
            assert!(size > product * 0.8 && size < product * 3.0, "{rate} {delay}: {size}");
        }
    }

    #[test]
    fn a_path_without_delay_keeps_the_window_small() {
        assert!(settle(100e6, 0.0) <= SMALLEST_WINDOW * 4);
    }

    #[test]
    fn an_idle_window_always_lets_one_begin() {
        let mut window = Window::default();
        window.begin(LARGEST_WINDOW * 2);
        assert!(!window.has_room());
        window.cancel(LARGEST_WINDOW * 2);
        assert!(window.has_room());
    }
}
