//! An agent that is killed with -9, again and again, while a client writes and verifies.
//!
//! fio's own NBD client gives up when its server goes away, so QEMU's storage daemon stands between: it reconnects
//! and asks again, as it does for a guest.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use e2e::disk::{self, Noise};
use e2e::lifeboot::{LiveRestore, Repository};
use e2e::nbd::Export;
use e2e::process::{Process, run, run_any};
use e2e::work_dir::WorkDir;

const DISK_BYTES: u64 = 256 << 20;
/// More rounds than these are a matter of patience: `LIFEBOOT_CRASH_ROUNDS=50`.
const ROUNDS: u32 = 6;
/// How many requests fio keeps in flight.
const DEPTH: u32 = 16;
/// How often one who waits for a reply looks whether there is still somebody who asks.
const A_LOOK: Duration = Duration::from_millis(100);

#[test]
fn no_acknowledged_write_is_lost_when_the_agent_is_killed_again_and_again() {
    let rounds = std::env::var("LIFEBOOT_CRASH_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    let work = WorkDir::new("crashes").unwrap();
    let (disk, target) = (work.file("disk.raw"), work.file("target.raw"));
    disk::make(&disk, DISK_BYTES, 21).unwrap();
    let repository = Repository::init(work.file("repository")).unwrap();
    repository.capture("vm", &disk).unwrap();

    // Slow enough that the background copies in every round.
    let limit = ["--limit", "6MiB"];
    let mut live =
        LiveRestore::start(&repository, "vm@latest", &target, &work.socket("live"), &limit).unwrap();
    let bridge = work.socket("bridge");
    let mut daemon = Process::spawn(&reconnecting_bridge(&live.export(), &bridge)).unwrap();
    daemon.wait_for_text("QMP").unwrap();

    let mut noise = Noise::new(u64::from(std::process::id()));
    let mut slowest = Duration::ZERO;
    let mut seed = 1;
    let start_writer =
        |seed| Process::spawn(&verified_writes(&Export::first(&bridge), seed, work.path())).unwrap();
    let mut writer = start_writer(seed);
    for round in 0..rounds {
        // Into the midst of writes: what was in flight at the last crash is behind us by then.
        daemon.skip_output();
        let mut replies = 0;
        while replies < 4 * DEPTH {
            let reply = |line: &str| line.contains("reply").then_some(());
            replies += u32::from(daemon.wait_for_within(A_LOOK, "a reply", reply).unwrap().is_some());
            if !writer.is_running() {
                writer.wait_success().unwrap_or_else(|error| panic!("by round {round}: {error:#}"));
                seed += 1;
                writer = start_writer(seed);
            }
        }
        // Orders nothing: it is the moment of the crash that is drawn here.
        thread::sleep(Duration::from_millis(noise.next() % 100));
        live = live.kill_and_restart().unwrap();
        slowest = slowest.max(live.start_time());
    }
    writer.wait_success().unwrap();
    println!("{rounds} rounds, {seed} runs of fio, slowest restart {} ms", slowest.as_millis());
    drop(daemon);

    let (stopped, parked) = live.park().unwrap();
    assert!(parked.success(), "parking ended with {parked}");
    drop(stopped);
    let mut live = LiveRestore::start(&repository, "vm@latest", &target, &work.socket("live"), &[]).unwrap();
    live.wait_complete().unwrap();
    // The last run of fio again, as a reader.
    let mut verify = fio(&live.export(), seed, work.path());
    verify.arg("--verify_only=1");
    run(&mut verify).unwrap();
    ensure_only_written_blocks_differ(&live, &disk, &target);
    // And it would have noticed.
    live.export().qemu_io(&["write -z 0 192M"]).unwrap();
    assert!(!run_any(&mut verify).unwrap().status.success(), "fio takes zeroes for what it wrote");
}

/// Every block that is not in the dirty bitmap equals the source.
fn ensure_only_written_blocks_differ(live: &LiveRestore, disk: &Path, target: &Path) {
    let info = live.export().info().unwrap();
    let contexts = info["exports"][0]["contexts"].as_array().unwrap().clone();
    let dirty =
        contexts.iter().filter_map(|context| context.as_str()).find(|name| name.contains("dirty")).unwrap();
    let map = live.export().map(dirty).unwrap();
    let clean =
        |block: &u64| !map.iter().any(|extent| extent.flags & 1 == 1 && extent.blocks().contains(block));
    let wrong = disk::differing_blocks(disk, target).unwrap().into_iter().find(clean);
    assert_eq!(wrong, None, "this block differs, and nobody wrote it");
}

/// fio's writes, each verified soon after it and all of them at the end.
fn verified_writes(export: &Export, seed: u64, directory: &Path) -> Command {
    let mut fio = fio(export, seed, directory);
    // Not for a reader: with `--verify_only` fio 3.33 then reads the first 128 blocks and calls the rest verified.
    fio.arg("--verify_backlog=128");
    fio
}

/// fio's random writes over all but the end of the disk.
fn fio(export: &Export, seed: u64, directory: &Path) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=crash", "--ioengine=nbd", &format!("--uri={}", export.uri())])
        .args(["--rw=randwrite", "--bssplit=4k/60:16k/20:64k/20", "--size=192M", "--io_size=48M"])
        .arg(format!("--iodepth={DEPTH}"))
        .args(["--fsync=100", "--rate=24m", "--verify=crc32c", "--verify_fatal=1"])
        .arg(format!("--randseed={seed}"))
        .current_dir(directory);
    fio
}

/// Serves `export` on at `socket`, and waits for its server whenever that is gone.
fn reconnecting_bridge(export: &Export, socket: &Path) -> Command {
    let mut daemon = Command::new("qemu-storage-daemon");
    daemon
        // A line for each reply that it gets.
        .args(["--trace", "nbd_receive_*reply*"])
        .arg("--blockdev")
        .arg(format!(
            "driver=nbd,node-name=disk,server.type=unix,server.path={},reconnect-delay=60",
            export.socket.display()
        ))
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={}", socket.display()))
        .args(["--export", "type=nbd,id=disk,node-name=disk,name=,writable=on"])
        // The monitor comes last: its greeting says that the rest is there.
        .args(["--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"]);
    daemon
}
