//! A live-restore tells its repository which snapshot it needs, for as long as it does.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use e2e::captured::Captured;
use e2e::lifeboot::lifeboot;
use e2e::process::{PATIENCE, Process, run, run_any, run_json};
use serde_json::Value;

const DISK_BYTES: u64 = 16 << 20;

fn leases(repository: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(repository.join("leases")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// A lease is left beside the start, which does not wait for it.
fn wait_leases(captured: &Captured, count: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    wait(&format!("there are {count} leases"), || {
        found = leases(captured.repository.path());
        found.len() == count
    });
    found
}

fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it never came that {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn show(captured: &Captured) -> Value {
    run_json(&mut captured.repository.verb("show", &["--json", "vm@latest"]).unwrap()).unwrap()
}

fn list_snapshots(captured: &Captured) -> String {
    run(&mut captured.repository.verb("snapshots", &[]).unwrap()).unwrap()
}

#[test]
fn a_session_holds_its_snapshot_until_it_is_home() {
    let captured = Captured::new("lease", DISK_BYTES, 81).unwrap();
    let live = captured.start(&["--no-background"]).unwrap();
    let first = wait_leases(&captured, 1);
    // The document stands behind a line with its length and hash.
    let text = fs::read_to_string(&first[0]).unwrap();
    let (line, document) = text.split_once('\n').unwrap();
    assert!(line.starts_with("lifeboot lease 1 "), "{line}");
    let lease: Value = serde_json::from_str(document).unwrap();
    let snapshot = show(&captured)["snapshot"].clone();
    assert_eq!((&lease["snapshot"], &lease["disk"]), (&snapshot, &"disk0".into()), "{lease}");
    let session = lease["session"].as_str().unwrap();
    assert!(first[0].file_name().unwrap().to_str().unwrap().starts_with(session));
    assert_eq!(show(&captured)["leases"][0]["session"], lease["session"]);
    let shown = run(&mut captured.repository.verb("show", &["vm@latest"]).unwrap()).unwrap();
    assert!(shown.contains("needed       by the live-restore of disk0 on "), "{shown}");
    let list = run_json(&mut captured.repository.verb("snapshots", &["--json"]).unwrap()).unwrap();
    assert_eq!(list[0]["leases"], show(&captured)["leases"], "{list}");
    let host = lease["host"].as_str().unwrap();
    let table = list_snapshots(&captured);
    assert!(table.contains("NEEDED ON") && table.contains(host), "{table}");
    captured.repository.verify().unwrap();

    // A parked session needs it too; one that goes on renews its own.
    let (stopped, parked) = live.park().unwrap();
    assert!(parked.success(), "{parked}");
    assert_eq!(leases(captured.repository.path()), first);
    let mut live = stopped.start_with(&[]).unwrap();
    live.wait_complete().unwrap();
    wait_leases(&captured, 0);
    // What names the lease goes after it, so that none is left that nobody knows of.
    wait("the session forgets it", || !captured.work.file("target.raw.lifeboot/lease.json").exists());
    assert_eq!(show(&captured)["leases"], serde_json::json!([]));
    let table = list_snapshots(&captured);
    assert!(!table.contains("NEEDED ON"), "{table}");
}

#[test]
fn an_agent_that_ends_once_the_disk_is_home_leaves_no_lease() {
    let captured = Captured::new("lease-ends", DISK_BYTES, 87).unwrap();
    let mut live = captured.start(&["--exit-when-done"]).unwrap();
    live.process().wait_success().unwrap();
    assert_eq!(leases(captured.repository.path()), Vec::<PathBuf>::new());
    assert!(!captured.work.file("target.raw.lifeboot/lease.json").exists());
}

#[test]
fn a_session_that_is_discarded_holds_nothing() {
    let captured = Captured::new("lease-discard", DISK_BYTES, 82).unwrap();
    let live = captured.start(&["--no-background"]).unwrap();
    wait_leases(&captured, 1);
    // It is found again though a kill left everything as it was, and discard is told of no repository.
    live.kill().unwrap();
    run(lifeboot(["discard", "--yes"]).unwrap().arg(&captured.target)).unwrap();
    assert_eq!(leases(captured.repository.path()), Vec::<PathBuf>::new());
    assert!(!captured.work.file("target.raw.lifeboot").exists());
}

#[test]
fn a_copied_session_has_a_lease_of_its_own_and_leaves_that_of_the_original() {
    let captured = Captured::new("lease-copied", DISK_BYTES, 85).unwrap();
    let live = captured.start(&["--no-background"]).unwrap();
    // By session: a lease is renewed by another file.
    let sessions = |count| {
        let names =
            wait_leases(&captured, count).into_iter().map(|path| path.file_name().unwrap().to_owned());
        let mut names: Vec<String> = names.map(|name| name.to_string_lossy()[..32].to_owned()).collect();
        names.sort();
        names
    };
    let original = sessions(1);
    let (stopped, _) = live.park().unwrap();
    let copy = |name: &str| {
        let target = captured.work.file(name);
        run(Command::new("cp").args(["-a", "--sparse=always"]).arg(&captured.target).arg(&target)).unwrap();
        let session = captured.work.file("target.raw.lifeboot");
        run(Command::new("cp").arg("-a").arg(session).arg(captured.work.file(&format!("{name}.lifeboot"))))
            .unwrap();
        target
    };
    let (copied, moved) = (copy("copied.raw"), copy("moved.raw"));
    // One that was never served, discarded beside the original that is.
    let _live = stopped.start_with(&["--no-background"]).unwrap();
    run(lifeboot(["discard", "--yes"]).unwrap().arg(&copied)).unwrap();
    assert_eq!(sessions(1), original);
    // And one that is served to its end: its own lease goes with it.
    let mut verb = captured.repository.verb("live-restore", &["vm@latest"]).unwrap();
    let ends = ["--moved", "--no-background", "--listen"];
    verb.arg(&moved).args(ends).arg(format!("unix:{}", captured.work.file("m.sock").display()));
    let mut served = Process::spawn(&verb).unwrap();
    let both = sessions(2);
    assert!(served.terminate().unwrap().success());
    assert_eq!(sessions(2), both);
    run(lifeboot(["discard", "--yes"]).unwrap().arg(&moved)).unwrap();
    assert_eq!(sessions(1), original);
}

#[test]
fn a_lease_that_cannot_be_understood_stops_nobody_but_those_who_remove() {
    let captured = Captured::new("lease-damaged", DISK_BYTES, 83).unwrap();
    let live = captured.start(&["--no-background"]).unwrap();
    let lease = wait_leases(&captured, 1).remove(0);
    let (stopped, _) = live.park().unwrap();
    fs::write(&lease, "nothing of the kind").unwrap();
    captured.repository.verify().unwrap();
    assert_eq!(show(&captured)["leases"], serde_json::json!([]));
    let warned = run_any(&mut captured.repository.verb("show", &["vm@latest"]).unwrap()).unwrap();
    let said = String::from_utf8_lossy(&warned.stderr);
    assert!(warned.status.success() && said.contains(lease.file_name().unwrap().to_str().unwrap()), "{said}");
    // The session that it is of puts a good one in its place.
    let _live = stopped.start_again().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while show(&captured)["leases"].as_array().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "no lease was left");
        thread::sleep(Duration::from_millis(20));
    }
    wait_leases(&captured, 1);
}

/// A directory that is mounted read-only onto itself.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn mount(path: &Path) -> Self {
        run(Command::new("mount").arg("--bind").args([path, path])).unwrap();
        let made = Self(path.to_owned());
        run(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(path)).unwrap();
        made
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = run_any(Command::new("umount").arg("-l").arg(&self.0));
    }
}

#[test]
fn a_repository_that_may_only_be_read_is_restored_from_with_one_warning() {
    let captured = Captured::new("lease-read-only", DISK_BYTES, 84).unwrap();
    let _read_only = ReadOnly::mount(captured.repository.path());
    let mut live = captured.start(&["--no-background"]).unwrap();
    // Another thread warns of it, and may do so before the start says that it is ready.
    live.process().reread_output();
    let warned = live.process().wait_for_text("cannot be told that vm@").unwrap();
    assert!(warned.contains("read-only"), "{warned}");
    let (stopped, _) = live.park().unwrap();
    let mut live = stopped.start_with(&["--exit-when-done"]).unwrap();
    let ended = live.process().wait().unwrap();
    let lines = live.process().lines();
    assert!(ended.success(), "{lines:#?}");
    assert!(lines.iter().filter(|line| line.contains("cannot be told that")).count() <= 1, "{lines:#?}");
    e2e::disk::ensure_same(&captured.disk, &captured.target).unwrap();
    assert!(leases(captured.repository.path()).is_empty());
}
