//! An agent that is killed with -9, again and again, under a QEMU guest in which fio writes and verifies.
//!
//! The guest's drive is QEMU's own, with the arguments that the agent prints: it connects again by itself, and the guest notices
//! nothing but the wait.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::collections::BTreeSet;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use e2e::captured::Captured;
use e2e::disk::{self, Noise};
use e2e::guest::GuestImage;
use e2e::machine::{Machine, Running};
use e2e::process::{PATIENCE, run};
use e2e::small_guest::make_initrd;

/// Kills, in two to three minutes; `LIFEBOOT_CRASH_ROUNDS` sets another number.
const ROUNDS: u64 = 100;
/// Each run of fio has a part of the disk to itself, so that there is always something absent to be written to. A run takes about two
/// seconds without the kills in it.
const PART_MIB: u64 = 32;

/// fio on one part of a disk: each block once, in random order, flushed now and then, some read again soon, all of them at the end.
fn fio(part: u64, disk: &str, further: &str) -> String {
    format!(
        "fio --name=part{part} --direct=1 --ioengine=psync --rw=randwrite --bs=16k --offset={}M --size={PART_MIB}M \
         --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed={} --fsync=64 --output-format=terse \
         --filename={disk} {further}",
        part * PART_MIB,
        part + 1
    )
}

#[test]
fn a_guest_loses_nothing_when_the_agent_is_killed_again_and_again() {
    let rounds = std::env::var("LIFEBOOT_CRASH_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    let parts = rounds / 4 + 2;
    let image = GuestImage::prepare().unwrap();
    let captured = Captured::new("killed", (parts * PART_MIB) << 20, 71).unwrap();
    let initrd = captured.work.file("initrd");
    make_initrd(&image, &initrd).unwrap();
    // Slow enough that the background copies in every round.
    let mut live = captured.start(&["--limit", "4MiB"]).unwrap();
    let mut machine =
        Machine::start_small(&image, &initrd, &live.qemu_arguments().unwrap(), captured.work.path()).unwrap();
    machine.wait_ready().unwrap();

    let mut noise = Noise::new(u64::from(std::process::id()));
    let (mut part, mut slowest) = (0, Duration::ZERO);
    let begin = |machine: &mut Machine, part: u64| -> Running {
        machine.begin(&fio(part, "/dev/vda", "--rate_iops=1000 --verify_backlog=128")).unwrap()
    };
    let mut running = begin(&mut machine, part);
    for round in 0..rounds {
        // Into the midst of requests: what was in flight at the last kill is behind us by then.
        let wanted = machine.requests().unwrap() + 100;
        let deadline = Instant::now() + PATIENCE;
        while machine.requests().unwrap() < wanted {
            assert!(Instant::now() < deadline, "the guest is stuck in round {round}");
            if machine.has_ended(&running) {
                machine.finish(running).unwrap();
                part += 1;
                assert!(part < parts, "fio is done with the disk by round {round}");
                running = begin(&mut machine, part);
            }
            thread::sleep(Duration::from_millis(2));
        }
        // Orders nothing: it is the moment of the kill that is drawn here.
        thread::sleep(Duration::from_millis(noise.next() % 100));
        live = live.kill_and_restart().unwrap();
        slowest = slowest.max(live.start_time());
    }
    machine.finish(running).unwrap();
    let written = 0..=part;
    println!("{rounds} kills, {} runs of fio, slowest restart {} ms", part + 1, slowest.as_millis());

    // The guest's own verdict, read from the disk anew.
    for part in written.clone() {
        machine.run(&fio(part, "/dev/vda", "--verify_only=1")).unwrap();
    }
    assert_eq!(machine.run("dmesg | grep -ci 'i/o error' || true").unwrap().trim(), "0");
    machine.process().write_line("0 echo o > /proc/sysrq-trigger").unwrap();
    machine.process().wait_success().unwrap();

    run(e2e::lifeboot::lifeboot(["limit"]).unwrap().arg(&captured.target).arg("0")).unwrap();
    live.wait_complete().unwrap();
    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "parking ended with {parked}");
    for part in written {
        run(Command::new("sh").arg("-c").arg(fio(part, "\"$0\"", "--verify_only=1")).arg(&captured.target))
            .unwrap();
    }
    // By QEMU's own record of what it sent, not by ours.
    let sent: BTreeSet<u64> = machine.written_blocks().unwrap().into_iter().collect();
    let differing = disk::differing_blocks(&captured.disk, &captured.target).unwrap();
    assert!(!differing.is_empty());
    let wrong = differing.iter().find(|block| !sent.contains(block));
    assert_eq!(wrong, None, "this block differs from the snapshot, and the guest never wrote it");
}
