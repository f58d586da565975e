//! A machine of `boot` that waits for an agent is found by whatever name its disk has now. QEMU is made up: a process that lives.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::advice::as_nobody;
use crate::devices::Loop;
use crate::support::{MIB, Ran, Scratch, is_root, live_restore_to, park, write};

/// What a process is made to do that its arguments say is QEMU.
const QEMU: &[u8] = b"#!/bin/sh\nif [ \"$1\" = --version ]; then echo QEMU; exit; fi\nexec sleep 1000\n";

/// A machine whose `boot` was killed.
struct Waiting<'a> {
    scratch: &'a Scratch,
    machine: Pid,
}

impl<'a> Waiting<'a> {
    /// One that was booted to this target.
    fn on(scratch: &'a Scratch, target: &str, further: &[&str]) -> Self {
        let qemu = scratch.path("qemu");
        write(&qemu, QEMU);
        std::fs::set_permissions(&qemu, std::fs::Permissions::from_mode(0o700)).unwrap();
        let args = [&["boot", "web01@latest", target, "--qemu", "./qemu", "--limit", "20"], further].concat();
        let args = [&args[..], &["--json", "--", "-accel", "tcg"]].concat();
        let mut boot = in_a_runtime_dir(scratch, &args).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(boot.stderr.take().unwrap()).lines().map(Result::unwrap);
        let started: Value = lines
            .find_map(|line| {
                serde_json::from_str(&line).ok().filter(|line: &Value| line["event"] == "started")
            })
            .unwrap();
        boot.kill().unwrap();
        boot.wait().unwrap();
        let machine = i32::try_from(started["pid"].as_u64().unwrap()).ok().and_then(Pid::from_raw).unwrap();
        Self { scratch, machine }
    }

    fn run(&self, args: &[&str]) -> Ran {
        Ran::of(in_a_runtime_dir(self.scratch, args).output().unwrap())
    }

    /// Neither `discard` nor `boot` takes the disk that is named so for one that nobody needs; tells what `discard` says.
    #[track_caller]
    fn keeps(&self, target: &str, further: &[&str]) -> String {
        let boot = [&["boot", "web01@latest", target, "--qemu", "./qemu"], further].concat();
        self.run(&boot).fails(&["still runs from an earlier `lifeboot boot`"]);
        let discard = [&["discard", target, "--yes"], further].concat();
        self.run(&discard).fails(&["still runs from an earlier `lifeboot boot`"]).stderr
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let _ = kill_process(self.machine, Signal::KILL);
    }
}

fn in_a_runtime_dir(scratch: &Scratch, args: &[&str]) -> Command {
    in_the_runtime_dir("run", scratch, args)
}

/// As from another login.
fn in_another(scratch: &Scratch, args: &[&str]) -> Ran {
    Ran::of(in_the_runtime_dir("other run", scratch, args).output().unwrap())
}

fn in_the_runtime_dir(name: &str, scratch: &Scratch, args: &[&str]) -> Command {
    let dir = scratch.path(name);
    std::fs::create_dir_all(&dir).unwrap();
    let mut command = scratch.command(args);
    command.env("XDG_RUNTIME_DIR", dir);
    command
}

fn with_snapshot() -> Scratch {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    scratch
}

#[test]
fn a_machine_that_waits_keeps_its_session_by_whatever_name_its_disk_has() {
    let scratch = with_snapshot();
    let machine = Waiting::on(&scratch, "t.raw", &[]);
    let path = |name: &str| scratch.path(name).display().to_string();
    assert!(machine.keeps("t.raw", &[]).contains(&format!("the machine of {} still", path("t.raw"))));
    std::fs::hard_link(scratch.path("t.raw"), scratch.path("link.raw")).unwrap();
    let said = machine.keeps("link.raw", &[]);
    assert!(said.contains(&format!("whose disk was {}", path("t.raw"))), "{said}");
    std::fs::remove_file(scratch.path("link.raw")).unwrap();
    // A copy of both is a disk of its own.
    scratch.copy("t.raw", "copy.raw");
    scratch.copy("t.raw.lifeboot", "copy.raw.lifeboot");
    machine.run(&["discard", "copy.raw", "--yes"]).ends_with(0);
    for suffix in ["", ".lifeboot"] {
        let name = |stem: &str| scratch.path(&format!("{stem}{suffix}"));
        std::fs::rename(name("t.raw"), name("renamed.raw")).unwrap();
    }
    let said = machine.keeps("renamed.raw", &[]);
    assert!(said.contains(&format!("/disk0 {} --listen", path("renamed.raw"))), "where it is now: {said}");
    // The session of a target that is gone.
    let what =
        format!("where TARGET is what the disk disk0 is called now that was {} (inode ", path("t.raw"));
    std::fs::rename(scratch.path("renamed.raw"), scratch.path("elsewhere")).unwrap();
    machine.run(&["discard", "renamed.raw", "--yes"]).fails(&["still runs", "/disk0 TARGET --listen", &what]);
    std::fs::rename(scratch.path("elsewhere"), scratch.path("renamed.raw")).unwrap();
    kill_process(machine.machine, Signal::KILL).unwrap();
    // It ends in its own time.
    while machine.run(&["discard", "renamed.raw", "--yes"]).code != Some(0) {}
}

#[test]
fn a_machine_that_waits_keeps_its_session_whatever_runtime_directory_there_is() {
    let scratch = with_snapshot();
    let machine = Waiting::on(&scratch, "t.raw", &[]);
    let refused = |target: &str| {
        for verb in [&["boot", "web01@latest", target, "--qemu", "./qemu"][..], &["discard", target, "--yes"]]
        {
            let nbd = format!("--listen unix:{}/lifeboot/", scratch.path("run").display());
            in_another(&scratch, verb).fails(&["still runs from an earlier `lifeboot boot`", &nbd]);
        }
    };
    refused("t.raw");
    for suffix in ["", ".lifeboot"] {
        let name = |stem: &str| scratch.path(&format!("{stem}{suffix}"));
        std::fs::rename(name("t.raw"), name("renamed.raw")).unwrap();
    }
    refused("renamed.raw");
    kill_process(machine.machine, Signal::KILL).unwrap();
    while in_another(&scratch, &["discard", "renamed.raw", "--yes"]).code != Some(0) {}
    assert!(!scratch.path("renamed.raw.lifeboot").exists(), "nothing is left there");
}

#[test]
fn a_session_is_kept_by_whoever_may_not_look_for_its_machine() {
    if !is_root() {
        return;
    }
    let scratch = with_snapshot();
    let machine = Waiting::on(&scratch, "t.raw", &[]);
    let open = |path: &str| {
        std::fs::set_permissions(scratch.path(path), std::fs::Permissions::from_mode(0o777)).unwrap();
    };
    [".", "t.raw", "t.raw.lifeboot"].into_iter().for_each(open);
    for name in scratch.names("t.raw.lifeboot") {
        open(&format!("t.raw.lifeboot/{name}"));
    }
    let refused = as_nobody(&scratch, &["discard", "t.raw", "--yes"]);
    refused.fails(&[
        "it cannot be told whether the machine of",
        "may not be looked into",
        "as root, or as who",
    ]);
    assert!(scratch.path("t.raw.lifeboot/session.json").exists());
    machine.keeps("t.raw", &[]);
}

#[test]
fn a_machine_that_waits_has_no_part_in_another_disk_at_its_old_path() {
    let scratch = with_snapshot();
    let machine = Waiting::on(&scratch, "t.raw", &[]);
    for suffix in ["", ".lifeboot"] {
        let name = |stem: &str| scratch.path(&format!("{stem}{suffix}"));
        std::fs::rename(name("t.raw"), name("w.raw")).unwrap();
    }
    park(&mut live_restore_to(&scratch, "t.raw", &["--no-background"]));
    machine.run(&["discard", "t.raw", "--yes"]).ends_with(0);
    // A machine of its own.
    let other = Waiting::on(&scratch, "t.raw", &["--force"]);
    let going_on = |said: &str, name: &str| {
        let target = format!("/disk0 {} --listen", scratch.path(name).display());
        assert!(said.contains(&target), "{said}");
        said.contains("-2/nbd.sock")
    };
    assert!(going_on(&other.keeps("t.raw", &[]), "t.raw"), "it has sockets of its own");
    assert!(!going_on(&machine.keeps("w.raw", &[]), "w.raw"));
    let said = machine.run(&["discard", "gone.raw", "--state", "w.raw.lifeboot", "--yes"]);
    assert!(!going_on(&said.fails(&["still runs"]).stderr, "w.raw"), "which the session is beside");
}

#[test]
fn a_machine_that_waits_keeps_its_session_where_its_device_has_another_path() {
    if !is_root() {
        return;
    }
    let scratch = with_snapshot();
    for name in ["one", "two"] {
        scratch.disk(name, 4 * MIB, &[]);
    }
    let (device, other) = (Loop::on(&scratch.path("one")), Loop::on(&scratch.path("two")));
    let state = ["--state", "st"];
    let machine = Waiting::on(&scratch, device.name(), &state);
    machine.keeps(device.name(), &state);
    let again = Loop::on(&scratch.path("one"));
    machine.keeps(again.name(), &state);
    // It is gone, or its path leads to another disk, and the session is given up by its directory.
    drop((device, again));
    let dir = format!("st/{}", scratch.names("st")[0]);
    machine
        .run(&["discard", other.name(), "--state", &dir, "--yes"])
        .fails(&["still runs", "/disk0 TARGET --"]);
}
