//! A target that is no disk yet is not taken for one, wherever its session is kept and whatever it is called; and a session that
//! somebody needs is not given up.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::{lifeboot, status};
use e2e::process::{Process, ends, run, run_any};

const DISK_BYTES: u64 = 16 << 20;

fn capture(captured: &Captured, source: &Path) -> Command {
    let mut command = captured.repository.verb("capture", &["-q", "again"]).unwrap();
    command.arg(source);
    command
}

/// Demands that a capture of `source` holds what `expected` does, whatever is home of it.
#[track_caller]
fn ensure_captured(captured: &Captured, source: &Path, expected: &Path) {
    run(&mut capture(captured, source)).unwrap();
    let restored = captured.work.file("restored.raw");
    captured.repository.restore("again@latest", &restored).unwrap();
    disk::ensure_same(&restored, expected).unwrap();
    fs::remove_file(restored).unwrap();
}

fn discard(captured: &Captured, further: &[&str]) -> Command {
    let mut command = lifeboot(["discard", "--yes"]).unwrap();
    command.arg(&captured.target).args(further);
    command
}

/// What stands beside the target: its session, or where that is.
fn beside(captured: &Captured) -> PathBuf {
    captured.work.file("target.raw.lifeboot")
}

#[test]
fn a_target_whose_session_is_kept_elsewhere_is_known_to_be_no_disk_until_it_is_one() {
    let captured = Captured::new("elsewhere", DISK_BYTES, 51).unwrap();
    let state = captured.work.file("state");
    let in_state = ["--state", state.to_str().unwrap()];
    let slow = [&in_state[..], &["--limit", "4KiB"]].concat();
    let live = captured.start(&slow).unwrap();
    live.export().qemu_io(&["write -P 0x51 1M 1M", "flush"]).unwrap();
    assert!(beside(&captured).is_file());
    let incomplete = ["is not complete", "lifeboot save"];
    // Served and parked, what its guest wrote is captured on top of what is restored: most of that is not home.
    let view = captured.work.file("view.raw");
    fs::copy(&captured.disk, &view).unwrap();
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 0x51 1M 1M"]).arg(&view)).unwrap();
    ensure_captured(&captured, &captured.target, &view);
    assert_eq!(status(&captured.target).unwrap()["phase"], "running");
    let (stopped, parked) = live.park().unwrap();
    assert!(parked.success());
    ensure_captured(&captured, &captured.target, &view);
    let mut restore = captured.repository.verb("restore", &["--force", "vm@latest"]).unwrap();
    ends(restore.arg(&captured.target), 1, &incomplete);
    let other = captured.work.file("other-state");
    let mut elsewhere = captured.repository.verb("live-restore", &["--force", "vm@latest"]).unwrap();
    elsewhere.arg(&captured.target).arg("--state").arg(&other);
    ends(elsewhere.args(["--listen", "unix:/nowhere/s"]), 1, &[state.to_str().unwrap(), "leave --state out"]);

    // It is gone on with from beside, too; and killed, what its guest wrote is not known for certain.
    let stopped = stopped.start_with(&["--limit", "4KiB"]).unwrap().kill().unwrap();
    ends(&mut capture(&captured, &captured.target), 1, &incomplete);
    let unmounted = captured.work.file("unmounted");
    fs::rename(&state, &unmounted).unwrap();
    ends(&mut capture(&captured, &captured.target), 1, &["is not there", "is its file system mounted"]);
    fs::rename(&unmounted, &state).unwrap();

    let mut live = stopped.start_with(&in_state).unwrap();
    live.wait_complete().unwrap();
    assert!(beside(&captured).exists(), "whoever asks finds its agent");
    live.park().unwrap();
    assert!(!beside(&captured).exists(), "it is a disk now");
    ensure_captured(&captured, &captured.target, &view);
    disk::ensure_same(&captured.target, &view).unwrap();

    // What is given up is forgotten beside the target as well.
    fs::remove_file(&captured.target).unwrap();
    run(&mut discard(&captured, &in_state)).unwrap();
    captured.start(&slow).unwrap().park().unwrap();
    assert!(beside(&captured).exists());
    run(&mut discard(&captured, &[])).unwrap();
    assert!(!beside(&captured).exists());
}

#[test]
fn a_copy_of_a_target_has_no_part_in_its_session() {
    let captured = Captured::new("elsewhere-copy", DISK_BYTES, 53).unwrap();
    let state = captured.work.file("state");
    let in_state = ["--state", state.to_str().unwrap()];
    let live = captured.start(&[&in_state[..], &["--limit", "4KiB"]].concat()).unwrap();
    let (stopped, _) = live.park().unwrap();
    fs::create_dir(captured.work.file("dir")).unwrap();
    let copy = captured.work.file("dir/target.raw");
    fs::copy(&captured.target, &copy).unwrap();
    fs::copy(beside(&captured), captured.work.file("dir/target.raw.lifeboot")).unwrap();
    let said = ["is a copy of", captured.target.to_str().unwrap()];
    ends(lifeboot(["discard", "--yes"]).unwrap().arg(&copy), 1, &said);
    ends(lifeboot(["status"]).unwrap().arg(&copy), 1, &said);
    ends(&mut capture(&captured, &copy), 1, &said);
    // The session goes on; and once it is over, the copy is no disk yet.
    let mut live = stopped.start_with(&in_state).unwrap();
    live.wait_complete().unwrap();
    ends(&mut capture(&captured, &copy), 1, &said);
}

#[test]
fn another_name_of_a_target_is_the_target() {
    let captured = Captured::new("hard-link", DISK_BYTES, 52).unwrap();
    let live = captured.start(&["--limit", "4KiB"]).unwrap();
    let near = captured.work.file("other-name.raw");
    fs::hard_link(&captured.target, &near).unwrap();
    fs::create_dir(captured.work.file("dir")).unwrap();
    let far = captured.work.file("dir/target.raw");
    fs::hard_link(&captured.target, &far).unwrap();
    // Its session cannot be found from there; its agent's lock can.
    ends(&mut capture(&captured, &far), 1, &["is locked by another program", "--state DIR"]);
    ensure_captured(&captured, &near, &captured.disk);
    let (stopped, parked) = live.park().unwrap();
    assert!(parked.success());
    ensure_captured(&captured, &near, &captured.disk);
    stopped.start_again().unwrap().kill().unwrap();
    ends(&mut capture(&captured, &near), 1, &["is not complete"]);
}

/// QEMU, with this file open as it has the disks of a machine.
fn qemu_on(file: &Path) -> Process {
    let mut qemu = Command::new("qemu-io");
    let mut qemu = Process::spawn(qemu.args(["-f", "raw"]).arg(file)).unwrap();
    qemu.write_line("read 0 4k").unwrap();
    qemu.wait_for_text("read 4096/4096").unwrap();
    qemu
}

#[test]
fn a_session_whose_target_or_export_a_machine_uses_is_not_given_up() {
    let captured = Captured::new("discard-used", DISK_BYTES, 53).unwrap();
    let live = captured.start(&["--limit", "4KiB"]).unwrap();
    let (stopped, _) = live.park().unwrap();
    let mut qemu = qemu_on(&captured.target);
    ends(&mut discard(&captured, &[]), 1, &["is in use", "end the machine first"]);
    qemu.kill().unwrap();

    // A machine of `boot` that waits for somebody to serve it again.
    let runtime = captured.work.socket("any").parent().unwrap().to_owned();
    let script = "import sys, zlib\nprint('%08x' % zlib.crc32(sys.argv[1].encode()))";
    let target = captured.target.canonicalize().unwrap();
    let name = run(Command::new("/usr/bin/python3").args(["-c", script]).arg(&target)).unwrap();
    let sockets = runtime.join("lifeboot").join(name.trim());
    fs::create_dir_all(&sockets).unwrap();
    let monitor = UnixListener::bind(sockets.join("qmp.sock")).unwrap();
    let waiting = std::thread::spawn(move || drop(monitor.accept().unwrap()));
    let mut command = discard(&captured, &[]);
    ends(
        command.env("XDG_RUNTIME_DIR", &runtime),
        1,
        &["still runs from an earlier `lifeboot boot`", "--qmp"],
    );
    waiting.join().unwrap();
    assert_eq!(status(&captured.target).unwrap()["phase"], "stopped", "it is as it was");

    // The same where this is not the machine's first disk.
    let elsewhere = runtime.join("lifeboot/another");
    fs::rename(&sockets, &elsewhere).unwrap();
    fs::remove_file(elsewhere.join("qmp.sock")).unwrap();
    let note = serde_json::json!({
        "version": 1,
        "snapshot": "vm@2026-11-21T00:33:12Z",
        "disks": [{ "name": "root", "target": "/r" }, { "name": "data", "target": target }],
        "repository": "/back up",
    });
    fs::write(elsewhere.join("machine.json"), note.to_string()).unwrap();
    let monitor = UnixListener::bind(elsewhere.join("qmp.sock")).unwrap();
    let waiting = std::thread::spawn(move || drop(monitor.accept().unwrap()));
    let words = format!(
        "live-restore -r '/back up' vm@2026-11-21T00:33:12Z root=/r data={} --listen",
        target.display()
    );
    let mut command = discard(&captured, &[]);
    ends(
        command.env("XDG_RUNTIME_DIR", &runtime),
        1,
        &["still runs from an earlier `lifeboot boot`", &words],
    );
    waiting.join().unwrap();

    // One that is home needs its target, and the session no more.
    let mut live = stopped.start_with(&[]).unwrap();
    live.wait_complete().unwrap();
    live.park().unwrap();
    let _qemu = qemu_on(&captured.target);
    ends(&mut discard(&captured, &["--remove-target"]), 1, &["is in use"]);
    run(&mut discard(&captured, &[])).unwrap();
    assert!(captured.target.exists() && !beside(&captured).exists());
}

#[test]
fn where_a_save_can_still_help_it_is_said() {
    let captured = Captured::new("journal-lost", DISK_BYTES, 54).unwrap();
    let live = captured.start(&["--limit", "4KiB"]).unwrap();
    live.export().qemu_io(&["write -P 0x52 2M 1M"]).unwrap();
    let stopped = live.kill().unwrap();
    fs::remove_file(beside(&captured).join("journal")).unwrap();
    let words = ["journal", "is missing", "`lifeboot save "];
    ends(lifeboot(["status"]).unwrap().arg(&captured.target), 1, &words);
    ends(&mut stopped.command().unwrap(), 1, &words);
    let mut save = captured.repository.verb("save", &["-q"]).unwrap();
    run(save.arg(&captured.target)).unwrap();
    let restored = captured.work.file("restored.raw");
    captured.repository.restore("vm@latest", &restored).unwrap();
    assert!(fs::read(&restored).unwrap()[2 << 20..3 << 20].iter().all(|byte| *byte == 0x52));
    // After a restart of the host it does not.
    fs::remove_file(beside(&captured).join("live")).unwrap();
    let output = run_any(lifeboot(["status"]).unwrap().arg(&captured.target)).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("is missing") && !said.contains("lifeboot save"), "{said}");
}
