//! `--take-over` where the new agent could not go on: it sees that beforehand, and the old one serves as if nothing had been.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::support::{MIB, Ran, Scratch, live_restore, park};

fn served() -> (Scratch, Child) {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let live = live_restore(&scratch, &["--no-background"]);
    (scratch, live)
}

fn is_served(scratch: &Scratch) -> bool {
    let place = format!("nbd+unix:///?socket={}", scratch.path("s").display());
    let ran = Command::new("qemu-io").args(["-f", "raw", "-c", "read 1M 64k", &place]).output().unwrap();
    ran.status.success()
}

const TAKE_OVER: [&str; 6] = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--take-over"];

fn take_over_with(scratch: &Scratch, further: &[&str]) -> Ran {
    scratch.run(&[&TAKE_OVER, further].concat())
}

fn take_over(scratch: &Scratch) -> Ran {
    take_over_with(scratch, &[])
}

#[track_caller]
fn is_refused(scratch: &Scratch, words: &[&str]) {
    take_over(scratch).fails(words).tells(&["goes on"]);
    assert!(is_served(scratch), "{words:?}");
}

#[test]
fn an_agent_whose_target_cannot_be_gone_on_with_is_not_told_to_end() {
    let (scratch, mut live) = served();
    let [target, aside] = ["t.raw", "aside.raw"].map(|name| scratch.path(name));
    std::fs::rename(&target, &aside).unwrap();
    is_refused(&scratch, &["t.raw", "is gone"]);
    scratch.copy("aside.raw", "t.raw");
    is_refused(&scratch, &["is another target now"]);
    take_over_with(&scratch, &["--moved"]).fails(&["t.raw is another target now", "end the agent first"]);
    assert!(is_served(&scratch), "--moved is of what nobody serves");
    std::fs::rename(&aside, &target).unwrap();
    let mut successor = live_restore(&scratch, &["--take-over"]);
    assert!(live.wait().unwrap().success());
    assert!(is_served(&scratch));
    // The only name that the bytes have is the agent's.
    std::fs::remove_file(&target).unwrap();
    is_refused(&scratch, &["t.raw", "is gone"]);
    park(&mut successor);
}

#[test]
fn an_agent_whose_target_may_not_be_written_to_is_not_told_to_end() {
    let (scratch, mut live) = served();
    let chattr = |how: &str| {
        let mut command = Command::new("chattr");
        command.arg(how).arg(scratch.path("t.raw")).output().is_ok_and(|ran| ran.status.success())
    };
    // Not every file system and user can.
    if chattr("+i") {
        let refused = std::panic::catch_unwind(|| is_refused(&scratch, &["t.raw", "not permitted"]));
        assert!(chattr("-i"));
        refused.unwrap();
    }
    park(&mut live);
}

#[test]
fn an_agent_whose_session_cannot_be_written_to_is_not_told_to_end() {
    let (scratch, mut live) = served();
    for (name, attribute) in [("live", "i"), ("live", "a"), ("session.json", "i"), ("session.json", "a")] {
        let chattr = |sign: &str| {
            let mut command = Command::new("chattr");
            command.arg(format!("{sign}{attribute}")).arg(scratch.path("t.raw.lifeboot").join(name));
            command.output().is_ok_and(|ran| ran.status.success())
        };
        // Not every file system and user can.
        if chattr("+") {
            let ran = take_over(&scratch);
            assert!(chattr("-") && is_served(&scratch), "{name} {attribute}: {ran:?}");
            ran.fails(&[name, "not permitted"]);
        }
    }
    park(&mut live);
}

#[test]
fn who_found_no_session_does_not_take_the_place_of_an_agent_that_has_one() {
    let (scratch, mut live) = served();
    assert!(is_served(&scratch));
    let [dir, away] = ["t.raw.lifeboot", "away"].map(|name| scratch.path(name));
    for further in [&[][..], &["--force"]] {
        std::fs::rename(&dir, &away).unwrap();
        let mut command = scratch.command(&[&TAKE_OVER, further].concat());
        let mut waits = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // It sleeps while somebody has the address: by then it has looked for the session.
        let sleeps = format!("{} ", libc::SYS_clock_nanosleep);
        let doing = format!("/proc/{}/syscall", waits.id());
        while !std::fs::read_to_string(&doing).unwrap().starts_with(&sleeps) {
            assert!(waits.try_wait().unwrap().is_none(), "{:?}", Ran::of(waits.wait_with_output().unwrap()));
            std::thread::yield_now();
        }
        std::fs::rename(&away, &dir).unwrap();
        let refused = Ran::of(waits.wait_with_output().unwrap());
        refused.fails(&["no session was in ", "run the same command again", "goes on"]);
        assert!(is_served(&scratch), "{further:?}");
    }
    park(&mut live);
}

#[test]
fn an_agent_whose_journal_cannot_be_read_is_not_told_to_end() {
    let (scratch, mut live) = served();
    let path = scratch.path("t.raw.lifeboot/journal");
    let journal = File::options().read(true).write(true).open(path).unwrap();
    let mut page = [0; 4096];
    journal.read_exact_at(&mut page, 0).unwrap();
    journal.write_all_at(&[0; 4096], 0).unwrap();
    is_refused(&scratch, &["the journal does not begin as one does"]);
    journal.write_all_at(&page, 0).unwrap();
    park(&mut live);
}

/// The program, where it may have so many files open.
fn with_files(scratch: &Scratch, files: u32, args: &str) -> Ran {
    let line = format!("ulimit -n {files}; exec {} {args}", env!("CARGO_BIN_EXE_lifeboot"));
    let mut command = Command::new("sh");
    command.args(["-c", &line]).current_dir(scratch.path(".")).env("LIFEBOOT_REPO", "repo");
    Ran::of(command.output().unwrap())
}

#[test]
fn who_may_have_too_few_files_open_says_so_and_nobody_is_told_to_end() {
    let (scratch, mut live) = served();
    for files in [12, 20, 24] {
        let args = "live-restore web01@latest t.raw --listen unix:s --take-over";
        with_files(&scratch, files, args).fails(&[&format!("no more than {files} files open"), "ulimit -n"]);
        assert!(is_served(&scratch), "with {files} files");
    }
    park(&mut live);
    let few = "no more than 12 files open";
    let verbs = [
        "live-restore web01@latest o.raw --listen unix:o",
        "restore web01@latest o.raw",
        "capture x d.raw",
        "status t.raw",
        "save t.raw",
        "discard t.raw --yes",
    ];
    for args in verbs {
        with_files(&scratch, 12, args).fails(&[few, "ulimit -n"]);
    }
    for args in ["capture x d.raw", "restore web01@latest p.raw", "status t.raw", "save t.raw"] {
        with_files(&scratch, 64, args).ends_with(0);
    }
    assert!(!scratch.path("o.raw").exists());
}

#[test]
fn a_save_for_which_the_agent_may_open_too_few_files_says_so_and_the_guests_go_on() {
    let (scratch, mut live) = served();
    // By then all of its threads have what they need.
    assert!(is_served(&scratch));
    let opens = |limit| {
        let limit = Rlimit { current: Some(limit), maximum: Some(1024) };
        prlimit(Some(Pid::from_child(&live)), Resource::Nofile, limit).unwrap();
    };
    let has = std::fs::read_dir(format!("/proc/{}/fd", live.id())).unwrap().count() as u64;
    let mut refused = 0;
    // The first of them is the connection over which it is asked.
    for more in 2..64 {
        opens(has + more);
        let ran = scratch.run(&["save", "t.raw"]);
        opens(1024);
        assert!(is_served(&scratch), "with {more} files more");
        if ran.code == Some(0) {
            break;
        }
        let why = ran.ends_with(1).tells(&[]).stderr;
        assert!(why.contains("files open") || why.contains("Too many open files"), "with {more}: {why}");
        refused += 1;
    }
    assert!((1..62).contains(&refused), "{refused}");
    park(&mut live);
}
