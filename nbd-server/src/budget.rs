//! The memory for the data of requests in flight: one amount for the whole server.
//!
//! Half of it is *common*, and given out in the order of asking. The other half is divided among as many connections as there may be:
//! each has its own share, which nobody else can take, so that requests of ordinary size go on though others hold all that is common
//! and do nothing with it. A request that fits into what is left of its connection's share takes it from there.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::Limits;

/// The unit in which common memory is counted, in bytes.
const UNIT: u64 = 4096;
/// What the longest BLOCK_STATUS reply takes: never more than this is asked for but for a request's own data.
pub(crate) const MAX_REPLY_BYTES: u32 = 1 << 20;

/// The budget. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    units: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    /// Units that are common.
    common: usize,
    /// Bytes of one connection's share.
    share: u64,
    /// Bytes that are given out of shares.
    used_of_shares: Arc<AtomicU64>,
}

/// Memory that may be used until this is dropped.
#[derive(Debug)]
pub(crate) struct Allowance {
    _from: From,
}

/// Where an allowance comes from.
#[derive(Debug)]
enum From {
    Common { _permit: OwnedSemaphorePermit },
    Share { _use: ShareUse },
}

/// What belongs to one connection.
#[derive(Debug)]
pub(crate) struct Share {
    size: u64,
    used: Rc<Cell<u64>>,
    used_of_all: Arc<AtomicU64>,
}

#[derive(Debug)]
struct ShareUse {
    bytes: u64,
    used: Rc<Cell<u64>>,
    used_of_all: Arc<AtomicU64>,
}

impl Budget {
    /// The budget that `limits` have, but enough for one request, and for one reply that no request bounds.
    pub(crate) fn new(limits: &Limits) -> Self {
        let least = u64::from(limits.request_bytes.max(MAX_REPLY_BYTES));
        let total = limits.memory_bytes.max(least);
        let for_shares = (total / 2).min(total - least);
        let connections = limits.connections.max(1) as u64;
        let share = (for_shares / connections).min(limits.memory_bytes / 4) / UNIT * UNIT;
        let common = usize::try_from(units(total - share * connections)).unwrap_or(usize::MAX);
        let common = common.min(Semaphore::MAX_PERMITS);
        Self {
            units: Arc::new(Semaphore::new(common)),
            waiting: Arc::default(),
            common,
            share,
            used_of_shares: Arc::default(),
        }
    }

    /// What belongs to a new connection.
    pub(crate) fn share(&self) -> Share {
        Share { size: self.share, used: Rc::default(), used_of_all: Arc::clone(&self.used_of_shares) }
    }

    /// An allowance for `len` bytes of what is common, if nobody has to be waited for.
    pub(crate) fn try_take(&self, len: u32) -> Option<Allowance> {
        let permit = Arc::clone(&self.units).try_acquire_many_owned(units32(len)).ok()?;
        Some(Allowance { _from: From::Common { _permit: permit } })
    }

    /// An allowance for `len` bytes of what is common, after those who asked before.
    pub(crate) fn take(&self, len: u32) -> impl Future<Output = Allowance> + use<> {
        let units = Arc::clone(&self.units);
        let waiting = Waiting::begin(&self.waiting);
        async move {
            let permit = units.acquire_many_owned(units32(len)).await;
            drop(waiting);
            let permit = permit.expect("the semaphore is never closed");
            Allowance { _from: From::Common { _permit: permit } }
        }
    }

    /// Whether somebody waits for what is common.
    pub(crate) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// How much is given out, in bytes.
    pub(crate) fn used_bytes(&self) -> u64 {
        let common = self.common.saturating_sub(self.units.available_permits());
        common as u64 * UNIT + self.used_of_shares.load(Ordering::Relaxed)
    }
}

impl Share {
    /// An allowance for `len` bytes, if there is so much left.
    pub(crate) fn try_take(&self, len: u32) -> Option<Allowance> {
        let bytes = u64::from(len);
        if bytes > self.size - self.used.get() {
            return None;
        }
        self.used.set(self.used.get() + bytes);
        self.used_of_all.fetch_add(bytes, Ordering::Relaxed);
        let used =
            ShareUse { bytes, used: Rc::clone(&self.used), used_of_all: Arc::clone(&self.used_of_all) };
        Some(Allowance { _from: From::Share { _use: used } })
    }

    /// How much of it is given out, in bytes.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used.get()
    }
}

impl Drop for ShareUse {
    fn drop(&mut self) {
        self.used.set(self.used.get() - self.bytes);
        self.used_of_all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

struct Waiting(Arc<AtomicUsize>);

impl Waiting {
    fn begin(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

const fn units(bytes: u64) -> u64 {
    bytes.div_ceil(UNIT)
}

fn units32(len: u32) -> u32 {
    u32::try_from(units(u64::from(len))).expect("fewer units than bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(memory_bytes: u64, request_bytes: u32, connections: usize) -> Limits {
        Limits { memory_bytes, request_bytes, connections, ..Limits::default() }
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let budget = Budget::new(&limits(4 << 20, 4096, 4));
        let first = budget.try_take((2 << 20) - 4095).unwrap();
        assert!(budget.try_take(1).is_none());
        assert_eq!(budget.used_bytes(), 2 << 20);
        drop(first);
        assert_eq!(budget.used_bytes(), 0);
        assert!(budget.try_take(2 << 20).is_some());
    }

    #[test]
    fn one_request_always_fits() {
        assert!(Budget::new(&limits(0, 4 << 20, 256)).try_take(4 << 20).is_some());
        assert!(Budget::new(&limits(0, 512, 256)).try_take(MAX_REPLY_BYTES).is_some());
        assert!(Budget::new(&limits(33 << 20, 32 << 20, 256)).try_take(32 << 20).is_some());
    }

    #[test]
    fn a_connection_has_its_share_whatever_others_hold_and_no_more() {
        let budget = Budget::new(&limits(8 << 20, 1 << 20, 4));
        let shares: Vec<Share> = (0..4).map(|_| budget.share()).collect();
        let _common = budget.try_take(4 << 20).unwrap();
        assert!(budget.try_take(1).is_none());
        let held: Vec<Allowance> = shares.iter().map(|share| share.try_take(1 << 20).unwrap()).collect();
        assert_eq!(budget.used_bytes(), 8 << 20, "all that there is");
        assert_eq!(shares[0].used_bytes(), 1 << 20);
        assert!(shares[0].try_take(1).is_none());
        drop(held);
        assert_eq!(budget.used_bytes(), 4 << 20);
        assert!(shares[0].try_take((1 << 20) + 1).is_none());
        assert!(shares[0].try_take(1 << 20).is_some());
    }

    #[test]
    fn who_waits_is_seen_until_it_stops_waiting() {
        let budget = Budget::new(&limits(MAX_REPLY_BYTES.into(), 4096, 4));
        let held = budget.try_take(MAX_REPLY_BYTES);
        let waiting = budget.take(4096);
        assert!(budget.is_wanted());
        drop(waiting);
        assert!(!budget.is_wanted());
        drop(held);
    }
}
