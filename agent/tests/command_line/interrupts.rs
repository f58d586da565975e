//! Ctrl-C, and readers that go away.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{MIB, Scratch, live_restore, noise, write};

/// Waits until a directory has an entry whose name ends so; the child must still be at work then.
fn wait_for_name(dir: &Path, end: &str, child: &mut Child) {
    loop {
        let entries = std::fs::read_dir(dir).unwrap();
        if entries.map(|entry| entry.unwrap().file_name()).any(|name| name.to_string_lossy().ends_with(end)) {
            return;
        }
        assert!(child.try_wait().unwrap().is_none(), "it ended before anything was seen of it");
        std::thread::yield_now();
    }
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn ended(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Bytes that keep zstd's highest levels busy for long: half noise, half repetition.
fn slow_to_compress(len: usize) -> Vec<u8> {
    noise(len / 2, 3).chunks(64).flat_map(|part| [part, part].concat()).collect()
}

#[test]
fn an_interrupted_capture_leaves_nothing() {
    let scratch = Scratch::new();
    write(&scratch.path("d.raw"), &slow_to_compress(256 << 20));
    for (which, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let mut command = scratch.command(&["capture", "g", "d.raw", "--level", "19"]);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        wait_for_name(&scratch.path("repo/tmp"), "pack", &mut child);
        signal(&child, which);
        let (ended, stderr) = ended(child);
        assert_eq!(ended, Some(code), "{stderr}");
        assert!(stderr.contains("interrupted by"), "{stderr}");
        assert_eq!(scratch.json(&["snapshots"]), serde_json::json!([]));
        assert!(scratch.names("repo/tmp").is_empty());
    }
    scratch.run(&["verify"]).ends_with(0);
}

#[test]
fn an_interrupted_restore_leaves_the_target_as_it_was() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 512 * MIB, &[(0, 400 << 20, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    let target = scratch.disk("out.raw", 512 * MIB, &[(0, 1000, 9)]);
    let mut command = scratch.command(&["restore", "g@latest", "out.raw", "--force"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    wait_for_name(&scratch.path("."), "lifeboot-partial", &mut child);
    signal(&child, Signal::INT);
    let (ended, stderr) = ended(child);
    assert_eq!(ended, Some(130), "{stderr}");
    assert_eq!(scratch.names("."), ["d.raw", "out.raw", "repo"]);
    let mut head = [0; 1000];
    std::fs::File::open(target).unwrap().read_exact(&mut head).unwrap();
    assert_eq!(head[..], noise(1000, 9));
}

#[test]
fn two_signals_at_once_are_one_interrupt() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 512 * MIB, &[(0, 400 << 20, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    let mut command = scratch.command(&["restore", "g@latest", "out.raw"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    wait_for_name(&scratch.path("."), "lifeboot-partial", &mut child);
    // Both are there when it goes on.
    for which in [Signal::STOP, Signal::INT, Signal::TERM, Signal::CONT] {
        signal(&child, which);
    }
    let (ended, stderr) = ended(child);
    assert!(matches!(ended, Some(130 | 143)) && stderr.contains("interrupted by"), "{ended:?} {stderr}");
    assert_eq!(scratch.names("."), ["d.raw", "repo"]);
}

#[test]
fn a_source_that_changes_meanwhile_is_captured_and_marked() {
    let scratch = Scratch::new();
    write(&scratch.path("d.raw"), &slow_to_compress(16 << 20));
    let mut command = scratch.command(&["capture", "g", "d.raw", "--level", "19"]);
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    wait_for_name(&scratch.path("repo/tmp"), "pack", &mut child);
    let file = std::fs::File::options().write(true).open(scratch.path("d.raw")).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let (ended, stderr) = ended(child);
    assert_eq!(ended, Some(0), "{stderr}");
    assert!(stderr.contains("warning") && stderr.contains("d.raw") && stderr.contains("changed"), "{stderr}");
    assert_eq!(scratch.json(&["show", "g@latest"])["consistency"], "changing");
}

#[test]
fn a_source_that_becomes_shorter_meanwhile_is_captured_with_zeroes_at_its_end() {
    let scratch = Scratch::new();
    let bytes = slow_to_compress(96 << 20);
    write(&scratch.path("d.raw"), &bytes);
    let mut command = scratch.command(&["capture", "g", "d.raw", "--level", "19", "--json"]);
    let mut child = command.stderr(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    wait_for_name(&scratch.path("repo/tmp"), "pack", &mut child);
    let left = 1_000_000;
    std::fs::File::options().write(true).open(scratch.path("d.raw")).unwrap().set_len(left).unwrap();
    let output = child.wait_with_output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["consistency"], "changing");
    assert!(report["warnings"][0].as_str().unwrap().contains("size went from"), "{report}");
    scratch.run(&["restore", "g@latest", "out.raw"]).ends_with(0);
    let restored = std::fs::read(scratch.path("out.raw")).unwrap();
    assert_eq!(restored.len(), bytes.len());
    // Each byte is what it was before, or zero; and what was left of the source is there.
    assert!(restored[..left as usize] == bytes[..left as usize]);
    assert!(restored.iter().zip(&bytes).all(|(now, before)| now == before || *now == 0));
    assert_eq!(restored.last(), Some(&0));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", MIB, &[(0, 1000, 1)]);
    write(&scratch.path("a.bin"), &noise(4 << 20, 1));
    scratch.run(&["capture", "g", "d.raw", "--attach", "a.bin"]).ends_with(0);
    // More than a pipe holds, of which one byte is read.
    let mut command = scratch.command(&["show", "g@latest", "--attachment", "a.bin"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    drop(stdout);
    assert_eq!(ended(child), (Some(0), String::new()));
    // Nobody reads stderr either.
    let mut child = scratch.command(&["show", "nothing@latest"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn at_the_question_of_a_discard_one_ctrl_c_is_a_no_and_a_capital_y_a_yes() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 8 * MIB, &[(0, 4 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let mut live = live_restore(&scratch, &["--no-background"]);
    signal(&live, Signal::TERM);
    assert!(live.wait().unwrap().success());
    let inside = format!("exec {} discard t.raw", env!("CARGO_BIN_EXE_lifeboot"));
    let discard = |answer: &[u8]| {
        let mut script = scratch.on_a_terminal(&inside);
        let mut script = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = script.stdout.take().unwrap();
        let mut text = Vec::new();
        let asks = |text: &[u8]| text.windows(7).any(|part| part == b"? [y/N]");
        while !asks(&text) {
            let mut part = [0; 256];
            let count = stdout.read(&mut part).unwrap();
            assert!(count > 0, "it ended: {}", String::from_utf8_lossy(&text));
            text.extend_from_slice(&part[..count]);
        }
        script.stdin.as_mut().unwrap().write_all(answer).unwrap();
        stdout.read_to_end(&mut text).unwrap();
        (script.wait().unwrap().code(), String::from_utf8_lossy(&text).into_owned())
    };
    // What a terminal makes of Ctrl-C is one SIGINT.
    let (code, said) = discard(b"\x03");
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("interrupted by Ctrl-C"), "{said}");
    let (code, said) = discard(b"\n");
    assert_eq!(code, Some(1), "{said}");
    assert!(scratch.path("t.raw.lifeboot/session.json").exists());
    let (code, said) = discard(b"Y\n");
    assert_eq!(code, Some(0), "{said}");
    assert!(!scratch.path("t.raw.lifeboot").exists());
}
