//! A live restore whose repository is there in part: packs on a file system that is not mounted, a pack that is gone.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::{lifeboot, status};
use e2e::nbd::Export;
use e2e::process::run_any;
use serde_json::Value;

const DISK_BYTES: u64 = 32 << 20;
const MIB: usize = 1 << 20;
/// Where the second snapshot differs from the first.
const NEW_BYTES: usize = 4 * MIB;

/// A disk, captured twice: what did not change is in the first pack, the rest and the disk's map in the second.
fn captured_twice(name: &str) -> Captured {
    let captured = Captured::new(name, DISK_BYTES, 21).unwrap();
    let new = disk::Noise::new(5).bytes(NEW_BYTES);
    fs::OpenOptions::new().write(true).open(&captured.disk).unwrap().write_all_at(&new, 0).unwrap();
    captured.repository.capture("vm", &captured.disk).unwrap();
    captured
}

fn packs(captured: &Captured) -> PathBuf {
    captured.repository.path().join("packs")
}

/// The pack that the first capture made: names of packs are in the order of their making.
fn first_pack(captured: &Captured) -> PathBuf {
    let mut packs: Vec<PathBuf> =
        fs::read_dir(packs(captured)).unwrap().map(|entry| entry.unwrap().path()).collect();
    packs.sort();
    assert_eq!(packs.len(), 2, "a pack for each capture");
    packs.remove(0)
}

/// Asks for the status until it is as it should be.
fn wait_status(captured: &Captured, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    for _ in 0..6000 {
        let said = status(&captured.target).unwrap();
        if is_so(&said) {
            return said;
        }
        thread::sleep(Duration::from_millis(50));
    }
    panic!("no status said that {what}: {}", status(&captured.target).unwrap());
}

fn ranges(status: &Value) -> Vec<(u64, u64, String)> {
    let range = |range: &Value| {
        let number = |name: &str| range[name].as_u64().unwrap();
        (number("offset"), number("len"), range["reason"].as_str().unwrap().to_owned())
    };
    status["damaged"].as_array().unwrap().iter().map(range).collect()
}

#[test]
fn packs_that_go_away_alone_are_waited_for() {
    let captured = captured_twice("packs-away");
    let _live = captured.start(&["--no-background", "--source-timeout", "10m"]).unwrap();
    let elsewhere = captured.work.file("elsewhere");
    fs::rename(packs(&captured), &elsewhere).unwrap();
    // As a mount point is while nothing is mounted there.
    fs::create_dir(packs(&captured)).unwrap();
    thread::scope(|scope| {
        let guest = scope.spawn(|| Export::first(&captured.socket).ensure_same(&captured.disk));
        wait_status(&captured, "it waits", |said| !said["waiting"].is_null());
        fs::remove_dir(packs(&captured)).unwrap();
        fs::rename(&elsewhere, packs(&captured)).unwrap();
        guest.join().unwrap().unwrap();
    });
    let said = status(&captured.target).unwrap();
    assert!(ranges(&said).is_empty() && said["damaged_bytes"] == 0, "{said}");
}

#[test]
fn a_lost_pack_is_reported_once_and_comes_home_when_it_is_put_back() {
    let captured = captured_twice("pack-gone");
    let (pack, elsewhere) = (first_pack(&captured), captured.work.file("elsewhere"));
    fs::rename(&pack, &elsewhere).unwrap();

    let mut live = captured.start(&["--exit-when-done"]).unwrap();
    let ended = live.process().wait().unwrap();
    let lines = live.process().lines();
    assert_eq!(ended.code(), Some(3), "done, but something is damaged: {lines:#?}");
    let events: Vec<Value> = lines
        .iter()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|event: &Value| !event["phase"].is_null())
        .collect();
    let last = events.last().unwrap();
    assert_eq!(last["event"], "settled", "{last}");
    let lost = ranges(last);
    for pair in lost.windows(2) {
        let joined = pair[0].0 + pair[0].1 == pair[1].0 && pair[0].2 == pair[1].2;
        assert!(!joined, "{pair:?} could be one range");
    }
    assert_eq!(lost.iter().map(|(_, len, _)| len).sum::<u64>(), last["damaged_bytes"].as_u64().unwrap());
    assert!(lost.len() < 60, "a lost pack is a few ranges: {}", lost.len());
    let errors = lines.iter().filter(|line| line.contains("\"level\":\"ERROR\"")).count();
    assert_eq!(errors, 1, "one line for one pack: {lines:#?}");

    // It is known while no agent runs, and after one was killed.
    let known = |what: &str| {
        let output = run_any(lifeboot(["status", "--json"]).unwrap().arg(&captured.target)).unwrap();
        assert_eq!(output.status.code(), Some(3), "{what}");
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(ranges(&said), lost, "{what}");
    };
    known("after it has ended");
    let live = captured.start(&[]).unwrap();
    let (offset, len, _) = lost[0].clone();
    let read = format!(
        "import errno\ntry:\n    h.pread({len}, {offset})\n    assert False\nexcept nbd.Error as error:\n    assert error.errnum == errno.EIO, error\n"
    );
    live.export().nbdsh("", &read).unwrap();
    let stopped = live.kill().unwrap();
    known("after it was killed");

    // Put back, it is had at once by whoever asks, and all of it comes home.
    let mut live = stopped.start_again().unwrap();
    wait_status(&captured, "it is missing", |said| said["damaged_bytes"] == last["damaged_bytes"]);
    fs::rename(&elsewhere, &pack).unwrap();
    live.export().ensure_same(&captured.disk).unwrap();
    let complete = live.wait_complete().unwrap();
    assert!(ranges(&complete).is_empty(), "{complete}");
    live.park().unwrap();
    assert!(!captured.work.file("target.raw.lifeboot/damaged.json").exists());
    assert_eq!(status(&captured.target).unwrap()["phase"], "complete");
    disk::ensure_same(&captured.disk, &captured.target).unwrap();
}

#[test]
fn a_disk_that_is_wholly_home_is_served_without_its_repository() {
    let captured = captured_twice("no-repository");
    let mut live = captured.start(&[]).unwrap();
    live.wait_complete().unwrap();
    live.export().qemu_io(&["write -P 0xa1 1M 64k"]).unwrap();
    let stopped = live.kill().unwrap();
    let elsewhere = captured.work.file("elsewhere");
    fs::rename(captured.repository.path(), &elsewhere).unwrap();

    let live = stopped.start_again().unwrap();
    live.export().qemu_io(&["read -P 0xa1 1M 64k", "write -P 0xa2 2M 64k", "flush"]).unwrap();
    assert_eq!(status(&captured.target).unwrap()["phase"], "complete");
    let (stopped, parked) = live.park().unwrap();
    assert!(parked.success(), "parking ended with {parked}");

    // So it is where only what holds the disk's map is away.
    fs::rename(&elsewhere, captured.repository.path()).unwrap();
    fs::rename(packs(&captured), &elsewhere).unwrap();
    let live = stopped.start_again().unwrap();
    live.export().qemu_io(&["read -P 0xa1 1M 64k", "read -P 0xa2 2M 64k"]).unwrap();
    live.park().unwrap();

    // What is served is still what was asked for.
    let mut other = captured.repository.verb("live-restore", &["other@latest"]).unwrap();
    let other = run_any(
        other.arg(&captured.target).arg("--listen").arg(format!("unix:{}", captured.socket.display())),
    )
    .unwrap();
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(other.status.code() == Some(1) && said.contains("belongs to a session"), "{said}");
}

#[test]
fn a_disk_that_is_not_home_is_refused_without_its_repository() {
    let captured = captured_twice("needs-repository");
    let live = captured.start(&["--no-background"]).unwrap();
    live.park().unwrap();
    fs::rename(captured.repository.path(), captured.work.file("elsewhere")).unwrap();
    let mut again = captured.repository.verb("live-restore", &["vm@latest"]).unwrap();
    let again = run_any(
        again.arg(&captured.target).arg("--listen").arg(format!("unix:{}", captured.socket.display())),
    )
    .unwrap();
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.code() == Some(1) && said.contains("there is no such repository"), "{said}");
}
