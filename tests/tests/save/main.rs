//! What a live-restore's guest wrote is saved as a snapshot, whatever the session's state; a session is given up; and the first
//! backup after a restore reads what the guest wrote.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod after;
mod damage;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::{LiveRestore, lifeboot, status};
use e2e::process::{Process, ends, run, run_json};
use e2e::work_dir::SmallFileSystem;
use serde_json::Value;

/// Not a multiple of a chunk.
const DISK_BYTES: u64 = (32 << 20) + 5 * 4096;
const CHUNK: u64 = 128 << 10;

/// A guest's work that touches everything: whole chunks, parts of blocks, zeroes, trims, the disk's end, and bytes that are
/// written back as they were.
fn guest_work(live: &LiveRestore) {
    let commands = work();
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    live.export().qemu_io(&commands).unwrap();
    live.export().nbdsh("", "b = h.pread(131072, 20 << 20)\nh.pwrite(b, 20 << 20)\nh.flush()").unwrap();
}

fn work() -> Vec<String> {
    let last = DISK_BYTES - 4096;
    let commands = [
        "write -P 0x11 1M 256k",
        "write -P 0x12 5000k 4k",
        "write -P 0x13 7777777 3000",
        &format!("write -P 0x14 {last} 4096"),
        "write -z 9M 300k",
        "write -z -u 11M 1M",
        "discard 13M 512k",
        "flush",
    ];
    commands.map(str::to_owned).to_vec()
}

/// What the disk is after that work. To read it through the export would bring it home.
fn worked(captured: &Captured) -> PathBuf {
    let view = captured.work.file("view.raw");
    fs::copy(&captured.disk, &view).unwrap();
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw", "-d", "unmap"]);
    for command in work() {
        qemu_io.args(["-c", &command]);
    }
    run(qemu_io.arg(&view)).unwrap();
    view
}

fn save(captured: &Captured, further: &[&str]) -> Value {
    let mut command = captured.repository.verb("save", &["--json"]).unwrap();
    run_json(command.arg(&captured.target).args(further)).unwrap()
}

/// Demands that a snapshot restores to the bytes of `expected`, and that the repository is sound.
#[track_caller]
fn ensure_restores(captured: &Captured, snapshot: &str, expected: &Path) {
    let out = captured.work.file("restored.raw");
    captured.repository.restore(snapshot, &out).unwrap();
    disk::ensure_same(&out, expected).unwrap();
    fs::remove_file(out).unwrap();
}

fn name(report: &Value) -> &str {
    report["snapshot"].as_str().unwrap()
}

fn snapshots(captured: &Captured) -> usize {
    let list = run_json(&mut captured.repository.verb("snapshots", &["--json"]).unwrap()).unwrap();
    list.as_array().unwrap().len()
}

fn show(captured: &Captured, snapshot: &str) -> Value {
    run_json(&mut captured.repository.verb("show", &["--json", snapshot]).unwrap()).unwrap()
}

/// The root of the map of a snapshot's only disk.
fn root(captured: &Captured, snapshot: &str) -> Value {
    show(captured, snapshot)["disks"][0]["map"].clone()
}

fn state_of(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".lifeboot");
    name.into()
}

#[test]
fn a_save_restores_to_the_guests_view_served_parked_killed_and_complete() {
    let captured = Captured::new("save-states", DISK_BYTES, 5).unwrap();
    let view = captured.work.file("view.raw");
    // So slow that most of it is not home while it is saved.
    let live = captured.start(&["--limit", "100KiB"]).unwrap();
    guest_work(&live);
    let dry = save(&captured, &["--dry-run"]);
    assert_eq!((dry["dry_run"].as_bool(), snapshots(&captured)), (Some(true), 1));
    let served = save(&captured, &[]);
    ensure_restores(&captured, name(&served), &worked(&captured));
    assert_eq!(status(&captured.target).unwrap()["phase"], "running", "most of it is not home");
    let disk = &served["disks"][0];
    assert!(disk["changed_chunks"].as_u64().unwrap() < disk["chunks"].as_u64().unwrap() / 4, "{served}");
    assert!(disk["new_chunks"].as_u64() < disk["changed_chunks"].as_u64(), "what was written back is known");

    // The same again stores nothing, in another group too.
    let again = save(&captured, &["other", "--note", "twice"]);
    assert!(name(&again).starts_with("other@"));
    assert_eq!(again["disks"][0]["new_chunks"], 0);
    assert_eq!(root(&captured, name(&again)), root(&captured, name(&served)));

    let (stopped, end) = live.park().unwrap();
    assert!(end.success());
    let parked = save(&captured, &[]);
    assert_eq!(root(&captured, name(&parked)), root(&captured, name(&served)));
    assert_eq!(parked["up_to"], "acknowledged");

    let live = stopped.start_again().unwrap();
    live.export().qemu_io(&["write -P 0x21 3M 64k", "write -P 0x22 30M 100k"]).unwrap();
    live.export().convert_to(&view).unwrap();
    let stopped = live.kill().unwrap();
    let killed = save(&captured, &[]);
    ensure_restores(&captured, name(&killed), &view);

    let mut live = stopped.start_with(&[]).unwrap();
    live.wait_complete().unwrap();
    live.export().qemu_io(&["write -P 0x23 4M 64k"]).unwrap();
    live.export().convert_to(&view).unwrap();
    let complete = save(&captured, &[]);
    ensure_restores(&captured, name(&complete), &view);
    live.park().unwrap();
    ensure_restores(&captured, name(&save(&captured, &[])), &view);
    captured.repository.verify().unwrap();
    // It goes on as if nothing had been done.
    disk::ensure_same(&view, &captured.target).unwrap();
}

#[test]
fn a_save_while_a_guest_writes_is_one_moment_of_its_disk() {
    let captured = Captured::new("save-moment", DISK_BYTES, 6).unwrap();
    let live = captured.start(&[]).unwrap();
    // The guest numbers its writes and goes round and round: a moment of its disk has, at each place, the newest number that is
    // not newer than the moment.
    let places = 200_u64;
    let program = format!(
        "import nbd, struct\nh = nbd.NBD()\nh.connect_uri('{}')\nn = 0\nwhile True:\n    \
         h.pwrite(struct.pack('<Q', n) * 512, (n * 61 % {places}) * 98304)\n    n += 1\n    \
         if n == {places}: print('begun', flush=True)\n",
        live.export().uri()
    );
    let mut guest = Command::new("/usr/bin/python3");
    guest.args(["-c", &program]);
    let mut guest = Process::spawn(&guest).unwrap();
    guest.wait_for_text("begun").unwrap();
    let out = captured.work.file("restored.raw");
    for _ in 0..3 {
        let saved = save(&captured, &[]);
        captured.repository.restore(name(&saved), &out).unwrap();
        let bytes = fs::read(&out).unwrap();
        fs::remove_file(&out).unwrap();
        let mut numbers: Vec<u64> = Vec::new();
        for place in 0..places {
            let at = usize::try_from(place * 98304).unwrap();
            let block = &bytes[at..at + 4096];
            assert!(block.chunks(8).all(|part| part == &block[..8]), "a write is whole or not there");
            let number = u64::from_le_bytes(block[..8].try_into().unwrap());
            assert_eq!(number * 61 % places, place);
            numbers.push(number);
        }
        // One writer, one write at a time: they are the last that were written, without a gap.
        numbers.sort_unstable();
        let newest = *numbers.last().unwrap();
        assert!(numbers.iter().copied().eq(newest + 1 - places..=newest), "{numbers:?}");
    }
    drop(guest);
    drop(live);
}

#[test]
fn after_a_host_crash_what_was_flushed_is_saved() {
    let captured = Captured::new("save-host", DISK_BYTES, 7).unwrap();
    let live = captured.start(&["--limit", "100KiB"]).unwrap();
    guest_work(&live);
    let view = worked(&captured);
    live.kill().unwrap();
    // Another boot: the live file is not believed.
    let record = state_of(&captured.target).join("session.json");
    let mut text: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    text["boot"] = "00000000000000000000000000000001".into();
    fs::write(&record, text.to_string()).unwrap();
    fs::remove_file(state_of(&captured.target).join("live")).unwrap();
    let before = fs::read(state_of(&captured.target).join("journal")).unwrap();
    let saved = save(&captured, &[]);
    assert_eq!(saved["up_to"], "flushed");
    ensure_restores(&captured, name(&saved), &view);
    assert!(fs::read(state_of(&captured.target).join("journal")).unwrap() == before);
    assert!(!state_of(&captured.target).join("live").exists(), "nothing is made");
}

#[test]
fn a_save_that_is_killed_or_finds_no_room_leaves_no_snapshot_and_the_session_as_it_was() {
    let captured = Captured::new("save-killed", DISK_BYTES, 9).unwrap();
    let live = captured.start(&["--limit", "100KiB"]).unwrap();
    guest_work(&live);
    let view = worked(&captured);
    // The agent is killed while it saves, at some moment or other.
    let mut live = Some(live);
    for _ in 0..4 {
        let mut command = captured.repository.verb("save", &["-q"]).unwrap();
        let mut saving = command.arg(&captured.target).stderr(Stdio::null()).spawn().unwrap();
        let stopped = live.take().unwrap().kill().unwrap();
        let _ = saving.wait().unwrap();
        captured.repository.verify().unwrap();
        live = Some(stopped.start_again().unwrap());
    }
    live.take().unwrap().park().unwrap();
    // So is a save of a session at rest.
    for _ in 0..4 {
        let mut command = captured.repository.verb("save", &["-q"]).unwrap();
        let mut saving = command.arg(&captured.target).spawn().unwrap();
        let _ = saving.kill();
        let _ = saving.wait().unwrap();
    }
    captured.repository.verify().unwrap();
    let list = run_json(&mut captured.repository.verb("snapshots", &["--json"]).unwrap()).unwrap();
    for snapshot in list.as_array().unwrap().iter().skip(1) {
        ensure_restores(&captured, snapshot["snapshot"].as_str().unwrap(), &view);
    }
    ensure_restores(&captured, name(&save(&captured, &[])), &view);
}

#[test]
fn a_full_repository_fails_the_save_and_nothing_else() {
    let captured = Captured::new("save-full", 8 << 20, 10).unwrap();
    let small = SmallFileSystem::mount(captured.work.file("small"), 24 << 20).unwrap();
    run(Command::new("cp").arg("-a").arg(captured.repository.path()).arg(small.path().join("repo"))).unwrap();
    let live = captured.start(&["--limit", "100KiB"]).unwrap();
    live.export()
        .nbdsh("", "import os\nfor i in range(6): h.pwrite(os.urandom(1 << 20), i << 20)\nh.flush()")
        .unwrap();
    let view = captured.work.file("view.raw");
    live.export().convert_to(&view).unwrap();
    let room = fs::File::create(small.path().join("filler")).unwrap();
    let free = rustix::fs::fstatvfs(&room).unwrap();
    let filler =
        vec![1_u8; usize::try_from((free.f_bavail * free.f_frsize).saturating_sub(1 << 20)).unwrap()];
    room.write_all_at(&filler, 0).unwrap();
    let mut command = lifeboot(["save", "-r"]).unwrap();
    ends(command.arg(small.path().join("repo")).arg(&captured.target), 1, &["space"]);
    live.export().ensure_same(&view).unwrap();
    drop(room);
    fs::remove_file(small.path().join("filler")).unwrap();
    let mut command = lifeboot(["save", "--json", "-r"]).unwrap();
    let saved = run_json(command.arg(small.path().join("repo")).arg(&captured.target)).unwrap();
    let out = captured.work.file("restored.raw");
    run(lifeboot(["restore", "-q", "-r"])
        .unwrap()
        .arg(small.path().join("repo"))
        .arg(name(&saved))
        .arg(&out))
    .unwrap();
    disk::ensure_same(&out, &view).unwrap();
    live.park().unwrap();
}

#[test]
fn what_cannot_be_saved_is_told_with_what_to_do() {
    let captured = Captured::new("save-refused", 8 << 20, 11).unwrap();
    let mut command = captured.repository.verb("save", &[]).unwrap();
    ends(command.arg(&captured.target), 1, &["nothing to save", "target.raw"]);
    let live = captured.start(&["--limit", "100KiB"]).unwrap();
    live.export().qemu_io(&["write -P 0x11 0 64k"]).unwrap();
    let mut command = captured.repository.verb("save", &[]).unwrap();
    ends(command.arg(&captured.target).arg("not a group"), 2, &["group"]);
    // Another repository has not what is restored.
    let other = e2e::lifeboot::Repository::init(captured.work.file("other")).unwrap();
    ends(
        other.verb("save", &[]).unwrap().arg(&captured.target),
        1,
        &["does not have", "a copy that still has it"],
    );
    live.park().unwrap();
    ends(other.verb("save", &[]).unwrap().arg(&captured.target), 1, &["does not have"]);
    // A copy of the session beside another file.
    let copy = captured.work.file("copy.raw");
    run(Command::new("cp").arg(&captured.target).arg(&copy)).unwrap();
    run(Command::new("cp").arg("-a").arg(state_of(&captured.target)).arg(state_of(&copy))).unwrap();
    ends(captured.repository.verb("save", &[]).unwrap().arg(&copy), 1, &["another target", "--moved"]);
    run(captured.repository.verb("save", &["-q", "--moved"]).unwrap().arg(&copy)).unwrap();
}

#[test]
fn a_discard_says_what_is_lost_asks_and_leaves_no_session() {
    let captured = Captured::new("discard", 8 << 20, 12).unwrap();
    let discard = |further: &[&str]| {
        let mut command = lifeboot(["discard"]).unwrap();
        command.args(further).arg(&captured.target).stdin(Stdio::null());
        command
    };
    let said = run(&mut discard(&[])).unwrap();
    assert!(said.contains("nothing to discard"), "{said}");
    let live = captured.start(&["--limit", "100KiB"]).unwrap();
    live.export().qemu_io(&["write -P 0x11 0 64k"]).unwrap();
    ends(&mut discard(&["--yes"]), 1, &["served by the agent", "SIGTERM"]);
    live.park().unwrap();
    ends(&mut discard(&[]), 1, &["nobody said yes", "--yes", "lifeboot save"]);
    let stopped = status(&captured.target).unwrap();
    assert_eq!(stopped["phase"], "stopped");
    assert_eq!(stopped["stable_bytes"], stopped["home_bytes"], "parked is on stable storage: {stopped}");
    let said = run(&mut discard(&["--yes"])).unwrap();
    assert!(said.contains("lost is what the guest wrote") && said.contains("stays as it is"), "{said}");
    assert!(captured.target.exists() && !state_of(&captured.target).exists());
    // Again: there is nothing to do.
    run(&mut discard(&["--yes"])).unwrap();
    // A new one begins as on any file that holds data.
    let mut command = captured.repository.verb("live-restore", &["vm@latest"]).unwrap();
    command.arg(&captured.target).arg("--listen").arg(format!("unix:{}", captured.socket.display()));
    ends(&mut command, 1, &["holds data already", "--force"]);
    let live = captured.start(&["--force"]).unwrap();
    live.park().unwrap();
    let said = discard(&[]).output().unwrap();
    let said = String::from_utf8_lossy(&said.stderr);
    assert!(said.contains("--yes") && !said.contains("lifeboot save"), "nothing was written: {said}");
    // A session that nobody understands can be given up too.
    fs::write(state_of(&captured.target).join("session.json"), "{").unwrap();
    ends(&mut discard(&["--yes", "--remove-target"]), 1, &["not removed"]);
    run(&mut discard(&["--yes"])).unwrap();
    assert!(captured.target.exists() && !state_of(&captured.target).exists());
    let live = captured.start(&["--force"]).unwrap();
    live.park().unwrap();
    let report = run_json(&mut discard(&["--yes", "--json", "--remove-target"])).unwrap();
    assert_eq!((report["target_removed"].as_bool(), report["discarded"].as_bool()), (Some(true), Some(true)));
    assert!(!captured.target.exists() && !state_of(&captured.target).exists());
}
