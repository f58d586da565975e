//! Work that is done, and a stdout that cannot be told so: full, or with nobody at its other end.

use std::fs::File;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{MIB, Ran, Scratch, assert_same, slow_live_restore};

/// What becomes of stdout.
#[derive(Clone, Copy)]
enum Stdout {
    Full,
    Closed,
}

fn run(scratch: &Scratch, args: &[&str], stdout: Stdout) -> Ran {
    let to = match stdout {
        Stdout::Full => File::options().write(true).open("/dev/full").unwrap().into(),
        Stdout::Closed => {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            Stdio::from(writer)
        }
    };
    let child = scratch.command(args).stdout(to).stderr(Stdio::piped()).spawn().unwrap();
    Ran::of(child.wait_with_output().unwrap())
}

/// Its report was lost, and it says what was done all the same.
#[track_caller]
fn lost(scratch: &Scratch, args: &[&str], done: &str) {
    for args in [args, &[args, &["--json"]].concat()] {
        let ran = run(scratch, args, Stdout::Full).ends_with(1);
        for words in [done, "all the same; only the report of it is lost", "cannot write to stdout"] {
            ran.tells_of(words);
        }
    }
}

fn snapshots(scratch: &Scratch) -> usize {
    scratch.json(&["snapshots"]).as_array().unwrap().len()
}

#[test]
fn what_was_made_is_named_where_the_report_of_it_is_lost() {
    let scratch = Scratch::empty();
    for (repo, args) in [("repo", &["init"][..]), ("other", &["init", "--json", "-r", "other"])] {
        let ran = run(&scratch, args, Stdout::Full);
        ran.ends_with(1).tells_of(&format!("the repository {repo} was made all the same"));
    }
    let disk = scratch.disk("d.raw", 4 * MIB, &[(0, 1 << 20, 1)]);
    lost(&scratch, &["capture", "web01", "d.raw"], "the snapshot web01@");
    assert_eq!(snapshots(&scratch), 2);
    lost(&scratch, &["restore", "web01@latest", "out.raw", "--force"], "out.raw was restored");
    assert_same(&disk, &scratch.path("out.raw"));
}

#[test]
fn what_a_session_was_made_to_do_is_named_where_the_report_of_it_is_lost() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 8 * MIB, &[(0, 3 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let mut child = slow_live_restore(&scratch);
    lost(&scratch, &["limit", "t.raw", "30"], "the limit was changed to 30 B/s");
    lost(&scratch, &["trace", "begin", "t.raw"], "the recording was begun");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
    let ran = run(&scratch, &["discard", "--yes", "t.raw", "--json"], Stdout::Full);
    ran.ends_with(1).tells_of("the session is discarded all the same");
    assert!(!scratch.path("t.raw.lifeboot").exists());
}

#[test]
fn a_reader_who_has_gone_away_keeps_nothing_from_being_done() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 8 * MIB, &[(0, 3 << 20, 1)]);
    let done = |args: &[&str]| run(&scratch, args, Stdout::Closed).ends_with(0);
    done(&["capture", "web01", "d.raw"]);
    assert_eq!(snapshots(&scratch), 1);
    let mut child = slow_live_restore(&scratch);
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
    done(&["save", "t.raw"]);
    assert_eq!(snapshots(&scratch), 2);
    done(&["discard", "--yes", "t.raw"]);
    assert!(!scratch.path("t.raw.lifeboot").exists());
}

#[test]
fn damage_is_told_by_the_exit_code_to_whoever_does_not_read() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let pack = scratch.pack();
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[1 << 20] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let args = ["restore", "web01@latest", "out.raw", "--keep-going"];
    run(&scratch, &args, Stdout::Closed).ends_with(3).tells_of("damaged");
}
