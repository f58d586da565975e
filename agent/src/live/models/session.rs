//! Flushes, parking and fills against guests' writes, through the whole engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::rig::{Rig, backup, block, read, spawn, write};
use super::{holds, is_broken_by};
use crate::live::mistakes::Mistake;
use crate::live::source::Urgency;
use crate::live::sync::point;
use block::{BlockDevice, ErrorKind};
use shuttle::rand::Rng as _;

/// A flush is answered by a sync that began after it arrived, and what it covers outlives a power cut at any time.
fn flushing() {
    let rig = Rig::new();
    let session = rig.create();
    let flushed: Arc<[AtomicU8; 3]> = Arc::default();
    let threads: Vec<_> = (0..3_u8)
        .map(|thread| {
            let (watch, flushed) = (Arc::clone(&rig.watch), Arc::clone(&flushed));
            spawn(&rig, &session, async move |device| {
                for value in 1..3 {
                    if write(&device, u64::from(thread), value).await.is_err() {
                        return;
                    }
                    let begun = watch.syncs_begun.load(Ordering::SeqCst);
                    if device.flush().await.is_err() {
                        return;
                    }
                    assert!(watch.synced.load(Ordering::SeqCst) > begun, "it shared a sync that had begun");
                    flushed[usize::from(thread)].store(value, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let mut rng = shuttle::rand::thread_rng();
    if rng.gen_bool(0.5) {
        let nobody_flushed = || flushed.iter().all(|value| value.load(Ordering::SeqCst) == 0);
        while nobody_flushed() {
            point();
        }
    }
    (0..rng.gen_range(0..100)).for_each(|_| point());
    // Nobody runs between this and the cut, so these were acknowledged before it.
    let flushed: Vec<u8> = flushed.iter().map(|value| value.load(Ordering::SeqCst)).collect();
    let (resumed, _) = rig.lose_power();
    threads.into_iter().for_each(|thread| thread.join().expect("it found nothing wrong"));
    let device = rig.device(&resumed);
    for (at, &flushed) in (0..).zip(&flushed) {
        let is = shuttle::future::block_on(read(&device, at)).expect("nothing fails");
        // A sector is whole; of a write that was not flushed some may be there, and some not.
        let may_be =
            |is: &u8| if *is == backup(at) { flushed == 0 } else { (flushed.max(1)..3).contains(is) };
        assert!(is.iter().all(may_be), "block {at} holds {is:x?} after {flushed} was flushed");
    }
}

/// Once the session is parked nobody changes the target.
fn parking() {
    let rig = Rig::new();
    let session = rig.create();
    let threads: Vec<_> = (0..3_u8)
        .map(|thread| {
            spawn(&rig, &session, async move |device| {
                let result = if thread == 2 {
                    device.bring_home(0, Urgency::Demand).await
                } else {
                    write(&device, u64::from(thread), thread + 1).await
                };
                if let Err(error) = result {
                    assert_eq!(error.kind(), ErrorKind::Shutdown, "{error}");
                }
            })
        })
        .collect();
    let watch = Arc::clone(&rig.watch);
    let parker = spawn(&rig, &session, async move |device| {
        point();
        device.park().await.expect("nothing fails");
        watch.is_closed.store(1, Ordering::SeqCst);
        assert_eq!(watch.changes.load(Ordering::SeqCst), 0, "the target is being changed after parking");
    });
    parker.join().expect("it found nothing wrong");
    threads.into_iter().for_each(|thread| thread.join().expect("it found nothing wrong"));
}

/// While the session is held still nobody changes the target; afterwards everybody goes on.
fn holding_still() {
    let rig = Rig::new();
    let session = rig.create();
    let guests: Vec<_> = (0..3_u8)
        .map(|at| {
            spawn(&rig, &session, async move |device| {
                for value in 1..3 {
                    write(&device, u64::from(at), value).await.expect("nothing fails");
                }
            })
        })
        .collect();
    let watch = Arc::clone(&rig.watch);
    let holder = spawn(&rig, &session, async move |device| {
        for _ in 0..2 {
            let still = device.session().hold_still().await.expect("nobody else does");
            watch.is_closed.store(1, Ordering::SeqCst);
            (0..40).for_each(|_| point());
            assert_eq!(watch.changes.load(Ordering::SeqCst), 0, "the target is being changed");
            watch.is_closed.store(0, Ordering::SeqCst);
            drop(still);
        }
    });
    holder.join().expect("it found nothing wrong");
    guests.into_iter().for_each(|guest| guest.join().expect("it went on"));
}

/// A fill never takes a guest's write back, and a read after a write sees it.
fn filling() {
    let rig = Rig::new();
    let session = rig.create();
    let guests: Vec<_> = (0..2_u8)
        .map(|at| {
            spawn(&rig, &session, async move |device| {
                let at = u64::from(at);
                for value in 1..3 {
                    write(&device, at, value).await.expect("nothing fails");
                    let is = read(&device, at).await.expect("nothing fails");
                    assert!(is.iter().all(|is| *is == value), "block {at} holds {is:x?} after {value}");
                }
            })
        })
        .collect();
    let fills: Vec<_> = (0..2)
        .map(|_| {
            spawn(&rig, &session, async move |device| {
                device.bring_home(0, Urgency::Demand).await.expect("nothing fails");
            })
        })
        .collect();
    let reader = spawn(&rig, &session, async move |device| {
        for at in 0..2 {
            let is = read(&device, at).await.expect("nothing fails");
            let may_be = |is: &u8| [backup(at), 1, 2].contains(is);
            assert!(is.iter().all(may_be), "block {at} holds {is:x?}, which nobody wrote");
        }
    });
    let join = |thread: shuttle::thread::JoinHandle<()>| thread.join().expect("it found nothing wrong");
    guests.into_iter().chain(fills).chain([reader]).for_each(join);
    let device = rig.device(&session);
    for at in 0..2 {
        let is = shuttle::future::block_on(read(&device, at)).expect("nothing fails");
        assert!(is.iter().all(|is| *is == 2), "block {at} holds {is:x?}");
    }
    rig.target.with_view(|view| assert!(view[..block(2).start() as usize].iter().all(|&byte| byte == 2)));
}

#[test]
fn a_flush_is_answered_by_a_sync_that_began_after_it_and_outlives_a_power_cut() {
    holds(flushing);
}

#[test]
fn nobody_changes_the_target_once_the_session_is_parked() {
    holds(parking);
}

#[test]
fn nobody_changes_the_target_while_the_session_is_held_still_and_all_go_on_after_it() {
    holds(holding_still);
}

#[test]
fn a_fill_never_takes_a_guests_write_back() {
    holds(filling);
}

macro_rules! noticed {
    ($($name:ident: $mistake:ident in $model:ident,)*) => {
        $(
            #[test]
            fn $name() {
                is_broken_by(Mistake::$mistake, $model);
            }
        )*
    };
}

noticed! {
    a_flush_answered_by_a_sync_that_began_before_it_is_noticed: SyncSharedTooLate in flushing,
    noting_after_the_sync_is_noticed: NoteAfterSync in flushing,
    a_journal_written_before_the_data_is_noticed: JournalBeforeData in flushing,
    a_journal_that_is_not_synced_is_noticed: JournalUnsynced in flushing,
    a_change_counted_late_is_noticed: ChangeCountedLate in parking,
    a_change_counted_late_is_noticed_by_who_holds_still: ChangeCountedLate in holding_still,
    holding_still_without_waiting_is_noticed: FrozenUnderWrites in holding_still,
    parking_that_does_not_wait_is_noticed: ParkWithoutWaiting in parking,
    a_fill_without_the_hold_is_noticed: FillWithoutHold in filling,
    a_fill_that_looked_before_it_held_is_noticed: LookBeforeHold in filling,
    a_hold_that_ends_before_the_block_is_home_is_noticed: HoldEndsBeforeHome in filling,
    a_block_home_before_its_write_has_ended_is_noticed: HomeBeforeCompletion in filling,
}
