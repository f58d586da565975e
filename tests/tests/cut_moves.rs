//! An agent that is killed at a chosen command of the move home: QEMU is the real one, without a guest.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::{LiveRestore, Repository, lifeboot, status};
use e2e::process::{Process, ends, run, run_any};
use e2e::work_dir::WorkDir;
use serde_json::{Value, json};

const DISK_BYTES: u64 = 8 << 20;

/// A client of a monitor.
struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(path: &Path) -> Self {
        let mut monitor = Self { stream: BufReader::new(UnixStream::connect(path).unwrap()) };
        assert!(monitor.line().get("QMP").is_some());
        monitor.execute("qmp_capabilities", &json!({}));
        monitor
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// Passes a command on as it is; returns the answer.
    fn pass_on(&mut self, command: &Value) -> Value {
        // At once: a QEMU that ends does not wait for the end of the line.
        self.stream.get_mut().write_all(format!("{command}\n").as_bytes()).unwrap();
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
        }
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let answer = self.pass_on(&json!({ "execute": command, "arguments": arguments }));
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].clone()
    }

    /// Reads or writes as the guest's first device does.
    fn io(&mut self, command: &str) {
        self.io_of(0, command);
    }

    fn io_of(&mut self, disk: usize, command: &str) {
        let device = self.execute("query-block", &json!({}))[disk]["qdev"].as_str().unwrap().to_owned();
        let line = format!("qemu-io -d {device} \"{command}\"");
        let said = self.execute("human-monitor-command", &json!({ "command-line": line }));
        assert!(!said.as_str().unwrap().contains("rror"), "{command}: {said}");
    }

    fn has_nbd_nodes(&mut self) -> bool {
        let nodes = self.execute("query-named-block-nodes", &json!({}));
        nodes.as_array().unwrap().iter().any(|node| node["drv"] == "nbd")
    }
}

/// A disk that is home and served, and a QEMU whose drive is on its export.
struct Rig {
    captured: Captured,
    live: LiveRestore,
    qemu: Process,
    /// Of two monitors the one that lifeboot is told.
    socket: PathBuf,
    /// The other one.
    guest: Monitor,
}

/// A QEMU without a guest, whose drives are on these exports; its monitors.
fn qemu(work: &WorkDir, drives: &[String]) -> (Process, PathBuf, Monitor) {
    let sockets = ["probe", "qmp", "guest"].map(|name| work.socket(name));
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-S", "-display", "none", "-m", "64", "-nodefaults"]).args(drives);
    for socket in &sockets {
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
    }
    let mut qemu = Process::spawn(&command).unwrap();
    // The last one that it makes.
    while UnixStream::connect(&sockets[2]).is_err() {
        assert!(qemu.is_running(), "{:?}", qemu.lines());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let guest = Monitor::connect(&sockets[2]);
    let [_, socket, _] = sockets;
    (qemu, socket, guest)
}

fn pivot(target: &Path, socket: &Path) -> Command {
    let mut command = lifeboot(["pivot"]).unwrap();
    command.arg(target).arg("--qmp").arg(socket);
    command
}

/// Whether QEMU answers at this monitor: it greets whoever comes in any case.
fn is_answering(probe: &Path) -> bool {
    let stream = UnixStream::connect(probe).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(2))).unwrap();
    let mut probe = BufReader::new(stream);
    writeln!(probe.get_mut(), "{}", json!({ "execute": "qmp_capabilities" })).unwrap();
    let mut line = String::new();
    (0..2).all(|_| probe.read_line(&mut line).is_ok())
}

/// Has the machine moved onto `target`; the agent is killed at the command `last`, of which it does not hear. QEMU has done it then,
/// or where it `hangs` does it while the agent dies, and waits for that.
fn cut(work: &WorkDir, target: &Path, socket: &Path, (last, hangs): (&str, bool), kill: impl FnOnce()) {
    let between = work.socket("between");
    let listener = UnixListener::bind(&between).unwrap();
    // Whoever listens at the socket is taken for QEMU.
    let open = File::open(target).unwrap();
    let mut pivot = Process::spawn(&pivot(target, &between)).unwrap();
    let mut agent = BufReader::new(listener.accept().unwrap().0);
    let mut monitor = Monitor { stream: BufReader::new(UnixStream::connect(socket).unwrap()) };
    let greeting = monitor.line();
    writeln!(agent.get_mut(), "{greeting}").unwrap();
    loop {
        let mut line = String::new();
        assert!(agent.read_line(&mut line).unwrap() > 0, "{:?}", pivot.lines());
        let command: Value = serde_json::from_str(&line).unwrap();
        if command["execute"] == last && hangs {
            kill();
            writeln!(monitor.stream.get_mut(), "{command}").unwrap();
            // Whoever hangs up before takes it back.
            while is_answering(&work.socket("probe")) {}
            break;
        }
        let answer = monitor.pass_on(&command);
        if command["execute"] == last {
            assert!(answer.get("return").is_some(), "{answer}");
            kill();
            break;
        }
        writeln!(agent.get_mut(), "{answer}").unwrap();
    }
    drop((agent, monitor, open));
    assert!(!pivot.wait().unwrap().success());
}

impl Rig {
    fn start(name: &str) -> Self {
        let captured = Captured::new(name, DISK_BYTES, 51).unwrap();
        let mut live = captured.start(&[]).unwrap();
        live.wait_complete().unwrap();
        let (qemu, socket, mut guest) = qemu(&captured.work, &live.qemu_arguments().unwrap());
        guest.io("write -P 0x51 1M 1M");
        Self { captured, live, qemu, socket, guest }
    }

    /// Has the machine moved; the agent is killed when QEMU has done `last`, and does not hear of it.
    fn killed_after(self, last: &str) -> Killed {
        let Self { captured, live, qemu, socket, guest } = self;
        cut(&captured.work, &captured.target, &socket, (last, false), || drop(live.kill().unwrap()));
        Killed { captured, qemu, socket, guest }
    }

    /// Has the machine moved, and no agent is killed.
    fn moved(mut self) -> Killed {
        says_that_it_was_moved(&mut pivot(&self.captured.target, &self.socket));
        self.live.process().wait_success().unwrap();
        let Self { captured, qemu, socket, guest, .. } = self;
        Killed { captured, qemu, socket, guest }
    }
}

/// A machine whose agent was killed while it was moved, or ended after it.
struct Killed {
    captured: Captured,
    qemu: Process,
    socket: PathBuf,
    guest: Monitor,
}

impl Killed {
    fn live_restore(&self) -> Command {
        let mut command = self.captured.repository.verb("live-restore", &["vm@latest"]).unwrap();
        command.arg(&self.captured.target).arg("--qmp").arg(&self.socket);
        command.arg("--listen").arg(format!("unix:{}", self.captured.socket.display()));
        command
    }

    fn pivot(&self) -> Command {
        pivot(&self.captured.target, &self.socket)
    }

    /// The machine goes on, and has nothing of the export any more: else it would wait for that at its end at the latest.
    fn runs_from_its_disk(mut self) {
        self.guest.io("write -P 0x52 2M 1M");
        self.guest.io("read -P 0x51 1M 1M");
        assert!(!self.guest.has_nbd_nodes());
        self.guest.execute("quit", &json!({}));
        self.qemu.wait_success().unwrap();
        let mut bytes = std::fs::read(&self.captured.disk).unwrap();
        bytes[1 << 20..2 << 20].fill(0x51);
        bytes[2 << 20..3 << 20].fill(0x52);
        assert!(std::fs::read(&self.captured.target).unwrap() == bytes);
    }
}

fn says_that_it_was_moved(command: &mut Command) {
    let output = run_any(command).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("handed over"), "{output:?}");
}

#[test]
fn a_start_after_a_kill_in_the_move_takes_the_dead_export_from_a_machine_that_goes_on() {
    let killed = Rig::start("cut-start").killed_after("blockdev-reopen");
    says_that_it_was_moved(&mut killed.live_restore());
    killed.runs_from_its_disk();
}

#[test]
fn pivot_after_a_kill_in_the_move_takes_the_dead_export_from_a_machine_that_goes_on() {
    let killed = Rig::start("cut-pivot").killed_after("blockdev-reopen");
    says_that_it_was_moved(&mut killed.pivot());
    killed.runs_from_its_disk();
}

#[test]
fn a_machine_whose_agent_was_killed_before_the_mark_keeps_its_session_and_is_moved_by_the_next_start() {
    let killed = Rig::start("cut-open").killed_after("blockdev-add");
    let mut discard = lifeboot(["discard", "--yes"]).unwrap();
    ends(discard.arg(&killed.captured.target), 1, &["may still wait on its export", "has the target open"]);
    says_that_it_was_moved(&mut killed.live_restore());
    killed.runs_from_its_disk();
}

/// Gives the name `path` to a copy of what stands there, and that the name `kept`.
fn take_its_name(path: &Path, kept: &Path) {
    let copy = path.with_extension("copy");
    std::fs::copy(path, &copy).unwrap();
    std::fs::rename(path, kept).unwrap();
    std::fs::rename(&copy, path).unwrap();
}

#[test]
fn a_machine_is_not_moved_onto_a_copy_that_took_its_targets_name() {
    let mut rig = Rig::start("cut-swapped");
    let (target, kept) = (rig.captured.target.clone(), rig.captured.work.file("kept.raw"));
    take_its_name(&target, &kept);
    // To the file that the agent has open.
    rig.guest.io("write -P 0x53 3M 1M");
    rig.guest.io("flush");
    let mut moved = pivot(&target, &rig.socket);
    ends(&mut moved, 1, &["another file stands there now", "kept.raw", "goes on through the agent"]);
    std::fs::remove_file(&target).unwrap();
    ends(&mut moved, 1, &["nothing stands there now", "rename", "kept.raw"]);
    assert!(rig.guest.has_nbd_nodes());
    assert_eq!(status(&kept.with_file_name("target.raw")).unwrap()["handed_over"], false);
    std::fs::rename(&kept, &target).unwrap();
    let mut moved = rig.moved();
    moved.guest.io("read -P 0x53 3M 1M");
    assert!(std::fs::read(&target).unwrap()[3 << 20..4 << 20] == [0x53; 1 << 20]);
    moved.guest.execute("quit", &json!({}));
    moved.qemu.wait_success().unwrap();
}

#[test]
fn nobody_takes_the_copy_of_a_moved_machines_disk_for_its_disk() {
    let moved = Rig::start("cut-copied").moved();
    let work = &moved.captured.work;
    // Its session, too.
    let (target, copy) = (&moved.captured.target, work.file("copy.raw"));
    run(Command::new("cp").arg("-a").arg(target).arg(&copy)).unwrap();
    run(Command::new("cp")
        .arg("-a")
        .arg(work.file("target.raw.lifeboot"))
        .arg(work.file("copy.raw.lifeboot")))
    .unwrap();
    let live_restore = |target: &Path, further: &[&str]| {
        let mut command = moved.captured.repository.verb("live-restore", &["vm@latest"]).unwrap();
        command.arg(target).arg("--listen").arg(format!("unix:{}", moved.captured.socket.display()));
        command.args(further);
        command
    };
    let save = |target: &Path| {
        let mut command = moved.captured.repository.verb("save", &[]).unwrap();
        command.arg(target);
        command
    };
    let qmp = ["--qmp", moved.socket.to_str().unwrap()];
    let with_moved = [&qmp[..], &["--moved"]].concat();
    let its = format!("name {}", target.display());
    let words = ["copy.raw is another one", its.as_str()];
    ends(&mut pivot(&copy, &moved.socket), 1, &words);
    ends(&mut live_restore(&copy, &qmp), 1, &words);
    ends(&mut live_restore(&copy, &[]), 1, &words);
    ends(&mut save(&copy), 1, &words);
    ends(
        &mut live_restore(&copy, &with_moved),
        1,
        &["it runs from another file", "copy.raw, which may be a copy"],
    );

    let kept = work.file("kept.raw");
    take_its_name(target, &kept);
    let words = ["target.raw is another one", "not from"];
    ends(&mut pivot(target, &moved.socket), 1, &words);
    ends(&mut live_restore(target, &qmp), 1, &words);
    ends(&mut live_restore(target, &[]), 1, &words);
    ends(&mut save(target), 1, &words);
    let told = run(lifeboot(["status"]).unwrap().arg(target)).unwrap();
    assert!(told.contains("target.raw is another one"), "{told}");
    std::fs::rename(&kept, target).unwrap();
    says_that_it_was_moved(&mut moved.pivot());
    moved.runs_from_its_disk();
}

/// Two disks that one agent serves, and a QEMU that has both.
struct TwoDisks {
    work: WorkDir,
    repository: Repository,
    agent: Process,
    qemu: Process,
    socket: PathBuf,
    guest: Monitor,
}

impl TwoDisks {
    fn start(name: &str) -> Self {
        let work = WorkDir::new(name).unwrap();
        let repository = Repository::init(work.file("repository")).unwrap();
        let mut capture = repository.verb("capture", &["-q", "vm"]).unwrap();
        for (seed, name) in ["a", "b"].into_iter().enumerate() {
            let path = work.file(&format!("{name}.raw"));
            disk::make(&path, DISK_BYTES, 61 + seed as u64).unwrap();
            capture.arg(format!("{name}={}", path.display()));
        }
        run(&mut capture).unwrap();
        let mut agent = Process::spawn(&live_restore_of_two(&work, &repository, &["--json"])).unwrap();
        let ready = agent.wait_for("its event `ready`", |line| event(line, "ready")).unwrap();
        agent.wait_for("its event `complete`", |line| event(line, "complete")).unwrap();
        let drives: Vec<String> = serde_json::from_value(ready["qemu"].clone()).unwrap();
        let (qemu, socket, mut guest) = qemu(&work, &drives);
        guest.io_of(0, "write -P 0x51 1M 1M");
        guest.io_of(1, "write -P 0x61 2M 1M");
        Self { work, repository, agent, qemu, socket, guest }
    }

    fn target(&self, disk: &str) -> PathBuf {
        target_of(&self.work, disk)
    }

    /// Has the command of both disks bring the machine home; returns what it said.
    fn moved_home(&self, further: &[&str]) -> String {
        let output = run_any(&mut live_restore_of_two(&self.work, &self.repository, further)).unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("handed over"), "{said}");
        said.into_owned()
    }

    /// The guest has all that it wrote, and writes to its targets alone.
    fn run_from_their_targets(mut self) {
        let guest = &mut self.guest;
        for (disk, old, new) in [(0, "0x51 1M", "0x52 4M"), (1, "0x61 2M", "0x62 4M")] {
            guest.io_of(disk, &format!("read -P {old} 1M"));
            guest.io_of(disk, &format!("write -P {new} 1M"));
        }
        assert!(!guest.has_nbd_nodes());
        guest.execute("quit", &json!({}));
        self.qemu.wait_success().unwrap();
        for (disk, byte) in [("a", 0x52), ("b", 0x62)] {
            let target = self.target(disk);
            assert!(std::fs::read(&target).unwrap()[4 << 20..5 << 20] == vec![byte; 1 << 20]);
            assert_eq!(status(&target).unwrap()["moved"], true);
        }
    }
}

fn target_of(work: &WorkDir, disk: &str) -> PathBuf {
    work.file(&format!("target-{disk}.raw"))
}

fn live_restore_of_two(work: &WorkDir, repository: &Repository, further: &[&str]) -> Command {
    let mut command = repository.verb("live-restore", &["vm@latest"]).unwrap();
    command.arg(target_of(work, "a")).arg(target_of(work, "b"));
    command.arg("--listen").arg(format!("unix:{}", work.socket("live").display())).args(further);
    command
}

fn event(line: &str, name: &str) -> Option<Value> {
    let value: Value = serde_json::from_str(line).ok()?;
    (value["event"] == name).then_some(value)
}

#[test]
fn a_machine_that_waits_for_its_second_disk_is_served_that_by_the_command_of_both() {
    let mut disks = TwoDisks::start("cut-second");
    let (first, second) = (disks.target("a"), disks.target("b"));
    says_that_it_was_moved(&mut pivot(&first, &disks.socket));
    let agent = &mut disks.agent;
    // It waits for the answer to what it was told to do before.
    cut(&disks.work, &second, &disks.socket, ("blockdev-reopen", true), || agent.kill().unwrap());
    ends(&mut pivot(&first, &disks.socket), 1, &["was moved onto", "another disk of it waits", "--qmp"]);
    ends(&mut pivot(&second, &disks.socket), 1, &["may wait on its export", "--qmp"]);

    let qmp = ["--qmp", disks.socket.to_str().unwrap()];
    let said = disks.moved_home(&qmp);
    assert!(said.contains("was moved onto"), "{said}");
    disks.run_from_their_targets();
}

#[test]
fn an_agent_is_taken_over_by_the_command_of_both_disks_although_one_was_moved() {
    let mut disks = TwoDisks::start("over-second");
    says_that_it_was_moved(&mut pivot(&disks.target("a"), &disks.socket));
    let qmp = ["--take-over", "--qmp", disks.socket.to_str().unwrap()];
    disks.moved_home(&qmp);
    disks.agent.wait().unwrap();
    disks.run_from_their_targets();
}
