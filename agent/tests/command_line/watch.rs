//! `status --watch`: on a terminal, piped, and as JSON; across the agent's end and its coming back.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{MIB, Scratch, slow_live_restore};

fn captured() -> Scratch {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 8 * MIB, &[(0, 4 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    scratch
}

fn signal(child: &mut Child, signal: Signal) -> Option<i32> {
    kill_process(Pid::from_child(child), signal).unwrap();
    child.wait().unwrap().code()
}

#[test]
fn a_document_a_second_shows_the_strip_and_follows_the_agent() {
    let scratch = captured();
    let mut live = slow_live_restore(&scratch);
    let mut watch =
        scratch.command(&["status", "--watch", "--json", "t.raw"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut seen = BufReader::new(watch.stdout.take().unwrap())
        .lines()
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap()["disks"][0].clone());
    let first = seen.next().unwrap();
    assert_eq!((first["phase"].as_str(), first["disk"].as_str()), (Some("running"), Some("disk0")));
    let strip = first["strip"].as_str().unwrap();
    // 8 MiB in cells of 256 KiB. What is zeroes was home from the start; of the rest hardly anything is.
    assert_eq!(strip.len(), 32, "{strip}");
    assert_eq!(&strip[16..], "#".repeat(16), "{strip}");
    assert!(strip[4..16].chars().all(|cell| ".>+".contains(cell)), "{strip}");
    assert!(strip.contains('.'), "{strip}");
    assert_eq!(signal(&mut live, Signal::TERM), Some(0));
    let stopped = seen.find(|disk| disk["phase"] == "stopped").unwrap();
    assert_eq!((&stopped["strip"], &stopped["pid"]), (&Value::Null, &Value::Null));
    let mut live = slow_live_restore(&scratch);
    seen.find(|disk| disk["phase"] == "running").unwrap();
    scratch.run(&["limit", "t.raw", "0"]).ends_with(0);
    let complete = seen.find(|disk| disk["phase"] == "complete").unwrap();
    assert_eq!(complete["strip"], "#".repeat(32));
    assert_eq!(signal(&mut watch, Signal::INT), Some(0));
    assert_eq!(signal(&mut live, Signal::TERM), Some(0));
}

#[test]
fn without_a_terminal_it_is_a_line_and_without_a_session_an_error() {
    let scratch = captured();
    let mut live = slow_live_restore(&scratch);
    let mut watch = scratch.command(&["status", "--watch", "t.raw"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let line = lines.next().unwrap().unwrap();
        for word in ["web01@", "/disk0: running", "% home", "0 misses", "################]"] {
            assert!(line.contains(word), "{line}");
        }
        assert!(!line.contains('\x1b'), "{line}");
    }
    // Whoever reads no more ends it.
    drop(lines);
    assert_eq!(watch.wait().unwrap().code(), Some(0));
    signal(&mut live, Signal::TERM);
    scratch.run(&["status", "--watch", "d.raw"]).fails(&["no live-restore to d.raw is known"]);
    scratch.run(&["status", "--watch", "--listen", "unix:s"]).ends_with(2);
}

#[test]
fn on_a_terminal_it_is_redrawn_in_place_and_fits() {
    let scratch = captured();
    let mut live = slow_live_restore(&scratch);
    let program = env!("CARGO_BIN_EXE_lifeboot");
    let inside = format!("stty cols 50 rows 20; exec {program} status --watch t.raw");
    let mut script = scratch.on_a_terminal(&inside);
    let mut script = script.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = script.stdout.take().unwrap();
    let mut text = String::new();
    // Up to the third view.
    while text.matches("\x1b[J").count() < 3 {
        let mut part = [0; 4096];
        let count = stdout.read(&mut part).unwrap();
        assert!(count > 0, "it ended: {text:?}");
        text.push_str(&String::from_utf8_lossy(&part[..count]));
    }
    let views: Vec<&str> = text.split("\x1b[J").collect();
    let drawn = views[0].matches('\n').count();
    assert!(views[1].contains(&format!("\x1b[{drawn}A")), "{views:?}");
    for word in ["disk0", "% home", "0 misses", "0 clients connected; limit 20 B/s", "# home"] {
        assert!(views[0].contains(word), "{word}: {views:?}");
    }
    for line in views[0].split("\r\n") {
        let shown = line.trim_start_matches('\r').trim_end_matches("\x1b[K");
        assert!(shown.chars().count() < 50, "{shown:?}");
    }
    // Nothing is changed about the terminal, so that nothing must be put back.
    assert!(!text.contains("\x1b[?"), "{text:?}");
    signal(&mut script, Signal::TERM);
    signal(&mut live, Signal::TERM);
}
