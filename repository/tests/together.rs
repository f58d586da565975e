//! Several at once: captures, merges of the index, readers and verify, each with an opening of its own as other processes have.

#![allow(clippy::unwrap_used, clippy::wildcard_imports, reason = "this is a test")]

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::*;
use parking_lot::Mutex;
use repository::*;

const ROUNDS: u64 = 10;
const GROUPS: [&str; 2] = ["web01", "web02"];

/// What round `round` of a group captures: some of it new, some of it new to both at the same time, some of it known.
fn content(group: usize, round: u64) -> Vec<u8> {
    let own = chunk_of(10_000 * (group as u64 + 1) + round);
    [own, chunk_of(500 + round), noise_of(round / 2), vec![0; CHUNK as usize], chunk_of(1)].concat()
}

#[test]
fn captures_merges_and_readers_do_not_disturb_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("repo");
    Repository::init(&path, InitOptions::default()).unwrap();
    let done: Mutex<HashMap<SnapshotName, (usize, u64)>> = Mutex::default();
    let running = AtomicUsize::new(GROUPS.len());
    std::thread::scope(|scope| {
        for (number, name) in GROUPS.iter().enumerate() {
            let (path, done, running) = (&path, &done, &running);
            scope.spawn(move || {
                // A capture that fails must not leave the others waiting for it.
                let _ended = Ended(running);
                for round in 0..ROUNDS {
                    let repo = Repository::open(path).unwrap();
                    let snapshot = capture(&repo, name, &content(number, round)).unwrap();
                    done.lock().insert(snapshot.name(), (number, round));
                }
            });
        }
        scope.spawn(|| {
            // Opened once, before there was anything.
            let repo = Repository::open(&path).unwrap();
            while running.load(Ordering::Acquire) > 0 {
                check_all(&repo, &done);
            }
        });
        scope.spawn(|| {
            while running.load(Ordering::Acquire) > 0 {
                let report =
                    Repository::open(&path).unwrap().verify(VerifyOptions::default(), |_| ()).unwrap();
                assert!(report.is_clean(), "{:?}", report.damages);
            }
        });
    });
    assert_eq!(done.lock().len(), GROUPS.len() * ROUNDS as usize);
    let repo = Repository::open(&path).unwrap();
    check_all(&repo, &done);
    let report = repo.verify(VerifyOptions::default(), |_| ()).unwrap();
    assert!(report.is_clean(), "{:?}", report.damages);
    assert_eq!(names_in(&path.join("tmp")), Vec::<String>::new());
}

struct Ended<'a>(&'a AtomicUsize);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Every snapshot that was completed before now comes back.
fn check_all(repo: &Repository, done: &Mutex<HashMap<SnapshotName, (usize, u64)>>) {
    let completed = done.lock().clone();
    let list = repo.snapshots(None).unwrap();
    assert!(list.damaged.is_empty(), "{:?}", list.damaged);
    assert!(list.snapshots.len() >= completed.len());
    for snapshot in &list.snapshots {
        let bytes = restore_first(repo, snapshot).unwrap();
        if let Some((group, round)) = completed.get(&snapshot.name()) {
            assert!(bytes == content(*group, *round), "{} came back wrong", snapshot.name());
        }
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}
