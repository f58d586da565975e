//! What fails while a live restore runs, with a client on top: the source, the repository under it, the state directory.
//!
//! A full target, a damaged chunk and a second agent are in `live_restore.rs`, packs that go and come in `missing.rs`, a killed
//! agent in `crashes.rs` and `guest.rs`.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::{LiveRestore, status};
use e2e::nbd::Export;
use e2e::process::{run, run_any};
use e2e::work_dir::SmallFileSystem;
use serde_json::Value;

const DISK_BYTES: u64 = 32 << 20;
const MIB: u64 = 1 << 20;

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").arg(from).arg(to)).unwrap();
}

/// The repository's packs, by size, the largest last.
fn packs(repository: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(repository.join("packs")).unwrap();
    let mut packs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    packs.sort_by_key(|pack| pack.metadata().unwrap().len());
    packs
}

/// Removes a repository as a server that goes away does: what was open cannot be read any more either.
fn take_away(repository: &Path, elsewhere: &Path) {
    copy(repository, elsewhere);
    packs(repository).iter().for_each(|pack| empty(pack));
    fs::remove_dir_all(repository).unwrap();
}

fn empty(pack: &Path) {
    fs::OpenOptions::new().write(true).open(pack).unwrap().set_len(0).unwrap();
}

/// Changes a byte at this part of a pack.
fn spoil(pack: &Path, per_cent: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(pack).unwrap();
    let at = file.metadata().unwrap().len() * per_cent / 100;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// Demands that a read fails with EIO.
fn ensure_eio(export: &Export, offset: u64) {
    let script = format!(
        "import errno\ntry:\n    h.pread(4096, {offset})\n    assert False, 'it could be read'\n\
         except nbd.Error as error:\n    assert error.errnum == errno.EIO, error\n"
    );
    export.nbdsh("", &script).unwrap();
}

fn from_copies(status: &Value) -> u64 {
    status["fallbacks"].as_array().unwrap().iter().map(|used| used["chunks"].as_u64().unwrap()).sum()
}

#[test]
fn a_source_that_stays_away_fails_reads_of_what_is_absent_alone_until_it_is_back() {
    let captured = Captured::new("away", DISK_BYTES, 41).unwrap();
    let live = captured.start(&["--no-background", "--source-timeout", "300ms"]).unwrap();
    let export = live.export();
    export.qemu_io(&["read 0 1M", "write -P 0xa1 4M 64k", "flush"]).unwrap();
    let elsewhere = captured.work.file("elsewhere");
    take_away(captured.repository.path(), &elsewhere);

    ensure_eio(&export, 8 * MIB);
    // What is home, and writes, do without it.
    export
        .qemu_io(&[
            "read 0 1M",
            "read -P 0xa1 4M 64k",
            "write -P 0xa2 9M 64k",
            "flush",
            "read -P 0xa2 9M 64k",
        ])
        .unwrap();
    let live = live.kill_and_restart();
    let refused = format!("{:#}", live.unwrap_err());
    assert!(refused.contains("there is no such repository"), "{refused}");

    fs::rename(&elsewhere, captured.repository.path()).unwrap();
    let mut live = captured.start(&["--source-timeout", "300ms"]).unwrap();
    live.export().qemu_io(&["read -P 0xa1 4M 64k", "read -P 0xa2 9M 64k", "read 8M 64k"]).unwrap();
    live.wait_complete().unwrap();
    let differing = disk::differing_blocks(&captured.disk, &captured.target).unwrap();
    let written =
        |block: &u64| [4 * MIB, 9 * MIB].iter().any(|at| (at / 4096..at / 4096 + 16).contains(block));
    assert!(differing.iter().all(written), "{differing:?}");
}

#[test]
fn what_the_repository_has_wrong_or_lacks_comes_from_its_copy() {
    let captured = Captured::new("fallback", DISK_BYTES, 42).unwrap();
    let copy_of_it = captured.work.file("copy");
    copy(captured.repository.path(), &copy_of_it);
    let pack = packs(captured.repository.path()).pop().unwrap();
    for per_cent in [20, 50, 80] {
        spoil(&pack, per_cent);
    }
    let fallback = copy_of_it.to_str().unwrap();
    // Without the copy it is damaged.
    let plain = captured.work.file("plain.raw");
    let mut restore = captured.repository.verb("restore", &["vm@latest"]).unwrap();
    assert_eq!(run_any(restore.arg(&plain)).unwrap().status.code(), Some(1));

    let mut live = captured.start(&["--exit-when-done", "--fallback", fallback]).unwrap();
    live.wait_complete().unwrap();
    let ended = live.process().wait().unwrap();
    let lines = live.process().lines();
    assert!(ended.success(), "{ended}: {lines:#?}");
    let complete: Value = serde_json::from_str(
        lines.iter().find(|line| line.contains("\"event\":\"complete\"")).expect("it was told"),
    )
    .unwrap();
    assert!((1..=3).contains(&from_copies(&complete)), "{complete}");
    let report = lines.iter().rev().find(|line| line.contains("\"report\":")).expect("it was told");
    let report: Value = serde_json::from_str(report).unwrap();
    assert_eq!(report["report"]["fallbacks"], complete["fallbacks"], "the last words tell it too");
    assert_eq!(
        complete["fallbacks"][0]["repository"],
        fs::canonicalize(&copy_of_it).unwrap().to_str().unwrap()
    );
    disk::ensure_same(&captured.disk, &captured.target).unwrap();

    let mut restore = captured.repository.verb("restore", &["--fallback", fallback, "vm@latest"]).unwrap();
    let output = run_any(restore.arg(&plain)).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("came from the copy"), "{said}");
    disk::ensure_same(&captured.disk, &plain).unwrap();
}

/// A number that the agent tells Prometheus of its only copy.
fn metric(socket: &Path, name: &str) -> u64 {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let samples: Vec<&str> =
        answer.lines().filter(|line| line.starts_with(&format!("{name}{{repository="))).collect();
    assert_eq!(samples.len(), 1, "{answer}");
    samples[0].rsplit_once(' ').unwrap().1.parse().unwrap()
}

#[test]
fn a_copy_stands_in_for_a_repository_that_goes_away() {
    let captured = Captured::new("stand-in", DISK_BYTES, 43).unwrap();
    let copy_of_it = captured.work.file("copy");
    copy(captured.repository.path(), &copy_of_it);
    let metrics = captured.work.socket("metrics");
    let address = format!("unix:{}", metrics.display());
    let fallback = ["--no-background", "--fallback", copy_of_it.to_str().unwrap(), "--metrics", &address];
    let live = captured.start(&fallback).unwrap();
    live.export().qemu_io(&["read 0 1M"]).unwrap();
    assert_eq!(metric(&metrics, "lifeboot_agent_fallback_chunks_total"), 0);
    let elsewhere = captured.work.file("elsewhere");
    take_away(captured.repository.path(), &elsewhere);
    live.export().ensure_same(&captured.disk).unwrap();
    let said = status(&captured.target).unwrap();
    assert!(from_copies(&said) > 0 && said["waiting"].is_null() && said["damaged_bytes"] == 0, "{said}");
    assert_eq!(metric(&metrics, "lifeboot_agent_fallback_chunks_total"), from_copies(&said));
    assert_eq!(metric(&metrics, "lifeboot_agent_fallback_bytes_total"), said["fallbacks"][0]["bytes"]);
    assert_eq!(metric(&metrics, "lifeboot_agent_fallback_errors_total"), 0);

    // It can even be gone on with.
    let live = live.kill_and_restart().unwrap();
    live.export().ensure_same(&captured.disk).unwrap();
}

#[test]
fn what_both_have_wrong_is_an_error_for_its_range_and_named() {
    let captured = Captured::new("both", DISK_BYTES, 44).unwrap();
    let pack = packs(captured.repository.path()).pop().unwrap();
    spoil(&pack, 50);
    let copy_of_it = captured.work.file("copy");
    copy(captured.repository.path(), &copy_of_it);
    spoil(&pack, 20);
    let mut live = captured.start(&["--exit-when-done", "--fallback", copy_of_it.to_str().unwrap()]).unwrap();
    let ended = live.process().wait().unwrap();
    assert_eq!(ended.code(), Some(3), "{:#?}", live.process().lines());
    let said: Value = {
        let output =
            run_any(e2e::lifeboot::lifeboot(["status", "--json"]).unwrap().arg(&captured.target)).unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let damaged = said["damaged"].as_array().unwrap();
    assert_eq!(damaged.len(), 1, "{said}");
    let offset = damaged[0]["offset"].as_u64().unwrap();
    let live = captured.start(&["--no-background"]).unwrap();
    ensure_eio(&live.export(), offset);
}

#[test]
fn a_snapshot_that_is_pruned_meanwhile_leaves_what_is_home_and_names_the_rest() {
    let captured = Captured::new("pruned", DISK_BYTES, 41).unwrap();
    let packs = packs(captured.repository.path());
    // Another machine's, which stays.
    let other = captured.work.file("other.raw");
    disk::make(&other, MIB, 46).unwrap();
    captured.repository.capture("other", &other).unwrap();
    let live = captured.start(&["--no-background"]).unwrap();
    let export = live.export();
    export.qemu_io(&["read 0 1M", "write -P 0xa1 4M 64k", "flush"]).unwrap();

    let manifests = captured.repository.path().join("snapshots/vm");
    fs::remove_dir_all(&manifests).unwrap_or_else(|error| panic!("{}: {error}", manifests.display()));
    for pack in &packs {
        empty(pack);
        fs::remove_file(pack).unwrap();
    }
    ensure_eio(&export, 8 * MIB);
    export.qemu_io(&["read 0 1M", "read -P 0xa1 4M 64k", "write -P 0xa2 9M 64k", "flush"]).unwrap();
    let said = status(&captured.target).unwrap();
    assert!(said["damaged_bytes"].as_u64().unwrap() > 0, "{said}");
    let refused = format!("{:#}", live.kill_and_restart().unwrap_err());
    assert!(refused.contains("does not have"), "{refused}");
}

#[test]
fn a_state_directory_that_is_full_is_refused_at_the_start_and_no_matter_later() {
    let captured = Captured::new("full-state", DISK_BYTES, 47).unwrap();
    let room = SmallFileSystem::mount(captured.work.file("room"), 4 << 20).unwrap();
    let state = room.path().to_str().unwrap();
    let refused = format!("{:#}", captured.start(&["--state", state]).unwrap_err());
    assert!(refused.contains("make room there"), "{refused}");
    assert!(!captured.target.exists(), "the target was made for nothing");

    room.resize(32 << 20).unwrap();
    let live = captured.start(&["--state", state, "--no-background"]).unwrap();
    // What is left is taken by somebody else.
    let mut fill = Command::new("dd");
    fill.arg("if=/dev/zero").arg(format!("of={state}/filler")).args(["bs=64k", "status=none"]);
    assert!(!run_any(&mut fill).unwrap().status.success(), "there was too much room");
    live.export().qemu_io(&["write -P 0xa1 0 8M", "flush", "read 16M 1M"]).unwrap();
    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "{parked}");
    fs::remove_file(room.path().join("filler")).unwrap();
    let arguments = ["--state", state];
    let mut live =
        LiveRestore::start(&captured.repository, "vm@latest", &captured.target, &captured.socket, &arguments)
            .unwrap();
    live.wait_complete().unwrap();
    live.export().qemu_io(&["read -P 0xa1 0 8M"]).unwrap();
}
