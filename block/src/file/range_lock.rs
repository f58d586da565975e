//! Holds on byte ranges, shared or exclusive, over all handles of one file.
//!
//! A request finer than the direct-I/O alignment is read, changed and written back. While that lasts
//! no other write may touch those units, or it would be undone: the one holds them exclusively, every
//! other write shared. Files in buffered mode need none of this.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::ByteRange;

/// How a range is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    Shared,
    Exclusive,
}

/// The holds on one file. Granted in the order of arrival where they conflict, so nobody starves, and
/// one at a time per request, so nobody waits in a circle.
#[derive(Debug, Default)]
pub(super) struct RangeLock {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    shared: Vec<Held>,
    exclusive: Vec<Held>,
    waiting: VecDeque<Waiting>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    id: u64,
    range: ByteRange,
}

#[derive(Debug)]
struct Waiting {
    held: Held,
    hold: Hold,
    granted: oneshot::Sender<()>,
}

/// A hold, or the wait for it; both end when it is dropped.
#[derive(Debug)]
pub(super) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl RangeLock {
    pub(super) async fn hold(&self, range: ByteRange, hold: Hold) -> RangeGuard<'_> {
        let (guard, wait) = {
            let mut state = self.state.lock();
            let id = state.next_id;
            state.next_id += 1;
            let held = Held { id, range };
            let guard = RangeGuard { lock: self, id };
            let in_the_way = state.conflicts(range, hold)
                || state
                    .waiting
                    .iter()
                    .any(|other| conflict(other.hold, hold) && overlap(other.held.range, range));
            if in_the_way {
                let (granted, wait) = oneshot::channel();
                state.waiting.push_back(Waiting { held, hold, granted });
                (guard, Some(wait))
            } else {
                state.grant(held, hold);
                (guard, None)
            }
        };
        if let Some(wait) = wait {
            wait.await.expect("a wait ends by being granted: its guard is alive");
        }
        guard
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.state.lock().release(self.id);
    }
}

impl State {
    fn conflicts(&self, range: ByteRange, hold: Hold) -> bool {
        self.exclusive.iter().any(|held| overlap(held.range, range))
            || (hold == Hold::Exclusive && self.shared.iter().any(|held| overlap(held.range, range)))
    }

    fn grant(&mut self, held: Held, hold: Hold) {
        match hold {
            Hold::Shared => self.shared.push(held),
            Hold::Exclusive => self.exclusive.push(held),
        }
    }

    fn release(&mut self, id: u64) {
        for list in [&mut self.shared, &mut self.exclusive] {
            if let Some(at) = list.iter().position(|held| held.id == id) {
                list.swap_remove(at);
            }
        }
        self.waiting.retain(|waiting| waiting.held.id != id);
        let mut at = 0;
        while at < self.waiting.len() {
            let candidate = &self.waiting[at];
            let (held, hold) = (candidate.held, candidate.hold);
            let behind_another = self
                .waiting
                .iter()
                .take(at)
                .any(|earlier| conflict(earlier.hold, hold) && overlap(earlier.held.range, held.range));
            if behind_another || self.conflicts(held.range, hold) {
                at += 1;
                continue;
            }
            let waiting = self.waiting.remove(at).expect("the index was checked above");
            self.grant(held, hold);
            // Its guard is alive, or it would not be in the list; that guard releases the hold.
            let _ = waiting.granted.send(());
        }
    }
}

fn conflict(a: Hold, b: Hold) -> bool {
    a == Hold::Exclusive || b == Hold::Exclusive
}

fn overlap(a: ByteRange, b: ByteRange) -> bool {
    a.start() < b.end() && b.start() < a.end()
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::from_bounds(start, end)
    }

    fn now<T>(future: impl Future<Output = T>) -> Option<T> {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[test]
    fn shared_holds_overlap_and_exclusive_ones_wait() {
        let lock = RangeLock::default();
        let first = now(lock.hold(range(0, 10), Hold::Shared)).unwrap();
        let second = now(lock.hold(range(5, 15), Hold::Shared)).unwrap();
        assert!(now(lock.hold(range(9, 10), Hold::Exclusive)).is_none());
        assert!(now(lock.hold(range(15, 20), Hold::Exclusive)).is_some());
        drop((first, second));
        assert!(now(lock.hold(range(9, 10), Hold::Exclusive)).is_some());
    }

    #[test]
    fn who_comes_later_does_not_overtake_a_waiting_exclusive_hold() {
        let lock = RangeLock::default();
        let mut cx = Context::from_waker(Waker::noop());
        let first = now(lock.hold(range(0, 10), Hold::Shared)).unwrap();
        let mut exclusive = pin!(lock.hold(range(5, 6), Hold::Exclusive));
        assert!(exclusive.as_mut().poll(&mut cx).is_pending());
        let mut later = pin!(lock.hold(range(0, 10), Hold::Shared));
        assert!(later.as_mut().poll(&mut cx).is_pending());
        drop(first);
        let Poll::Ready(held) = exclusive.as_mut().poll(&mut cx) else {
            panic!("the exclusive hold was next")
        };
        assert!(later.as_mut().poll(&mut cx).is_pending());
        drop(held);
        assert!(later.as_mut().poll(&mut cx).is_ready());
    }

    #[test]
    fn a_dropped_wait_stands_in_nobodys_way() {
        let lock = RangeLock::default();
        let held = now(lock.hold(range(0, 1), Hold::Exclusive)).unwrap();
        assert!(now(lock.hold(range(0, 1), Hold::Exclusive)).is_none());
        drop(held);
        assert!(now(lock.hold(range(0, 1), Hold::Shared)).is_some());
    }
}
