//! Putting finished pieces away in the order in which they were read, whichever worker finished first: so
//! that neighbours on the disk are neighbours in a pack, and a restore reads long runs.

use std::collections::BTreeMap;

use parking_lot::Mutex;

/// Hands on numbered things in the order of their numbers, one at a time, on the thread of whoever brings them.
#[derive(Debug)]
pub(super) struct InOrder<T> {
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    next: u64,
    ready: BTreeMap<u64, T>,
    /// Somebody hands on; all others only leave what they have.
    busy: bool,
}

impl<T> InOrder<T> {
    pub(super) const fn new() -> Self {
        Self { state: Mutex::new(State { next: 0, ready: BTreeMap::new(), busy: false }) }
    }

    /// Brings number `number`, and calls `hand_on` for whatever can be handed on now. After an error nothing is
    /// handed on any more.
    pub(super) fn bring<E>(
        &self,
        number: u64,
        thing: T,
        mut hand_on: impl FnMut(T) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut state = self.state.lock();
        state.ready.insert(number, thing);
        if state.busy {
            return Ok(());
        }
        state.busy = true;
        loop {
            let next = state.next;
            let Some(thing) = state.ready.remove(&next) else { break };
            state.next += 1;
            drop(state);
            hand_on(thing)?;
            state = self.state.lock();
        }
        state.busy = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_order_they_come_in_they_leave_in_theirs() {
        let order = InOrder::new();
        let mut left = Vec::new();
        for number in [2, 0, 1, 4, 3] {
            let mut hand_on = |thing| {
                left.push(thing);
                Ok::<_, ()>(())
            };
            order.bring(number, number, &mut hand_on).unwrap();
        }
        assert_eq!(left, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn after_an_error_nothing_is_handed_on() {
        let order = InOrder::new();
        assert_eq!(order.bring(0, (), |()| Err("full")), Err("full"));
        order.bring(1, (), |()| Err("not called")).unwrap();
    }
}
