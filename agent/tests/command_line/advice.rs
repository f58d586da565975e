//! What the program says to do is what helps: commands that it advises work as they stand.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::refusals::SmallDisk;
use crate::support::{MIB, Ran, Scratch, is_root, live_restore, park, slow_live_restore, write};

fn with_snapshot() -> Scratch {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    scratch
}

/// A session of `t.raw` that is not complete, parked.
fn parked(further: &[&str]) -> Scratch {
    let scratch = with_snapshot();
    let args = [&["--limit", "20"], further].concat();
    let mut live = live_restore(&scratch, &args);
    park(&mut live);
    scratch
}

/// Runs the `lifeboot discard` that a failure advises, as a shell does.
#[track_caller]
fn follow(scratch: &Scratch, failed: &Ran) {
    let command = failed.stderr.split('`').find(|part| part.starts_with("lifeboot discard "));
    let command = command.unwrap_or_else(|| panic!("it advises no discard: {failed:?}"));
    let program = env!("CARGO_BIN_EXE_lifeboot");
    let line = format!("{program} {} --yes", command.strip_prefix("lifeboot ").unwrap());
    let ran = Command::new("sh").args(["-c", &line]).current_dir("/").stdin(Stdio::null()).output().unwrap();
    assert!(Ran::of(ran).ends_with(0).stdout.contains("is discarded"), "{line}");
    assert!(!scratch.path("t.raw.lifeboot").exists());
}

fn go_on(scratch: &Scratch, further: &[&str]) -> Ran {
    let args = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--exit-when-done"];
    scratch.run(&[&args, further].concat())
}

/// What is said of it, and what brings it about.
type Damage<'a> = (&'a str, &'a dyn Fn(&Scratch));

#[test]
fn a_session_that_cannot_be_gone_on_with_is_given_up_by_the_command_that_is_advised() {
    let name = |scratch: &Scratch| scratch.path("t.raw.lifeboot");
    let damages: [Damage; 4] = [
        ("is gone", &|scratch| std::fs::remove_file(scratch.path("t.raw")).unwrap()),
        ("is another target now", &|scratch| {
            std::fs::copy(scratch.path("t.raw"), scratch.path("copy")).unwrap();
            std::fs::rename(scratch.path("copy"), scratch.path("t.raw")).unwrap();
        }),
        ("session.json is damaged", &|scratch| write(&name(scratch).join("session.json"), b"{")),
        ("session.json is missing", &|scratch| {
            std::fs::remove_file(name(scratch).join("session.json")).unwrap();
        }),
    ];
    for (words, damage) in damages {
        let scratch = parked(&[]);
        damage(&scratch);
        let failed = go_on(&scratch, &[]).fails(&[words]);
        follow(&scratch, &failed);
        go_on(&scratch, &["--force"]).ends_with(0);
    }
}

#[test]
fn a_session_that_is_kept_elsewhere_is_given_up_by_the_command_that_is_advised() {
    let state = ["--state", "a state"];
    for damage in ["session.json", "journal"] {
        let scratch = parked(&state);
        let dir = std::fs::read_dir(scratch.path("a state")).unwrap().next().unwrap().unwrap().path();
        write(&dir.join(damage), b"{");
        std::fs::remove_file(dir.join("live")).unwrap();
        let failed = go_on(&scratch, &state).fails(&[dir.file_name().unwrap().to_str().unwrap()]);
        follow(&scratch, &failed);
        assert!(!dir.exists());
        go_on(&scratch, &["--force"]).ends_with(0);
    }
    let scratch = parked(&[]);
    let failed = go_on(&scratch, &state).fails(&["is kept in", "leave --state out"]);
    follow(&scratch, &failed);
    go_on(&scratch, &[&state[..], &["--force"]].concat()).ends_with(0);
}

#[test]
fn a_discard_says_that_nothing_was_written_and_removes_no_target_that_is_not_there() {
    let scratch = parked(&[]);
    std::fs::remove_file(scratch.path("t.raw")).unwrap();
    let told = scratch.run(&["discard", "t.raw", "--yes", "--remove-target"]).ends_with(0).stdout;
    assert!(told.contains("the guest wrote nothing") && !told.contains("unless it was saved"), "{told}");
    assert!(told.contains("t.raw does not exist") && !told.contains("will be removed"), "{told}");

    go_on(&scratch, &[]).ends_with(0);
    let discard = ["discard", "t.raw", "--remove-target"];
    let told = scratch.run(&discard).ends_with(1).stdout;
    assert!(told.contains("the guest wrote nothing") && told.contains("t.raw will be removed"), "{told}");
    // As when a machine was started from it, which the session does not hear of.
    write(&scratch.path("t.raw"), b"x");
    let told = scratch.run(&discard).ends_with(1).stdout;
    assert!(told.contains("how much is not known") && !told.contains("wrote nothing"), "{told}");
}

#[test]
fn a_restore_onto_a_session_advises_what_gives_it_up() {
    let scratch = parked(&[]);
    let restore = || scratch.run(&["restore", "web01@latest", "t.raw", "--force"]);
    let failed = restore().fails(&["not complete"]);
    follow(&scratch, &failed);
    restore().ends_with(0);
    std::fs::remove_file(scratch.path("t.raw")).unwrap();
    go_on(&scratch, &[]).ends_with(0);
    let failed = restore().fails(&["t.raw", "belongs to a live-restore"]);
    follow(&scratch, &failed);
    restore().ends_with(0);
    // Nothing that discard knows how to remove.
    std::fs::create_dir(scratch.path("t.raw.lifeboot")).unwrap();
    write(&scratch.path("t.raw.lifeboot/list"), b"x");
    let ran = restore().fails(&["holds no session", "move it away"]);
    assert!(!ran.stderr.contains("discard"), "{ran:?}");
}

#[test]
fn whoever_may_not_remove_a_session_is_told_who_may() {
    if !is_root() {
        return;
    }
    let scratch = parked(&[]);
    write(&scratch.path("t.raw.lifeboot/session.json"), b"{");
    for (path, mode) in [(".", 0o755), ("t.raw.lifeboot", 0o755)] {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(scratch.path(path), std::fs::Permissions::from_mode(mode)).unwrap();
    }
    as_nobody(&scratch, &["status", "t.raw"]).fails(&[
        "session.json is damaged",
        "lifeboot discard",
        "as root or as the owner of",
    ]);
}

pub(crate) fn as_nobody(scratch: &Scratch, args: &[&str]) -> Ran {
    if !scratch.path("lifeboot").exists() {
        std::fs::copy(env!("CARGO_BIN_EXE_lifeboot"), scratch.path("lifeboot")).unwrap();
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "./lifeboot"]).args(args);
    command.current_dir(scratch.path(".")).env("LIFEBOOT_REPO", "repo").stdin(Stdio::null());
    Ran::of(command.output().unwrap())
}

#[test]
fn nobody_is_told_of_a_note_that_he_may_not_even_look_for() {
    if !is_root() {
        return;
    }
    use std::os::unix::fs::PermissionsExt as _;
    // A root's agent makes the runtime directory, which is root's alone.
    let scratch = parked(&[]);
    let open = |path: &str| {
        std::fs::set_permissions(scratch.path(path), std::fs::Permissions::from_mode(0o777)).unwrap();
    };
    open(".");
    std::fs::create_dir(scratch.path("mine")).unwrap();
    open("mine");
    let live = ["live-restore", "web01@latest", "mine/t.raw", "--listen", "unix:mine/s", "--exit-when-done"];
    as_nobody(&scratch, &live).ends_with(0);
    for args in [&live[..], &["status", "mine/t.raw"], &["discard", "mine/t.raw", "--yes"]] {
        let ran = as_nobody(&scratch, args).ends_with(0);
        assert!(!ran.stderr.contains("note"), "{ran:?}");
    }
}

#[test]
fn a_target_that_is_a_link_to_nothing_is_told_as_that() {
    let scratch = with_snapshot();
    std::os::unix::fs::symlink("gone/t.raw", scratch.path("t.raw")).unwrap();
    let words = ["t.raw is a symbolic link to gone/t.raw, which does not exist", "remove the link"];
    go_on(&scratch, &[]).fails(&words);
    scratch.run(&["restore", "web01@latest", "t.raw"]).fails(&words);
    assert_eq!(scratch.names("."), ["d.raw", "repo", "t.raw"]);
    std::fs::create_dir(scratch.path("gone")).unwrap();
    write(&scratch.path("gone/t.raw"), b"");
    go_on(&scratch, &[]).ends_with(0);
}

#[test]
fn a_target_whose_name_is_no_text_is_refused_at_once_or_written() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    let scratch = with_snapshot();
    let run = |args: &[&str], name: &[u8]| {
        Ran::of(scratch.command(args).arg(OsStr::from_bytes(name)).output().unwrap())
    };
    let live = ["live-restore", "web01@latest", "--listen", "unix:s"];
    run(&live, b"odd-\xff").fails(&["is not UTF-8", "rename"]);
    let elsewhere = [&live[..], &["t.raw", "--state"]].concat();
    run(&elsewhere, b"odd-\xff").fails(&["the state directory", "is not UTF-8"]);
    assert_eq!(scratch.names("."), ["d.raw", "repo"]);
    let report = run(&["restore", "web01@latest", "--json"], b"odd-\xff").ends_with(0).json();
    assert_eq!(report["target"], "odd-\u{fffd}");
}

#[test]
fn what_is_served_is_named_so_that_it_is_found_from_any_directory() {
    let scratch = with_snapshot();
    let mut live = slow_live_restore(&scratch);
    let uri = scratch.json(&["status", "t.raw"])["uri"].as_str().unwrap().to_owned();
    kill_process(Pid::from_child(&live), Signal::TERM).unwrap();
    live.wait().unwrap();
    let socket = scratch.path("s").canonicalize().unwrap_or_else(|_| scratch.path("s"));
    assert!(uri.ends_with(&format!("?socket={}", socket.display())), "{uri}");
    let mut child = scratch
        .command(&["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--limit", "20"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let qemu = lines.find(|line| line.starts_with("QEMU: ")).unwrap();
    assert!(qemu.contains(&format!("server.path={},", socket.display())), "{qemu}");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
}

#[test]
fn a_guest_that_finds_no_room_on_a_disk_that_is_home_is_told_of_once() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    scratch.disk("d.raw", 64 * MIB, &[(0, 1 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    // The journal is there too.
    let _small = SmallDisk::mount(scratch.path("small"), "30m");
    let mut live = scratch
        .command(&["live-restore", "web01@latest", "small/t.raw", "--listen", "unix:s"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = BufReader::new(live.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(told.any(|line| line.starts_with("complete: ")));
    let status = || scratch.json(&["status", "small/t.raw"]);
    assert_eq!(status()["waiting"], serde_json::Value::Null);
    let uri = format!("nbd+unix:///?socket={}", scratch.path("s").display());
    for _ in 0..2 {
        let ran = Command::new("qemu-io").args(["-f", "raw", "-c", "write 2M 40M", &uri]).output().unwrap();
        assert!(Ran::of(ran).stdout.contains("No space left"));
    }
    let waiting = status()["waiting"].as_str().unwrap().to_owned();
    assert!(waiting.contains("small/t.raw: make room there"), "{waiting}");
    let mut logged = BufReader::new(live.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(logged.any(|line| line.contains("small/t.raw: make room there")), "it is logged");
    park(&mut live);
    assert!(!logged.any(|line| line.contains("make room there")), "and once");
}
