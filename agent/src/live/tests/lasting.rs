//! What is on stable storage, and what a successor finds.

use block::sim::{Faults, Rng, SimDisk, SimOptions};
use block::{BLOCK_SIZE, BlockDevice, ErrorKind};

use super::{CHUNK, CHUNKS, DISK, Rig, STEPS, chunk, range};
use crate::live::error;
use crate::live::journal::SessionId;
use crate::live::live_file::LiveWords;
use crate::live::parts::Resumed;
use crate::live::stats::Phase;

#[test]
fn flushes_that_arrive_together_share_syncs() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, chunk(0), 1).unwrap();
    let (target, journal) = (rig.target.stats().syncs, rig.journal.stats().syncs);
    let flushes: Vec<_> = (0..50)
        .map(|_| {
            let device = device.clone();
            rig.executor.spawn(async move { device.flush().await })
        })
        .collect();
    rig.executor.run(1_000_000);
    assert!(flushes.iter().all(|flush| flush.take().expect("it has ended").is_ok()));
    assert!(rig.target.stats().syncs - target <= 3, "{} syncs", rig.target.stats().syncs - target);
    assert_eq!(rig.journal.stats().syncs - journal, 1);
}

#[test]
fn a_flush_after_which_nothing_new_is_home_leaves_the_journal_alone() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, chunk(0), 1).unwrap();
    rig.flush(&device).unwrap();
    let before = rig.journal.stats();
    rig.write(&device, chunk(0), 2).unwrap();
    rig.flush(&device).unwrap();
    assert_eq!(rig.journal.stats(), before);
}

#[test]
fn a_failed_sync_is_never_tried_again_and_everything_fails_after_it() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, chunk(0), 1).unwrap();
    rig.flush(&device).unwrap();
    rig.write(&device, chunk(1), 2).unwrap();
    let before = rig.target.stats().syncs;
    rig.target.set_faults(Faults { sync: 1000, ..Faults::default() });
    assert_eq!(rig.flush(&device).unwrap_err().kind(), ErrorKind::Poisoned);
    rig.target.set_faults(Faults::default());
    assert_eq!(rig.flush(&device).unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(rig.target.stats().syncs, before + 1);
    assert_eq!(rig.write(&device, chunk(2), 3).unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(rig.read(&device, chunk(0)).unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(device.session().phase(), Phase::Poisoned);
    rig.target.drop_clean_cache();
    let (device, resumed) = rig.resume();
    assert_eq!(resumed, Resumed::SyncFailed);
    assert_eq!(rig.read(&device, chunk(0)).unwrap(), vec![1; CHUNK as usize]);
    assert_eq!(rig.read(&device, chunk(1)).unwrap(), vec![2; CHUNK as usize], "the backup's");
}

#[test]
fn a_killed_agents_successor_has_everything_acknowledged() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, chunk(2), 0x77).unwrap();
    drop(device);
    let (device, resumed) = rig.resume();
    assert_eq!(resumed, Resumed::AgentDied);
    assert_eq!(rig.read(&device, chunk(2)).unwrap(), vec![0x77; CHUNK as usize]);
    assert_eq!(device.session().stats().guest_bytes, CHUNK);
    rig.flush(&device).unwrap();
    rig.reboot();
    rig.target.power_cut(&mut Rng::new(0));
    rig.journal.power_cut(&mut Rng::new(0));
    let (device, resumed) = rig.resume();
    assert_eq!(resumed, Resumed::HostDied);
    assert_eq!(rig.read(&device, chunk(2)).unwrap(), vec![0x77; CHUNK as usize]);
}

#[test]
fn a_parked_session_knows_everything_exactly_after_a_reboot() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.read(&device, chunk(0)).unwrap();
    rig.write(&device, range(CHUNK, BLOCK_SIZE), 0x11).unwrap();
    let parker = device.clone();
    rig.run(async move { parker.park().await.unwrap() });
    assert_eq!(rig.read(&device, chunk(0)).unwrap_err().kind(), ErrorKind::Shutdown);
    assert_eq!(rig.write(&device, chunk(0), 1).unwrap_err().kind(), ErrorKind::Shutdown);
    let home = device.session().stats().home_bytes;
    rig.reboot();
    rig.target.power_cut(&mut Rng::new(7));
    rig.journal.power_cut(&mut Rng::new(7));
    let (device, resumed) = rig.resume();
    assert_eq!(resumed, Resumed::Parked);
    let stats = device.session().stats();
    assert_eq!((stats.home_bytes, stats.guest_bytes), (home, BLOCK_SIZE));
    // It is not parked any more: the next crash must not be taken for a parking.
    drop(device);
    rig.reboot();
    assert_eq!(rig.resume().1, Resumed::HostDied);
}

#[test]
fn parking_that_fails_is_a_failed_sync_and_not_a_parking() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, chunk(0), 1).unwrap();
    rig.journal.set_faults(Faults { sync: 1000, ..Faults::default() });
    let mut park = || {
        let parker = device.clone();
        rig.run(async move { parker.park().await })
    };
    park().unwrap_err();
    assert_eq!(park().unwrap_err().kind(), error::ErrorKind::Poisoned, "it is not parked the second time");
    assert_eq!(device.session().phase(), Phase::Poisoned);
    rig.journal.set_faults(Faults::default());
    assert_eq!(rig.resume().1, Resumed::SyncFailed);
}

#[test]
fn a_commit_that_waits_while_the_session_is_parked_writes_nothing_after_it() {
    for seed in 0..40 {
        let mut rig = Rig::new();
        rig.executor = block::sim::Executor::new(seed);
        let device = rig.create();
        rig.write(&device, chunk(0), 1).unwrap();
        for _ in 0..3 {
            let device = device.clone();
            rig.executor.spawn(async move { device.commit().await });
        }
        let parker = device.clone();
        let parked = rig.executor.spawn(async move { parker.park().await });
        rig.executor.run(STEPS);
        parked.take().expect("parking ends").unwrap();
        rig.reboot();
        assert_eq!(rig.resume().1, Resumed::Parked, "seed {seed}");
    }
}

#[test]
fn after_a_host_crash_all_that_is_home_counts_as_written_by_the_guest() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.read(&device, chunk(0)).unwrap();
    rig.flush(&device).unwrap();
    rig.reboot();
    let (device, _) = rig.resume();
    let stats = device.session().stats();
    assert_eq!(stats.guest_bytes, stats.home_bytes);
}

#[test]
fn a_complete_session_stays_complete_and_goes_on_to_note_what_the_guest_writes() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.executor.spawn(device.clone().fill_worker());
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    rig.write(&device, chunk(3), 0x33).unwrap();
    rig.flush(&device).unwrap();
    drop(device);
    let (device, _) = rig.resume();
    assert_eq!(device.session().phase(), Phase::Complete);
    assert_eq!(device.session().stats().guest_bytes, CHUNK);
}

#[test]
fn a_parked_session_says_so_on_the_same_boot_with_or_without_its_live_file() {
    for keeps_live_file in [true, false] {
        let mut rig = Rig::new();
        let device = rig.create();
        rig.write(&device, chunk(2), 0x77).unwrap();
        rig.run(async move { device.park().await.unwrap() });
        if !keeps_live_file {
            rig.live = LiveWords::in_memory(DISK);
        }
        let (device, resumed) = rig.resume();
        assert_eq!(resumed, Resumed::Parked);
        assert_eq!(rig.read(&device, chunk(2)).unwrap(), vec![0x77; CHUNK as usize]);
        assert_eq!(device.session().stats().guest_bytes, CHUNK);
        rig.write(&device, chunk(1), 0x78).unwrap();
        drop(device);
        let (device, resumed) = rig.resume();
        assert_eq!(resumed, Resumed::AgentDied, "it is not parked any more");
        assert_eq!(rig.read(&device, chunk(1)).unwrap(), vec![0x78; CHUNK as usize]);
    }
}

#[test]
fn a_live_file_that_is_lost_on_the_same_boot_is_told_from_a_host_that_went_down() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, chunk(0), 1).unwrap();
    rig.flush(&device).unwrap();
    rig.write(&device, chunk(1), 2).unwrap();
    drop(device);
    rig.live = LiveWords::in_memory(DISK);
    let (device, resumed) = rig.resume();
    assert_eq!(resumed, Resumed::LiveFileLost);
    assert_eq!(rig.read(&device, chunk(0)).unwrap(), vec![1; CHUNK as usize]);
    assert_eq!(rig.read(&device, chunk(1)).unwrap(), vec![2; CHUNK as usize], "the backup's");
    drop(device);
    rig.live = LiveWords::in_memory(DISK);
    rig.reboot();
    assert_eq!(rig.resume().1, Resumed::HostDied);
}

#[test]
fn a_loss_is_told_of_before_the_session_is_believed_again() {
    for is_poisoned in [false, true] {
        let mut rig = Rig::new();
        let device = rig.create();
        rig.write(&device, chunk(0), 1).unwrap();
        rig.flush(&device).unwrap();
        let expected = if is_poisoned { Resumed::SyncFailed } else { Resumed::HostDied };
        if is_poisoned {
            rig.target.set_faults(Faults { sync: 1000, ..Faults::default() });
            rig.write(&device, chunk(0), 2).unwrap();
            rig.flush(&device).unwrap_err();
            rig.target.set_faults(Faults::default());
        } else {
            rig.reboot();
        }
        drop(device);
        let (parts, target, journal, id) = (rig.parts(), rig.target.clone(), rig.journal.clone(), rig.id);
        let cut_short = async move {
            let told = |resumed| {
                assert_eq!(resumed, expected);
                Err(block::Error::new(ErrorKind::NoSpace, "no room for the record"))
            };
            crate::live::Session::resume_telling(parts, id, &target, &journal, told).await.map(|_| ())
        };
        let refused = rig.run(cut_short).unwrap_err();
        assert_eq!(refused.kind(), error::ErrorKind::Device(ErrorKind::NoSpace));
        assert_eq!(rig.resume().1, expected, "it is not known any more that something was lost");
        assert_eq!(rig.resume().1, Resumed::AgentDied);
    }
}

#[test]
fn a_target_that_does_not_hold_what_was_filled_is_refused_and_nothing_is_written() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.read(&device, chunk(0)).unwrap();
    rig.read(&device, chunk(1)).unwrap();
    rig.write(&device, chunk(5), 0x55).unwrap();
    rig.executor.spawn(device.clone().fill_worker());
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    rig.flush(&device).unwrap();
    drop(device);
    let right = std::mem::replace(
        &mut rig.target,
        SimDisk::holding(&vec![0x55; DISK.size as usize], SimOptions::new(DISK.size, 9)),
    );
    let (journal, target) = (rig.journal.stats(), rig.target.stats());
    for is_rebooted in [false, true] {
        if is_rebooted {
            rig.reboot();
        }
        assert_eq!(rig.try_resume().unwrap_err().kind(), error::ErrorKind::WrongTarget);
        assert_eq!((rig.journal.stats().writes, rig.target.stats().writes), (journal.writes, target.writes));
    }
    rig.target = right;
    let (device, _) = rig.resume();
    assert_eq!(rig.read(&device, chunk(5)).unwrap(), vec![0x55; CHUNK as usize]);
}

#[test]
fn a_power_cut_after_writes_that_were_never_flushed_does_not_make_the_target_a_wrong_one() {
    let mut rig = Rig::new();
    let device = rig.create();
    for number in [0, 1, 2] {
        rig.read(&device, chunk(number)).unwrap();
    }
    rig.executor.spawn(device.clone().fill_worker());
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    // They reach the target, and no record speaks of them.
    for number in (0..CHUNKS - 1).filter(|number| !super::ZERO.contains(number)) {
        rig.write(&device, chunk(number), 0xee).unwrap();
    }
    drop(device);
    rig.reboot();
    assert_eq!(rig.resume().1, Resumed::HostDied);
}

#[test]
fn a_journal_that_belongs_elsewhere_or_is_none_is_refused() {
    let mut rig = Rig::new();
    assert_eq!(rig.try_resume().unwrap_err().kind(), error::ErrorKind::NotAJournal);
    rig.create();
    rig.identity.snapshot = "vm@earlier".into();
    assert_eq!(rig.try_resume().unwrap_err().kind(), error::ErrorKind::Elsewhere);
    rig.identity.snapshot = "vm@now".into();
    rig.id = SessionId([6; 16]);
    assert_eq!(rig.try_resume().unwrap_err().kind(), error::ErrorKind::Elsewhere);
}

#[test]
fn a_target_that_is_too_small_or_writes_too_coarsely_is_refused() {
    let mut rig = Rig::new();
    rig.target = SimDisk::new(SimOptions::new(DISK.size - 512, 1));
    assert_eq!(rig.try_create().unwrap_err().kind(), error::ErrorKind::Unsuitable);
    rig.target = SimDisk::new(SimOptions { minimum_io: 8192, ..SimOptions::new(DISK.size, 1) });
    assert_eq!(rig.try_create().unwrap_err().kind(), error::ErrorKind::Unsuitable);
}
