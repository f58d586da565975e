//! Who may write to a chunk that is not whole: guests together, a fill alone.
//!
//! A hold spans a write to the target and nothing else, never a fetch. Several chunks are held in
//! ascending order, so that two holders never wait for each other. Only chunks that somebody holds
//! or waits for take memory, whatever the disk's size.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use super::mistakes::{Mistake, makes};
use super::sync::Mutex;

/// Locks of different chunks are found under different mutexes, so that shards seldom meet.
const SHELVES: usize = 64;

type Shelf = Mutex<HashMap<u64, Arc<RwLock<()>>>>;

/// The holds of one disk.
#[derive(Debug)]
pub(super) struct Holds {
    shelves: Arc<[Shelf]>,
}

#[derive(Debug)]
enum Guard {
    Shared(OwnedRwLockReadGuard<()>),
    Exclusive(OwnedRwLockWriteGuard<()>),
}

/// One chunk, held until this is dropped.
#[derive(Debug)]
pub(super) struct Hold {
    shelves: Arc<[Shelf]>,
    chunk: u64,
    guard: Option<Guard>,
}

impl Holds {
    pub(super) fn new() -> Self {
        Self { shelves: (0..SHELVES).map(|_| Shelf::default()).collect() }
    }

    /// Waits until no fill holds the chunk.
    pub(super) async fn shared(&self, chunk: u64) -> Hold {
        let mut hold = self.place(chunk);
        let lock = self.lock(chunk);
        hold.guard = Some(Guard::Shared(lock.read_owned().await));
        hold
    }

    /// A shared hold where nobody has to be waited for.
    pub(super) fn try_shared(&self, chunk: u64) -> Option<Hold> {
        let mut hold = self.place(chunk);
        hold.guard = Some(Guard::Shared(self.lock(chunk).try_read_owned().ok()?));
        Some(hold)
    }

    /// Waits until nobody holds the chunk. Who asks later waits behind this.
    pub(super) async fn exclusive(&self, chunk: u64) -> Hold {
        let mut hold = self.place(chunk);
        let lock = self.lock(chunk);
        hold.guard = Some(Guard::Exclusive(lock.write_owned().await));
        hold
    }

    /// A hold without its guard yet: it clears up where the waiting for it is given up.
    fn place(&self, chunk: u64) -> Hold {
        Hold { shelves: Arc::clone(&self.shelves), chunk, guard: None }
    }

    fn lock(&self, chunk: u64) -> Arc<RwLock<()>> {
        Arc::clone(shelf(&self.shelves, chunk).lock().entry(chunk).or_default())
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.shelves.iter().all(|shelf| shelf.lock().is_empty())
    }
}

fn shelf(shelves: &[Shelf], chunk: u64) -> &Shelf {
    &shelves[(chunk % SHELVES as u64) as usize]
}

impl Drop for Hold {
    fn drop(&mut self) {
        match self.guard.take() {
            Some(Guard::Shared(guard)) => drop(guard),
            Some(Guard::Exclusive(guard)) => drop(guard),
            None => {}
        }
        let mut shelf = shelf(&self.shelves, self.chunk).lock();
        // The shelf is locked, so nobody can come to share the last reference.
        let is_last = |lock: &Arc<RwLock<()>>| Arc::strong_count(lock) == 1 || makes(Mistake::HoldForgotten);
        if shelf.get(&self.chunk).is_some_and(is_last) {
            shelf.remove(&self.chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use block::sim::{Executor, Stop, yield_now};

    use super::*;

    #[test]
    fn a_fill_is_alone_and_nothing_is_left_behind() {
        for seed in 0..50 {
            let mut executor = Executor::new(seed);
            let holds = Rc::new(Holds::new());
            let (guests, fills) = (Rc::new(Cell::new(0_i32)), Rc::new(Cell::new(0_i32)));
            for task in 0..12 {
                let (holds, guests, fills) = (Rc::clone(&holds), Rc::clone(&guests), Rc::clone(&fills));
                executor.spawn(async move {
                    let (mine, hold) = if task % 3 == 0 {
                        (fills.clone(), holds.exclusive(7).await)
                    } else {
                        (guests.clone(), holds.shared(7).await)
                    };
                    mine.set(mine.get() + 1);
                    assert!(fills.get() == 0 || (fills.get() == 1 && guests.get() == 0), "seed {seed}");
                    yield_now().await;
                    mine.set(mine.get() - 1);
                    drop(hold);
                });
            }
            assert_eq!(executor.run(10_000), Stop::Finished, "seed {seed}");
            assert!(holds.is_empty(), "seed {seed}");
        }
    }

    #[test]
    fn a_waiter_that_gives_up_leaves_nothing_behind() {
        let mut executor = Executor::new(1);
        let holds = Rc::new(Holds::new());
        let (first, second) = (Rc::clone(&holds), Rc::clone(&holds));
        let hold = executor.block_on(100, async move { first.exclusive(3).await });
        executor.spawn(async move { second.shared(3).await });
        executor.run(10);
        drop(executor);
        drop(hold);
        assert!(holds.is_empty());
    }
}
