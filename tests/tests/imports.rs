//! The house stands as ARCHITECTURE.md draws it: who may depend on whom.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use e2e::programs::project_dir;

/// Each crate of the workspace, with those of the workspace that it may depend on, for its tests too.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("block", &[]),
    ("nbd-server", &["proto", "block"]),
    ("repository", &["block"]),
    ("agent", &["proto", "block", "nbd-server", "repository"]),
    // From outside alone, by command line and socket.
    ("tests", &[]),
    ("benches", &["proto"]),
];

/// What is pure takes bytes and time as arguments: crates that do I/O, keep time or start threads have no place in it.
const IMPURE: &[&str] = &["tokio", "tokio-uring", "io-uring", "libc", "rustix", "tempfile", "jiff"];

#[test]
fn crates_depend_only_on_those_that_they_may_know() {
    let members = members();
    let ours: BTreeSet<&str> = members.iter().map(String::as_str).collect();
    let rules: BTreeMap<&str, &[&str]> = MAY_KNOW.iter().copied().collect();
    assert_eq!(
        ours,
        rules.keys().copied().collect(),
        "every member of the workspace has its rule, and no other"
    );
    for member in &members {
        let known: Vec<String> =
            dependencies(member, true).into_iter().filter(|name| ours.contains(name.as_str())).collect();
        for name in known {
            // A crate may appear in its own tests.
            let allowed = name == *member || rules[member.as_str()].contains(&name.as_str());
            assert!(allowed, "{member} depends on {name}, which it must not know");
        }
    }
}

#[test]
fn the_protocol_does_no_io() {
    for name in dependencies("proto", false) {
        assert!(!IMPURE.contains(&name.as_str()), "proto depends on {name}");
    }
}

#[test]
fn no_crate_escapes_the_shared_lints() {
    for member in members() {
        let manifest = manifest(&member);
        let shared =
            manifest.get("lints").and_then(|lints| lints.get("workspace")).and_then(toml::Value::as_bool);
        assert_eq!(shared, Some(true), "{member} does not take the workspace's lints");
    }
}

/// The members of the workspace, by the names of their directories, which are those of their packages.
fn members() -> Vec<String> {
    let text = fs::read_to_string(project_dir().join("Cargo.toml")).unwrap();
    let workspace: toml::Table = text.parse().unwrap();
    let members = workspace["workspace"]["members"].as_array().unwrap();
    members.iter().map(|member| member.as_str().unwrap().to_owned()).collect()
}

fn manifest(member: &str) -> toml::Table {
    let manifest: toml::Table =
        fs::read_to_string(project_dir().join(member).join("Cargo.toml")).unwrap().parse().unwrap();
    assert_eq!(manifest["package"]["name"].as_str(), Some(member), "a package has the name of its directory");
    manifest
}

/// The names of the packages that `member` depends on: to be built, and to be tested too where `for_tests` says so.
fn dependencies(member: &str, for_tests: bool) -> Vec<String> {
    let manifest = manifest(member);
    let mut tables = vec![&manifest];
    let targets = manifest.get("target").and_then(toml::Value::as_table);
    tables.extend(targets.into_iter().flat_map(|targets| targets.values()).filter_map(toml::Value::as_table));
    let mut kinds = vec!["dependencies", "build-dependencies"];
    kinds.extend(for_tests.then_some("dev-dependencies"));
    let listed = tables.iter().flat_map(|table| kinds.iter().filter_map(|kind| table.get(*kind)));
    let entries = listed.filter_map(toml::Value::as_table).flatten();
    entries.map(|(name, entry)| renamed(name, entry)).collect()
}

/// A dependency may go by another name than its package's.
fn renamed(name: &str, entry: &toml::Value) -> String {
    entry.get("package").and_then(toml::Value::as_str).unwrap_or(name).to_owned()
}
