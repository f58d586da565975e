//! A disk that is captured over another: only what changed is put, and it is the same as if all of it had been.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    clippy::single_range_in_vec_init,
    reason = "this is a test"
)]

mod common;

use std::collections::BTreeMap;

use common::*;
use proptest::prelude::*;
use repository::*;

/// Chunks that a leaf of a map covers.
const LEAF: u64 = 1024;

fn new_repo() -> (tempfile::TempDir, Repository) {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path().join("repo"), InitOptions::default()).unwrap();
    (dir, repo)
}

/// What stands at some places of a disk of zeroes, 0 for zeroes.
type Places = BTreeMap<u64, u64>;

fn put(disk: &DiskWriter, place: u64, number: u64) {
    if number == 0 {
        return disk.put_zero(place..place + 1).unwrap();
    }
    let bytes = &chunk_of(number)[..disk.chunk_len(place)];
    let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL).unwrap();
    let id = encoder.id(bytes);
    if !disk.put_known(place, &id).unwrap() {
        disk.put_chunk(place, &id, &encoder.encode(bytes).unwrap()).unwrap();
    }
}

/// Captures a whole disk of `size` bytes.
fn whole(repo: &Repository, size: u64, places: &Places) -> DiskEntry {
    let mut capture = repo.begin_capture(&group("vm"), small_packs()).unwrap();
    let disk = capture.begin_disk("disk0".parse().unwrap(), size, CHUNK, None).unwrap();
    let mut at = 0;
    for (&place, &number) in places {
        disk.put_zero(at..place).unwrap();
        put(&disk, place, number);
        at = place + 1;
    }
    disk.put_zero(at..disk.chunk_count()).unwrap();
    capture.commit(meta()).unwrap().manifest().disks[0].clone()
}

/// Captures `base` but for these places.
fn over(repo: &Repository, base: &DiskEntry, changes: &Places) -> DiskEntry {
    let mut capture = repo.begin_capture(&group("vm"), small_packs()).unwrap();
    let disk = capture.begin_disk_over("disk0".parse().unwrap(), base).unwrap();
    // Backwards: places may come in any order.
    changes.iter().rev().for_each(|(&place, &number)| put(&disk, place, number));
    capture.commit(meta()).unwrap().manifest().disks[0].clone()
}

const DISK_CHUNKS: u64 = 2 * LEAF + 20;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_disk_over_another_is_the_very_same_as_one_captured_whole(
        before in proptest::collection::btree_map(0..DISK_CHUNKS, 1_u64..6, 0..12),
        changes in proptest::collection::btree_map(0..DISK_CHUNKS, 0_u64..9, 0..8),
        near in proptest::collection::btree_map(0_u64..12, 0_u64..9, 0..6),
        cut in 0_u64..u64::from(CHUNK),
    ) {
        let (_dir, repo) = new_repo();
        let size = DISK_CHUNKS * u64::from(CHUNK) - cut;
        let base = whole(&repo, size, &before);
        // Some changes fall on what was there before.
        let keys: Vec<u64> = before.keys().copied().collect();
        let mut changes = changes;
        changes.extend(near.into_iter().filter_map(|(at, number)| Some((*keys.get(at as usize)?, number))));
        let made = over(&repo, &base, &changes);
        let mut after = before;
        after.extend(&changes);
        let expected = whole(&repo, size, &after);
        prop_assert_eq!(made.map, expected.map);
        prop_assert_eq!(made.stats.data_chunks, expected.stats.data_chunks);
        prop_assert_eq!(made.stats.zero_chunks, expected.stats.zero_chunks);
        prop_assert!(made.stats.new_chunks <= changes.len() as u64);
        prop_assert_eq!((made.size, made.chunk_size), (base.size, base.chunk_size));
    }
}

#[test]
fn a_disk_over_another_with_nothing_put_shares_its_map_and_stores_nothing() {
    let (dir, repo) = new_repo();
    let base = whole(&repo, 3 * LEAF * u64::from(CHUNK), &[(1, 1), (LEAF, 2)].into());
    let packs = || std::fs::read_dir(dir.path().join("repo/packs")).unwrap().count();
    let before = packs();
    assert_eq!(over(&repo, &base, &Places::new()).map, base.map);
    assert_eq!(
        over(&repo, &base, &[(1, 1), (2, 0)].into()).map,
        base.map,
        "the same bytes were written back"
    );
    assert_eq!(packs(), before);
    // Of a disk of zeroes there is no node at all.
    let blank = whole(&repo, 3 * LEAF * u64::from(CHUNK), &Places::new());
    assert_eq!(over(&repo, &blank, &[(5, 0)].into()).map, None);
    assert_eq!(over(&repo, &base, &[(1, 0), (LEAF, 0)].into()).map, None);
}

#[test]
fn what_was_lost_stays_so_until_something_else_stands_there() {
    let (_dir, repo) = new_repo();
    let base = whole(&repo, 2 * LEAF * u64::from(CHUNK), &[(1, 1), (2, 2), (LEAF, 3)].into());
    let mut capture = repo.begin_capture(&group("vm"), small_packs()).unwrap();
    let disk = capture.begin_disk_over("disk0".parse().unwrap(), &base).unwrap();
    disk.put_lost(1).unwrap();
    disk.put_lost(5).unwrap();
    assert_eq!(disk.put_lost(5).unwrap_err().kind(), ErrorKind::InvalidInput);
    let saved = capture.commit(meta()).unwrap().manifest().disks[0].clone();
    assert_eq!(saved.stats.data_chunks, base.stats.data_chunks + 1, "one that was zeroes before");
    let entries = |disk: &DiskEntry| repo.disk_map(disk).unwrap().entries(0..6).unwrap();
    assert_eq!((entries(&saved)[1], entries(&saved)[5]), (MapEntry::Lost, MapEntry::Lost));
    assert_eq!(entries(&saved)[2], entries(&base)[2]);
    // Whoever goes by ids alone finds it as little.
    assert_eq!(repo.locate(&ChunkId::from_bytes([0xff; 32])).unwrap(), None);
    let later = over(&repo, &saved, &[(2, 0), (5, 7)].into());
    assert_eq!(entries(&later)[1], MapEntry::Lost, "nobody wrote there");
    assert_eq!(entries(&later)[5], MapEntry::Chunk(ChunkId::of(&chunk_of(7))));
    let report = repo.verify(VerifyOptions::default(), |_| ()).unwrap();
    let places: Vec<_> =
        report.damages.iter().map(|found| found.range.clone().unwrap().start / u64::from(CHUNK)).collect();
    assert_eq!(places, [1, 5, 1], "of both snapshots: {report:?}");
}

#[test]
fn a_place_over_another_disk_is_put_once_and_within_the_disk() {
    let (_dir, repo) = new_repo();
    let base = whole(&repo, 4 * u64::from(CHUNK), &[(1, 1)].into());
    let mut capture = repo.begin_capture(&group("vm"), small_packs()).unwrap();
    let disk = capture.begin_disk_over("disk0".parse().unwrap(), &base).unwrap();
    disk.put_zero(0..1).unwrap();
    assert_eq!(disk.put_zero(0..1).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(disk.put_zero(3..5).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(capture.begin_disk_over("disk0".parse().unwrap(), &base).is_err(), "the name is taken");
}

#[test]
fn a_snapshot_says_whose_live_restore_it_was_saved_of() {
    let (dir, repo) = new_repo();
    let saved = Saved { live_restore_of: "vm@2026-11-21T00:33:12Z".into(), up_to: SavedUpTo::Flushed };
    let mut capture = repo.begin_capture(&group("vm"), small_packs()).unwrap();
    put_disk(&repo, &mut capture, "disk0", &disk("a"), None).unwrap();
    let snapshot = capture.commit(SnapshotMeta { saved: Some(saved.clone()), ..meta() }).unwrap();
    let again = Repository::open(dir.path().join("repo")).unwrap();
    assert_eq!(again.snapshot(&snapshot.name()).unwrap().manifest().saved, Some(saved));
}
