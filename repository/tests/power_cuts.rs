//! The power goes at every operation of a capture, or the disk is full from there on: old snapshots stay whole, no snapshot that is
//! seen lacks a chunk, leftovers do no harm. The mistakes that the order of a commit exists to avoid are each noticed.

#![allow(clippy::unwrap_used, clippy::wildcard_imports, reason = "this is a test")]

mod common;

use std::sync::LazyLock;

use common::sim::{Mistake, Sim};
use common::*;
use repository::*;

/// How many outcomes of each power cut are looked at.
const OUTCOMES: u64 = 4;

/// What was captured before, and what is being captured: two packs, and its end is a merge of the index.
const OLD: [&str; 4] = ["abC.", "abCd", "abXd", "abWd"];
static NEW: LazyLock<Vec<u8>> = LazyLock::new(|| disk("aYZd"));

fn old_repository() -> (Sim, Vec<(SnapshotName, Vec<u8>)>) {
    let sim = Sim::new();
    let repo = Repository::init_on(sim.storage(), InitOptions::default()).unwrap();
    let snapshots =
        OLD.map(|picture| (capture(&repo, "web01", &disk(picture)).unwrap().name(), disk(picture)));
    (sim, snapshots.to_vec())
}

/// Checks what there is after the power came back; an answer is what is wrong with it.
fn check(
    sim: &Sim,
    old: &[(SnapshotName, Vec<u8>)],
    completed: Option<&SnapshotName>,
) -> std::result::Result<(), String> {
    let fail = |what: &str, error: Error| format!("{what}: {error}");
    let repo = Repository::open_on(sim.storage()).map_err(|error| fail("cannot be opened", error))?;
    let whole = |repo: &Repository, name: &SnapshotName, bytes: &[u8]| {
        let snapshot = repo.snapshot(name).map_err(|error| fail("a snapshot is gone", error))?;
        match restore_first(repo, &snapshot) {
            Ok(back) if back == bytes => Ok(()),
            Ok(_) => Err(format!("{name} comes back wrong")),
            Err(error) => Err(fail("a snapshot has a hole", error)),
        }
    };
    for (name, bytes) in old {
        whole(&repo, name, bytes)?;
    }
    if let Some(name) = completed {
        whole(&repo, name, &NEW)?;
    }
    for name in repo.snapshot_names(&group("web01")).map_err(|error| fail("cannot list", error))? {
        if !old.iter().any(|(old, _)| *old == name) {
            whole(&repo, &name, &NEW)?;
        }
    }
    let verified = |repo: &Repository| {
        let report = repo
            .verify(VerifyOptions::default(), |_| ())
            .map_err(|error| fail("cannot be verified", error))?;
        report.damages.first().map_or(Ok(()), |damage| Err(format!("verify: {damage}")))
    };
    verified(&repo)?;
    // And life goes on: what is captured next may lean on anything that it finds.
    let next = capture(&repo, "web01", &NEW).map_err(|error| fail("the next capture fails", error))?;
    whole(&repo, &next.name(), &NEW)?;
    verified(&repo)
}

/// Cuts the power at each operation of a capture; the first thing that is wrong with any outcome.
fn explore(mistake: Mistake) -> std::result::Result<u64, String> {
    let (base, old) = old_repository();
    for op in 0.. {
        let sim = base.fork().with_mistake(mistake).cut_at(op);
        let done = Repository::open_on(sim.storage()).and_then(|repo| capture(&repo, "web01", &NEW));
        let completed = done.as_ref().ok().map(Snapshot::name);
        for outcome in 0..OUTCOMES {
            check(&sim.after_power_cut(op * OUTCOMES + outcome), &old, completed.as_ref())
                .map_err(|what| format!("cut at operation {op}, outcome {outcome}: {what}"))?;
        }
        if !sim.was_cut() {
            let segments = sim.files().keys().filter(|path| path.starts_with("index/")).count();
            assert_eq!(segments, 2, "the capture ended in a merge");
            return Ok(op);
        }
    }
    unreachable!("a capture ends")
}

#[test]
fn a_power_cut_at_any_operation_leaves_every_snapshot_whole() {
    let ops = explore(Mistake::None).unwrap();
    assert!(ops > 25, "{ops} operations");
}

#[test]
fn packs_and_indexes_that_were_not_synced_before_their_rename_are_noticed() {
    let found = explore(Mistake::NoSyncBeforeRename).unwrap_err();
    println!("{found}");
}

#[test]
fn names_that_were_never_synced_are_noticed() {
    let found = explore(Mistake::NoDirSync).unwrap_err();
    println!("{found}");
}

#[test]
fn an_index_before_its_pack_is_noticed() {
    let found = explore(Mistake::IndexBeforePack).unwrap_err();
    println!("{found}");
}

#[test]
fn a_manifest_before_what_it_names_is_noticed() {
    let found = explore(Mistake::ManifestFirst).unwrap_err();
    println!("{found}");
}

#[test]
fn a_power_cut_during_init_leaves_nothing_or_a_repository() {
    for op in 0.. {
        let sim = Sim::new().cut_at(op);
        let made = Repository::init_on(sim.storage(), InitOptions::default());
        for outcome in 0..OUTCOMES {
            let after = sim.after_power_cut(op * OUTCOMES + outcome);
            let repo = match Repository::open_on(after.storage()) {
                Err(error) => {
                    assert!(made.is_err(), "cut at {op}: it was made");
                    assert_eq!(error.kind(), ErrorKind::NotARepository, "cut at {op}: {error}");
                    Repository::init_on(after.storage(), InitOptions::default()).unwrap()
                }
                Ok(repo) => repo,
            };
            capture(&repo, "web01", &disk("ab")).unwrap();
        }
        if !sim.was_cut() {
            return;
        }
    }
}

#[test]
fn a_full_disk_at_any_operation_is_a_clean_error_and_leaves_no_files() {
    let (base, old) = old_repository();
    let before: Vec<String> = base.files().into_keys().collect();
    for op in 0.. {
        let sim = base.fork().full_at(op);
        let repo = Repository::open_on(sim.storage()).unwrap();
        let done = capture(&repo, "web01", &NEW);
        let after: Vec<String> = sim.files().into_keys().collect();
        assert!(!after.iter().any(|path| path.starts_with("tmp/")), "full at {op}: {after:?}");
        let completed = match done {
            Ok(snapshot) => Some(snapshot.name()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "full at {op}: {error}");
                assert!(error.advice().is_some());
                let seen =
                    |files: &[String]| files.iter().filter(|path| path.starts_with("snapshots/")).count();
                assert_eq!(seen(&after), seen(&before), "full at {op}");
                let index_grew =
                    after.iter().any(|path| path.starts_with("index/") && !before.contains(path));
                let packs_grew =
                    after.iter().any(|path| path.starts_with("packs/") && !before.contains(path));
                assert_eq!(index_grew, packs_grew, "full at {op}: packs that no index names");
                None
            }
        };
        let ops = sim.ops();
        check(&sim.fork(), &old, completed.as_ref()).unwrap_or_else(|what| panic!("full at {op}: {what}"));
        if ops <= op {
            assert!(completed.is_some());
            return;
        }
    }
}
