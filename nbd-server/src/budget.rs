//! The memory for the data of requests in flight: one amount for the whole server, given out in the order of asking.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The unit in which memory is counted, in bytes.
const UNIT: u64 = 4096;
/// What the longest BLOCK_STATUS reply takes: never more than this is asked for but for a request's own data.
pub(crate) const MAX_REPLY_BYTES: u32 = 1 << 20;

/// The budget. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    units: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    total: usize,
}

/// Memory that may be used until this is dropped.
#[derive(Debug)]
pub(crate) struct Allowance {
    _permit: OwnedSemaphorePermit,
}

impl Budget {
    /// A budget of `bytes`, but enough for one request of `request_bytes`, and for one reply that no request bounds.
    pub(crate) fn new(bytes: u64, request_bytes: u32) -> Self {
        let least = request_bytes.max(MAX_REPLY_BYTES);
        let total = usize::try_from(units(bytes.max(u64::from(least)))).unwrap_or(usize::MAX);
        let total = total.min(Semaphore::MAX_PERMITS);
        Self { units: Arc::new(Semaphore::new(total)), waiting: Arc::default(), total }
    }

    /// An allowance for `len` bytes, if nobody has to be waited for.
    pub(crate) fn try_take(&self, len: u32) -> Option<Allowance> {
        let permit = Arc::clone(&self.units).try_acquire_many_owned(units32(len)).ok()?;
        Some(Allowance { _permit: permit })
    }

    /// An allowance for `len` bytes, after those who asked before.
    pub(crate) fn take(&self, len: u32) -> impl Future<Output = Allowance> + use<> {
        let units = Arc::clone(&self.units);
        let waiting = Waiting::begin(&self.waiting);
        async move {
            let permit = units.acquire_many_owned(units32(len)).await;
            drop(waiting);
            Allowance { _permit: permit.expect("the semaphore is never closed") }
        }
    }

    /// Whether somebody waits for memory.
    pub(crate) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// How much is given out, in bytes.
    pub(crate) fn used_bytes(&self) -> u64 {
        (self.total.saturating_sub(self.units.available_permits())) as u64 * UNIT
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

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let budget = Budget::new(2 << 20, 4096);
        let first = budget.try_take((2 << 20) - 4095).unwrap();
        assert!(budget.try_take(1).is_none());
        assert_eq!(budget.used_bytes(), 2 << 20);
        drop(first);
        assert_eq!(budget.used_bytes(), 0);
        assert!(budget.try_take(2 << 20).is_some());
    }

    #[test]
    fn one_request_always_fits() {
        assert!(Budget::new(0, 4 << 20).try_take(4 << 20).is_some());
        assert!(Budget::new(0, 512).try_take(MAX_REPLY_BYTES).is_some());
    }

    #[test]
    fn who_waits_is_seen_until_it_stops_waiting() {
        let budget = Budget::new(MAX_REPLY_BYTES.into(), 4096);
        let held = budget.try_take(MAX_REPLY_BYTES);
        let waiting = budget.take(4096);
        assert!(budget.is_wanted());
        drop(waiting);
        assert!(!budget.is_wanted());
        drop(held);
    }
}
