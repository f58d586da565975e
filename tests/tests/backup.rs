//! Capture, restore and serve: what goes in comes out, whoever else is at work and whatever runs full.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::disk;
use e2e::lifeboot::{LiveRestore, Repository};
use e2e::nbd::Export;
use e2e::process::{PATIENCE, Process, run, run_any, run_json};
use e2e::work_dir::{LoopDevice, SmallFileSystem, WorkDir};
use rustix::process::Signal;

const DISK_BYTES: u64 = 96 << 20;

struct Setting {
    work: WorkDir,
    repository: Repository,
    disk: PathBuf,
}

fn setting(name: &str) -> Setting {
    let work = WorkDir::new(name).unwrap();
    let disk = work.file("disk.raw");
    disk::make(&disk, DISK_BYTES, 31).unwrap();
    let repository = Repository::init(work.file("repository")).unwrap();
    Setting { work, repository, disk }
}

fn snapshots(repository: &Repository) -> usize {
    let list = run_json(&mut repository.verb("snapshots", &["--json"]).unwrap()).unwrap();
    list.as_array().unwrap().len()
}

#[test]
fn a_restored_disk_is_the_captured_one() {
    let Setting { work, repository, disk } = setting("round-trip");
    repository.capture("vm", &disk).unwrap();
    let target = work.file("target.raw");
    repository.restore("vm@latest", &target).unwrap();
    disk::ensure_same(&disk, &target).unwrap();
    repository.verify().unwrap();
    let (source, restored) = (disk::allocated_bytes(&disk).unwrap(), disk::allocated_bytes(&target).unwrap());
    assert!(restored <= source + (1 << 20), "{restored} bytes are allocated, {source} in the source");
}

#[test]
fn a_block_device_is_captured_and_restored() {
    let Setting { work, repository, disk } = setting("loop");
    let target = work.file("target.raw");
    // Full of what must not shine through.
    fs::write(&target, vec![0x5a; usize::try_from(DISK_BYTES).unwrap()]).unwrap();
    let (source, destination) = (LoopDevice::attach(&disk).unwrap(), LoopDevice::attach(&target).unwrap());
    repository.capture("vm", source.path()).unwrap();
    let mut restore = repository.verb("restore", &["-q", "--force", "vm@latest"]).unwrap();
    run(restore.arg(destination.path())).unwrap();
    drop(destination);
    disk::ensure_same(&disk, &target).unwrap();
}

#[test]
fn served_snapshots_are_read_only_and_what_they_were() {
    let Setting { work, repository, disk } = setting("serve");
    repository.capture("vm", &disk).unwrap();
    let socket = work.socket("serve");
    let _server = repository.serve(&["vm@latest"], &socket).unwrap();
    let export = Export::first(&socket);
    assert_eq!(export.info().unwrap()["exports"][0]["is_read_only"], true);
    export.ensure_same(&disk).unwrap();
    let copy = work.file("copy.raw");
    fs::File::create(&copy).unwrap().set_len(DISK_BYTES).unwrap();
    run(Command::new("nbdcopy").arg("--connections=4").arg(export.uri()).arg(&copy)).unwrap();
    disk::ensure_same(&disk, &copy).unwrap();
    // Holes are told from the disk map.
    let map = export.map("base:allocation").unwrap();
    let holes: u64 = map.iter().filter(|extent| extent.flags & 2 != 0).map(|extent| extent.len_bytes).sum();
    assert!(holes > 0, "{map:?}");
}

#[test]
fn a_scratch_exports_writes_are_read_back_and_forgotten() {
    let Setting { work, repository, disk } = setting("scratch");
    repository.capture("vm", &disk).unwrap();
    let scratch = work.file("scratch");
    fs::create_dir(&scratch).unwrap();
    let arguments = ["vm@latest", "--scratch", scratch.to_str().unwrap()];
    let socket = work.socket("serve");
    let mut server = repository.serve(&arguments, &socket).unwrap();
    let export = Export::first(&socket);
    export.qemu_io(&["write -P 0x77 3584 1M", "write -z 9M 64k", "flush", "read -P 0x77 3584 1M"]).unwrap();
    export.qemu_io(&["read -P 0 9M 64k"]).unwrap();
    assert!(server.terminate().unwrap().success());
    let _server = repository.serve(&arguments, &socket).unwrap();
    export.ensure_same(&disk).unwrap();
}

#[test]
fn two_captures_and_a_live_restore_share_a_repository() {
    let Setting { work, repository, disk } = setting("together");
    repository.capture("vm", &disk).unwrap();
    let others = [work.file("one.raw"), work.file("two.raw")];
    for (path, seed) in others.iter().zip(40..) {
        disk::make(path, DISK_BYTES, seed).unwrap();
    }
    let target = work.file("target.raw");
    let mut live =
        LiveRestore::start(&repository, "vm@latest", &target, &work.socket("live"), &["--limit", "32MiB"])
            .unwrap();
    let mut captures: Vec<Process> = ["one", "two"]
        .iter()
        .zip(&others)
        .map(|(group, path)| {
            Process::spawn(repository.verb("capture", &["-q", group]).unwrap().arg(path)).unwrap()
        })
        .collect();
    for capture in &mut captures {
        capture.wait_success().unwrap();
    }
    live.wait_complete().unwrap();
    disk::ensure_same(&disk, &target).unwrap();
    for (group, path) in ["one", "two"].iter().zip(&others) {
        let restored = work.file(&format!("{group}.restored"));
        repository.restore(&format!("{group}@latest"), &restored).unwrap();
        disk::ensure_same(path, &restored).unwrap();
    }
    repository.verify().unwrap();
}

#[test]
fn an_interrupted_capture_leaves_no_snapshot_and_no_harm() {
    let Setting { work, repository, disk } = setting("interrupt");
    repository.capture("vm", &disk).unwrap();
    let other = work.file("other.raw");
    disk::make(&other, 8 * DISK_BYTES, 50).unwrap();
    let mut seen_interrupted = 0;
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let mut command = repository.verb("capture", &["--json", "vm"]).unwrap();
        let mut capture = Process::spawn(command.arg(&other)).unwrap();
        // The first word of progress: it is at work. It may be done before the signal comes, too.
        let _ = capture.wait_for("its progress", |line| line.starts_with('{').then_some(()));
        capture.signal(signal).unwrap();
        seen_interrupted += usize::from(!capture.wait().unwrap().success());
    }
    assert_eq!(snapshots(&repository), 4 - seen_interrupted, "a snapshot for each capture that was done");
    repository.verify().unwrap();
    repository.capture("vm", &other).unwrap();
    let target = work.file("target.raw");
    repository.restore("vm@latest", &target).unwrap();
    disk::ensure_same(&other, &target).unwrap();
}

#[test]
fn a_restore_from_a_source_that_was_made_slow_ends_when_it_is_interrupted() {
    let Setting { work, repository, disk } = setting("interrupt-slow");
    repository.capture("vm", &disk).unwrap();
    let target = work.file("target.raw");
    // What it reads would take hours.
    let mut command = repository.verb("restore", &["--json", "--source-rate", "50", "vm@latest"]).unwrap();
    let mut restore = Process::spawn(command.arg(&target)).unwrap();
    // It hears signals before it makes anything; what it makes has another name at first.
    let begun = Instant::now();
    let is_target = |name: &str| name.contains("target.raw");
    let entries = || fs::read_dir(work.path()).unwrap().map(|entry| entry.unwrap().file_name());
    while !entries().any(|name| name.to_str().is_some_and(is_target)) {
        assert!(begun.elapsed() < PATIENCE && restore.is_running(), "it makes no target");
        std::thread::sleep(Duration::from_millis(10));
    }
    restore.signal(Signal::INT).unwrap();
    assert_eq!(restore.wait().unwrap().code(), Some(130));
}

#[test]
fn a_full_disk_fails_the_capture_and_spares_what_was_there() {
    let work = WorkDir::new("full-repository").unwrap();
    let room = SmallFileSystem::mount(work.file("room"), 48 << 20).unwrap();
    let small = work.file("small.raw");
    disk::make(&small, 8 << 20, 60).unwrap();
    let large = work.file("large.raw");
    disk::make(&large, 256 << 20, 61).unwrap();
    let repository = Repository::init(room.path().join("repository")).unwrap();
    repository.capture("vm", &small).unwrap();

    let output = run_any(repository.verb("capture", &["-q", "vm"]).unwrap().arg(&large)).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.to_lowercase().contains("space"), "it says what is wrong: {said}");
    assert_eq!(snapshots(&repository), 1);
    repository.verify().unwrap();

    room.resize(1 << 30).unwrap();
    repository.capture("vm", &large).unwrap();
    let target = work.file("target.raw");
    repository.restore("vm@latest", &target).unwrap();
    disk::ensure_same(&large, &target).unwrap();
}

#[test]
fn a_full_disk_fails_the_restore_and_says_so() {
    let Setting { work, repository, disk } = setting("full-target");
    repository.capture("vm", &disk).unwrap();
    let room = SmallFileSystem::mount(work.file("room"), 8 << 20).unwrap();
    let mut command = repository.verb("restore", &["-q", "vm@latest"]).unwrap();
    let output = run_any(command.arg(room.path().join("target.raw"))).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.to_lowercase().contains("space"), "it says what is wrong: {said}");
}
