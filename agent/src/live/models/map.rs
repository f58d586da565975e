//! The map's list of what changed, against noting: a bit that is set is in the noting that follows.

use std::sync::Arc;

use shuttle::thread;

use super::rig::DISK;
use super::{holds, is_broken_by};
use crate::live::live_file::{LiveFile, LiveWords};
use crate::live::map::BlockMap;
use crate::live::mistakes::Mistake;
use crate::live::sync::Mutex;

/// Two threads bring the same blocks home, or mark them as the guest's; whichever finds the bit set, and flushes
/// because of nothing else, must find it noted.
fn noting() {
    let map = Arc::new(BlockMap::new(DISK, LiveFile::new(LiveWords::in_memory(DISK), DISK)));
    let committed: Arc<Mutex<u64>> = Arc::default();
    let threads: Vec<_> = [(0..2, true), (1..3, true), (0..3, false)]
        .into_iter()
        .map(|(blocks, by_guest)| {
            let (map, committed) = (Arc::clone(&map), Arc::clone(&committed));
            thread::spawn(move || {
                if by_guest {
                    map.mark_guest(blocks.clone());
                }
                map.mark_home(blocks.clone());
                let mut guests = committed.lock();
                let runs = map.note();
                for run in runs.iter().filter(|run| run.guest) {
                    (run.start..run.start + u64::from(run.len)).for_each(|block| *guests |= 1 << block);
                }
                map.mark_stable(&runs);
                assert!(map.p().all(blocks.clone()), "a bit was set and is not noted");
                let is_noted = |block: u64| *guests >> block & 1 == 1;
                assert!(!by_guest || blocks.clone().all(is_noted), "a guest's bit is not noted");
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("it found nothing wrong"));
    assert_eq!(map.home(), map.v().count());
}

#[test]
fn a_bit_set_by_one_and_acknowledged_by_another_is_in_the_noting_that_follows() {
    holds(noting);
}

#[test]
fn a_bit_set_before_its_run_is_listed_is_noticed() {
    is_broken_by(Mistake::BitBeforeList, noting);
}
