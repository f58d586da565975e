//! A target whose storage fails under programs that use it: its writes, its syncs, or the whole file system that it and its session are
//! on. What was acknowledged as flushed is there afterwards, nothing is acknowledged falsely, and the agent says what to do.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::path::Path;
use std::process::Command;

use e2e::captured::Captured;
use e2e::disk;
use e2e::failing::{Failing, FailingDevice, FileSystem};
use e2e::lifeboot::{LiveRestore, status_with};
use e2e::nbd::Export;
use e2e::process::{run, run_any};

const DISK_BYTES: u64 = 64 << 20;
const MIB: u64 = 1 << 20;
/// How much each run of fio writes.
const PART_MIB: u64 = 8;

/// fio's writes on a part of the disk, flushed at the end.
fn fio(export: &Export, part: u64, directory: &Path) -> Command {
    let mut fio = fio_on(part, directory);
    fio.args(["--ioengine=nbd", &format!("--uri={}", export.uri())]);
    fio
}

fn fio_on(part: u64, directory: &Path) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=part", "--rw=randwrite", "--bs=16k", "--iodepth=8", "--fsync=64", "--end_fsync=1"])
        .args([format!("--offset={}M", part * PART_MIB), format!("--size={PART_MIB}M")])
        .args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"])
        .arg(format!("--randseed={}", part + 1))
        .current_dir(directory);
    fio
}

/// Runs fio, which must be told of an I/O error.
fn ensure_fails(fio: &mut Command) {
    let output = run_any(fio).unwrap();
    let said = format!("{output:?}");
    assert!(!output.status.success() && said.contains("Input/output error"), "{said}");
}

/// What is called as `fails(lambda: h.pread(…))` and must fail with EIO, or as `ends(…)` and must not succeed.
const FAILS: &str = "import errno, subprocess
def fails(what):
    try:
        what()
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error
        return
    assert False, 'it did not fail'
def ends(what):
    try:
        what()
    except nbd.Error:
        return
    assert False, 'it succeeded'
";

fn start(captured: &Captured, target: &Path, further: &[&str]) -> LiveRestore {
    let state = captured.work.file("state");
    let mut further = further.to_vec();
    if target.starts_with("/dev") {
        further.extend(["--state", state.to_str().unwrap()]);
    }
    LiveRestore::start(&captured.repository, "vm@latest", target, &captured.socket, &further).unwrap()
}

fn failing_device(captured: &Captured) -> FailingDevice {
    FailingDevice::new(captured.work.file("failing"), DISK_BYTES, &captured.work.socket("failing")).unwrap()
}

/// Waits for the end of an agent whose session is given up, and demands that it says what to do.
fn ensure_given_up(mut live: LiveRestore) {
    let advice = live.process().wait_for_text("look after").unwrap();
    let ended = live.process().wait().unwrap();
    let lines = live.process().lines().join("\n");
    assert_eq!(ended.code(), Some(1), "{lines}");
    assert!(advice.contains("run the same command") || lines.contains("then run the same"), "{lines}");
    assert!(!lines.contains("panicked"), "{lines}");
}

/// The part of the disk that a run of fio wrote.
fn is_of_part(block: u64, part: u64) -> bool {
    (part * PART_MIB..(part + 1) * PART_MIB).contains(&(block * disk::BLOCK_BYTES / MIB))
}

#[test]
fn writes_that_fail_are_told_and_everything_else_goes_on() {
    let captured = Captured::new("failing-writes", DISK_BYTES, 61).unwrap();
    let work = captured.work.path();
    let mut target = failing_device(&captured);
    let live = start(&captured, target.path(), &["--limit", "1MiB"]);
    run(&mut fio(&live.export(), 0, work)).unwrap();

    target.fail(Failing::Writes).unwrap();
    ensure_fails(&mut fio(&live.export(), 1, work));
    // What is absent can be read all the same, what was flushed is there, and there is nothing that a flush could not promise.
    let script = format!(
        "{FAILS}
fails(lambda: h.pwrite(b'x' * 65536, 40 << 20))
with open('{}', 'rb') as disk:
    disk.seek(40 << 20)
    assert h.pread(1 << 20, 40 << 20) == disk.read(1 << 20)
h.flush()
fails(lambda: h.pwrite(b'x' * 65536, 40 << 20, nbd.CMD_FLAG_FUA))
",
        captured.disk.display()
    );
    live.export().nbdsh("", &script).unwrap();
    run(fio(&live.export(), 0, work).arg("--verify_only=1")).unwrap();

    // It is parked in good order in the midst of it.
    let (stopped, parked) = live.park().unwrap();
    assert!(parked.success(), "{parked}");
    let live = stopped.start_again().unwrap();
    ensure_fails(&mut fio(&live.export(), 2, work));
    target.fail(Failing::Nothing).unwrap();
    for part in 0..3 {
        run(&mut fio(&live.export(), part, work)).unwrap();
    }
    // The background has gone on by itself.
    let state = captured.work.file("state");
    run(e2e::lifeboot::lifeboot(["limit", "--state", state.to_str().unwrap()])
        .unwrap()
        .arg(target.path())
        .arg("0"))
    .unwrap();
    finish(live, &captured, target.path(), &[0, 1, 2], &[40]);
}

#[test]
fn a_sync_that_fails_ends_the_session_and_what_was_flushed_before_is_there() {
    let captured = Captured::new("failing-syncs", DISK_BYTES, 62).unwrap();
    let work = captured.work.path();
    let mut target = failing_device(&captured);
    let live = start(&captured, target.path(), &["--no-background"]);
    run(&mut fio(&live.export(), 0, work)).unwrap();

    target.fail(Failing::Sync).unwrap();
    let script = format!(
        "{FAILS}
h.pwrite(b'x' * 65536, 40 << 20)
ends(h.flush)
ends(h.flush)
ends(lambda: h.pwrite(b'x' * 65536, 41 << 20))
ends(lambda: h.pwrite(b'x' * 65536, 42 << 20, nbd.CMD_FLAG_FUA))
"
    );
    // It never gets to a farewell: the agent ends.
    live.export().nbdsh("", &format!("{script}\nh = nbd.NBD()\nh.shutdown = lambda: None\n")).unwrap();
    ensure_given_up(live);
    let state = captured.work.file("state");
    let told = status_with(target.path(), &["--state", state.to_str().unwrap()]).unwrap();
    assert!(told["phase"] == "poisoned" && told["loss"].to_string().contains("a sync had failed"), "{told}");

    target.fail(Failing::Nothing).unwrap();
    let live = start(&captured, target.path(), &[]);
    // What was not flushed may be lost.
    assert!(live.ready()["uris"].to_string().contains("/disk0@2"), "{}", live.ready());
    run(fio(&live.export(), 0, work).arg("--verify_only=1")).unwrap();
    finish(live, &captured, target.path(), &[0], &[40, 41, 42]);
}

#[test]
fn fio_is_told_of_a_sync_that_fails() {
    let captured = Captured::new("failing-fio", DISK_BYTES, 63).unwrap();
    let work = captured.work.path();
    let mut target = failing_device(&captured);
    let live = start(&captured, target.path(), &[]);
    run(&mut fio(&live.export(), 0, work)).unwrap();
    target.fail(Failing::Sync).unwrap();
    assert!(!run_any(&mut fio(&live.export(), 1, work)).unwrap().status.success());
    ensure_given_up(live);
    target.fail(Failing::Nothing).unwrap();
    let live = start(&captured, target.path(), &[]);
    run(fio(&live.export(), 0, work).arg("--verify_only=1")).unwrap();
    run(&mut fio(&live.export(), 1, work)).unwrap();
    finish(live, &captured, target.path(), &[0, 1], &[]);
}

#[test]
fn a_file_system_that_is_shut_down_under_target_and_session_loses_nothing_that_was_flushed() {
    for (seed, kind, is_written_back) in [(64, "xfs", true), (65, "xfs", false), (66, "ext4", true)] {
        let captured = Captured::new("shut-down", DISK_BYTES, seed).unwrap();
        let work = captured.work.path();
        let below = FileSystem::make(kind, &captured.work.file("image"), captured.work.file("mnt")).unwrap();
        let target = below.path().join("target.raw");
        let live = start(&captured, &target, &["--no-background"]);
        assert!(live.ready()["uris"].to_string().contains("/disk0@1"), "{}", live.ready());
        run(&mut fio(&live.export(), 0, work)).unwrap();
        if is_written_back {
            // With the live file: it says that it is in use.
            below.write_back().unwrap();
        }
        // Acknowledged, and never flushed.
        live.export().qemu_io(&["write -P 0xa1 40M 64k"]).unwrap();
        below.shut_down().unwrap();
        let script = format!(
            "{FAILS}
ends(lambda: h.pwrite(b'x' * 65536, 0))
ends(lambda: h.pwrite(b'x' * 65536, 42 << 20))
ends(h.flush)
ends(h.flush)
ends(lambda: h.pread(4096, 40 << 20))
h = nbd.NBD()
h.shutdown = lambda: None
"
        );
        live.export().nbdsh("", &script).unwrap();
        ensure_given_up(live);

        below.remount().unwrap();
        let live = start(&captured, &target, &[]);
        // What was acknowledged may be lost: a guest that lived on must not go on as if it were not.
        let uris = live.ready()["uris"].to_string();
        assert!(uris.contains("/disk0@2"), "{kind}: {uris}");
        run(fio(&live.export(), 0, work).arg("--verify_only=1")).unwrap();
        finish(live, &captured, &target, &[0], &[40, 42]);
    }
}

#[test]
fn a_session_that_cannot_be_parked_says_so_and_is_found_as_it_was_flushed() {
    let captured = Captured::new("shut-down-park", DISK_BYTES, 67).unwrap();
    let work = captured.work.path();
    let below = FileSystem::make("xfs", &captured.work.file("image"), captured.work.file("mnt")).unwrap();
    let target = below.path().join("target.raw");
    let mut live = start(&captured, &target, &["--no-background"]);
    run(&mut fio(&live.export(), 0, work)).unwrap();
    live.export().qemu_io(&["write -P 0xa1 40M 64k"]).unwrap();
    below.shut_down().unwrap();
    // Nobody has noticed yet.
    live.process().terminate().unwrap();
    ensure_given_up(live);
    below.remount().unwrap();
    let live = start(&captured, &target, &[]);
    assert!(live.ready()["uris"].to_string().contains("/disk0@2"), "{}", live.ready());
    run(fio(&live.export(), 0, work).arg("--verify_only=1")).unwrap();
    finish(live, &captured, &target, &[0], &[40]);
}

/// Brings everything home and demands that the target holds what fio wrote, and the snapshot everywhere but in these MiB.
fn finish(mut live: LiveRestore, captured: &Captured, target: &Path, parts: &[u64], others_mib: &[u64]) {
    live.wait_complete().unwrap();
    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "{parked}");
    for part in parts {
        let mut verify = fio_on(*part, captured.work.path());
        run(verify
            .args(["--verify_only=1", "--ioengine=psync"])
            .arg(format!("--filename={}", target.display())))
        .unwrap();
    }
    let differing = disk::differing_blocks(&captured.disk, target).unwrap();
    let may_differ = |block: u64| {
        parts.iter().any(|part| is_of_part(block, *part))
            || others_mib.contains(&(block * disk::BLOCK_BYTES / MIB))
    };
    let wrong = differing.iter().find(|block| !may_differ(**block));
    assert_eq!(wrong, None, "this block differs, and nobody wrote it");
}
