//! Whose session it is: a `live-restore` goes on only with its own target, journal and live file, and a start that fails
//! leaves nothing behind.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::disk;
use e2e::lifeboot::{LiveRestore, Repository, lifeboot, status};
use e2e::process::{Process, ends, run, run_any};
use e2e::work_dir::{LoopDevice, SmallFileSystem, WorkDir};

const DISK_BYTES: u64 = 32 << 20;

/// A disk, captured as the group `vm`, and a place for targets.
struct Captured {
    work: WorkDir,
    repository: Repository,
    disk: PathBuf,
    socket: PathBuf,
}

impl Captured {
    fn new(name: &str) -> Self {
        let work = WorkDir::new(name).unwrap();
        let disk = work.file("disk.raw");
        disk::make(&disk, DISK_BYTES, 5).unwrap();
        let repository = Repository::init(work.file("repository")).unwrap();
        repository.capture("vm", &disk).unwrap();
        let socket = work.socket("live");
        Self { work, repository, disk, socket }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.work.file(name)
    }

    fn start(&self, target: &Path, further: &[&str]) -> LiveRestore {
        LiveRestore::start(&self.repository, "vm@latest", target, &self.socket, further).unwrap()
    }

    /// Brings the disk home to `target`, and parks.
    fn complete(&self, target: &Path, further: &[&str]) {
        let mut live = self.start(target, further);
        live.wait_complete().unwrap();
        live.park().unwrap();
    }

    fn command(&self, target: &Path, further: &[&str]) -> Command {
        let mut command = self.repository.verb("live-restore", &["vm@latest"]).unwrap();
        command.arg(target).arg("--listen").arg(format!("unix:{}", self.socket.display())).args(further);
        command
    }

    /// Starts it where that must fail, and demands all of `words` of what it says.
    #[track_caller]
    fn refused(&self, target: &Path, further: &[&str], words: &[&str]) {
        ends(&mut self.command(target, further), 1, words);
    }

    /// Starts it as a person would; returns what it said until it was ready, and it runs.
    fn start_telling(&self, target: &Path, further: &[&str]) -> (Process, String) {
        let mut process = Process::spawn(&self.command(target, further)).unwrap();
        process.wait_for_text("QEMU: ").unwrap();
        // Stdout and stderr are read by threads of their own.
        let said = process.lines().join("\n");
        (process, said)
    }
}

fn state_of(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".lifeboot");
    name.into()
}

/// Held by who attaches loop devices by their numbers, which are the machine's: another one waits for its turn.
fn turn_of_numbers() -> fs::File {
    let turn = fs::File::create(std::env::temp_dir().join("lifeboot-e2e-loop-numbers.lock")).unwrap();
    turn.lock().unwrap();
    turn
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").arg(from).arg(to)).unwrap();
}

/// A disk full of one byte.
fn full_of(byte: u8, path: &Path) -> Vec<u8> {
    let bytes = vec![byte; usize::try_from(DISK_BYTES).unwrap()];
    fs::write(path, &bytes).unwrap();
    bytes
}

#[test]
fn another_disk_under_a_devices_number_is_refused_and_the_disk_is_found_under_another() {
    let _turn = turn_of_numbers();
    let captured = Captured::new("device-number");
    let (first, second, state) = (captured.file("d1.img"), captured.file("d2.img"), captured.file("state"));
    fs::File::create(&first).unwrap().set_len(DISK_BYTES).unwrap();
    let theirs = full_of(0x5a, &second);
    let in_state = ["--state", state.to_str().unwrap()];
    let device = LoopDevice::attach_to(231, &first).unwrap();
    captured.complete(device.path(), &in_state);
    drop(device);

    let device = LoopDevice::attach_to(231, &second).unwrap();
    let both = ["d1.img", "d2.img", "--moved"];
    captured.refused(device.path(), &in_state, &both);
    captured.refused(device.path(), &[&in_state[..], &["--force"]].concat(), &both);
    let moved = [&in_state[..], &["--moved"]].concat();
    captured.refused(device.path(), &moved, &["does not hold what the session says"]);
    assert!(fs::read(&second).unwrap() == theirs, "it is as it was");

    // The disk itself has another number now.
    let other = LoopDevice::attach_to(232, &first).unwrap();
    captured.complete(other.path(), &in_state);
    let said = run(lifeboot(["status", "--json", "--state"]).unwrap().arg(&state).arg(other.path())).unwrap();
    assert!(said.contains("loop232"), "the record names the device as it is now: {said}");
    drop((device, other));
    disk::ensure_same(&captured.disk, &first).unwrap();

    // A copy as a whole, under the first number again.
    let third = captured.file("d3.img");
    copy(&first, &third);
    let device = LoopDevice::attach_to(232, &third).unwrap();
    captured.refused(device.path(), &in_state, &["d1.img", "d3.img", "--moved"]);
    captured.complete(device.path(), &moved);
    captured.complete(device.path(), &in_state);
}

#[test]
fn of_copied_devices_whose_names_were_swapped_none_gets_the_session_of_another() {
    let _turn = turn_of_numbers();
    let captured = Captured::new("devices-swapped");
    let state = captured.file("state");
    let in_state = ["--state", state.to_str().unwrap()];
    let files = [captured.file("d1.img"), captured.file("d2.img")];
    let devices = [(233, &files[0]), (234, &files[1])].map(|(number, file)| {
        fs::File::create(file).unwrap().set_len(DISK_BYTES).unwrap();
        LoopDevice::attach_to(number, file).unwrap()
    });
    // Nothing is home but what each guest wrote.
    let written = [[0xa0, 1], [0xb0, 2]];
    for (device, [byte, mib]) in devices.iter().zip(written) {
        let live = captured.start(device.path(), &[&in_state[..], &["--no-background"]].concat());
        live.export().qemu_io(&[&format!("write -P {byte} {mib}M 1M")]).unwrap();
        live.park().unwrap();
    }
    let copies = [captured.file("c1.img"), captured.file("c2.img")];
    for (file, copied) in files.iter().zip(&copies) {
        copy(file, copied);
    }
    let state = captured.file("copied");
    copy(&captured.file("state"), &state);
    drop(devices);
    // Attached the other way round: the first device has the second disk.
    let devices =
        [LoopDevice::attach_to(233, &copies[1]).unwrap(), LoopDevice::attach_to(234, &copies[0]).unwrap()];
    let moved = ["--state", state.to_str().unwrap(), "--moved"];
    for device in &devices {
        captured.refused(device.path(), &moved, &["several sessions", "--state"]);
        let mut save = captured.repository.verb("save", &["--dry-run"]).unwrap();
        ends(save.arg(device.path()).args(moved), 1, &["several sessions"]);
    }
    for (device, [byte, mib]) in devices.iter().zip([written[1], written[0]]) {
        let name = if byte == 0xa0 { "d1.img" } else { "d2.img" };
        let named = fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().path());
        let named: Vec<_> = named.filter(|path| path.to_str().unwrap().contains(name)).collect();
        let [dir] = named.as_slice() else { panic!("{named:?}") };
        let live = captured.start(device.path(), &["--state", dir.to_str().unwrap(), "--moved"]);
        live.export().qemu_io(&[&format!("read -P {byte} {mib}M 1M")]).unwrap();
        live.park().unwrap();
    }
}

#[test]
fn a_session_that_was_copied_beside_another_file_is_refused() {
    let captured = Captured::new("copied-session");
    let (a, b) = (captured.file("a.raw"), captured.file("b.raw"));
    captured.complete(&a, &[]);
    let theirs = full_of(0x5b, &b);
    copy(&state_of(&a), &state_of(&b));
    for further in [&[][..], &["--force"]] {
        captured.refused(&b, further, &["a.raw", "b.raw", "inode", "--moved"]);
    }
    captured.refused(&b, &["--moved"], &["does not hold what the session says"]);
    assert!(fs::read(&b).unwrap() == theirs, "it is as it was");
    captured.complete(&a, &[]);
    // The journal of another session.
    let c = captured.file("c.raw");
    captured.complete(&c, &[]);
    fs::copy(state_of(&a).join("journal"), state_of(&c).join("journal")).unwrap();
    captured.refused(&c, &[], &["of session"]);
}

#[test]
fn a_target_that_is_renamed_goes_on_and_a_copy_does_when_it_is_said_to_be_one() {
    let captured = Captured::new("renamed");
    let (a, b, c) = (captured.file("a.raw"), captured.file("b.raw"), captured.file("c.raw"));
    let live = captured.start(&a, &["--limit", "4KiB"]);
    live.export().qemu_io(&["write -P 0xa1 1M 1M", "flush"]).unwrap();
    live.park().unwrap();
    fs::rename(&a, &b).unwrap();
    fs::rename(state_of(&a), state_of(&b)).unwrap();
    let live = captured.start(&b, &["--limit", "4KiB"]);
    live.export().qemu_io(&["read -P 0xa1 1M 1M"]).unwrap();
    assert!(status(&b).unwrap()["target"].as_str().unwrap().ends_with("b.raw"));
    live.park().unwrap();

    copy(&b, &c);
    copy(&state_of(&b), &state_of(&c));
    captured.refused(&c, &[], &["b.raw", "c.raw", "--moved"]);
    let mut live = captured.start(&c, &["--moved"]);
    live.wait_complete().unwrap();
    live.export().qemu_io(&["read -P 0xa1 1M 1M"]).unwrap();
    live.park().unwrap();
    // It is its own now.
    captured.complete(&c, &[]);
    captured.refused(&captured.file("d.raw"), &["--moved"], &["no session"]);
    assert!(!captured.file("d.raw").exists());
}

#[test]
fn what_is_said_to_be_a_copy_is_not_taken_while_there_is_no_repository_to_check_it_by() {
    let captured = Captured::new("unchecked-copy");
    let (a, b) = (captured.file("a.raw"), captured.file("b.raw"));
    captured.complete(&a, &[]);
    let theirs = full_of(0x5f, &b);
    copy(&state_of(&a), &state_of(&b));
    let elsewhere = captured.file("elsewhere");
    fs::rename(captured.repository.path(), &elsewhere).unwrap();
    captured.refused(&b, &["--moved"], &["b.raw", "cannot be checked"]);
    captured.complete(&a, &[]);
    fs::rename(&elsewhere, captured.repository.path()).unwrap();
    captured.refused(&b, &["--moved"], &["does not hold what the session says"]);
    assert!(fs::read(&b).unwrap() == theirs, "it is as it was");
}

#[test]
fn a_target_that_was_made_anew_or_overwritten_is_refused() {
    let captured = Captured::new("made-anew");
    let target = captured.file("c.raw");
    let mut live = captured.start(&target, &[]);
    live.wait_complete().unwrap();
    live.kill().unwrap();
    let make_anew = || fs::File::create_new(&target).unwrap().set_len(DISK_BYTES).unwrap();
    fs::rename(&target, captured.file("kept.raw")).unwrap();
    make_anew();
    captured.refused(&target, &[], &["c.raw", "inode", "--moved"]);
    captured.refused(&target, &["--moved"], &["does not hold what the session says"]);
    assert_eq!(disk::allocated_bytes(&target).unwrap(), 0, "nothing was written to it");
    fs::rename(captured.file("kept.raw"), &target).unwrap();

    // The same file, other contents; after a reboot too, when the live file is not believed.
    let bytes = fs::read(&target).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&target).unwrap();
    file.write_all_at(&vec![0x5c; bytes.len()], 0).unwrap();
    captured.refused(&target, &[], &["does not hold what the session says"]);
    let live = state_of(&target).join("live");
    fs::rename(&live, captured.file("live")).unwrap();
    captured.refused(&target, &[], &["does not hold what the session says"]);
    fs::rename(captured.file("live"), &live).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    captured.complete(&target, &[]);
}

#[test]
fn a_journal_that_is_missing_or_empty_is_never_made_anew() {
    let captured = Captured::new("no-journal");
    let target = captured.file("t.raw");
    let live = captured.start(&target, &["--limit", "4KiB"]);
    live.export().qemu_io(&["write -P 0xa2 0 1M", "flush"]).unwrap();
    live.kill().unwrap();
    let journal = state_of(&target).join("journal");
    let whole = fs::read(&journal).unwrap();
    let refused = |how: &str| {
        for further in [&[][..], &["--force"]] {
            captured.refused(&target, further, &[how, "keep a copy", "t.raw.lifeboot"]);
        }
        let output = run_any(lifeboot(["status"]).unwrap().arg(&target)).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(how) && said.contains("journal"), "{said}");
    };
    fs::remove_file(&journal).unwrap();
    refused("is missing");
    fs::write(&journal, "").unwrap();
    refused("shorter than its header");
    fs::write(&journal, vec![0; whole.len()]).unwrap();
    refused("does not begin as one does");
    fs::write(&journal, &whole).unwrap();
    // Nor without the record, or with a damaged one.
    let record = state_of(&target).join("session.json");
    let text = fs::read(&record).unwrap();
    fs::remove_file(&record).unwrap();
    captured.refused(
        &target,
        &["--force"],
        &["session.json is missing", "lifeboot discard", "begins with --force"],
    );
    fs::write(&record, &text[..text.len() / 2]).unwrap();
    captured.refused(
        &target,
        &["--force"],
        &["session.json is damaged", "lifeboot discard", "begins with --force"],
    );
    fs::write(&record, &text).unwrap();
    let live = captured.start(&target, &[]);
    live.export().qemu_io(&["read -P 0xa2 0 1M"]).unwrap();
}

#[test]
fn a_first_start_that_was_cut_short_is_made_anew() {
    let captured = Captured::new("cut-short");
    let (whole, target) = (captured.file("whole.raw"), captured.file("t.raw"));
    captured.complete(&whole, &[]);
    // As it stands when the agent is killed between its journal's room and the journal.
    let text = fs::read_to_string(state_of(&whole).join("session.json")).unwrap();
    let mut record: serde_json::Value = serde_json::from_str(&text).unwrap();
    record["boot"] = serde_json::Value::Null;
    fs::create_dir(state_of(&target)).unwrap();
    fs::write(state_of(&target).join("session.json"), record.to_string()).unwrap();
    fs::write(state_of(&target).join("journal"), "").unwrap();
    fs::File::create(&target).unwrap();
    assert_eq!(status(&target).unwrap()["home_bytes"], 0);
    captured.complete(&target, &[]);
    disk::ensure_same(&captured.disk, &target).unwrap();
}

#[test]
fn a_lost_live_file_is_told_from_a_host_that_went_down() {
    let captured = Captured::new("lost-live");
    let target = captured.file("t.raw");
    let live_file = state_of(&target).join("live");
    let session = captured.start(&target, &["--limit", "4KiB"]);
    session.export().qemu_io(&["write -P 0xa3 0 1M", "flush"]).unwrap();
    session.kill().unwrap();
    let spoil: [fn(&Path); 3] = [
        |live| {
            let file = fs::OpenOptions::new().read(true).write(true).open(live).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, 9).unwrap();
            file.write_all_at(&[!byte[0]], 9).unwrap();
        },
        |live| fs::File::options().write(true).open(live).unwrap().set_len(512).unwrap(),
        |live| fs::remove_file(live).unwrap(),
    ];
    for spoil in spoil {
        spoil(&live_file);
        let (mut process, said) = captured.start_telling(&target, &["--limit", "4KiB"]);
        assert!(said.contains("live file was lost"), "{said}");
        assert!(!said.contains("host had gone down"), "{said}");
        process.kill().unwrap();
        let warned = process.lines().join("\n");
        assert!(warned.contains("warning: the session's live file is missing or damaged"), "{warned}");
    }
    // Another boot's: the host did go down.
    let record = state_of(&target).join("session.json");
    let text = fs::read_to_string(&record).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["boot"] = "0123456789abcdef0123456789abcdef".into();
    fs::write(&record, value.to_string()).unwrap();
    fs::remove_file(&live_file).unwrap();
    let (mut process, said) = captured.start_telling(&target, &["--limit", "4KiB"]);
    assert!(said.contains("host had gone down"), "{said}");
    process.kill().unwrap();
    assert!(!process.lines().join("\n").contains("warning"), "nothing is wrong: {:#?}", process.lines());
}

#[test]
fn what_a_session_says_of_how_it_had_ended_is_true() {
    let captured = Captured::new("ends");
    let target = captured.file("t.raw");
    let (mut process, said) = captured.start_telling(&target, &["--limit", "4KiB"]);
    assert!(said.contains("restoring vm@"), "{said}");
    process.terminate().unwrap();
    let (mut process, said) = captured.start_telling(&target, &["--limit", "4KiB"]);
    assert!(said.contains("going on where it was parked"), "{said}");
    process.kill().unwrap();
    let (mut process, said) = captured.start_telling(&target, &["--limit", "4KiB"]);
    assert!(said.contains("after the agent had died"), "{said}");
    // The state that a failed sync leaves in the live file.
    process.kill().unwrap();
    let live = fs::OpenOptions::new().write(true).open(state_of(&target).join("live")).unwrap();
    live.write_all_at(&2_u64.to_le_bytes(), 64 * 8).unwrap();
    let (mut process, said) = captured.start_telling(&target, &["--limit", "4KiB"]);
    assert!(said.contains("going on after a sync had failed"), "{said}");
    process.kill().unwrap();
}

#[test]
fn a_start_that_fails_takes_back_what_it_made_and_forces_nothing() {
    let captured = Captured::new("taken-back");
    let target = captured.file("t.raw");
    captured.refused(&target, &["--state", "/proc/nope"], &["/proc/nope"]);
    assert!(!target.exists());

    let small = SmallFileSystem::mount(captured.file("small"), 1 << 20).unwrap();
    let root = small.path().join("state");
    captured.refused(&target, &["--state", root.to_str().unwrap()], &["make room"]);
    assert!(!target.exists() && !root.exists());
    let inside = small.path().join("t.raw");
    captured.refused(&inside, &[], &["make room"]);
    assert_eq!(fs::read_dir(small.path()).unwrap().count(), 0);

    // Neither a place without room nor an address that is taken costs a target its contents.
    let theirs = full_of(0x5d, &target);
    captured.refused(&target, &["--force", "--state", root.to_str().unwrap()], &["make room"]);
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("tcp:{}", holder.local_addr().unwrap());
    captured.refused(&target, &["--force", "--listen", &taken], &["cannot listen"]);
    assert!(fs::read(&target).unwrap() == theirs, "it is as it was");
    assert!(!state_of(&target).exists() && !root.exists());
    assert!(!captured.socket.exists());
}

#[test]
fn a_device_with_data_in_its_middle_or_that_is_read_only_is_refused() {
    let captured = Captured::new("in-use");
    let (image, state) = (captured.file("d.img"), captured.file("state"));
    let file = fs::File::create(&image).unwrap();
    file.set_len(512 << 20).unwrap();
    file.write_all_at(&vec![0x5e; 4 << 20], 80 << 20).unwrap();
    let in_state = ["--state", state.to_str().unwrap()];
    let device = LoopDevice::attach(&image).unwrap();
    captured.refused(device.path(), &in_state, &["holds data already", "--force"]);
    let restore = |device: &LoopDevice| {
        let output = run_any(captured.repository.verb("restore", &["vm@latest"]).unwrap().arg(device.path()));
        String::from_utf8_lossy(&output.unwrap().stderr).into_owned()
    };
    assert!(restore(&device).contains("is not empty: there is data at byte"));

    file.set_len(0).unwrap();
    file.set_len(512 << 20).unwrap();
    drop(device);
    let device = LoopDevice::attach(&image).unwrap();
    device.set_read_only(true).unwrap();
    captured.refused(device.path(), &in_state, &["is a read-only device", "--setrw"]);
    assert!(restore(&device).contains("is a read-only device"));
    device.set_read_only(false).unwrap();
    captured.complete(device.path(), &in_state);
    device.set_read_only(true).unwrap();
    captured.refused(device.path(), &in_state, &["is a read-only device"]);
}
