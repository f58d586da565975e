//! How many connections there are, and how many are in their handshake.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

use crate::Limits;

/// The places for connections. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slots {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    connections: AtomicUsize,
    half_open: AtomicUsize,
    freed: Notify,
}

/// Why a connection has no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    Connections,
    HalfOpen,
}

impl Slots {
    /// A place for one more connection, in its handshake. Called by the one thread that accepts.
    pub(crate) fn take(&self, limits: &Limits) -> Result<Slot, Full> {
        if self.connections() >= limits.connections {
            return Err(Full::Connections);
        }
        if self.half_open() >= limits.half_open {
            return Err(Full::HalfOpen);
        }
        self.counts.connections.fetch_add(1, Ordering::Relaxed);
        self.counts.half_open.fetch_add(1, Ordering::Relaxed);
        Ok(Slot { counts: Arc::clone(&self.counts), half_open: true })
    }

    pub(crate) fn connections(&self) -> usize {
        self.counts.connections.load(Ordering::Relaxed)
    }

    pub(crate) fn half_open(&self) -> usize {
        self.counts.half_open.load(Ordering::Relaxed)
    }

    /// Waits until no connection has a place.
    pub(crate) async fn empty(&self) {
        loop {
            let freed = self.counts.freed.notified();
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
    counts: Arc<Counts>,
    half_open: bool,
}

impl Slot {
    /// The handshake is over.
    pub(crate) fn opened(&mut self) {
        if std::mem::take(&mut self.half_open) {
            self.counts.half_open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.opened();
        self.counts.connections.fetch_sub(1, Ordering::Relaxed);
        // One waits at most, and a wake-up that nobody waits for is kept for it.
        self.counts.freed.notify_one();
    }
}
