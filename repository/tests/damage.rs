//! Bytes that are not what was written: each byte of a small repository flipped, files cut short or gone. Detected or harmless, and
//! never a wrong restore.

#![allow(clippy::unwrap_used, clippy::wildcard_imports, reason = "this is a test")]

mod common;

use std::collections::BTreeMap;

use common::sim::Sim;
use common::*;
use repository::*;

/// Two snapshots of a short disk each, with a hole and a chunk, in as few bytes as the format allows.
fn small_repository() -> (Sim, Vec<(SnapshotName, Vec<u8>)>) {
    repository_of([disk(".a"), disk(".b")].map(|mut bytes| {
        bytes.truncate(CHUNK as usize + 3000);
        bytes
    }))
}

fn repository_of(disks: [Vec<u8>; 2]) -> (Sim, Vec<(SnapshotName, Vec<u8>)>) {
    let sim = Sim::new();
    let repo = Repository::init_on(sim.storage(), InitOptions::default()).unwrap();
    let captured = disks.map(|bytes| (capture(&repo, "web01", &bytes).unwrap().name(), bytes));
    (sim, captured.to_vec())
}

struct Seen {
    /// Whether anything reported an error.
    refused: bool,
    /// Whether verify, or opening, named damage.
    verified: bool,
}

/// Uses all of the repository. Whatever comes back must be right.
fn use_all(sim: &Sim, expected: &[(SnapshotName, Vec<u8>)], what: &str) -> Seen {
    let Ok(repo) = Repository::open_on(sim.storage()) else { return Seen { refused: true, verified: true } };
    let mut refused = false;
    for (name, bytes) in expected {
        match repo.snapshot(name).and_then(|snapshot| Ok((restore_first(&repo, &snapshot)?, snapshot))) {
            Ok((back, snapshot)) => {
                assert!(back == *bytes, "{what}: {name} came back wrong");
                match repo.read_attachment(&snapshot.manifest().attachments[0]) {
                    Ok(back) => assert_eq!(back, b"memory of web01", "{what}"),
                    Err(_) => refused = true,
                }
            }
            Err(_) => refused = true,
        }
    }
    match repo.resolve("web01@latest") {
        Ok((snapshot, _)) => assert_eq!(snapshot.name(), expected.last().unwrap().0, "{what}"),
        Err(_) => refused = true,
    }
    let options = VerifyOptions { threads: 1, ..VerifyOptions::default() };
    let verified = repo.verify(options, |_| ()).is_ok_and(|report| !report.is_clean());
    Seen { refused, verified }
}

/// Tries each change to each file, spread over the cores.
fn try_all(changes: impl Fn(&[u8]) -> Vec<(String, Vec<u8>)> + Sync) {
    let (sim, expected) = small_repository();
    let seen = use_all(&sim, &expected, "untouched");
    assert!(!seen.refused && !seen.verified, "an untouched repository is clean");
    let files: BTreeMap<String, Vec<u8>> = sim.files();
    assert!(files.len() >= 7, "{:?}", files.keys());
    for (path, bytes) in &files {
        let changes = changes(bytes);
        std::thread::scope(|scope| {
            for half in 0..2 {
                let (changes, expected, world) = (&changes, &expected, sim.fork());
                scope.spawn(move || {
                    for (how, changed) in changes.iter().skip(half).step_by(2) {
                        world.overwrite(path, changed.clone());
                        let what = format!("{path} {how}");
                        let seen = use_all(&world, expected, &what);
                        assert!(seen.verified, "{what}: verify found nothing (refused: {})", seen.refused);
                    }
                });
            }
        });
    }
}

#[test]
fn each_flipped_byte_is_found_by_verify_and_never_restored() {
    try_all(|bytes| {
        let flip = |at: usize| {
            let mut changed = bytes.to_vec();
            changed[at] ^= 1 << (at % 8);
            (format!("with bit {} of byte {at} flipped", at % 8), changed)
        };
        (0..bytes.len()).map(flip).collect()
    });
}

#[test]
fn each_file_cut_short_is_found_by_verify_and_never_restored() {
    try_all(|bytes| {
        // Every length near the ends and the pages' bounds, a sample of the others.
        let near = |len: &usize| len % 4096 < 3 || len % 4096 > 4093 || *len < 80 || len.is_multiple_of(61);
        let cut = |len: usize| (format!("cut to {len} bytes"), bytes[..len].to_vec());
        let longer = ("with a byte more".into(), [bytes, &[0]].concat());
        (0..bytes.len()).filter(near).map(cut).chain([longer]).collect()
    });
}

#[test]
fn each_missing_file_is_an_error_that_names_it() {
    let (sim, expected) = small_repository();
    for path in sim.files().into_keys() {
        let world = sim.fork();
        world.storage().remove(&path).unwrap();
        let seen = use_all_but(&world, &expected, &path);
        assert!(seen, "{path} is gone and nobody minds");
    }
}

/// Whether the missing file was noticed. A manifest that is gone is a snapshot that is gone: it is not found.
fn use_all_but(sim: &Sim, expected: &[(SnapshotName, Vec<u8>)], path: &str) -> bool {
    let Ok(repo) = Repository::open_on(sim.storage()) else { return true };
    let results: Vec<_> = expected
        .iter()
        .map(|(name, bytes)| {
            let back = repo.snapshot(name).and_then(|snapshot| restore_first(&repo, &snapshot));
            assert!(back.as_ref().is_ok_and(|back| back == bytes) || back.is_err(), "{path}");
            back
        })
        .collect();
    if path.starts_with("snapshots/") {
        return results
            .iter()
            .any(|result| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound));
    }
    let report = repo.verify(VerifyOptions::default(), |_| ()).unwrap();
    results.iter().any(|result| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Damaged))
        && report.damages.iter().any(|damage| damage.snapshot.is_some())
}

#[test]
fn the_report_names_snapshot_disk_and_place_of_what_is_damaged() {
    let (sim, _) = repository_of([disk("ab."), disk("cb")]);
    let repo = Repository::open_on(sim.storage()).unwrap();
    let (first, second) =
        (&repo.snapshots(None).unwrap().snapshots[0], &repo.snapshots(None).unwrap().snapshots[1]);
    // The chunk `b`, which both snapshots have at their second place.
    let at = repo.locate(&ChunkId::of(&chunk_of(b'b'.into()))).unwrap().unwrap();
    let path = format!("packs/{}.pack", at.pack);
    let mut bytes = sim.files().remove(&path).unwrap();
    bytes[at.offset as usize + 20] ^= 1;
    sim.overwrite(&path, bytes);
    let repo = Repository::open_on(sim.storage()).unwrap();
    let report = repo.verify(VerifyOptions::default(), |_| ()).unwrap();
    let named: Vec<_> = report.damages.iter().filter(|damage| damage.snapshot.is_some()).collect();
    assert_eq!(named.len(), 2);
    for (damage, snapshot) in named.iter().zip([first, second]) {
        assert_eq!(damage.snapshot, Some(snapshot.name().to_string()));
        assert_eq!(damage.disk.as_deref(), Some("disk0"));
        assert_eq!(damage.range, Some(u64::from(CHUNK)..2 * u64::from(CHUNK)));
        assert_eq!(damage.path.as_deref(), Some(std::path::Path::new("/sim").join(&path).as_path()));
    }
    assert_eq!(report.damages.len(), 3, "{:?}", report.damages);
    // Captured once more it is not stored again: it is known. The rest of the snapshot can still be had.
    assert_eq!(restore_first(&repo, first).unwrap_err().kind(), ErrorKind::Damaged);
}

#[test]
fn a_damaged_index_costs_nothing_but_what_it_alone_names() {
    let (sim, expected) = small_repository();
    let newest = sim.files().into_keys().filter(|path| path.starts_with("index/")).max().unwrap();
    sim.overwrite(&newest, vec![0; 8192]);
    let repo = Repository::open_on(sim.storage()).unwrap();
    let restore = |at: usize| restore_first(&repo, &repo.snapshot(&expected[at].0)?);
    assert_eq!(restore(0).unwrap(), expected[0].1);
    assert_eq!(restore(1).unwrap_err().kind(), ErrorKind::Damaged);
    // A capture stores again what it cannot find, and so mends the second snapshot too.
    capture(&repo, "web01", &expected[1].1).unwrap();
    assert_eq!(restore(1).unwrap(), expected[1].1);
}

#[test]
fn what_is_not_a_repository_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let kind = |path: &std::path::Path| Repository::open(path).unwrap_err().kind();
    assert_eq!(kind(&dir.path().join("nowhere")), ErrorKind::NotFound);
    assert_eq!(kind(dir.path()), ErrorKind::NotARepository);
    std::fs::write(dir.path().join("file"), "x").unwrap();
    assert_eq!(kind(&dir.path().join("file")), ErrorKind::NotARepository);
    let refused = |path: &std::path::Path, options| Repository::init(path, options).unwrap_err().kind();
    assert_eq!(refused(dir.path(), InitOptions::default()), ErrorKind::AlreadyExists);
    let repo = dir.path().join("repo");
    assert_eq!(refused(&repo, InitOptions { chunk_size: 5000 }), ErrorKind::InvalidInput);
    assert!(!repo.exists());
    Repository::init(&repo, InitOptions::default()).unwrap();
    assert_eq!(refused(&repo, InitOptions::default()), ErrorKind::AlreadyExists);
    assert_eq!(refused(&dir.path().join("a/b"), InitOptions::default()), ErrorKind::NotFound);
    // What a newer release wrote is not called damaged.
    let config = repo.join("lifeboot.config");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replacen("config 1 ", "config 2 ", 1)).unwrap();
    assert_eq!(kind(&repo), ErrorKind::NewerFormat);
    std::fs::write(&config, "").unwrap();
    assert_eq!(kind(&repo), ErrorKind::Damaged);
}
