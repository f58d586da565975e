//! The backups after a restore: they read what the guest wrote, and what a machine wrote to its own disk since.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use e2e::captured::Captured;
use e2e::lifeboot::LiveRestore;
use e2e::process::{run, run_json};
use e2e::work_dir::LoopDevice;
use serde_json::Value;

use super::{CHUNK, DISK_BYTES, ends, ensure_restores, guest_work, name, root, save, state_of, worked};

/// Captures the target, and returns the report.
fn capture(captured: &Captured, further: &[&str]) -> Value {
    let mut command = captured.repository.verb("capture", &["--json", "after"]).unwrap();
    run_json(command.arg(&captured.target).args(further)).unwrap()
}

#[test]
fn the_first_backup_after_a_restore_reads_what_the_guest_wrote_and_equals_a_full_scan() {
    let captured = Captured::new("incremental", DISK_BYTES, 13).unwrap();
    let mut live = captured.start(&[]).unwrap();
    live.wait_complete().unwrap();
    guest_work(&live);
    let looked_at = |report: &Value| report["disks"][0]["chunks_looked_at"].as_u64();
    let all = DISK_BYTES.div_ceil(CHUNK);
    // By the agent that serves it.
    let served = capture(&captured, &[]);
    assert!(looked_at(&served).unwrap() < all / 4, "{served}");
    let (stopped, _) = live.park().unwrap();
    let parked = capture(&captured, &[]);
    assert!(looked_at(&parked).unwrap() < all / 4, "{parked}");
    let full = capture(&captured, &["--full"]);
    assert_eq!(looked_at(&full), None);
    assert_eq!(root(&captured, name(&parked)), root(&captured, name(&full)));
    assert_eq!(root(&captured, name(&served)), root(&captured, name(&full)));
    for count in ["data_chunks", "zero_chunks"] {
        assert_eq!(parked["disks"][0][count], full["disks"][0][count]);
    }
    ensure_restores(&captured, name(&parked), &captured.target);

    // Somebody writes to the file itself: it is read as a whole, and the result is right.
    let file = fs::File::options().write(true).open(&captured.target).unwrap();
    file.write_all_at(&[0x5c; 8192], 25 << 20).unwrap();
    drop(file);
    let mut command = captured.repository.verb("capture", &["after"]).unwrap();
    let said = run(command.arg(&captured.target)).unwrap();
    assert!(said.contains("full scan") && said.contains("written to"), "{said}");
    ensure_restores(&captured, "after@latest", &captured.target);

    // Killed after it was complete.
    let live = stopped.start_again().unwrap();
    live.export().qemu_io(&["write -P 0x31 2M 64k"]).unwrap();
    live.kill().unwrap();
    let killed = capture(&captured, &[]);
    assert_eq!(looked_at(&killed), None);
    ensure_restores(&captured, name(&killed), &captured.target);
}

#[test]
fn a_file_that_took_the_targets_path_is_captured_as_it_is() {
    let captured = Captured::new("another-at-the-path", DISK_BYTES, 14).unwrap();
    let mut live = captured.start(&[]).unwrap();
    live.wait_complete().unwrap();
    guest_work(&live);
    let aside = captured.target.with_extension("aside");
    fs::rename(&captured.target, &aside).unwrap();
    fs::copy(&aside, &captured.target).unwrap();
    write_past(&captured, 7 * CHUNK, 0x5d);
    live.export().qemu_io(&["write -P 0x5e 9M 64k", "flush"]).unwrap();
    let mut command = captured.repository.verb("capture", &["after"]).unwrap();
    let said = run(command.arg(&captured.target)).unwrap();
    assert!(said.contains("full scan") && said.contains("is not the target of the session"), "{said}");
    ensure_restores(&captured, "after@latest", &captured.target);
    // What the agent serves is known by what it is.
    let served =
        run_json(captured.repository.verb("capture", &["--json", "after"]).unwrap().arg(&aside)).unwrap();
    ensure_restores(&captured, name(&served), &aside);
    live.park().unwrap();
    ensure_restores(&captured, name(&capture(&captured, &[])), &captured.target);
}

#[test]
fn a_file_at_the_path_of_an_unfinished_restore_may_be_a_copy_of_its_target_and_is_captured_by_another_name() {
    let captured = Captured::new("another-unfinished", DISK_BYTES, 19).unwrap();
    let live = captured.start(&["--limit", "100KiB"]).unwrap();
    guest_work(&live);
    let view = worked(&captured);
    let aside = captured.target.with_extension("aside");
    fs::rename(&captured.target, &aside).unwrap();
    fs::copy(&captured.disk, &captured.target).unwrap();
    write_past(&captured, 7 * CHUNK, 0x5d);
    let refused = |further: &[&str], words: &[&str]| {
        let mut command = captured.repository.verb("capture", &[&["after"], further].concat()).unwrap();
        let words = [&["is not the target that", "may be a copy", "to another name"], words].concat();
        ends(command.arg(&captured.target), 1, &words)
    };
    for further in [&[][..], &["--full"]] {
        refused(further, &["away first, put that back"]);
    }
    // Its agent has the session.
    let mut command = captured.repository.verb("capture", &["after"]).unwrap();
    let said = command.arg(&captured.target).output().unwrap().stderr;
    assert!(!String::from_utf8_lossy(&said).contains("--moved"));
    // What the agent serves is found by what it is.
    let mut command = captured.repository.verb("capture", &["--json", "after"]).unwrap();
    ensure_restores(&captured, name(&run_json(command.arg(&aside)).unwrap()), &view);
    live.park().unwrap();
    for further in [&[][..], &["--full"]] {
        refused(
            further,
            &[
                "away first, put that back",
                "only if it is that target, copied or moved as a whole",
                "--moved`",
            ],
        );
    }

    // A copy of both, while the target is where it was, or not.
    let copy = captured.work.file("copy.raw");
    run(Command::new("cp").arg(&aside).arg(&copy)).unwrap();
    run(Command::new("cp").arg("-a").arg(state_of(&captured.target)).arg(state_of(&copy))).unwrap();
    let mut command = captured.repository.verb("capture", &["after", "--full"]).unwrap();
    ends(command.arg(&copy), 1, &["may be a copy", "away first, put that back", "--moved`"]);
    let mut command = captured.repository.verb("save", &["--json", "--moved"]).unwrap();
    ensure_restores(&captured, name(&run_json(command.arg(&copy)).unwrap()), &view);

    let other = captured.work.file("other.raw");
    fs::rename(&captured.target, &other).unwrap();
    let mut command = captured.repository.verb("capture", &["--json", "after"]).unwrap();
    ensure_restores(&captured, name(&run_json(command.arg(&other)).unwrap()), &other);
    fs::rename(&aside, &captured.target).unwrap();
    ensure_restores(&captured, name(&save(&captured, &[])), &view);
    let its_own = format!("name {}", captured.target.display());
    let mut command = captured.repository.verb("capture", &["after", "--full"]).unwrap();
    ends(command.arg(&copy), 1, &["may be a copy", &its_own, "--moved`"]);
}

/// Writes to the target as a machine does that was started from it.
fn write_past(captured: &Captured, at: u64, byte: u8) {
    write_to(&captured.target, at, byte);
}

fn write_to(target: &Path, at: u64, byte: u8) {
    let target = fs::File::options().write(true).open(target).unwrap();
    target.write_all_at(&[byte; 8192], at).unwrap();
    target.sync_all().unwrap();
}

#[test]
fn what_a_machine_wrote_to_its_own_disk_is_in_every_backup_after_it() {
    let captured = Captured::new("written-past", DISK_BYTES, 15).unwrap();
    let mut live = captured.start(&["--exit-when-done"]).unwrap();
    live.process().wait_success().unwrap();
    write_past(&captured, 5 * CHUNK, 0x51);
    let saved = save(&captured, &[]);
    ensure_restores(&captured, name(&saved), &captured.target);

    write_past(&captured, 9 * CHUNK, 0x52);
    let live = captured.start(&[]).unwrap();
    let served = capture(&captured, &[]);
    ensure_restores(&captured, name(&served), &captured.target);
    live.park().unwrap();
    let parked = capture(&captured, &[]);
    ensure_restores(&captured, name(&parked), &captured.target);

    // What was learnt then is not forgotten where the host goes down.
    write_past(&captured, 11 * CHUNK, 0x53);
    captured.start(&[]).unwrap().kill().unwrap();
    let killed = save(&captured, &[]);
    ensure_restores(&captured, name(&killed), &captured.target);
}

#[test]
fn what_a_machine_wrote_to_the_disk_of_an_agent_that_was_killed_is_in_every_backup() {
    let captured = Captured::new("written-past-killed", DISK_BYTES, 16).unwrap();
    let mut live = captured.start(&[]).unwrap();
    live.wait_complete().unwrap();
    live.kill().unwrap();
    write_past(&captured, 5 * CHUNK, 0x51);
    ensure_restores(&captured, name(&save(&captured, &[])), &captured.target);
    let live = captured.start(&[]).unwrap();
    ensure_restores(&captured, name(&capture(&captured, &[])), &captured.target);
    ensure_restores(&captured, name(&save(&captured, &[])), &captured.target);
    live.park().unwrap();
    ensure_restores(&captured, name(&capture(&captured, &[])), &captured.target);
}

#[test]
fn what_a_machine_wrote_to_its_own_block_device_is_in_every_backup() {
    let captured = Captured::new("written-past-device", DISK_BYTES, 17).unwrap();
    let backing = captured.work.file("backing.raw");
    fs::File::create(&backing).unwrap().set_len(DISK_BYTES).unwrap();
    let device = LoopDevice::attach(&backing).unwrap();
    let state = captured.work.file("state");
    let in_state = ["--state", state.to_str().unwrap()];
    let start = |further: &[&str]| {
        let further = [&in_state[..], further].concat();
        LiveRestore::start(&captured.repository, "vm@latest", device.path(), &captured.socket, &further)
    };
    start(&["--exit-when-done"]).unwrap().process().wait_success().unwrap();
    let backup = |verb: &[&str]| {
        let mut command = captured.repository.verb(verb[0], &[&["--json"], &verb[1..]].concat()).unwrap();
        let report = run_json(command.arg(device.path()).args(in_state)).unwrap();
        ensure_restores(&captured, name(&report), device.path());
    };
    write_to(device.path(), 5 * CHUNK, 0x51);
    backup(&["save"]);
    let live = start(&[]).unwrap();
    backup(&["save"]);
    backup(&["capture", "after"]);
    live.park().unwrap();
    backup(&["capture", "after"]);
}

#[test]
fn what_a_machine_wrote_to_its_own_disk_before_that_was_moved_is_in_every_backup() {
    let captured = Captured::new("written-past-moved", DISK_BYTES, 18).unwrap();
    captured.start(&["--exit-when-done"]).unwrap().process().wait_success().unwrap();
    write_past(&captured, 5 * CHUNK, 0x51);
    let moved = captured.work.file("moved.raw");
    run(Command::new("cp").arg(&captured.target).arg(&moved)).unwrap();
    run(Command::new("cp").arg("-a").arg(state_of(&captured.target)).arg(state_of(&moved))).unwrap();
    let mut command = captured.repository.verb("save", &["--dry-run", "--moved"]).unwrap();
    ends(command.arg(&moved), 0, &["moved.raw may have been written to", "is read"]);
    let mut command = captured.repository.verb("save", &["--json", "--moved"]).unwrap();
    let report = run_json(command.arg(&moved)).unwrap();
    ensure_restores(&captured, name(&report), &captured.target);
    let start = LiveRestore::start(&captured.repository, "vm@latest", &moved, &captured.socket, &["--moved"]);
    let live = start.unwrap();
    let mut command = captured.repository.verb("capture", &["--json", "after"]).unwrap();
    let report = run_json(command.arg(&moved)).unwrap();
    ensure_restores(&captured, name(&report), &captured.target);
    live.park().unwrap();
}

#[test]
fn the_target_of_an_unfinished_restore_is_captured_on_top_of_what_it_restores() {
    let captured = Captured::new("incremental-part", DISK_BYTES, 14).unwrap();
    let live = captured.start(&["--limit", "100KiB"]).unwrap();
    guest_work(&live);
    let view = worked(&captured);
    ensure_restores(&captured, name(&capture(&captured, &[])), &view);
    let mut command = captured.repository.verb("capture", &["after", "--full"]).unwrap();
    ends(command.arg(&captured.target), 1, &["not complete", "lifeboot save"]);
    let (stopped, _) = live.park().unwrap();
    let parked = capture(&captured, &[]);
    assert!(parked["disks"][0]["chunks_looked_at"].as_u64().is_some());
    ensure_restores(&captured, name(&parked), &view);
    stopped.start_again().unwrap().kill().unwrap();
    let mut command = captured.repository.verb("capture", &["after"]).unwrap();
    ends(command.arg(&captured.target), 1, &["not complete", "killed", "lifeboot save"]);
    let other = e2e::lifeboot::Repository::init(captured.work.file("other")).unwrap();
    ends(
        other.verb("capture", &["after"]).unwrap().arg(&captured.target),
        1,
        &["not complete", "does not have"],
    );
}
