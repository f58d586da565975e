//! What a running agent is asked through its socket, and what it is not upset by.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::Child;

use serde_json::Value;

use crate::support::{MIB, Scratch, live_restore, park, slow_live_restore};

/// A live-restore that runs, of a disk that will not be home soon.
fn running() -> (Scratch, Child) {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 8 * MIB, &[(0, 4 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let live = slow_live_restore(&scratch);
    (scratch, live)
}

fn connect(scratch: &Scratch) -> UnixStream {
    UnixStream::connect(scratch.path("t.raw.lifeboot/control.sock")).unwrap()
}

/// What the agent answers to these bytes: every line of it.
fn answer(scratch: &Scratch, bytes: &[u8]) -> Vec<Value> {
    let mut stream = connect(scratch);
    // It may hang up before it has read all of it.
    let _ = stream.write_all(bytes);
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn end(mut live: Child) {
    park(&mut live);
}

#[test]
fn a_request_is_answered_with_lines_and_one_that_is_not_known_with_the_reason() {
    let (scratch, live) = running();
    let lines = answer(&scratch, b"{\"request\":\"status\"}\n");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(lines[0]["reply"], "done");
    assert_eq!(lines[0]["result"]["pid"], live.id());
    // Without the end of the line, for whoever ends its half of the connection instead.
    let mut stream = connect(&scratch);
    stream.write_all(b"{\"request\":\"status\"}").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("{\"reply\":\"done\""), "{text}");
    for wrong in ["{\"request\":\"juggle\"}\n", "{}\n", "[]\n", "status\n", "\n", "\0\n"] {
        let lines = answer(&scratch, wrong.as_bytes());
        assert_eq!(lines.len(), 1, "{wrong:?}: {lines:?}");
        assert_eq!(lines[0]["reply"], "failed", "{wrong:?}");
        assert!(lines[0]["message"].as_str().unwrap().contains("does not understand"), "{wrong:?}");
        assert!(lines[0]["advice"].as_str().unwrap().contains("version"), "{wrong:?}");
    }
    end(live);
    assert!(!scratch.path("t.raw.lifeboot/control.sock").exists());
}

#[test]
fn peers_that_are_silent_huge_or_gone_keep_nobody_from_an_answer() {
    let (scratch, live) = running();
    let huge = vec![b'x'; 4 << 20];
    let lines = answer(&scratch, &huge);
    assert!(lines.iter().all(|line| line["reply"] == "failed"), "{lines:?}");
    for _ in 0..200 {
        // They leave before, or while, they are answered.
        drop(connect(&scratch));
        connect(&scratch).write_all(b"{\"request\":\"status\"}\n").unwrap();
    }
    // More than have a place at once.
    let silent: Vec<UnixStream> = (0..100).map(|_| connect(&scratch)).collect();
    assert_eq!(scratch.json(&["status", "t.raw"])["pid"], live.id());
    drop(silent);
    end(live);
    assert_eq!(scratch.json(&["status", "t.raw"])["phase"], "stopped");
}

#[test]
fn without_a_background_it_is_said_that_nothing_is_copied() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 8 * MIB, &[(0, 4 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let live = live_restore(&scratch, &["--no-background"]);
    let told = scratch.run(&["status", "t.raw"]).ends_with(0).stdout;
    assert!(told.contains("running: nothing is copied in the background"), "{told}");
    assert!(told.contains("50.0 %") && !told.contains("copying home"), "{told}");
    assert!(!told.contains("time left"), "{told}");
    let status = scratch.json(&["status", "t.raw"]);
    assert_eq!((&status["background"], &status["seconds_left"]), (&Value::Bool(false), &Value::Null));
    end(live);
    // Of no agent it cannot be told.
    assert_eq!(scratch.json(&["status", "t.raw"])["background"], Value::Null);
    let live = live_restore(&scratch, &["--limit", "20"]);
    assert_eq!(scratch.json(&["status", "t.raw"])["background"], true);
    end(live);
}

#[test]
fn the_limit_of_a_running_restore_is_changed_and_said() {
    let (scratch, live) = running();
    let ran = scratch.run(&["limit", "t.raw", "3MiB"]).ends_with(0);
    assert_eq!(ran.stdout, "limit: 3.0 MiB/s (it was 20 B/s)\n");
    assert_eq!(scratch.json(&["status", "t.raw"])["limit"], 3 << 20);
    let changed = scratch.json(&["limit", "t.raw", "0"]);
    assert_eq!(changed, serde_json::json!({"old": 3 << 20, "new": 0}));
    // Without a limit it is soon home.
    while scratch.json(&["status", "t.raw"])["phase"] != "complete" {
        std::thread::yield_now();
    }
    end(live);
    scratch.run(&["limit", "t.raw", "1MiB"]).fails(&["no agent serves", "t.raw", "--limit"]);
    scratch.run(&["limit", "d.raw", "1MiB"]).fails(&["no live-restore to d.raw is known"]);
    scratch.run(&["limit", "t.raw", "fast"]).ends_with(2).tells(&["not a rate"]);
}

#[test]
fn what_is_said_of_a_save_that_was_taken_back_is_what_came_of_it() {
    let (scratch, live) = running();
    let repository = scratch.path("repo").display().to_string();
    let request = serde_json::json!({
        "request": "save", "repository": repository, "group": "saved", "time": "2026-11-22T00:00:00Z", "note": null, "level": 3,
        "dry_run": false, "backup_of": null,
    });
    let mut made = 0;
    // Whether it was too late depends on the machine; that it never is cannot be.
    for _ in 0..200 {
        let mut lines = answer(&scratch, format!("{request}\n{{\"request\":\"cancel\"}}\n").as_bytes());
        let last = lines.pop().expect("it is answered");
        made += usize::from(last["reply"] == "done");
        assert_eq!(scratch.names("repo/snapshots").contains(&"saved".to_owned()), made > 0);
        let there = if made > 0 { scratch.names("repo/snapshots/saved").len() } else { 0 };
        assert_eq!(there, made, "{last}");
        if last["reply"] == "failed" {
            end(live);
            return;
        }
    }
    panic!("it was never given up");
}
