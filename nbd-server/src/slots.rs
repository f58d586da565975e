//! How many connections there are, and how many are in their handshake.
//!
//! # When the places for handshakes are full
//! Whoever holds one without getting on with it may not keep others out: the oldest that has had a second gives up its place
//! to a newcomer. A client that means it needs milliseconds, so it is never hit, unless somebody opens more connections a second than there
//! are places; then all take their chances, and a client that connects again gets through. Younger ones are not
//! touched, for then a flood could cut off every handshake in its middle, and nobody would get through. The rest are refused at once.
//!
//! Connections that transmit are never closed for a newcomer, which is refused instead.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::Limits;

/// So long nobody's handshake is cut short.
const HANDSHAKE_GRACE: Duration = Duration::from_secs(1);

/// The places for connections. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slots {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    places: Mutex<Places>,
    freed: Notify,
    /// Connections that have their handshake behind them.
    transmitting: AtomicUsize,
}

#[derive(Debug, Default)]
struct Places {
    connections: usize,
    /// Those of them that gave up their place and are about to end.
    leaving: usize,
    /// The oldest first.
    half_open: VecDeque<HalfOpen>,
}

#[derive(Clone, Debug)]
struct HalfOpen {
    since: Instant,
    give_way: Arc<Notify>,
}

/// Why a connection has no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    Connections,
    HalfOpen,
}

impl Slots {
    /// A place for one more connection, in its handshake.
    pub(crate) fn take(&self, limits: &Limits, now: Instant) -> Result<Slot, Full> {
        let mut places = self.shared.places.lock();
        let full = if places.connections - places.leaving >= limits.connections {
            Some(Full::Connections)
        } else if places.half_open.len() >= limits.half_open {
            Some(Full::HalfOpen)
        } else {
            None
        };
        if let Some(full) = full {
            let is_idle = |oldest: &HalfOpen| now.duration_since(oldest.since) >= HANDSHAKE_GRACE;
            if !places.half_open.front().is_some_and(is_idle) {
                return Err(full);
            }
            if let Some(oldest) = places.half_open.pop_front() {
                oldest.give_way.notify_one();
            }
            places.leaving += 1;
        }
        let entry = HalfOpen { since: now, give_way: Arc::default() };
        places.connections += 1;
        places.half_open.push_back(entry.clone());
        Ok(Slot { shared: Arc::clone(&self.shared), half_open: Some(entry) })
    }

    pub(crate) fn connections(&self) -> usize {
        self.shared.places.lock().connections
    }

    pub(crate) fn half_open(&self) -> usize {
        self.shared.places.lock().half_open.len()
    }

    /// Waits until no connection has a place.
    pub(crate) async fn empty(&self) {
        loop {
            let freed = self.shared.freed.notified();
            if self.connections() == 0 {
                return;
            }
            freed.await;
        }
    }
}

/// The place of one connection; free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    shared: Arc<Shared>,
    half_open: Option<HalfOpen>,
}

impl Slot {
    /// Counts the connection as one that transmits.
    pub(crate) fn transmitting(&self) -> Transmitting {
        self.shared.transmitting.fetch_add(1, Ordering::Relaxed);
        Transmitting(Arc::clone(&self.shared))
    }

    /// The handshake is over. `false` where its place was given away a moment before: then the connection must end.
    #[must_use]
    pub(crate) fn opened(&mut self) -> bool {
        let Some(entry) = &self.half_open else { return true };
        let mut places = self.shared.places.lock();
        let count = places.half_open.len();
        places.half_open.retain(|other| !Arc::ptr_eq(&other.give_way, &entry.give_way));
        let had_place = places.half_open.len() < count;
        if had_place {
            drop(places);
            self.half_open = None;
        }
        had_place
    }

    /// Waits until the place of the handshake was given to somebody else.
    pub(crate) fn given_away(&self) -> impl Future<Output = ()> + use<> {
        let entry = self.half_open.clone();
        async move {
            match entry {
                Some(entry) => entry.give_way.notified().await,
                None => std::future::pending().await,
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let had_place = self.opened();
        {
            let mut places = self.shared.places.lock();
            places.connections -= 1;
            if !had_place {
                places.leaving -= 1;
            }
        }
        // One waits at most, and a wake-up that nobody waits for is kept for it.
        self.shared.freed.notify_one();
    }
}

/// A connection that transmits, as long as this lives.
#[derive(Debug)]
pub(crate) struct Transmitting(Arc<Shared>);

impl Transmitting {
    /// How many there are on the whole server.
    pub(crate) fn count(&self) -> usize {
        self.0.transmitting.load(Ordering::Relaxed)
    }
}

impl Drop for Transmitting {
    fn drop(&mut self) {
        self.0.transmitting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(connections: usize, half_open: usize) -> Limits {
        Limits { connections, half_open, ..Limits::default() }
    }

    async fn gives_way(slot: &Slot) -> bool {
        tokio::time::timeout(Duration::ZERO, slot.given_away()).await.is_ok()
    }

    #[tokio::test]
    async fn the_oldest_handshake_gives_way_to_a_newcomer_once_it_has_had_its_second() {
        let (slots, limits, begun) = (Slots::default(), limits(10, 2), Instant::now());
        let mut first = slots.take(&limits, begun).unwrap();
        let mut second = slots.take(&limits, begun + HANDSHAKE_GRACE / 2).unwrap();
        assert_eq!(slots.take(&limits, begun + HANDSHAKE_GRACE / 2).unwrap_err(), Full::HalfOpen);
        let third = slots.take(&limits, begun + HANDSHAKE_GRACE).unwrap();
        assert!(gives_way(&first).await && !gives_way(&second).await && !gives_way(&third).await);
        assert_eq!((slots.connections(), slots.half_open()), (3, 2));
        assert!(!first.opened(), "too late: its place is another's");
        assert!(second.opened());
        drop(first);
        assert_eq!((slots.connections(), slots.half_open()), (2, 1));
        drop((second, third));
        assert_eq!((slots.connections(), slots.half_open()), (0, 0));
    }

    #[tokio::test]
    async fn who_transmits_gives_way_to_nobody() {
        let (slots, limits, begun) = (Slots::default(), limits(2, 2), Instant::now());
        let mut established: Vec<Slot> = (0..2).map(|_| slots.take(&limits, begun).unwrap()).collect();
        assert!(established.iter_mut().all(Slot::opened));
        let later = begun + 100 * HANDSHAKE_GRACE;
        assert_eq!(slots.take(&limits, later).unwrap_err(), Full::Connections);
        established.pop();
        let idle = slots.take(&limits, later).unwrap();
        assert_eq!(slots.take(&limits, later).unwrap_err(), Full::Connections);
        let newcomer = slots.take(&limits, later + HANDSHAKE_GRACE).unwrap();
        assert!(gives_way(&idle).await);
        drop((idle, newcomer, established));
        slots.empty().await;
    }
}
