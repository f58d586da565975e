//! Which chunk is fetched next, and who waits for it.
//!
//! One fetch per chunk however many want it; a chunk that somebody more urgent joins is raised in
//! place. Pure: no thread, no clock, no I/O. [`super::pool`] drives it.

use std::collections::hash_map::Entry as MapEntry;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

use crate::live::Urgency;

const LANES: usize = Urgency::ALL.len();

/// Where a fetch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Queued,
    Running,
}

#[derive(Debug)]
struct Fetch<W> {
    urgency: Urgency,
    stage: Stage,
    waiters: Vec<W>,
}

/// What [`FetchQueue::join`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Joined {
    /// A new fetch was queued.
    Queued,
    /// The fetch was known, and is more urgent from now on.
    Raised,
    /// The fetch was known already and its place did not change.
    Shared,
}

/// The fetches that are wanted or under way: `K` names a chunk, `W` is whoever waits for one.
#[derive(Debug)]
pub(super) struct FetchQueue<K, W> {
    fetches: HashMap<K, Fetch<W>>,
    /// Chunks by urgency. One whose fetch is running, or stands in another lane by now, is skipped
    /// when its turn comes.
    lanes: [VecDeque<K>; LANES],
}

impl<K, W> Default for FetchQueue<K, W> {
    fn default() -> Self {
        Self { fetches: HashMap::new(), lanes: std::array::from_fn(|_| VecDeque::new()) }
    }
}

impl<K: Copy + Eq + Hash, W> FetchQueue<K, W> {
    /// Asks for `chunk`; `waiter` is given back by [`finish`](Self::finish).
    pub(super) fn join(&mut self, chunk: K, urgency: Urgency, waiter: W) -> Joined {
        match self.fetches.entry(chunk) {
            MapEntry::Vacant(vacant) => {
                vacant.insert(Fetch { urgency, stage: Stage::Queued, waiters: vec![waiter] });
                self.lanes[urgency.lane()].push_back(chunk);
                Joined::Queued
            }
            MapEntry::Occupied(mut occupied) => {
                let fetch = occupied.get_mut();
                fetch.waiters.push(waiter);
                if urgency <= fetch.urgency {
                    return Joined::Shared;
                }
                fetch.urgency = urgency;
                if fetch.stage == Stage::Queued {
                    self.lanes[urgency.lane()].push_back(chunk);
                }
                Joined::Raised
            }
        }
    }

    /// The next chunk of this urgency, where it is one that `fits`; it counts as running from now on.
    pub(super) fn start_next(&mut self, urgency: Urgency, fits: impl Fn(K) -> bool) -> Option<K> {
        let lane = &mut self.lanes[urgency.lane()];
        while let Some(&chunk) = lane.front() {
            let fetch = self.fetches.get_mut(&chunk);
            let Some(fetch) = fetch.filter(|it| it.stage == Stage::Queued && it.urgency == urgency) else {
                lane.pop_front();
                continue;
            };
            if !fits(chunk) {
                return None;
            }
            fetch.stage = Stage::Running;
            lane.pop_front();
            return Some(chunk);
        }
        None
    }

    /// Whether [`start_next`](Self::start_next) may find something of this urgency; it is certain to find nothing
    /// where this is false.
    pub(super) fn may_start(&self, urgency: Urgency) -> bool {
        !self.lanes[urgency.lane()].is_empty()
    }

    /// Takes back the fetches of this urgency that have not begun, and without which whoever waits for them `may` do;
    /// returns everybody who waited for one, in the order of the fetches.
    pub(super) fn withdraw(&mut self, urgency: Urgency, may: impl Fn(K, &[W]) -> bool) -> Vec<W> {
        let mut waiters = Vec::new();
        let fetches = &mut self.fetches;
        self.lanes[urgency.lane()].retain(|&chunk| {
            let MapEntry::Occupied(fetch) = fetches.entry(chunk) else { return false };
            let Fetch { urgency: now, stage, waiters: waiting } = fetch.get();
            if *now != urgency || *stage != Stage::Queued {
                return false;
            }
            let goes = may(chunk, waiting);
            if goes {
                waiters.extend(fetch.remove().waiters);
            }
            !goes
        });
        waiters
    }

    /// The fetches of this urgency that have not begun.
    pub(super) fn queued(&self, urgency: Urgency) -> impl Iterator<Item = K> {
        let is_queued = move |chunk: &K| {
            let fetch = self.fetches.get(chunk);
            fetch.is_some_and(|fetch| fetch.stage == Stage::Queued && fetch.urgency == urgency)
        };
        self.lanes[urgency.lane()].iter().copied().filter(is_queued)
    }

    /// How urgent a fetch is by now, where it is known.
    pub(super) fn urgency(&self, chunk: K) -> Option<Urgency> {
        self.fetches.get(&chunk).map(|fetch| fetch.urgency)
    }

    /// Who waits for a chunk by now.
    pub(super) fn waiters(&self, chunk: K) -> &[W] {
        self.fetches.get(&chunk).map_or(&[], |fetch| &fetch.waiters)
    }

    /// Ends a fetch; returns everybody who waited for it.
    pub(super) fn finish(&mut self, chunk: K) -> Vec<W> {
        self.fetches.remove(&chunk).map_or_else(Vec::new, |fetch| fetch.waiters)
    }

    /// Ends every fetch, those that are running too; returns everybody who waited for one.
    pub(super) fn close(&mut self) -> Vec<W> {
        self.lanes.iter_mut().for_each(VecDeque::clear);
        self.fetches.drain().flat_map(|(_, fetch)| fetch.waiters).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(queue: &mut FetchQueue<u64, &'static str>, urgency: Urgency) -> Option<u64> {
        queue.start_next(urgency, |_| true)
    }

    #[test]
    fn one_fetch_serves_everybody_who_wants_the_chunk() {
        let mut queue = FetchQueue::default();
        assert_eq!(queue.join(7, Urgency::Background, "a"), Joined::Queued);
        assert_eq!(queue.join(7, Urgency::Background, "b"), Joined::Shared);
        assert_eq!(next(&mut queue, Urgency::Background), Some(7));
        assert_eq!(queue.join(7, Urgency::Demand, "c"), Joined::Raised);
        assert_eq!(next(&mut queue, Urgency::Demand), None, "it is running already");
        assert_eq!(queue.urgency(7), Some(Urgency::Demand));
        assert_eq!(queue.finish(7), ["a", "b", "c"]);
        assert_eq!(queue.join(7, Urgency::Demand, "d"), Joined::Queued, "a later wish is a new fetch");
    }

    #[test]
    fn demand_overtakes_the_background_and_a_raised_chunk_is_fetched_once() {
        let mut queue = FetchQueue::default();
        for chunk in 0..4 {
            queue.join(chunk, Urgency::Background, "sweep");
        }
        assert_eq!(queue.join(2, Urgency::Demand, "guest"), Joined::Raised);
        assert_eq!(next(&mut queue, Urgency::Demand), Some(2));
        assert_eq!(next(&mut queue, Urgency::Demand), None, "the background does not count as demand");
        let rest: Vec<u64> = std::iter::from_fn(|| next(&mut queue, Urgency::Background)).collect();
        assert_eq!(rest, [0, 1, 3]);
    }

    #[test]
    fn what_does_not_fit_keeps_its_place() {
        let mut queue = FetchQueue::default();
        queue.join(1, Urgency::Demand, "one");
        queue.join(5, Urgency::Demand, "other");
        assert_eq!(next(&mut queue, Urgency::Demand), Some(1));
        assert_eq!(queue.start_next(Urgency::Demand, |chunk| chunk == 2), None);
        assert_eq!(next(&mut queue, Urgency::Demand), Some(5));
    }

    #[test]
    fn what_is_taken_back_is_fetched_anew_once_it_is_asked_for_again() {
        let mut queue = FetchQueue::default();
        for chunk in 0..6 {
            queue.join(chunk, Urgency::Background, if chunk == 4 { "needs it" } else { "sweep" });
        }
        assert_eq!(next(&mut queue, Urgency::Background), Some(0));
        queue.join(2, Urgency::Demand, "guest");
        assert_eq!(queue.queued(Urgency::Background).collect::<Vec<_>>(), [1, 3, 4, 5]);
        let withdrawn =
            queue.withdraw(Urgency::Background, |chunk, waiters| chunk != 5 && waiters == ["sweep"]);
        assert_eq!(withdrawn, ["sweep"; 2], "of 1 and 3");
        assert!(queue.urgency(1).is_none() && queue.urgency(0).is_some());
        assert_eq!(queue.join(3, Urgency::Background, "sweep"), Joined::Queued);
        let rest: Vec<u64> = std::iter::from_fn(|| next(&mut queue, Urgency::Background)).collect();
        assert_eq!((rest, next(&mut queue, Urgency::Demand)), (vec![4, 5, 3], Some(2)));
    }

    #[test]
    fn closing_gives_everybody_back_once() {
        let mut queue = FetchQueue::default();
        queue.join(1, Urgency::Demand, "running");
        next(&mut queue, Urgency::Demand);
        queue.join(2, Urgency::Demand, "queued");
        let mut given_back = queue.close();
        given_back.sort_unstable();
        assert_eq!(given_back, ["queued", "running"]);
        assert!(queue.finish(1).is_empty() && queue.urgency(1).is_none());
        assert_eq!(next(&mut queue, Urgency::Demand), None);
    }
}
