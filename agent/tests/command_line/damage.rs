//! A repository that is not what was written: found, named, and never passed on as a disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{MIB, Scratch, assert_same, live_restore, noise};

/// A repository with one disk of noise, one byte in the middle of its pack flipped.
fn damaged() -> Scratch {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    flip(&scratch.pack(), MIB);
    scratch
}

fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

#[test]
fn verify_names_the_damage_and_whose_it_is() {
    let scratch = damaged();
    let ran = scratch.run(&["verify"]).ends_with(3);
    ran.tells(&["damaged", "web01@", "disk0", "CRC"]);
    let ran = scratch.run(&["verify", "--json"]).ends_with(3);
    assert_eq!(ran.json()["snapshots"], 1);
    assert!(!ran.json()["damages"].as_array().unwrap().is_empty());
}

#[test]
fn a_sound_repository_verifies() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let ran = scratch.run(&["verify"]).ends_with(0);
    assert!(ran.stdout.contains("all is well") && ran.stderr.is_empty(), "{ran:?}");
    scratch.run(&["verify", "--quick"]).ends_with(0);
}

#[test]
fn a_restore_stops_at_damage_and_leaves_no_target() {
    let scratch = damaged();
    let ran = scratch.run(&["restore", "web01@latest", "out.raw"]);
    ran.fails(&[
        "of the disk cannot be restored",
        "chunk",
        "pack",
        "CRC",
        "--keep-going",
        "`lifeboot verify`",
    ]);
    assert_eq!(scratch.names("."), ["d.raw", "repo"]);
}

#[test]
fn a_restore_of_many_packs_stops_at_damage_in_the_first() {
    let scratch = Scratch::new();
    // Far more reads than wait for the decoders at any time.
    scratch.disk("d.raw", 320 * MIB, &[(0, 320 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let is_of_chunks = |pack: &&PathBuf| std::fs::metadata(pack).unwrap().len() > 2 * MIB;
    scratch.packs().iter().filter(is_of_chunks).for_each(|pack| flip(pack, MIB));
    scratch.run(&["restore", "web01@latest", "out.raw"]).fails(&["cannot be restored", "CRC"]);
    assert_eq!(scratch.names("."), ["d.raw", "repo"]);
}

#[test]
fn a_restore_that_keeps_going_gives_back_all_but_the_damaged_chunk() {
    let scratch = damaged();
    let ran = scratch.run(&["restore", "web01@latest", "out.raw", "--keep-going", "--json"]).ends_with(3);
    let report = ran.json();
    let [damage] = report["damaged"].as_array().unwrap().as_slice() else { panic!("{report}") };
    let (offset, len) =
        (damage["offset"].as_u64().unwrap() as usize, damage["len"].as_u64().unwrap() as usize);
    assert_eq!(len, 128 << 10);
    assert!(ran.stderr.contains("damaged"), "{}", ran.stderr);
    let mut wanted = noise(2 << 20, 1);
    wanted.resize(4 << 20, 0);
    wanted[offset..offset + len].fill(0);
    assert!(std::fs::read(scratch.path("out.raw")).unwrap() == wanted);
}

#[test]
fn a_damaged_node_of_the_map_is_one_place_and_its_bytes_are_not_called_restored() {
    let scratch = Scratch::new();
    let runs = [(0, 128 << 10, 1), (20 * MIB, 1 << 20, 2), (100 * MIB, 300_000, 3)];
    scratch.disk("d.raw", 130 * MIB, &runs);
    scratch.run(&["capture", "web01", "d.raw", "--chunk-size", "64KiB"]).ends_with(0);
    // The node of the first 64 MiB stands behind the pack's header and their eighteen chunks, which are stored plain.
    flip(&scratch.pack(), 64 + 18 * (64 << 10) + 20);
    let ranges: Vec<_> = scratch.run(&["verify", "--json"]).ends_with(3).json()["damages"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|damage| damage["range"].as_object().cloned())
        .collect();
    assert_eq!(ranges.len(), 1, "{ranges:?}");
    assert_eq!((&ranges[0]["start"], &ranges[0]["end"]), (&0.into(), &(64 * MIB).into()));

    let ran = scratch.run(&["restore", "web01@latest", "out.raw", "--keep-going", "--json"]).ends_with(3);
    let report = ran.json();
    let [damage] = report["damaged"].as_array().unwrap().as_slice() else { panic!("{report}") };
    assert_eq!((&damage["offset"], &damage["len"]), (&0.into(), &(64 * MIB).into()));
    // What is left are the five chunks that the last run touches.
    assert_eq!((&report["data_bytes"], &report["damaged_bytes"]), (&(5 << 16).into(), &(64 * MIB).into()));
    let mut wanted = vec![0; 130 << 20];
    wanted[100 << 20..(100 << 20) + 300_000].copy_from_slice(&noise(300_000, 3));
    assert!(std::fs::read(scratch.path("out.raw")).unwrap() == wanted);

    let ran = scratch.run(&["restore", "web01@latest", "again.raw", "--keep-going"]).ends_with(3);
    assert!(ran.stdout.contains("130.0 MiB, 320.0 KiB of it data, 64.0 MiB lost"), "{ran:?}");
    assert_eq!(ran.stderr.lines().count(), 2, "{ran:?}");
}

#[test]
fn a_live_restore_that_has_brought_home_what_it_could_has_no_rate_and_no_time_left() {
    let scratch = damaged();
    let mut live = live_restore(&scratch, &[]);
    let home_or_damaged = |status: &Value| {
        let bytes = |name: &str| status[name].as_u64().unwrap();
        bytes("damaged_bytes") > 0 && bytes("home_bytes") + bytes("damaged_bytes") == bytes("size")
    };
    let status = loop {
        let ran = scratch.run(&["status", "t.raw", "--json"]);
        let status = ran.json();
        if home_or_damaged(&status) {
            break status;
        }
    };
    assert_eq!(status["seconds_left"], Value::Null);
    let told = scratch.run(&["status", "t.raw"]).ends_with(3).stdout;
    assert!(told.contains("running: all is home but what is damaged"), "{told}");
    assert!(!told.lines().any(|row| row.starts_with("rate") || row.starts_with("time left")), "{told}");
    kill_process(Pid::from_child(&live), Signal::TERM).unwrap();
    assert_eq!(live.wait().unwrap().code(), Some(3));
}

#[test]
fn a_pack_that_is_cut_short_costs_what_was_in_the_rest_of_it() {
    let scratch = damaged();
    File::options().write(true).open(scratch.pack()).unwrap().set_len(MIB).unwrap();
    scratch.run(&["restore", "web01@latest", "out.raw"]).fails(&["cannot be restored"]);
    assert_eq!(scratch.names("."), ["d.raw", "repo"]);
}

#[test]
fn a_manifest_that_is_damaged_is_named_in_the_list() {
    let scratch = damaged();
    let [file] = &scratch.names("repo/snapshots/web01")[..] else { panic!("one manifest") };
    flip(&scratch.path("repo/snapshots/web01").join(file), 60);
    scratch.run(&["snapshots"]).ends_with(3).tells(&["web01@"]);
    scratch.run(&["restore", "web01@latest", "out.raw"]).fails(&["web01@", "no other snapshot of web01"]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0).tells(&["warning", "web01"]);
}

/// The list of three snapshots then.
fn captured_twice_more(scratch: &Scratch) -> Value {
    for _ in 0..2 {
        scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    }
    scratch.json(&["snapshots"])
}

#[test]
fn in_the_place_of_a_damaged_manifest_one_that_can_be_read_is_offered() {
    let scratch = damaged();
    let listed = captured_twice_more(&scratch);
    let name = |index: usize| listed[index]["snapshot"].as_str().unwrap();
    let files = scratch.names("repo/snapshots/web01");
    let damage = |index: usize| flip(&scratch.path("repo/snapshots/web01").join(&files[index]), 60);
    damage(2);
    let older = format!("the next older one that can be read is {}", name(1));
    scratch.run(&["restore", "web01@latest", "out.raw"]).fails(&[name(2), &older, "`lifeboot verify`"]);
    damage(1);
    let older = format!("the next older one that can be read is {}", name(0));
    scratch.run(&["show", "web01@latest"]).fails(&[name(2), &older]);
    scratch.run(&["show", name(1)]).fails(&[name(1), &older]);
}

#[test]
fn what_cannot_be_had_is_not_offered_in_the_place_of_another() {
    let scratch = damaged();
    let listed = captured_twice_more(&scratch);
    let name = |index: usize| listed[index]["snapshot"].as_str().unwrap();
    let files = scratch.names("repo/snapshots/web01");
    let manifest = |index: usize| scratch.path("repo/snapshots/web01").join(&files[index]);
    flip(&manifest(1), 60);
    std::fs::remove_file(manifest(2)).unwrap();
    std::os::unix::fs::symlink("nowhere", manifest(2)).unwrap();
    let ran = scratch.run(&["show", "web01@2001-01-01T00:00:00Z"]);
    ran.fails(&[&format!("did you mean {}?", name(0))]);
}

#[test]
fn a_session_whose_manifest_is_gone_is_offered_no_other_snapshot() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 8 * MIB, &[(0, 3 << 20, 1)]);
    for group in ["web01", "web01", "web02"] {
        scratch.run(&["capture", group, "d.raw"]).ends_with(0);
    }
    let mut live = live_restore(&scratch, &["--limit", "20"]);
    kill_process(Pid::from_child(&live), Signal::TERM).unwrap();
    assert_eq!(live.wait().unwrap().code(), Some(0));
    // The snapshot alone, and then all of its group.
    for _ in 0..2 {
        let files = scratch.names("repo/snapshots/web01");
        std::fs::remove_file(scratch.path("repo/snapshots/web01").join(files.last().unwrap())).unwrap();
        for verb in [&["save", "t.raw"][..], &["live-restore", "web01@latest", "t.raw", "--listen", "unix:s"]]
        {
            let ran = scratch.run(verb).fails(&["which this repository does not have", "forgotten there"]);
            assert!(!ran.stderr.contains("did you mean"), "{ran:?}");
        }
    }
}

#[test]
fn a_configuration_that_is_cut_short_is_named_and_one_of_a_new_repository_takes_its_place() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    File::options().write(true).open(scratch.path("repo/lifeboot.config")).unwrap().set_len(20).unwrap();
    scratch.run(&["restore", "web01@latest", "out.raw"]).fails(&[
        "the repository's configuration is damaged",
        "repo/lifeboot.config",
        "put a copy",
        "newly made by init",
    ]);
    // The advice holds.
    scratch.run(&["init", "-r", "new"]).ends_with(0);
    std::fs::copy(scratch.path("new/lifeboot.config"), scratch.path("repo/lifeboot.config")).unwrap();
    scratch.run(&["restore", "web01@latest", "out.raw"]).ends_with(0);
    assert_same(&disk, &scratch.path("out.raw"));
    scratch.run(&["verify"]).ends_with(0);
}

#[test]
fn a_newer_format_is_refused_by_name() {
    let scratch = damaged();
    // The version stands in the header of every file; whichever byte it is, some change must read as newer or damaged.
    let config = scratch.path("repo/lifeboot.config");
    let sound = std::fs::read(&config).unwrap();
    let mut newer = 0;
    for at in 0..sound.len().min(32) {
        let mut bytes = sound.clone();
        bytes[at] = bytes[at].wrapping_add(1);
        std::fs::write(&config, &bytes).unwrap();
        let ran = scratch.run(&["snapshots"]).ends_with(1);
        newer += usize::from(ran.stderr.contains("newer"));
    }
    assert!(newer > 0);
    std::fs::write(&config, &sound).unwrap();
    scratch.run(&["snapshots"]).ends_with(0);
}
