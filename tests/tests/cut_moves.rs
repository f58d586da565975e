//! An agent that is killed at a chosen command of the move home: QEMU is the real one, without a guest.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::captured::Captured;
use e2e::lifeboot::{LiveRestore, lifeboot};
use e2e::process::{Process, ends, run_any};
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
        writeln!(self.stream.get_mut(), "{command}").unwrap();
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

    /// Reads or writes as the guest's device does.
    fn io(&mut self, command: &str) {
        let device = self.execute("query-block", &json!({}))[0]["qdev"].as_str().unwrap().to_owned();
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

impl Rig {
    fn start(name: &str) -> Self {
        let captured = Captured::new(name, DISK_BYTES, 51).unwrap();
        let mut live = captured.start(&[]).unwrap();
        live.wait_complete().unwrap();
        let sockets = ["qmp", "guest"].map(|name| captured.work.socket(name));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-S", "-display", "none", "-m", "64", "-nodefaults"]);
        command.args(live.qemu_arguments().unwrap());
        for socket in &sockets {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        }
        let mut qemu = Process::spawn(&command).unwrap();
        // The last one that it makes.
        while UnixStream::connect(&sockets[1]).is_err() {
            assert!(qemu.is_running(), "{:?}", qemu.lines());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let mut guest = Monitor::connect(&sockets[1]);
        guest.io("write -P 0x51 1M 1M");
        let [socket, _] = sockets;
        Self { captured, live, qemu, socket, guest }
    }

    /// Has the machine moved; the agent is killed when QEMU has done `last`, and does not hear of it.
    fn killed_after(self, last: &str) -> Killed {
        let Self { captured, live, qemu, socket, guest } = self;
        let between = captured.work.socket("between");
        let listener = UnixListener::bind(&between).unwrap();
        // Whoever listens at the socket is taken for QEMU.
        let open = File::open(&captured.target).unwrap();
        let mut pivot = lifeboot(["pivot"]).unwrap();
        let mut pivot = Process::spawn(pivot.arg(&captured.target).arg("--qmp").arg(&between)).unwrap();
        let mut agent = BufReader::new(listener.accept().unwrap().0);
        let mut monitor = Monitor { stream: BufReader::new(UnixStream::connect(&socket).unwrap()) };
        let greeting = monitor.line();
        writeln!(agent.get_mut(), "{greeting}").unwrap();
        loop {
            let mut line = String::new();
            assert!(agent.read_line(&mut line).unwrap() > 0, "{:?}", pivot.lines());
            let command: Value = serde_json::from_str(&line).unwrap();
            let answer = monitor.pass_on(&command);
            if command["execute"] == last {
                assert!(answer.get("return").is_some(), "{answer}");
                break;
            }
            writeln!(agent.get_mut(), "{answer}").unwrap();
        }
        live.kill().unwrap();
        drop((agent, monitor, open));
        assert!(!pivot.wait().unwrap().success());
        Killed { captured, qemu, socket, guest }
    }
}

/// A machine whose agent was killed while it was moved.
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
        let mut command = lifeboot(["pivot"]).unwrap();
        command.arg(&self.captured.target).arg("--qmp").arg(&self.socket);
        command
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
