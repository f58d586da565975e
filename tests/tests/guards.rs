//! What must not happen at the same time does not, and whoever asks for it is told what to do instead.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::captured::Captured;
use e2e::disk;
use e2e::failing::FileSystem;
use e2e::lifeboot::{LiveRestore, Repository, lifeboot, status};
use e2e::nbd::Export;
use e2e::process::{PATIENCE, Process, ends, run, run_any, run_json};
use e2e::work_dir::WorkDir;
use serde_json::Value;

const DISK_BYTES: u64 = 12 << 20;

fn save(captured: &Captured, further: &[&str]) -> Command {
    let mut command = captured.repository.verb("save", further).unwrap();
    command.arg(&captured.target);
    command
}

/// One that has begun, and that something holds. Of two that are asked for at once only one begins.
fn begin_held_save(captured: &Captured) -> Process {
    let [mut held, mut refused] = [(), ()].map(|()| Process::spawn(&save(captured, &["-q"])).unwrap());
    while refused.is_running() {
        if !held.is_running() {
            std::mem::swap(&mut held, &mut refused);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(refused.wait().unwrap().code(), Some(1));
    let said = refused.lines().join("\n");
    for words in ["is being saved already", "ask again when that has ended"] {
        assert!(said.contains(words), "{said}");
    }
    held
}

/// Writes noise over the whole disk, and returns what the disk is then.
fn write_noise(captured: &Captured, live: &LiveRestore) -> PathBuf {
    let noise = captured.work.file("noise.raw");
    let bytes = disk::Noise::new(77).bytes(DISK_BYTES as usize);
    fs::write(&noise, bytes).unwrap();
    let script = format!(
        "d = open('{}', 'rb').read()\nfor at in range(0, len(d), 1 << 20):\n    h.pwrite(d[at:at + (1 << 20)], at)\nh.flush()",
        noise.display()
    );
    live.export().nbdsh("", &script).unwrap();
    noise
}

/// What takes a QEMU's place at a monitor's socket: it greets, and then does nothing of what it is asked.
struct Stub {
    stream: BufReader<UnixStream>,
}

impl Stub {
    fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        let mut stub = Self { stream: BufReader::new(stream) };
        stub.say("{\"QMP\": {\"version\": {}, \"capabilities\": []}}");
        let asked = stub.asked();
        assert_eq!(asked["execute"], "qmp_capabilities");
        stub.say(&format!("{{\"return\": {{}}, \"id\": {}}}", asked["id"]));
        stub
    }

    fn say(&mut self, line: &str) {
        writeln!(self.stream.get_mut(), "{line}").unwrap();
    }

    fn asked(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }
}

/// A disk that was captured into a repository on a file system of its own.
fn captured_elsewhere(name: &str, seed: u64) -> (Captured, FileSystem) {
    let work = WorkDir::new(name).unwrap();
    let disk = work.file("disk.raw");
    disk::make(&disk, DISK_BYTES, seed).unwrap();
    let file_system = FileSystem::make("ext4", &work.file("image"), work.file("elsewhere")).unwrap();
    let repository = Repository::init(file_system.path().join("repository")).unwrap();
    repository.capture("vm", &disk).unwrap();
    let (target, socket) = (work.file("target.raw"), work.socket("live"));
    (Captured { work, repository, disk, target, socket }, file_system)
}

#[test]
fn a_move_home_waits_for_a_save_and_a_save_during_a_move_is_refused() {
    let (captured, file_system) = captured_elsewhere("guards-move", 41);
    let mut live = captured.start(&[]).unwrap();
    live.wait_complete().unwrap();
    let noise = write_noise(&captured, &live);
    let frozen = file_system.freeze().unwrap();
    let mut saving = begin_held_save(&captured);

    let socket = captured.work.socket("qmp");
    let listener = UnixListener::bind(&socket).unwrap();
    let ask_to_move = || {
        let mut pivot = lifeboot(["pivot"]).unwrap();
        Process::spawn(pivot.arg(&captured.target).arg("--qmp").arg(&socket)).unwrap()
    };
    let mut pivot = ask_to_move();
    let mut monitor = Stub::accept(&listener);
    pivot.wait_for_text("is being saved: the machine is moved when that has ended").unwrap();
    let mut other_pivot = ask_to_move();
    other_pivot.wait_for_text("already: this waits until that has ended").unwrap();
    // The save goes on; no other begins.
    ends(&mut save(&captured, &[]), 1, &["is just being moved onto", "lifeboot capture"]);
    // A guest that goes on writing meanwhile is none of the snapshot's business.
    live.export().qemu_io(&["write -P 0x55 0 1M"]).unwrap();
    assert!(saving.is_running() && pivot.is_running() && other_pivot.is_running());
    drop(frozen);
    saving.wait_success().unwrap();
    // Only now the monitor is asked for anything.
    assert_eq!(monitor.asked()["execute"], "query-block");
    ends(&mut save(&captured, &[]), 1, &["is just being moved onto"]);
    let mut backup = captured.repository.verb("capture", &["vm"]).unwrap();
    ends(backup.arg(&captured.target), 1, &["is just being moved onto"]);
    drop(monitor);
    assert_eq!(pivot.wait().unwrap().code(), Some(1));
    // Now it is the other's turn.
    drop(Stub::accept(&listener));
    assert_eq!(other_pivot.wait().unwrap().code(), Some(1));
    assert_eq!(status(&captured.target).unwrap()["handed_over"], false);

    // It was not moved: what it is now can be saved.
    run(&mut save(&captured, &["-q"])).unwrap();
    let list = run_json(&mut captured.repository.verb("snapshots", &["--json"]).unwrap()).unwrap();
    let names: Vec<&str> =
        list.as_array().unwrap().iter().map(|one| one["snapshot"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 3, "{list}");
    let mut names = names;
    names.sort_unstable();
    let restored = captured.work.file("restored.raw");
    captured.repository.restore(names[1], &restored).unwrap();
    disk::ensure_same(&restored, &noise).unwrap();
}

#[test]
fn a_save_that_is_interrupted_ends_at_once_and_another_one_says_what_to_do() {
    let captured = Captured::new("guards-save", DISK_BYTES, 42).unwrap();
    // The rest of what the guest wrote to would take hours.
    let live = captured.start(&["--no-background", "--source-rate", "50"]).unwrap();
    live.export().qemu_io(&["write -P 0x55 8M 4k"]).unwrap();
    let mut saving = begin_held_save(&captured);
    let output = run_any(&mut save(&captured, &["--json", "--dry-run"])).unwrap();
    assert!(output.status.success(), "{output:?}");
    saving.signal(rustix::process::Signal::INT).unwrap();
    assert_eq!(saving.wait().unwrap().code(), Some(130));
    // The agent gives up by itself, which lets others begin.
    loop {
        let mut saving = Process::spawn(&save(&captured, &["--json"])).unwrap();
        if saving.wait_for("its progress", |line| line.contains("\"bytes_done\"").then_some(())).is_ok() {
            saving.signal(rustix::process::Signal::INT).unwrap();
        }
        let code = saving.wait().unwrap().code();
        if code == Some(130) {
            break;
        }
        let said = saving.lines().join("\n");
        assert!(code == Some(1) && said.contains("is being saved already"), "{code:?}: {said}");
    }
    // What is parked is saved without it.
    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "{parked}");
    run(&mut save(&captured, &["-q"])).unwrap();
    let list = run_json(&mut captured.repository.verb("snapshots", &["--json"]).unwrap()).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2, "{list}");
}

#[test]
fn a_report_that_cannot_be_written_names_the_snapshot_that_was_made() {
    let captured = Captured::new("guards-full", DISK_BYTES, 43).unwrap();
    let live = captured.start(&[]).unwrap();
    let mut count = 1;
    let mut check = |further: &[&str]| {
        let mut command = save(&captured, further);
        command.stdout(fs::File::options().write(true).open("/dev/full").unwrap());
        let output =
            command.stderr(std::process::Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        let list = run_json(&mut captured.repository.verb("snapshots", &["--json"]).unwrap()).unwrap();
        let names: Vec<&str> =
            list.as_array().unwrap().iter().map(|one| one["snapshot"].as_str().unwrap()).collect();
        count += usize::from(!further.contains(&"--dry-run"));
        assert_eq!(names.len(), count, "{further:?}: {said}");
        if !further.contains(&"--dry-run") {
            let newest = names.iter().max().unwrap();
            assert!(said.contains(&format!("the snapshot {newest} was made all the same")), "{said}");
        }
    };
    check(&["--json"]);
    check(&[]);
    check(&["--dry-run"]);
    live.park().unwrap();
    check(&[]);
    check(&["--dry-run"]);
}

#[test]
fn an_agent_whose_stdout_nobody_reads_serves_answers_and_parks() {
    let captured = Captured::new("guards-unread", DISK_BYTES, 46).unwrap();
    let (_reader, writer) = std::io::pipe().unwrap();
    // Full from the start: not a word fits.
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[b'.'; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    let mut command = captured.repository.verb("live-restore", &["--json", "vm@latest"]).unwrap();
    command.arg(&captured.target).arg("--listen").arg(format!("unix:{}", captured.socket.display()));
    let mut agent = Killed(command.stdout(writer).spawn().unwrap());
    let begun = Instant::now();
    while !status(&captured.target).is_ok_and(|status| status["phase"] == "complete") {
        assert!(begun.elapsed() < PATIENCE && agent.0.try_wait().unwrap().is_none(), "it does not come home");
        std::thread::sleep(Duration::from_millis(20));
    }
    Export::first(&captured.socket).qemu_io(&["write -P 0x12 0 64k", "flush"]).unwrap();
    let pid = rustix::process::Pid::from_child(&agent.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    while agent.0.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(agent.0.wait().unwrap().success());
    assert_eq!(status(&captured.target).unwrap()["pid"], Value::Null);
}

/// A process that does not outlive its test.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It has ended where this fails.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_disk_that_a_group_does_not_have_has_no_trace_to_be_shown_or_removed() {
    let captured = Captured::new("guards-trace", DISK_BYTES, 44).unwrap();
    for verb in ["show", "remove"] {
        let trace = |of: &str| {
            let mut command = lifeboot(["trace", verb, "-r"]).unwrap();
            command.arg(captured.repository.path()).arg(of);
            command
        };
        ends(&mut trace("vm/nodisk"), 1, &["the group vm has no disk called nodisk", "it has disk0"]);
        run(&mut trace("vm/disk0")).unwrap();
    }
}

/// A second restore of the same snapshot.
fn second(captured: &Captured) -> (LiveRestore, PathBuf) {
    let target = captured.work.file("second.raw");
    let live =
        LiveRestore::start(&captured.repository, "vm@latest", &target, &captured.work.socket("second"), &[]);
    (live.unwrap(), target)
}

fn with(captured: &Captured, other: &Path) -> Command {
    let mut command = save(captured, &[]);
    command.arg("--with").arg(other);
    command
}

#[test]
fn a_disk_that_is_served_and_one_at_rest_are_not_saved_as_one_moment() {
    let captured = Captured::new("guards-with", DISK_BYTES, 45).unwrap();
    let live = captured.start(&[]).unwrap();
    let (_second, other) = second(&captured);
    let (_, parked) = live.park().unwrap();
    assert!(parked.success());
    let words = ["an agent serves", "second.raw", "and none", "save them one by one"];
    ends(&mut with(&captured, &other), 1, &words);
    let mut command = captured.repository.verb("save", &[]).unwrap();
    ends(command.arg(&other).arg("--with").arg(&captured.target), 1, &words);
}
