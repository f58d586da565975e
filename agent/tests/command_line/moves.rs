//! An agent that is killed while a machine is moved home: nobody takes that machine for moved until QEMU says so. QEMU is made up,
//! and stops for ever where the real one waits for its disk.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};

use serde_json::{Value, json};

use crate::support::{MIB, Scratch, live_restore};

const DISK_BYTES: u64 = 4 * MIB;

/// How far the move is for QEMU.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    OnExport,
    /// It waits for the export, and answers nobody.
    Hanging,
    Moved,
}

struct State {
    stage: Stage,
    /// At which command it begins to wait.
    hangs_at: &'static str,
    export: String,
    /// The target, once it was opened, and the node's name.
    target: Option<(File, String)>,
}

/// A QEMU with one drive, as far as its monitor tells.
struct Qemu {
    state: Arc<Mutex<State>>,
    hangs: mpsc::Receiver<()>,
}

impl Qemu {
    fn start(socket: &Path, export: PathBuf, hangs_at: &'static str) -> Self {
        let export = format!("nbd+unix:///disk0?socket={}", export.display());
        let state = Arc::new(Mutex::new(State { stage: Stage::OnExport, hangs_at, export, target: None }));
        let (hung, hangs) = mpsc::channel();
        let listener = UnixListener::bind(socket).unwrap();
        let ours = Arc::clone(&state);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                // Whoever gives up hangs up; that is no concern of the next one.
                let _ = answer(client.unwrap(), &ours, &hung);
            }
        });
        Self { state, hangs }
    }

    fn is(&self, stage: Stage) {
        self.state.lock().unwrap().stage = stage;
    }

    /// What a QEMU has open goes with it.
    fn ends(&self) {
        self.state.lock().unwrap().target = None;
    }
}

fn answer(client: UnixStream, state: &Mutex<State>, hung: &mpsc::Sender<()>) -> std::io::Result<()> {
    let mut to = client.try_clone()?;
    writeln!(to, "{}", json!({ "QMP": {} }))?;
    for line in BufReader::new(client).lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let mut state = state.lock().unwrap();
        if state.stage == Stage::Hanging {
            continue;
        }
        let answer = state.execute(request["execute"].as_str().unwrap(), &request["arguments"]);
        if request["execute"] == state.hangs_at {
            state.stage = Stage::Hanging;
            hung.send(()).unwrap();
            continue;
        }
        writeln!(to, "{}", json!({ "return": answer, "id": request["id"] }))?;
    }
    Ok(())
}

impl State {
    fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let home = self.target.as_ref().map_or("", |(_, name)| name.as_str());
        let below = if self.stage == Stage::Moved { 4 } else { 3 };
        match command {
            "query-block" => json!([{ "device": "d0", "inserted": { "node-name": "lifeboot" } }]),
            "query-named-block-nodes" => json!([
                self.node("lifeboot", "raw", &self.export),
                self.node("lifeboot-nbd", "nbd", &self.export),
                self.node(home, "file", ""),
            ]),
            "x-debug-query-block-graph" => json!({
                "nodes": [
                    { "id": 1, "type": "block-backend", "name": "d0" },
                    { "id": 2, "type": "block-driver", "name": "lifeboot" },
                    { "id": 3, "type": "block-driver", "name": "lifeboot-nbd" },
                    { "id": 4, "type": "block-driver", "name": home },
                ],
                "edges": [
                    { "parent": 1, "child": 2, "name": "root" },
                    { "parent": 2, "child": below, "name": "file" },
                ],
            }),
            "query-block-jobs" => json!([]),
            "blockdev-add" => {
                let text = |name: &str| arguments[name].as_str().unwrap().to_owned();
                let target = File::options().read(true).write(true).open(text("filename")).unwrap();
                self.target = Some((target, text("node-name")));
                json!({})
            }
            _ => json!({}),
        }
    }

    fn node(&self, name: &str, driver: &str, file: &str) -> Value {
        json!({ "node-name": name, "drv": driver, "file": file, "image": { "virtual-size": DISK_BYTES } })
    }
}

/// A session that is wholly home, and served.
fn served() -> (Scratch, Child) {
    let scratch = Scratch::new();
    scratch.disk("d.raw", DISK_BYTES, &[(0, 1 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let args = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--exit-when-done"];
    scratch.run(&args).ends_with(0);
    let live = live_restore(&scratch, &[]);
    (scratch, live)
}

/// Kills the agent at the moment when QEMU was told to move the drive, and has not done it.
fn killed_in_the_move() -> (Scratch, Qemu) {
    killed_at("blockdev-reopen")
}

/// Kills the agent when QEMU has got this command.
fn killed_at(command: &'static str) -> (Scratch, Qemu) {
    let (scratch, mut live) = served();
    let qemu = Qemu::start(&scratch.path("a qmp"), scratch.path("s").canonicalize().unwrap(), command);
    let mut pivot = scratch
        .command(&["pivot", "t.raw", "--qmp", "a qmp"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    qemu.hangs.recv().unwrap();
    live.kill().unwrap();
    live.wait().unwrap();
    assert!(!pivot.wait().unwrap().success());
    (scratch, qemu)
}

/// A program of QEMU's that has the target locked, as a machine has that runs from it.
fn locked_by_another(scratch: &Scratch) -> Child {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw"]).arg(scratch.path("t.raw")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut program = command.spawn().unwrap();
    writeln!(program.stdin.as_mut().unwrap(), "read 0 512").unwrap();
    let mut lines = BufReader::new(program.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("read 512/512")), "it has no lock");
    program
}

#[test]
fn a_machine_that_may_wait_for_its_agent_keeps_its_session_until_qemu_says_that_it_was_moved() {
    let (scratch, qemu) = killed_in_the_move();
    let monitor = scratch.path("a qmp").canonicalize().unwrap();
    let goes_on =
        format!("`lifeboot live-restore …` command as before, with `--qmp '{}'`", monitor.display());
    let discard = ["discard", "t.raw", "--yes"];
    scratch.run(&discard).fails(&["may still wait on its export", "has the target open", &goes_on]);
    let asked = scratch.run(&["pivot", "t.raw", "--qmp", "a qmp"]).fails(&["does not answer", &goes_on]);
    assert!(!asked.stderr.contains("one program at a time"), "{asked:?}");
    let status = || scratch.run(&["status", "t.raw"]).ends_with(0).stdout;
    assert!(status().contains("or was about to be when the agent ended"), "{}", status());
    scratch.run(&["save", "t.raw"]).fails(&["or was about to be when the agent ended", &goes_on]);

    qemu.is(Stage::Moved);
    scratch.run(&["pivot", "t.raw", "--qmp", "a qmp"]).ends_with(0);
    assert!(status().contains("a running machine was moved onto the target, which"), "{}", status());
    let refused = scratch.run(&["save", "t.raw"]).fails(&["a disk of its own", "lifeboot capture"]);
    assert!(!refused.stderr.contains("about to be"), "{refused:?}");
    let told = scratch.run(&discard).ends_with(0).stdout;
    assert!(told.contains("nothing is lost: a running machine was moved onto the target"), "{told}");
    assert!(scratch.path("t.raw").exists() && !scratch.path("t.raw.lifeboot").exists());
}

#[test]
fn of_a_file_that_took_the_path_of_a_moved_machines_disk_nobody_says_that_the_machine_writes_to_it() {
    let (scratch, _qemu) = killed_in_the_move();
    let capture = || scratch.run(&["capture", "after", "t.raw"]).ends_with(0).stdout;
    let said = capture();
    assert!(said.contains("full scan") && said.contains("was moved onto it"), "{said}");
    std::fs::rename(scratch.path("t.raw"), scratch.path("o.raw")).unwrap();
    std::fs::copy(scratch.path("d.raw"), scratch.path("t.raw")).unwrap();
    let said = capture();
    assert!(
        said.contains("is not the target of the session") && said.contains("stood at its path before"),
        "{said}"
    );
    assert!(!said.contains("was moved onto it"), "{said}");
}

#[test]
fn a_machine_that_ended_while_it_was_moved_keeps_nobody_from_giving_its_session_up() {
    let (scratch, qemu) = killed_in_the_move();
    qemu.ends();
    let told = scratch.run(&["discard", "t.raw", "--yes"]).ends_with(0).stdout;
    assert!(told.contains("nothing is lost: all of the disk is home"), "{told}");
    assert!(told.contains("or was about to be when the agent ended"), "{told}");
    assert!(scratch.path("t.raw").exists() && !scratch.path("t.raw.lifeboot").exists());
}

#[test]
fn a_start_that_asks_qemu_finds_that_the_machine_was_moved_and_notes_it() {
    let (scratch, qemu) = killed_in_the_move();
    qemu.is(Stage::Moved);
    let live = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s"];
    scratch.run(&live).fails(&["or was about to be when the agent ended"]);
    let ran = scratch.run(&[&live[..], &["--qmp", "a qmp"]].concat()).ends_with(0);
    assert!(ran.stdout.contains("the machine runs from"), "{ran:?}");
    let refused = scratch.run(&live).fails(&["is over", "was moved onto"]);
    assert!(!refused.stderr.contains("about to be"), "{refused:?}");
}

#[test]
fn a_machine_that_is_known_to_be_moved_is_not_served_again_while_its_monitor_is_busy() {
    let (scratch, qemu) = killed_in_the_move();
    qemu.is(Stage::Moved);
    scratch.run(&["pivot", "t.raw", "--qmp", "a qmp"]).ends_with(0);
    qemu.is(Stage::Hanging);
    let live = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--qmp", "a qmp"];
    let words = ["was moved onto", "monitor is busy", "does not answer", "lifeboot discard"];
    scratch.run(&live).fails(&words);
    scratch.run(&["pivot", "t.raw", "--qmp", "a qmp"]).fails(&words);
}

#[test]
fn an_agent_ends_when_it_is_told_to_while_its_monitor_has_no_room_for_it() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", DISK_BYTES, &[(0, 1 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    // As that of a QEMU which talks to somebody: one more can wait, and another one cannot.
    let listener = UnixListener::bind(scratch.path("a qmp")).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _waits = UnixStream::connect(scratch.path("a qmp")).unwrap();
    let args = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--qmp", "a qmp"];
    let mut command = scratch.command(&args);
    let mut live = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(live.stderr.take().unwrap()).lines();
    // It tries to move the machine, which is home.
    assert!(lines.any(|line| line.unwrap().contains("does not answer")));
    rustix::process::kill_process(rustix::process::Pid::from_child(&live), rustix::process::Signal::TERM)
        .unwrap();
    assert_eq!(live.wait().unwrap().code(), Some(0));
}

#[test]
fn a_machine_whose_qemu_has_just_opened_the_target_is_not_left_to_wait_for_ever() {
    let (scratch, qemu) = killed_at("blockdev-add");
    let record = std::fs::read_to_string(scratch.path("t.raw.lifeboot/session.json")).unwrap();
    assert!(record.contains("\"handed_over\": false"), "{record}");
    let discard = ["discard", "t.raw", "--yes"];
    scratch.run(&discard).fails(&["may still wait on its export", "has the target open", "--qmp '"]);
    let boot = ["boot", "web01@latest", "t.raw", "--qemu", "true"];
    scratch.run(&boot).fails(&["may still wait on its export", "boot it then"]);
    qemu.ends();
    scratch.run(&discard).ends_with(0);
}

#[test]
fn a_move_that_was_begun_and_not_marked_means_nothing_once_the_session_was_gone_on_with() {
    let (scratch, _qemu) = killed_in_the_move();
    // As the session is before the mark.
    let record = scratch.path("t.raw.lifeboot/session.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace("\"handed_over\": true", "\"handed_over\": false")).unwrap();
    let discard = ["discard", "t.raw", "--yes"];
    scratch.run(&discard).fails(&["may still wait on its export", "has the target open"]);
    let boot = ["boot", "web01@latest", "t.raw", "--qemu", "true"];
    scratch.run(&boot).fails(&["may still wait on its export", "boot it then"]);
    let live = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s2", "--exit-when-done"];
    scratch.run(&live).ends_with(0);
    // Some program has it open, and is no machine that waits.
    scratch.run(&discard).ends_with(0);
}

#[test]
fn the_mark_of_a_machine_on_the_target_is_not_taken_back_for_another_one() {
    let (scratch, qemu) = killed_in_the_move();
    // That one gave the move up; another machine has the target.
    qemu.ends();
    qemu.is(Stage::OnExport);
    let mut other = locked_by_another(&scratch);
    let record = || std::fs::read(scratch.path("t.raw.lifeboot/session.json")).unwrap();
    let before = record();
    let live = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--qmp", "a qmp"];
    scratch.run(&live).fails(&[
        "a machine runs from",
        "another one, whose drive is on the export",
        "end the other one",
    ]);
    assert!(record() == before, "{}", String::from_utf8_lossy(&record()));
    scratch.run(&["save", "t.raw"]).fails(&["or was about to be when the agent ended"]);
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn what_a_move_left_open_in_the_machines_own_qemu_keeps_nobody_from_serving_it_again() {
    let (scratch, qemu) = killed_in_the_move();
    qemu.is(Stage::OnExport);
    // A node that nothing uses may hold a lock all the same.
    let target = File::options().write(true).open(scratch.path("t.raw")).unwrap();
    rustix::fs::fcntl_lock(&target, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut live = live_restore(&scratch, &["--qmp", "a qmp"]);
    live.kill().unwrap();
    live.wait().unwrap();
}

#[test]
fn a_machine_on_the_export_is_not_served_what_another_one_was_moved_onto() {
    let (scratch, qemu) = killed_in_the_move();
    qemu.is(Stage::Moved);
    scratch.run(&["pivot", "t.raw", "--qmp", "a qmp"]).ends_with(0);
    let noted = || {
        ["session.json", "move.json"]
            .map(|name| std::fs::read(scratch.path("t.raw.lifeboot").join(name)).unwrap())
    };
    let before = noted();
    // As one that waited there all the time.
    qemu.ends();
    qemu.is(Stage::OnExport);
    let live = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--qmp", "a qmp"];
    let words = ["was moved onto", "is not that machine", "end that QEMU"];
    scratch.run(&live).fails(&words);
    scratch.run(&["pivot", "t.raw", "--qmp", "a qmp"]).fails(&words);
    assert!(noted() == before);
}

#[test]
fn of_a_session_that_is_over_nobody_says_that_its_machine_may_not_have_been_moved() {
    let (scratch, qemu) = killed_in_the_move();
    qemu.is(Stage::Moved);
    scratch.run(&["pivot", "t.raw", "--qmp", "a qmp"]).ends_with(0);
    let live = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--qmp"];
    // Started by hand, and ended.
    let other = Qemu::start(&scratch.path("other"), "/nowhere".into(), "");
    for (socket, words) in [("other", "has it neither there"), ("none", "cannot be asked")] {
        let said = scratch.run(&[&live[..], &[socket]].concat()).fails(&["is over", words]);
        assert!(!said.stderr.contains("about to be"), "{said:?}");
    }
    scratch.run(&["pivot", "t.raw", "--qmp", "other"]).fails(&["is over", "has it neither there"]);
    drop(other);
}
