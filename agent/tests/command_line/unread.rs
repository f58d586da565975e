//! A stderr that nobody reads holds up neither a service nor the end of any verb; a stdout that nobody reads no work.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{MIB, Ran, Scratch, slow_live_restore};

/// A pipe that is full, and its reader.
fn full() -> (io::PipeReader, Stdio) {
    let (reader, mut writer) = io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let error = std::iter::repeat_with(|| writer.write(&[b'.'; 4096])).find_map(Result::err).unwrap();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    (reader, writer.into())
}

#[test]
fn a_save_is_made_before_anybody_reads_of_it() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 8 * MIB, &[(0, 3 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let saves = |made: u64| {
        let (mut reader, stdout) = full();
        let mut child = scratch.command(&["save", "t.raw"]).stdout(stdout).spawn().unwrap();
        while (scratch.json(&["snapshots"]).as_array().unwrap().len() as u64) < made {
            assert_eq!(child.try_wait().unwrap(), None, "it ended, and saved nothing");
            std::thread::yield_now();
        }
        let mut told = String::new();
        reader.read_to_string(&mut told).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        let lines: Vec<&str> = told.trim_start_matches('.').lines().collect();
        assert!(
            matches!(lines[..], [saving, saved] if saving.starts_with("saving ") && saved.starts_with("saved "))
        );
    };
    let mut live = slow_live_restore(&scratch);
    saves(2);
    kill_process(Pid::from_child(&live), Signal::TERM).unwrap();
    assert_eq!(live.wait().unwrap().code(), Some(0));
    saves(3);
}

#[test]
fn what_a_verb_has_found_is_told_on_stdout_though_nobody_reads_its_stderr() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let file = File::options().write(true).open(scratch.pack()).unwrap();
    file.write_all_at(b"another byte, and more", MIB).unwrap();
    // The damage is named on stderr before stdout has the report.
    for json in [&[][..], &["--json"]] {
        let args = ["restore", "web01@latest", "out.raw", "--keep-going", "--force"];
        let (_reader, stderr) = full();
        let ran = scratch.command(&[&args[..], json].concat()).stderr(stderr).output().unwrap();
        let told = Ran::of(ran).ends_with(3).stdout;
        assert!(told.contains(if json.is_empty() { "128.0 KiB lost" } else { "\"damaged\"" }), "{told}");
    }
}

#[test]
fn a_failure_ends_with_its_exit_code_though_nobody_reads_of_it() {
    let scratch = Scratch::new();
    let (_reader, stderr) = full();
    for json in [&[][..], &["--json"]] {
        let mut command = scratch.command(&[&["show", "nothing@latest"][..], json].concat());
        let stderr = if json.is_empty() { io::pipe().unwrap().1.into() } else { Stdio::null() };
        assert_eq!(command.stderr(stderr).status().unwrap().code(), Some(1));
    }
    let status = scratch.command(&["show", "nothing@latest"]).stderr(stderr).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_service_serves_and_ends_though_nobody_reads_its_log() {
    let scratch = Scratch::new();
    scratch.disk("a.raw", 1 << 20, &[(0, 65536, 1)]);
    scratch.run(&["capture", "a", "a.raw"]).ends_with(0);
    let socket = scratch.path("s");
    let (_reader, stderr) = full();
    let mut command = scratch.command(&["serve", "--listen", &format!("unix:{}", socket.display())]);
    let mut child = command.stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
    while UnixStream::connect(&socket).is_err() {
        assert_eq!(child.try_wait().unwrap(), None, "it ended by itself");
        std::thread::yield_now();
    }
    // Each of these has a line in the log, or is counted in one.
    for name in ["nothing", "neither", ""] {
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        let asked = scratch.command(&["status", "--listen", &uri]).output().unwrap();
        assert_eq!(asked.status.success(), name.is_empty(), "{asked:?}");
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
