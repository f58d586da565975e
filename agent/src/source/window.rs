//! How many bytes of prefetching may be in flight.
//!
//! A guest's miss queues on the wire behind whatever was asked for before it. Too little in flight leaves the
//! wire idle during each delay; too much makes the guest wait. So the window follows the product of bandwidth and
//! delay, as congestion control by model does (BBR): the bandwidth is the most that was delivered lately, the
//! delay the least that a fetch took lately beyond its own transfer, and a little more than their product is let
//! out, so that the wire has a next piece when one ends. At the start the window doubles until fetches wait for each
//! other. What is in flight hides how short the delay is, so now and then the wire is left to run empty for a
//! moment. Pure: times are given, nothing here reads a clock.

use std::collections::VecDeque;
use std::time::Duration;

/// The least that the window falls to.
pub(super) const SMALLEST_WINDOW: u64 = 256 << 10;
/// The most that the window grows to.
pub(super) const LARGEST_WINDOW: u64 = 64 << 20;
/// Where it begins.
const FIRST_WINDOW: u64 = 1 << 20;
/// For how long a bandwidth that was reached is believed.
const BANDWIDTH_AGE: Duration = Duration::from_secs(2);
/// For how long the shortest delay is believed.
const DELAY_AGE: Duration = Duration::from_secs(10);
/// Pieces beyond the product.
const SPARE_PIECES: u64 = 2;
/// A fetch that took so many times as long as the quickest one waited for others: the wire is full.
const QUEUED: f64 = 1.75;

/// A fetch that is in flight.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(super) struct Flight {
    len: u64,
    /// What had been delivered when it began.
    delivered: u64,
    /// Whether the window was full, so that what was delivered meanwhile is what the path can do.
    is_full: bool,
    /// Whether the wire was being left to run empty.
    is_probe: bool,
}

/// The window.
#[derive(Debug)]
pub(super) struct Window {
    size: u64,
    in_flight: u64,
    delivered: u64,
    /// Bandwidths in bytes a second with when they were seen: each less than the one before it.
    bandwidths: VecDeque<(Duration, f64)>,
    quickest: Option<Quickest>,
    is_probing: bool,
    is_starting: bool,
}

/// The fetch that took the least time lately.
#[derive(Clone, Copy, Debug)]
struct Quickest {
    seen: Duration,
    latency: Duration,
    len: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            size: FIRST_WINDOW,
            in_flight: 0,
            delivered: 0,
            bandwidths: VecDeque::new(),
            quickest: None,
            is_probing: false,
            is_starting: true,
        }
    }
}

impl Window {
    /// Whether another piece may be asked for. The first one always may.
    #[must_use]
    pub(super) const fn has_room(&self) -> bool {
        let size = if self.is_probing { 1 } else { self.size };
        self.in_flight < size
    }

    /// How many bytes may be in flight.
    #[must_use]
    pub(super) const fn size(&self) -> u64 {
        self.size
    }

    /// A fetch of `len` bytes begins.
    pub(super) const fn begin(&mut self, len: u64) -> Flight {
        let is_probe = self.is_probing && self.in_flight == 0;
        self.in_flight += len;
        Flight { len, delivered: self.delivered, is_full: !self.has_room(), is_probe }
    }

    /// A fetch ended at `now`, after `latency`.
    pub(super) fn end(&mut self, flight: Flight, latency: Duration, now: Duration) {
        self.in_flight = self.in_flight.saturating_sub(flight.len);
        self.delivered += flight.len;
        let seconds = latency.as_secs_f64().max(1e-6);
        let bandwidth = self.saw_bandwidth(flight, seconds, now);
        let quickest = self.saw_latency(flight, latency, now);
        if self.is_starting {
            if latency.as_secs_f64() < quickest.latency.as_secs_f64() * QUEUED {
                self.size = (self.size + flight.len).min(LARGEST_WINDOW);
                return;
            }
            self.is_starting = false;
        }
        let delay = (quickest.latency.as_secs_f64() - quickest.len as f64 / bandwidth).max(0.0);
        let size = (bandwidth * delay) as u64 + SPARE_PIECES * flight.len.min(SMALLEST_WINDOW);
        self.size = size.clamp(SMALLEST_WINDOW, LARGEST_WINDOW);
    }

    /// A fetch failed; its time says nothing.
    pub(super) const fn cancel(&mut self, flight: Flight) {
        self.in_flight = self.in_flight.saturating_sub(flight.len);
    }

    /// Takes in what was delivered during a flight; the bandwidth that is believed now.
    fn saw_bandwidth(&mut self, flight: Flight, seconds: f64, now: Duration) -> f64 {
        let seen = (self.delivered - flight.delivered) as f64 / seconds;
        let best = self.bandwidths.front().map_or(0.0, |(_, best)| *best);
        if flight.is_full || seen > best {
            while self.bandwidths.back().is_some_and(|(_, last)| *last <= seen) {
                self.bandwidths.pop_back();
            }
            self.bandwidths.push_back((now, seen));
            // The last stays, however old: it is all that is known.
            while self.bandwidths.len() > 1
                && self.bandwidths.front().is_some_and(|(at, _)| now.saturating_sub(*at) > BANDWIDTH_AGE)
            {
                self.bandwidths.pop_front();
            }
        }
        self.bandwidths.front().map_or(seen, |(_, best)| *best).max(1.0)
    }

    fn saw_latency(&mut self, flight: Flight, latency: Duration, now: Duration) -> Quickest {
        match self.quickest {
            Some(quickest) if latency > quickest.latency && !flight.is_probe => {
                if now.saturating_sub(quickest.seen) > DELAY_AGE {
                    self.is_probing = true;
                }
                quickest
            }
            _ => {
                self.is_probing = false;
                *self.quickest.insert(Quickest { seen: now, latency, len: flight.len })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: u64 = 200 << 10;

    /// A wire of `rate` bytes a second after `delay`, kept as full as the window allows for `seconds`.
    struct Wire {
        window: Window,
        rate: f64,
        delay: f64,
        free: f64,
        now: f64,
        flights: VecDeque<(f64, f64, Flight)>,
        arrived: u64,
    }

    impl Wire {
        fn new(rate: f64, delay: f64) -> Self {
            let flights = VecDeque::new();
            Self { window: Window::default(), rate, delay, free: 0.0, now: 0.0, flights, arrived: 0 }
        }

        fn run(&mut self, seconds: f64) {
            let end = self.now + seconds;
            while self.now < end {
                while self.window.has_room() {
                    let flight = self.window.begin(PIECE);
                    self.free = self.free.max(self.now + self.delay) + PIECE as f64 / self.rate;
                    self.flights.push_back((self.now, self.free, flight));
                }
                let (begun, arrived, flight) = self.flights.pop_front().unwrap();
                self.now = arrived;
                self.arrived += PIECE;
                let latency = Duration::from_secs_f64(arrived - begun);
                self.window.end(flight, latency, Duration::from_secs_f64(arrived));
            }
        }
    }

    #[test]
    fn the_window_settles_near_the_product_of_bandwidth_and_delay() {
        for (rate, delay) in [(100e6, 0.005), (100e6, 0.02), (100e6, 0.05), (1e9, 0.02)] {
            let mut wire = Wire::new(rate, delay);
            wire.run(60.0);
            let product = rate * delay;
            let size = wire.window.size as f64 - (SPARE_PIECES * PIECE) as f64;
            assert!(size > product * 0.9 && size < product * 1.5, "{rate} {delay}: {size}");
        }
    }

    #[test]
    fn the_wire_is_full_within_a_few_delays_and_stays_so() {
        for (rate, delay) in [(100e6, 0.005), (100e6, 0.02), (1e9, 0.02)] {
            let mut wire = Wire::new(rate, delay);
            wire.run(20.0 * delay);
            let begun = wire.arrived;
            let from = wire.now;
            wire.run(30.0);
            let used = (wire.arrived - begun) as f64 / ((wire.now - from) * rate);
            assert!(used > 0.97, "{rate} {delay}: {used}");
        }
    }

    #[test]
    fn a_delay_that_became_longer_is_noticed() {
        let mut wire = Wire::new(100e6, 0.005);
        wire.run(5.0);
        wire.delay = 0.05;
        wire.run(30.0);
        let size = wire.window.size as f64;
        assert!(size > 4.5e6, "{size}");
    }

    #[test]
    fn a_path_without_delay_keeps_the_window_small() {
        let mut wire = Wire::new(100e6, 0.0);
        wire.run(10.0);
        assert!(wire.window.size <= SMALLEST_WINDOW * 4, "{}", wire.window.size);
    }

    #[test]
    fn an_idle_window_always_lets_one_begin() {
        let mut window = Window::default();
        let flight = window.begin(LARGEST_WINDOW * 2);
        assert!(!window.has_room());
        window.cancel(flight);
        assert!(window.has_room());
    }
}
