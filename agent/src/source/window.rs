//! How many bytes of prefetching may be in flight.
//!
//! A guest's miss queues on the wire behind whatever was asked for before it. Too little in flight leaves the
//! wire idle during each delay; too much makes the guest wait. So while guests ask, the window follows the product of
//! bandwidth and delay, as congestion control by model does (BBR): the bandwidth is the most that was delivered lately,
//! the delay the least that a fetch took lately beyond its own transfer, and one piece more is let out, so that the wire has a next one when
//! one ends. At the start the window doubles until fetches wait for each other. What is in flight hides how short the
//! delay is, so now and then the wire is left to run empty for a moment.
//!
//! The product is too little where fetches take unevenly long. So while no guest asks, [`Climb`] tries what is
//! enough, and while guests ask, half of what it found is let out if that is more. Pure: times are given, nothing here
//! reads a clock.

use std::collections::VecDeque;
use std::time::Duration;

use super::climb::Climb;

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
const SPARE_PIECES: u64 = 1;
/// For how long after a guest asked more may ask.
const GUESTS_ASK: Duration = Duration::from_secs(1);
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
    /// The product of bandwidth and delay, and what is spare.
    product: u64,
    climb: Climb,
    /// When a guest asked last.
    asked: Option<Duration>,
    do_guests_ask: bool,
    in_flight: u64,
    delivered: u64,
    /// Bandwidths in bytes a second with when they were seen: each less than the one before it.
    bandwidths: VecDeque<(Duration, f64)>,
    /// The highest bandwidth of all.
    best: f64,
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
            product: FIRST_WINDOW,
            climb: Climb::new(FIRST_WINDOW),
            asked: None,
            do_guests_ask: false,
            in_flight: 0,
            delivered: 0,
            bandwidths: VecDeque::new(),
            best: 1.0,
            quickest: None,
            is_probing: false,
            is_starting: true,
        }
    }
}

impl Window {
    /// Whether another piece may be asked for. The first one always may.
    #[must_use]
    pub(super) fn has_room(&self) -> bool {
        let size = if self.is_probing { 1 } else { self.size() };
        self.in_flight < size
    }

    /// How many bytes may be in flight.
    #[must_use]
    pub(super) fn size(&self) -> u64 {
        let tried = match (self.is_starting, self.do_guests_ask) {
            (true, _) => 0,
            (false, true) => self.climb.found() / 2,
            (false, false) => self.climb.size(),
        };
        self.product.max(tried)
    }

    /// A guest asks for something at `now`.
    pub(super) const fn guest_asks(&mut self, now: Duration) {
        self.asked = Some(now);
        self.do_guests_ask = true;
    }

    /// Whether guests asked for something lately.
    #[must_use]
    pub(super) const fn do_guests_ask(&self) -> bool {
        self.do_guests_ask
    }

    /// A fetch of `len` bytes begins.
    pub(super) fn begin(&mut self, len: u64) -> Flight {
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
        if self.is_starting && latency.as_secs_f64() < quickest.latency.as_secs_f64() * QUEUED {
            self.product = (self.product + flight.len).min(LARGEST_WINDOW);
            return;
        }
        // By the most that was ever seen: a path that became slow for want of a window would look shorter still.
        let transfer = quickest.len as f64 / self.best;
        let delay = (quickest.latency.as_secs_f64() - transfer).max(0.0);
        let product = (bandwidth * delay) as u64 + SPARE_PIECES * flight.len.min(SMALLEST_WINDOW);
        self.product = product.clamp(SMALLEST_WINDOW, LARGEST_WINDOW);
        if std::mem::take(&mut self.is_starting) {
            self.climb = Climb::new(self.product);
        }
        self.do_guests_ask = self.asked.is_some_and(|asked| now.saturating_sub(asked) < GUESTS_ASK);
        if self.do_guests_ask || self.is_probing {
            // What guests take of the wire is not seen here, and an empty wire delivers nothing.
            self.climb.pause();
        } else {
            self.climb.delivered(flight.len, flight.is_full, now, (self.product, LARGEST_WINDOW));
        }
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
        let bandwidth = self.bandwidths.front().map_or(seen, |(_, best)| *best).max(1.0);
        self.best = self.best.max(bandwidth);
        bandwidth
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

    /// A wire of `rate` bytes a second after `delay`, kept as full as the window allows.
    struct Wire {
        window: Window,
        rate: f64,
        delay: f64,
        /// A fetch is late by up to so many delays.
        uneven: f64,
        do_guests_ask: bool,
        free: f64,
        now: f64,
        /// Fetches in flight: when each arrives, when it began.
        flights: Vec<(f64, f64, Flight)>,
        arrived: u64,
        random: u64,
    }

    impl Wire {
        fn new(rate: f64, delay: f64) -> Self {
            Self {
                window: Window::default(),
                rate,
                delay,
                uneven: 0.0,
                do_guests_ask: false,
                free: 0.0,
                now: 0.0,
                flights: Vec::new(),
                arrived: 0,
                random: 1,
            }
        }

        /// Of most fetches a little, of few much.
        fn lateness(&mut self) -> f64 {
            self.random =
                self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let random = (self.random >> 40) as f64 / (1u64 << 24) as f64;
            self.delay * self.uneven * random * random
        }

        fn run(&mut self, seconds: f64) {
            let end = self.now + seconds;
            while self.now < end {
                if self.do_guests_ask {
                    self.window.guest_asks(Duration::from_secs_f64(self.now));
                }
                while self.window.has_room() {
                    let flight = self.window.begin(PIECE);
                    let late = self.lateness();
                    self.free = self.free.max(self.now + self.delay) + PIECE as f64 / self.rate;
                    self.flights.push((self.free + late, self.now, flight));
                }
                let first =
                    (0..self.flights.len()).min_by(|a, b| self.flights[*a].0.total_cmp(&self.flights[*b].0));
                let (arrived, begun, flight) = self.flights.swap_remove(first.unwrap());
                self.now = arrived;
                self.arrived += PIECE;
                let latency = Duration::from_secs_f64(arrived - begun);
                self.window.end(flight, latency, Duration::from_secs_f64(arrived));
            }
        }

        /// The part of the wire that is used for so long.
        fn used(&mut self, seconds: f64) -> f64 {
            let (from, begun) = (self.now, self.arrived);
            self.run(seconds);
            (self.arrived - begun) as f64 / ((self.now - from) * self.rate)
        }
    }

    #[test]
    fn while_guests_ask_the_window_settles_near_the_product_of_bandwidth_and_delay() {
        for (rate, delay) in [(100e6, 0.005), (100e6, 0.02), (100e6, 0.05), (1e9, 0.02)] {
            let mut wire = Wire::new(rate, delay);
            wire.do_guests_ask = true;
            wire.run(60.0);
            let product = rate * delay;
            let size = wire.window.size() as f64 - (SPARE_PIECES * PIECE) as f64;
            assert!(size > product * 0.9 && size < product * 1.5, "{rate} {delay}: {size}");
        }
    }

    #[test]
    fn while_no_guest_asks_it_is_not_much_more() {
        for (rate, delay) in [(100e6, 0.005), (100e6, 0.02), (100e6, 0.05), (1e9, 0.02)] {
            let mut wire = Wire::new(rate, delay);
            wire.run(60.0);
            let product = rate * delay;
            let size = wire.window.size() as f64 - (SPARE_PIECES * PIECE) as f64;
            assert!(size > product * 0.9 && size < product * 2.0, "{rate} {delay}: {size}");
        }
    }

    #[test]
    fn the_wire_is_full_within_a_few_delays_and_stays_so() {
        for (rate, delay) in [(100e6, 0.005), (100e6, 0.02), (1e9, 0.02)] {
            let mut wire = Wire::new(rate, delay);
            wire.run(20.0 * delay);
            let used = wire.used(30.0);
            assert!(used > 0.97, "{rate} {delay}: {used}");
        }
    }

    #[test]
    fn where_fetches_take_unevenly_long_the_wire_is_full_all_the_same() {
        for (rate, delay) in [(100e6, 0.005), (100e6, 0.02), (500e6, 0.01)] {
            for uneven in [1.0, 4.0, 10.0] {
                let mut wire = Wire::new(rate, delay);
                wire.uneven = uneven;
                wire.run(5.0);
                let used = wire.used(30.0);
                assert!(used > 0.85, "{rate} {delay} {uneven}: {used} {}", wire.window.size());
            }
        }
    }

    #[test]
    fn guests_who_ask_shrink_the_window_at_once() {
        let mut wire = Wire::new(100e6, 0.02);
        wire.uneven = 10.0;
        wire.run(10.0);
        let quiet = wire.window.size();
        wire.window.guest_asks(Duration::from_secs_f64(wire.now));
        let asked = wire.window.size();
        assert!(asked <= quiet * 2 / 3, "{quiet} {asked}");
        assert!(asked > SMALLEST_WINDOW, "but not to what the shortest delay says: {asked}");
    }

    #[test]
    fn a_delay_that_became_longer_is_noticed() {
        for do_guests_ask in [true, false] {
            let mut wire = Wire::new(100e6, 0.005);
            wire.do_guests_ask = do_guests_ask;
            wire.run(5.0);
            wire.delay = 0.05;
            wire.run(30.0);
            let size = wire.window.size() as f64;
            assert!(size > 4.5e6, "{size}");
        }
    }

    #[test]
    fn a_path_without_delay_keeps_the_window_small() {
        let mut wire = Wire::new(100e6, 0.0);
        wire.run(10.0);
        assert!(wire.window.size() <= SMALLEST_WINDOW * 4, "{}", wire.window.size());
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
