//! What goes in comes out: disks, attachments, names, maps, through captures that share.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    clippy::single_range_in_vec_init,
    reason = "this is a test"
)]

mod common;

use std::collections::HashSet;

use common::*;
use jiff::Timestamp;
use proptest::prelude::*;
use repository::*;

fn new_repo() -> (tempfile::TempDir, Repository) {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path().join("repo"), InitOptions::default()).unwrap();
    (dir, repo)
}

#[test]
fn a_disk_comes_back_and_so_does_its_attachment() {
    let (dir, repo) = new_repo();
    let mut bytes = disk("aB.bcD..a");
    bytes.truncate(bytes.len() - 1000);
    let snapshot = capture(&repo, "web01", &bytes).unwrap();
    let stats = snapshot.manifest().disks[0].stats;
    assert_eq!((stats.data_chunks, stats.zero_chunks, stats.new_chunks), (6, 3, 6));

    let again = Repository::open(dir.path().join("repo")).unwrap();
    let (found, entry) = again.resolve("web01@latest/disk0").unwrap();
    assert_eq!(found, snapshot);
    assert_eq!(restore(&again, &entry.unwrap()).unwrap(), bytes);
    assert_eq!(again.read_attachment(&found.manifest().attachments[0]).unwrap(), b"memory of web01");
    assert_eq!(again.resolve(&snapshot.name().to_string()).unwrap().0, snapshot);
}

#[test]
fn what_is_known_is_neither_stored_nor_mapped_again() {
    let (dir, repo) = new_repo();
    let bytes = disk("abCD.e");
    capture(&repo, "web01", &bytes).unwrap();
    let files = |dir: &std::path::Path| std::fs::read_dir(dir).unwrap().count();
    let before = (files(&dir.path().join("repo/packs")), files(&dir.path().join("repo/index")));
    let second = capture(&repo, "web01", &bytes).unwrap();
    assert_eq!(second.manifest().disks[0].stats.new_chunks, 0);
    let after = (files(&dir.path().join("repo/packs")), files(&dir.path().join("repo/index")));
    assert_eq!(before, after);
    // Another group shares too, and a changed chunk is the only one stored.
    let other = capture(&repo, "web02", &disk("abCX.e")).unwrap();
    assert_eq!(other.manifest().disks[0].stats.new_chunks, 1);
}

#[test]
fn several_disks_and_empty_ones_stand_in_one_snapshot() {
    let (_dir, repo) = new_repo();
    let mut capture = repo.begin_capture(&group("web01"), small_packs()).unwrap();
    for (name, picture) in [("boot", "ab"), ("data", "bcD"), ("empty", ""), ("blank", "....")] {
        put_disk(&repo, &mut capture, name, &disk(picture), None).unwrap();
    }
    capture.add_attachment("empty.conf".parse().unwrap(), b"").unwrap();
    let snapshot = capture.commit(meta()).unwrap();
    for (entry, picture) in snapshot.manifest().disks.iter().zip(["ab", "bcD", "", "...."]) {
        assert_eq!(restore(&repo, entry).unwrap(), disk(picture));
    }
    assert_eq!(snapshot.manifest().disks[3].map, None);
    assert_eq!(repo.read_attachment(&snapshot.manifest().attachments[0]).unwrap(), b"");
}

#[test]
fn captures_of_the_same_second_get_distinct_names() {
    let (_dir, repo) = new_repo();
    let options = CaptureOptions { time: Some("2026-11-21T00:33:12.7Z".parse().unwrap()), ..small_packs() };
    let names: Vec<String> = (0..3)
        .map(|_| capture_with(&repo, "web01", &disk("a"), options).unwrap().name().to_string())
        .collect();
    assert_eq!(
        names,
        ["web01@2026-11-21T00:33:12Z", "web01@2026-11-21T00:33:13Z", "web01@2026-11-21T00:33:14Z"]
    );
}

#[test]
fn a_wrong_name_is_answered_with_the_nearest() {
    let (_dir, repo) = new_repo();
    let options =
        CaptureOptions { time: Some(Timestamp::from_second(1_000_000_000).unwrap()), ..small_packs() };
    capture_with(&repo, "web01", &disk("a"), options).unwrap();
    let nearest = |spec: &str| {
        let error = repo.resolve(spec).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{spec}");
        error.nearest().to_vec()
    };
    assert_eq!(nearest("web1@latest"), ["web01"]);
    assert_eq!(nearest("web01@latest/disk1"), ["disk0"]);
    assert_eq!(nearest("web01@2001-09-09T01:46:41Z"), ["web01@2001-09-09T01:46:40Z"]);
    assert_eq!(repo.snapshots(Some(&group("web1"))).unwrap_err().nearest(), ["web01"]);
    assert_eq!(repo.resolve("web01").unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn an_incomplete_or_doubly_put_disk_is_refused() {
    let (_dir, repo) = new_repo();
    let mut capture = repo.begin_capture(&group("web01"), small_packs()).unwrap();
    let writer = capture.begin_disk("disk0".parse().unwrap(), 5 * u64::from(CHUNK), CHUNK, None).unwrap();
    writer.put_zero(1..3).unwrap();
    assert_eq!(writer.put_zero(2..4).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(writer.put_zero(4..6).unwrap_err().kind(), ErrorKind::InvalidInput);
    let plain = chunk_of(1);
    let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL).unwrap();
    let id = encoder.id(&plain);
    assert!(!writer.put_known(0, &id).unwrap());
    let short = encoder.encode(&plain[..1000]).unwrap();
    assert_eq!(writer.put_chunk(0, &id, &short).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(capture.begin_disk("disk0".parse().unwrap(), 1, CHUNK, None).is_err());
    assert_eq!(capture.commit(meta()).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(repo.groups().unwrap().is_empty());
    let empty = repo.begin_capture(&group("web01"), small_packs()).unwrap();
    assert_eq!(empty.commit(meta()).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn a_capture_that_is_dropped_leaves_no_file_behind() {
    let (dir, repo) = new_repo();
    let mut capture = repo.begin_capture(&group("web01"), small_packs()).unwrap();
    put_disk(&repo, &mut capture, "disk0", &disk("ABCDEFG"), None).unwrap();
    drop(capture);
    for sub in ["tmp", "packs", "index", "snapshots"] {
        assert_eq!(std::fs::read_dir(dir.path().join("repo").join(sub)).unwrap().count(), 0, "{sub}");
    }
}

#[test]
fn an_index_that_was_published_on_the_way_serves_the_rest_of_the_capture() {
    let (_dir, repo) = new_repo();
    let options = CaptureOptions { index_batch: 2, ..small_packs() };
    let bytes = disk("ABCDEFGHABCDEFGH");
    let snapshot = capture_with(&repo, "web01", &bytes, options).unwrap();
    assert_eq!(snapshot.manifest().disks[0].stats.new_chunks, 8);
    assert_eq!(restore_first(&repo, &snapshot).unwrap(), bytes);
}

#[test]
fn many_captures_leave_few_segments_and_lose_nothing() {
    let (dir, repo) = new_repo();
    let reader = Repository::open(dir.path().join("repo")).unwrap();
    let mut snapshots = Vec::new();
    for n in 0..40u8 {
        let bytes = [disk("ab"), chunk_of(1000 + u64::from(n)), noise_of(n.into())].concat();
        snapshots.push((capture(&repo, "web01", &bytes).unwrap(), bytes));
    }
    let segments = std::fs::read_dir(dir.path().join("repo/index")).unwrap().count();
    assert!(segments <= 12, "{segments} segments");
    // A reader that was there before the first of them finds everything.
    for (snapshot, bytes) in &snapshots {
        assert_eq!(&restore_first(&reader, snapshot).unwrap(), bytes);
    }
}

#[test]
fn a_large_sparse_disk_needs_a_tree_and_costs_little() {
    let (dir, repo) = new_repo();
    const SIZE: u64 = 20 << 40;
    let chunks = SIZE / u64::from(CHUNK);
    let places = [0, 1, 1023, 1024, 262_143, 262_144, 5_000_000, chunks - 1];
    let snap = |extra: Option<u64>, parent: Option<DiskMap>| {
        let mut capture = repo.begin_capture(&group("big"), small_packs()).unwrap();
        let writer = capture.begin_disk("disk0".parse().unwrap(), SIZE, CHUNK, parent).unwrap();
        let mut places: Vec<u64> = places.iter().copied().chain(extra).collect();
        places.sort_unstable();
        let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL).unwrap();
        let mut next = 0;
        for place in places {
            writer.put_zero(next..place).unwrap();
            let plain = chunk_of(place);
            let id = encoder.id(&plain);
            if !writer.put_known(place, &id).unwrap() {
                writer.put_chunk(place, &id, &encoder.encode(&plain).unwrap()).unwrap();
            }
            next = place + 1;
        }
        writer.put_zero(next..chunks).unwrap();
        capture.commit(meta()).unwrap()
    };
    let first = snap(None, None);
    let map = repo.disk_map(&first.manifest().disks[0]).unwrap();
    let second = snap(Some(7_000_000), Some(map.clone()));
    let changed = repo.disk_map(&second.manifest().disks[0]).unwrap();
    assert_eq!(changed.changed_since(&map).unwrap(), [7_000_000..7_000_001]);
    assert_eq!(map.changed_since(&map).unwrap(), []);
    for place in places {
        assert_eq!(map.entry(place).unwrap(), MapEntry::Chunk(ChunkId::of(&chunk_of(place))));
        assert_eq!(map.entry(place ^ 8).unwrap(), MapEntry::Zero);
    }
    assert!(map.entry(chunks).is_err());
    let stored: u64 = std::fs::read_dir(dir.path().join("repo/packs"))
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert!(stored < 64 << 10, "{stored} bytes");
}

#[test]
fn locations_sort_in_the_order_of_capture() {
    let (_dir, repo) = new_repo();
    let snapshot = capture(&repo, "web01", &disk("ABCDEFGH")).unwrap();
    let map = repo.disk_map(&snapshot.manifest().disks[0]).unwrap();
    let ids: Vec<ChunkId> = map
        .entries(0..8)
        .unwrap()
        .into_iter()
        .filter_map(|entry| match entry {
            MapEntry::Chunk(id) => Some(id),
            MapEntry::Zero | MapEntry::Lost => None,
        })
        .collect();
    let locations = repo.locate_all(&ids).unwrap();
    assert!(locations.is_sorted());
    assert!(locations.iter().map(|location| location.pack).collect::<HashSet<_>>().len() > 1);
    // Neighbours come in one read and decode to what they were.
    let reader = repo.reader();
    let mut decoder = ChunkDecoder::new().unwrap();
    let fetches = plan_fetches(&locations, |at| at, FetchLimits::default());
    assert!(fetches.len() < locations.len());
    for fetch in fetches {
        let mut stored = vec![0; fetch.len];
        reader.read_stored_range(fetch.pack, fetch.offset, &mut stored).unwrap();
        for item in fetch.items.clone() {
            let mut plain = vec![0; locations[item].plain_len as usize];
            decoder
                .decode(&locations[item], &stored[fetch.place(&locations[item])], &ids[item], &mut plain)
                .unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_sequence_of_disks_comes_back(
        pictures in proptest::collection::vec("[a-dA-C.]{0,12}", 1..5), cut in 0usize..70_000, batch in 1usize..20
    ) {
        let (_dir, repo) = new_repo();
        let mut kept = Vec::new();
        for picture in pictures {
            let mut bytes = disk(&picture);
            bytes.truncate(bytes.len().saturating_sub(cut));
            let options = CaptureOptions { index_batch: batch, ..small_packs() };
            kept.push((capture_with(&repo, "web01", &bytes, options).unwrap(), bytes));
        }
        for (snapshot, bytes) in &kept {
            prop_assert_eq!(&restore_first(&repo, snapshot).unwrap(), bytes);
        }
        prop_assert_eq!(repo.snapshots(None).unwrap().snapshots.len(), kept.len());
    }
}
