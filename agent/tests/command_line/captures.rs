//! What a capture keeps, and what it notices.

use std::os::unix::fs::FileExt;

use crate::support::{MIB, Scratch, assert_same, noise, write};

#[test]
fn what_the_repository_has_is_not_stored_again() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 20 * MIB, &[(0, 3_000_000, 1), (9_000_000, 500_000, 2)]);
    let first = scratch.json(&["capture", "web01", "d.raw"]);
    assert!(first["disks"][0]["new_bytes"].as_u64().unwrap() >= 3_500_000);
    let second = scratch.json(&["capture", "web01", "d.raw"]);
    assert_eq!(second["disks"][0]["new_chunks"], 0);
    assert_eq!(second["disks"][0]["data_chunks"], first["disks"][0]["data_chunks"]);

    std::fs::File::options().write(true).open(&disk).unwrap().write_all_at(b"changed", 1_000_000).unwrap();
    let third = scratch.json(&["capture", "web01", "d.raw"]);
    assert_eq!(third["disks"][0]["new_chunks"], 1);
    // Another group, the same bytes.
    let other = scratch.json(&["capture", "web02", "d.raw"]);
    assert_eq!(other["disks"][0]["new_chunks"], 0);
}

#[test]
fn a_chunk_that_stands_twice_on_a_disk_is_stored_once() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 8 * MIB, &[(0, 1 << 20, 5), (4 << 20, 1 << 20, 5)]);
    let report = scratch.json(&["capture", "web01", "d.raw"]);
    assert_eq!(report["disks"][0]["data_chunks"], 16);
    assert_eq!(report["disks"][0]["new_chunks"], 8);
    scratch.run(&["restore", "web01@latest", "out.raw"]).ends_with(0);
    assert_same(&disk, &scratch.path("out.raw"));
}

#[test]
fn several_disks_make_one_snapshot_and_come_back_by_their_names() {
    let scratch = Scratch::new();
    let root = scratch.disk("root.raw", 2 * MIB, &[(0, 100_000, 1)]);
    let data = scratch.disk("data.raw", 3 * MIB, &[(MIB, 200_000, 2)]);
    let report = scratch.json(&["capture", "db", "root.raw", "data=data.raw"]);
    assert_eq!(report["disks"][0]["name"], "disk0");
    assert_eq!(report["disks"][1]["name"], "data");
    scratch.run(&["restore", "db@latest", "out.raw"]).fails(&["2 disks", "/disk0", "/data"]);
    scratch.run(&["restore", "db@latest/dat", "out.raw"]).fails(&["dat", "data"]);
    let shown = scratch.run(&["show", "db@latest/data"]).ends_with(0).stdout;
    assert!(shown.contains("\ndata ") && !shown.contains("disk0"), "{shown}");
    let shown = scratch.json(&["show", "db@latest/data"]);
    assert_eq!((&shown["disks"][0]["name"], &shown["size_bytes"]), (&"data".into(), &(3 * MIB).into()));
    assert_eq!(shown["disks"].as_array().unwrap().len(), 1);
    scratch.run(&["restore", "db@latest/disk0", "0.raw"]).ends_with(0);
    scratch.run(&["restore", "db@latest/data", "1.raw"]).ends_with(0);
    assert_same(&root, &scratch.path("0.raw"));
    assert_same(&data, &scratch.path("1.raw"));
}

#[test]
fn attachments_and_notes_ride_along() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", MIB, &[(0, 5000, 1)]);
    let xml = noise(300_000, 9);
    write(&scratch.path("web01.xml"), &xml);
    write(&scratch.path("empty.conf"), b"");
    let note = "before the upgrade\nof\u{1b}[31m Tuesday";
    let args =
        ["capture", "web01", "d.raw", "--attach", "web01.xml", "--attach", "empty.conf", "--note", note];
    scratch.run(&args).ends_with(0);

    let shown = scratch.run(&["show", "web01@latest"]).ends_with(0);
    assert!(shown.stdout.contains("web01.xml (293.0 KiB)"), "{shown:?}");
    assert!(shown.stdout.contains("before the upgrade of [31m Tuesday"), "{shown:?}");
    assert_eq!(scratch.json(&["show", "web01@latest"])["note"], note);

    let output = scratch.command(&["show", "web01@latest", "--attachment", "web01.xml"]).output().unwrap();
    assert_eq!(output.stdout, xml);
    let ran = scratch.run(&["show", "web01@latest", "--attachment", "empty.conf", "-o", "back"]).ends_with(0);
    assert_eq!(ran.stdout, "wrote empty.conf (0 B) to back\n");
    assert_eq!(std::fs::read(scratch.path("back")).unwrap(), b"");
    let written = scratch.json(&["show", "web01@latest", "--attachment", "web01.xml", "-o", "web01.back"]);
    assert_eq!(
        (&written["attachment"]["name"], &written["attachment"]["size"]),
        (&"web01.xml".into(), &300_000.into())
    );
    assert_eq!(written["output"], "web01.back");
    assert_eq!(std::fs::read(scratch.path("web01.back")).unwrap(), xml);
    let args = ["show", "web01@latest", "--attachment", "web01.xml", "-o", "back"];
    scratch.run(&args).fails(&["back", "exists"]);
    scratch.run(&["show", "web01@latest", "--attachment", "web01.xm"]).fails(&["no attachment", "web01.xml"]);
}

#[test]
fn snapshots_are_listed_as_an_array_and_as_plain_columns() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", MIB, &[(0, 5000, 1)]);
    assert_eq!(scratch.json(&["snapshots"]), serde_json::json!([]));
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    scratch.run(&["capture", "db", "d.raw", "--note", "n"]).ends_with(0);
    let listed = scratch.json(&["snapshots"]);
    let groups: Vec<_> = listed.as_array().unwrap().iter().map(|one| one["group"].clone()).collect();
    assert_eq!(groups, ["db", "web01"]);
    assert_eq!(listed[0]["size_bytes"], MIB);
    assert_eq!(scratch.json(&["snapshots", "web01"]).as_array().unwrap().len(), 1);
    let table = scratch.run(&["snapshots"]).ends_with(0).stdout;
    assert!(table.starts_with("SNAPSHOT"), "{table}");
    assert!(table.is_ascii() && !table.contains('\u{1b}') && table.lines().count() == 3, "{table}");
}

#[test]
fn two_captures_at_once_both_become_snapshots() {
    let scratch = Scratch::new();
    let a = scratch.disk("a.raw", 40 * MIB, &[(0, 20 << 20, 1)]);
    let b = scratch.disk("b.raw", 40 * MIB, &[(0, 10 << 20, 1), (20 << 20, 10 << 20, 2)]);
    let children =
        ["a.raw", "b.raw"].map(|disk| scratch.command(&["capture", "web01", disk, "-q"]).spawn().unwrap());
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let listed = scratch.json(&["snapshots"]);
    let names: Vec<_> =
        listed.as_array().unwrap().iter().map(|one| one["snapshot"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    // Which of them came first is not said; each must be one of the two, whole.
    let mut equal = 0;
    for (index, name) in names.iter().enumerate() {
        let out = format!("{index}.raw");
        scratch.run(&["restore", name, &out]).ends_with(0);
        let bytes = std::fs::read(scratch.path(&out)).unwrap();
        equal += usize::from(bytes == std::fs::read(&a).unwrap());
        equal += usize::from(bytes == std::fs::read(&b).unwrap());
    }
    assert_eq!(equal, 2);
    scratch.run(&["verify"]).ends_with(0);
}

#[test]
fn image_files_are_refused_with_advice_unless_they_are_wanted_as_they_are() {
    let scratch = Scratch::new();
    let image = scratch.path("d.qcow2");
    write(&image, &[b"QFI\xfb".as_slice(), &noise(100_000, 1)].concat());
    scratch.run(&["capture", "web01", "d.qcow2"]).fails(&[
        "d.qcow2",
        "qcow2",
        "qemu-img convert",
        "--as-raw",
    ]);
    scratch.run(&["capture", "web01", "d.qcow2", "--as-raw"]).ends_with(0);
    scratch.run(&["restore", "web01@latest", "out"]).ends_with(0);
    assert_same(&image, &scratch.path("out"));
}

#[test]
fn both_engines_and_every_chunk_size_capture_and_restore() {
    let scratch = Scratch::new();
    // An odd size: the last chunk is shorter, and direct I/O cannot be had.
    let disk =
        scratch.disk("d.raw", 9 * MIB + 777, &[(0, 1_000_000, 1), (5 << 20, 300_000, 2), (9 * MIB, 777, 3)]);
    for (engine, chunk_size) in
        [("uring", "64KiB"), ("threads", "64KiB"), ("threads", "4MiB"), ("auto", "1MiB")]
    {
        let args =
            ["capture", "g", "d.raw", "--io-engine", engine, "--chunk-size", chunk_size, "--level", "-1"];
        scratch.run(&args).ends_with(0);
        let args = ["restore", "g@latest", "out.raw", "--force", "--io-engine", engine, "--direct", "auto"];
        scratch.run(&args).ends_with(0);
        assert_same(&disk, &scratch.path("out.raw"));
    }
}

#[test]
fn what_a_clock_that_is_behind_made_is_said_not_to_be_the_latest() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", MIB, &[(0, 4096, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let repository = repository::Repository::open(scratch.path("repo")).unwrap();
    let ahead = repository::CaptureOptions {
        time: Some("2190-01-01T00:00:00Z".parse().unwrap()),
        ..repository::CaptureOptions::default()
    };
    let mut writer = repository.begin_capture(&"web01".parse().unwrap(), ahead).unwrap();
    writer.add_attachment("vm.conf".parse().unwrap(), b"memory: 4096").unwrap();
    writer.commit(repository::SnapshotMeta::default()).unwrap();
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0).tells(&[
        "web01@2190-01-01T00:00:00Z is dated later",
        "web01@latest",
        "clock",
    ]);
    let warned = scratch.json(&["capture", "web01", "d.raw"]);
    assert!(warned["warnings"][0].as_str().unwrap().contains("is dated later"), "{warned}");
    let told = scratch.run(&["capture", "other", "d.raw"]).ends_with(0).stderr;
    assert!(!told.contains("clock"), "{told}");
}
