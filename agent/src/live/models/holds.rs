//! The holds: a fill is alone, guests are together, everybody gets a turn, and nothing is left behind.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::task::Poll;

use shuttle::thread;

use super::rig::{DISK, Rig, spawn};
use super::{holds, is_broken_by};
use crate::live::holds::Holds;
use crate::live::mistakes::Mistake;
use crate::live::sync::point;

/// Guests and fills on both chunks, through the engine's own order of taking them.
fn several_chunks() {
    let rig = Rig::new();
    let session = rig.create();
    let inside: Arc<[AtomicI64; 2]> = Arc::default();
    let threads: Vec<_> = (0..4)
        .map(|thread| {
            let inside = Arc::clone(&inside);
            spawn(&rig, &session, async move |device| {
                let is_fill = thread % 2 == 1;
                let held = if is_fill {
                    device.hold_exclusive(&(0..2)).await
                } else {
                    device.hold_shared(&(0..DISK.size / block::BLOCK_SIZE)).await
                };
                let (mine, most) = if is_fill { (-100, -100) } else { (1, 2) };
                for chunk in &*inside {
                    let now = chunk.fetch_add(mine, Ordering::SeqCst) + mine;
                    assert!(now == most || (!is_fill && now == 1), "a fill is not alone: {now}");
                }
                point();
                for chunk in &*inside {
                    chunk.fetch_sub(mine, Ordering::SeqCst);
                }
                drop(held);
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("it found nothing wrong"));
    assert!(session.holds.is_empty(), "holds are left behind");
}

/// A guest that comes after a fill has asked waits behind it.
fn in_turn() {
    let shelves = Arc::new(Holds::new());
    let [asked, had] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let first = shuttle::future::block_on(shelves.shared(5));
    let fill = {
        let (shelves, asked, had) = (Arc::clone(&shelves), Arc::clone(&asked), Arc::clone(&had));
        thread::spawn(move || {
            shuttle::future::block_on(async move {
                let mut hold = pin!(shelves.exclusive(5));
                let hold = std::future::poll_fn(|cx| {
                    let polled = hold.as_mut().poll(cx);
                    if polled.is_pending() {
                        asked.store(true, Ordering::SeqCst);
                    }
                    polled
                })
                .await;
                had.store(true, Ordering::SeqCst);
                drop(hold);
            });
        })
    };
    let guests: Vec<_> = (0..2)
        .map(|_| {
            let (shelves, asked, had) = (Arc::clone(&shelves), Arc::clone(&asked), Arc::clone(&had));
            thread::spawn(move || {
                shuttle::future::block_on(async move {
                    point();
                    let is_behind = asked.load(Ordering::SeqCst);
                    let hold = shelves.shared(5).await;
                    assert!(!is_behind || had.load(Ordering::SeqCst), "a guest overtook a fill that waits");
                    drop(hold);
                });
            })
        })
        .collect();
    point();
    drop(first);
    fill.join().expect("it had its turn");
    guests.into_iter().for_each(|guest| guest.join().expect("it found nothing wrong"));
    assert!(shelves.is_empty(), "holds are left behind");
}

/// A waiter that gives up while the hold it waits for is let go: nobody is forgotten.
fn giving_up() {
    let shelves = Arc::new(Holds::new());
    let first = shuttle::future::block_on(shelves.exclusive(5));
    let threads: Vec<_> = (0..3)
        .map(|thread| {
            let shelves = Arc::clone(&shelves);
            thread::spawn(move || {
                shuttle::future::block_on(async move {
                    let mut hold = pin!(shelves.exclusive(5));
                    if thread == 0 {
                        std::future::poll_fn(|cx| {
                            let _ = hold.as_mut().poll(cx);
                            Poll::Ready(())
                        })
                        .await;
                        point();
                    } else {
                        drop(hold.await);
                    }
                });
            })
        })
        .collect();
    drop(first);
    threads.into_iter().for_each(|thread| thread.join().expect("it found nothing wrong"));
    assert!(shelves.is_empty(), "holds are left behind");
}

#[test]
fn fills_and_guests_on_several_chunks_never_wait_for_each_other_for_ever() {
    holds(several_chunks);
}

#[test]
fn a_fill_that_waits_is_not_overtaken() {
    holds(in_turn);
}

#[test]
fn whoever_gives_up_waiting_keeps_nobody_from_their_turn() {
    holds(giving_up);
}

#[test]
fn holds_in_descending_order_are_noticed() {
    is_broken_by(Mistake::HoldsDescending, several_chunks);
}

#[test]
fn a_hold_that_is_forgotten_while_others_wait_is_noticed() {
    is_broken_by(Mistake::HoldForgotten, several_chunks);
}
