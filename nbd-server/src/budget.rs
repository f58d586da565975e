//! The memory for the data of requests in flight: one amount for the whole server.
//!
//! Half of it is *common*, and given out in the order of asking. The other half is divided among as many connections as there may be:
//! each has its own share, which nobody else can take, so that requests of ordinary size go on though others hold all that is common
//! and do nothing with it. A request that fits into what is left of its connection's share takes it from there, and one that is longer
//! goes on in parts that do where nothing else can be had.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Poll, Waker};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::Limits;

/// The unit in which common memory is counted, in bytes.
const UNIT: u64 = 4096;
/// The longest part of a request in bytes: what one call of the device does well.
const MOST_OF_PART: u64 = 1 << 20;
/// What the longest BLOCK_STATUS reply takes: never more than this is asked for but for a request's own data.
pub(crate) const MAX_REPLY_BYTES: u32 = 1 << 20;

/// The budget. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    units: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    gone_without: Arc<GoneWithout>,
    given_back: Arc<GivenBack>,
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

/// A moment in the life of a budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark(u64);

/// Where an allowance comes from.
#[derive(Debug)]
enum From {
    Common { permit: OwnedSemaphorePermit, given_back: Arc<GivenBack> },
    Share { _use: ShareUse },
}

/// Requests that went on without what is common.
#[derive(Debug, Default)]
struct GoneWithout {
    times: AtomicU64,
    /// The most that any of them needed, in bytes, since so much was seen to be free.
    most_bytes: AtomicU64,
}

/// What came back of what is common.
#[derive(Debug, Default)]
struct GivenBack {
    bytes: AtomicU64,
    /// Nothing has, since somebody waited for it in vain.
    is_stuck: AtomicBool,
}

/// What belongs to one connection. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    size: u64,
    given: Rc<Given>,
}

/// What is given out of a share.
#[derive(Debug)]
struct Given {
    bytes: Cell<u64>,
    bytes_of_all: Arc<AtomicU64>,
    /// Who is told when some of it comes back.
    waiting: RefCell<Option<Waker>>,
}

#[derive(Debug)]
struct ShareUse {
    bytes: u64,
    given: Rc<Given>,
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
            gone_without: Arc::default(),
            given_back: Arc::default(),
            common,
            share,
            used_of_shares: Arc::default(),
        }
    }

    /// What belongs to a new connection.
    pub(crate) fn share(&self) -> Share {
        let given = Given {
            bytes: Cell::new(0),
            bytes_of_all: Arc::clone(&self.used_of_shares),
            waiting: RefCell::new(None),
        };
        Share { size: self.share, given: Rc::new(given) }
    }

    /// An allowance for `len` bytes of what is common, if nobody has to be waited for.
    pub(crate) fn try_take(&self, len: u32) -> Option<Allowance> {
        let permit = Arc::clone(&self.units).try_acquire_many_owned(units32(len)).ok()?;
        Some(Allowance { _from: From::Common { permit, given_back: Arc::clone(&self.given_back) } })
    }

    /// An allowance for `len` bytes of what is common, after those who asked before: from when it is first looked at.
    pub(crate) fn take(&self, len: u32) -> impl Future<Output = Allowance> + use<> {
        let units = Arc::clone(&self.units);
        let waiting = Arc::clone(&self.waiting);
        let given_back = Arc::clone(&self.given_back);
        async move {
            let waiting = Waiting::begin(&waiting);
            let permit = units.acquire_many_owned(units32(len)).await;
            drop(waiting);
            let permit = permit.expect("the semaphore is never closed");
            Allowance { _from: From::Common { permit, given_back } }
        }
    }

    /// How many bytes of what is common were ever given back.
    pub(crate) fn given_back(&self) -> u64 {
        self.given_back.bytes.load(Ordering::Relaxed)
    }

    /// Somebody waited for what is common in vain.
    pub(crate) fn get_stuck(&self) {
        self.given_back.is_stuck.store(true, Ordering::Relaxed);
    }

    /// Whether nothing of what is common has come back since [`Budget::get_stuck`]: to wait for it is in vain.
    pub(crate) fn is_stuck(&self) -> bool {
        self.given_back.is_stuck.load(Ordering::Relaxed)
    }

    /// Somebody who needed `len` bytes of what is common goes on without.
    pub(crate) fn go_without(&self, len: u32) {
        self.gone_without.most_bytes.fetch_max(len.into(), Ordering::Relaxed);
        self.gone_without.times.fetch_add(1, Ordering::Relaxed);
    }

    /// From here on it may be asked whether what is common is wanted.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.gone_without.times.load(Ordering::Relaxed))
    }

    /// Whether somebody waits for what is common, or went on without it since `mark` and could not have it now either. How much was given
    /// back meanwhile means nothing: others may take little of it, and give that back, all the time.
    pub(crate) fn is_wanted_since(&self, mark: Mark) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0 || (self.mark() != mark && self.is_short())
    }

    /// Whether less of what is common is free than somebody needed who went on without it.
    fn is_short(&self) -> bool {
        let free_bytes = self.units.available_permits() as u64 * UNIT;
        let is_short = free_bytes < self.gone_without.most_bytes.load(Ordering::Relaxed);
        if !is_short {
            // They could have had it since: what others will need is another matter.
            self.gone_without.most_bytes.store(0, Ordering::Relaxed);
        }
        is_short
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
        let given = &self.given;
        if bytes > self.size - given.bytes.get() {
            return None;
        }
        given.bytes.set(given.bytes.get() + bytes);
        given.bytes_of_all.fetch_add(bytes, Ordering::Relaxed);
        Some(Allowance { _from: From::Share { _use: ShareUse { bytes, given: Rc::clone(given) } } })
    }

    /// An allowance for `len` bytes, no more than all of it, once there is so much left. One at a time waits for it.
    pub(crate) async fn take(&self, len: u32) -> Allowance {
        poll_fn(|cx| match self.try_take(len) {
            Some(allowance) => Poll::Ready(allowance),
            None => {
                self.given.waiting.replace(Some(cx.waker().clone()));
                Poll::Pending
            }
        })
        .await
    }

    /// The length in bytes of the parts of a request for which there is this share alone: two fit into it, so that one is made while
    /// the other is sent. `None` where it holds nothing worth the name.
    pub(crate) fn part_bytes(&self) -> Option<u32> {
        let part = (self.size / 2).min(MOST_OF_PART) / UNIT * UNIT;
        u32::try_from(part).ok().filter(|part| *part > 0)
    }

    /// How much of it is given out, in bytes.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.given.bytes.get()
    }
}

impl Drop for From {
    fn drop(&mut self) {
        if let Self::Common { permit, given_back } = self {
            given_back.bytes.fetch_add(permit.num_permits() as u64 * UNIT, Ordering::Relaxed);
            given_back.is_stuck.store(false, Ordering::Relaxed);
        }
    }
}

impl Drop for ShareUse {
    fn drop(&mut self) {
        let given = &self.given;
        given.bytes.set(given.bytes.get() - self.bytes);
        given.bytes_of_all.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Some(waiting) = given.waiting.take() {
            waiting.wake();
        }
    }
}

/// Somebody waits for what is common.
#[derive(Debug)]
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

    #[tokio::test]
    async fn who_waits_is_seen_until_it_stops_waiting() {
        let budget = Budget::new(&limits(MAX_REPLY_BYTES.into(), 4096, 4));
        let held = budget.try_take(MAX_REPLY_BYTES);
        let mark = budget.mark();
        let mut waiting = Box::pin(budget.take(4096));
        assert!(!budget.is_wanted_since(mark), "nobody has looked for it yet");
        let looked = poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx).is_pending()));
        assert!(looked.await && budget.is_wanted_since(mark));
        drop(waiting);
        assert!(!budget.is_wanted_since(mark));
        drop(held);
    }

    #[test]
    fn who_goes_without_wants_what_is_common_until_so_much_of_it_is_free() {
        let budget = Budget::new(&limits(MAX_REPLY_BYTES.into(), 4096, 4));
        let all = MAX_REPLY_BYTES;
        let (first, second) = (budget.try_take(4096).unwrap(), budget.try_take(all - 4096).unwrap());
        let mark = budget.mark();
        budget.get_stuck();
        assert!(budget.is_stuck() && !budget.is_wanted_since(mark));
        budget.go_without(8192);
        assert!(budget.is_wanted_since(mark));
        assert!(!budget.is_wanted_since(budget.mark()), "that was before");
        drop(first);
        assert!(!budget.is_stuck());
        assert!(budget.is_wanted_since(mark), "what came back is less than it needed");
        budget.go_without(4096);
        assert!(budget.is_wanted_since(mark), "the other did not need less for that");
        drop(second);
        assert!(!budget.is_wanted_since(mark));
        assert_eq!(budget.given_back(), u64::from(all));
        let _held = budget.try_take(all - 4096).unwrap();
        assert!(!budget.is_wanted_since(mark), "they could have had it");
    }
}
