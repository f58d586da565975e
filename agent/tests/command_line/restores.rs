//! What a restore gives back.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use proptest::prelude::*;

use crate::support::{MIB, Scratch, assert_same, write};

const CHUNK: u64 = 64 << 10;

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn a_sparse_disk_comes_back_byte_for_byte_and_as_sparse(
        size in 1..(24 * MIB),
        runs in proptest::collection::vec((0..24 * MIB, 1..400_000usize, any::<u64>()), 0..12),
    ) {
        let scratch = Scratch::new();
        let runs: Vec<_> = runs
            .into_iter()
            .map(|(offset, len, salt)| (offset % size, len, salt))
            .map(|(offset, len, salt)| (offset, len.min((size - offset) as usize), salt))
            .collect();
        let disk = scratch.disk("d.raw", size, &runs);
        scratch.run(&["capture", "g", "d.raw", "--chunk-size", "64KiB"]).ends_with(0);
        scratch.run(&["restore", "g@latest", "out.raw"]).ends_with(0);
        let out = scratch.path("out.raw");
        assert_same(&disk, &out);
        let chunks: std::collections::BTreeSet<u64> = runs
            .iter()
            .flat_map(|(offset, len, _)| offset / CHUNK..=(offset + *len as u64 - 1) / CHUNK)
            .collect();
        let allocated = std::fs::metadata(&out).unwrap().blocks() * 512;
        prop_assert!(allocated <= chunks.len() as u64 * CHUNK + 64 * 1024, "{allocated} for {} chunks", chunks.len());
    }
}

#[test]
fn a_target_that_holds_something_is_replaced_only_by_force() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 2 * MIB, &[(0, 100_000, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    let out = scratch.path("out.raw");
    write(&out, &vec![7; 3 << 20]);
    std::fs::set_permissions(&out, std::fs::Permissions::from_mode(0o640)).unwrap();
    scratch.run(&["restore", "g@latest", "out.raw"]).fails(&["out.raw", "not empty", "--force"]);
    assert_eq!(std::fs::read(&out).unwrap(), vec![7; 3 << 20]);
    scratch.run(&["restore", "g@latest", "out.raw", "--force"]).ends_with(0);
    assert_same(&disk, &out);
    assert_eq!(std::fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(scratch.names("."), ["d.raw", "out.raw", "repo"]);
}

#[test]
fn a_file_that_was_never_written_to_is_an_empty_target() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 2 * MIB, &[(0, 100_000, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    for (name, len) in [("zero.raw", 0), ("small.raw", MIB), ("sized.raw", 2 * MIB), ("large.raw", 3 * MIB)] {
        let out = scratch.disk(name, len, &[]);
        scratch.run(&["restore", "g@latest", name]).ends_with(0);
        assert_same(&disk, &out);
    }
}

#[test]
fn a_file_of_any_size_is_replaced_by_force() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 2 * MIB, &[(0, 100_000, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    for (name, len) in [("small.raw", MIB), ("large.raw", 3 * MIB)] {
        let out = scratch.disk(name, len, &[(0, 5000, 2)]);
        scratch.run(&["restore", "g@latest", name]).fails(&[name, "is not empty", "--force"]);
        assert_eq!(std::fs::metadata(&out).unwrap().len(), len);
        scratch.run(&["restore", "g@latest", name, "--force"]).ends_with(0);
        assert_same(&disk, &out);
    }
}

#[test]
fn through_a_symbolic_link_the_file_behind_it_is_written() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", MIB, &[(0, 100_000, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    write(&scratch.path("real.raw"), b"");
    std::os::unix::fs::symlink("real.raw", scratch.path("link.raw")).unwrap();
    scratch.run(&["restore", "g@latest", "link.raw"]).ends_with(0);
    assert!(scratch.path("link.raw").is_symlink());
    assert_same(&disk, &scratch.path("real.raw"));
    std::os::unix::fs::symlink("nowhere.raw", scratch.path("broken.raw")).unwrap();
    scratch.run(&["restore", "g@latest", "broken.raw"]).fails(&["broken.raw", "does not exist"]);
}

#[test]
fn what_a_killed_restore_left_is_cleared_away() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", MIB, &[(0, 100_000, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    write(&scratch.path("out.raw.lifeboot-partial"), b"half a disk");
    scratch.run(&["restore", "g@latest", "out.raw"]).ends_with(0);
    assert_same(&disk, &scratch.path("out.raw"));
    assert_eq!(scratch.names("."), ["d.raw", "out.raw", "repo"]);
}

#[test]
fn the_report_of_a_restore_has_exact_numbers() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", MIB + 1, &[(0, 100_000, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    let report = scratch.json(&["restore", "g@latest", "out.raw"]);
    assert_eq!(report["size_bytes"], MIB + 1);
    assert_eq!(report["data_bytes"], 128 << 10);
    assert_eq!(report["damaged"], serde_json::json!([]));
}

#[test]
fn a_last_chunk_that_is_short_counts_as_long_as_it_is() {
    let scratch = Scratch::new();
    // Seven chunks of 128 KiB, and 82,496 bytes.
    let last = 7 * (128 << 10);
    scratch.disk("short.raw", 1_000_000, &[(last, 82_496, 1)]);
    let ran = scratch.run(&["capture", "short", "short.raw", "--json"]).ends_with(0);
    assert_eq!(last_progress(&ran.stderr), (82_496, 82_496));
    let shown = scratch.run(&["show", "short@latest"]).ends_with(0).stdout;
    assert!(shown.contains(" 80.6 KiB ") && !shown.contains("128.0 KiB  80"), "{shown}");
    let ran = scratch.run(&["restore", "short@latest", "out.raw", "--json"]).ends_with(0);
    assert_eq!(ran.json()["data_bytes"], 82_496);
    assert_eq!(last_progress(&ran.stderr), (82_496, 82_496));

    // Whole chunks beside a short one of zeroes.
    scratch.disk("zero.raw", 1_000_000, &[(0, 200_000, 1)]);
    scratch.run(&["capture", "zero", "zero.raw"]).ends_with(0);
    assert_eq!(scratch.json(&["restore", "zero@latest", "zero.out"])["data_bytes"], 2 * (128 << 10));
}

/// The bytes done and to do of the last line of progress.
fn last_progress(stderr: &str) -> (u64, u64) {
    let line: serde_json::Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
    (line["bytes_done"].as_u64().unwrap(), line["bytes_total"].as_u64().unwrap())
}
