//! The targets as ordinary tests: on their seeds, on the corpus, and on a bounded number of mutations of both.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::path::Path;

use fuzz::Target;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

const CASES: u32 = 1500;
/// Numbers at which lengths, counts and offsets go wrong.
const EDGES: [u64; 10] =
    [0, 1, 2, 0x7f, 0xff, 0x8000, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x7fff_ffff_ffff_ffff];

#[derive(Clone, Debug)]
enum Edit {
    Flip(Index, u8),
    Overwrite(Index, u8),
    Number { at: Index, bytes: usize, edge: usize, add: u64, big_endian: bool },
    Insert(Index, Vec<u8>),
    Remove(Index, Index),
    Repeat(Index, Index),
    Cut(Index),
    Splice(Index, Index, Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<Index>;
    prop_oneof![
        4 => (at(), 0..8_u8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        3 => (at(), any::<u8>()).prop_map(|(at, byte)| Edit::Overwrite(at, byte)),
        3 => (at(), 0..4_u32, 0..EDGES.len(), 0..3_u64, any::<bool>()).prop_map(|(at, log, edge, add, big_endian)| {
            Edit::Number { at, bytes: 1 << log, edge, add, big_endian }
        }),
        2 => (at(), prop::collection::vec(any::<u8>(), 1..32)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        2 => (at(), at()).prop_map(|(from, to)| Edit::Remove(from, to)),
        1 => (at(), at()).prop_map(|(from, to)| Edit::Repeat(from, to)),
        1 => at().prop_map(Edit::Cut),
        1 => (at(), at(), at()).prop_map(|(seed, from, at)| Edit::Splice(seed, from, at)),
    ]
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit, seeds: &[Vec<u8>]) {
    let end = bytes.len();
    let place = |at: &Index| at.index(end + 1);
    let byte = |at: &Index| (end > 0).then(|| at.index(end));
    match edit {
        Edit::Flip(at, bit) => byte(at).into_iter().for_each(|at| bytes[at] ^= 1 << bit),
        Edit::Overwrite(at, value) => byte(at).into_iter().for_each(|at| bytes[at] = *value),
        Edit::Number { at, bytes: len, edge, add, big_endian } => {
            let Some(at) = byte(at) else { return };
            let number = EDGES[*edge].wrapping_add(*add);
            let encoded = if *big_endian { number.to_be_bytes() } else { number.to_le_bytes() };
            let encoded = if *big_endian { &encoded[8 - len..] } else { &encoded[..*len] };
            let to = end.min(at + len);
            bytes[at..to].copy_from_slice(&encoded[..to - at]);
        }
        Edit::Insert(at, more) => {
            let at = place(at);
            bytes.splice(at..at, more.iter().copied());
        }
        Edit::Remove(a, b) | Edit::Repeat(a, b) => {
            let (a, b) = (place(a), place(b));
            let range = a.min(b)..a.max(b).min(a.min(b) + 64);
            if matches!(edit, Edit::Remove(..)) {
                bytes.drain(range);
            } else {
                let again = bytes[range.clone()].to_vec();
                bytes.splice(range.end..range.end, again);
            }
        }
        Edit::Cut(at) => bytes.truncate(place(at)),
        Edit::Splice(seed, from, at) => {
            let other = seed.get(seeds);
            bytes.truncate(place(at));
            bytes.extend_from_slice(&other[from.index(other.len() + 1)..]);
        }
    }
}

/// What lies in the corpus of a target, and what its code has for seeds.
fn seeds(target: &Target) -> Vec<Vec<u8>> {
    let mut seeds = (target.seeds)();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let mut files: Vec<_> =
        fs::read_dir(&dir).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    seeds.extend(files.iter().map(|file| fs::read(file).unwrap()));
    seeds
}

fn briefly(name: &str) {
    let target = Target::named(name).unwrap();
    let seeds = seeds(target);
    assert!(!seeds.is_empty());
    (target.run)(&[]);
    seeds.iter().for_each(|seed| (target.run)(seed));
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let edited = (any::<Index>(), prop::collection::vec(edit(), 0..8));
    TestRunner::new(config)
        .run(&edited, |(seed, edits)| {
            let mut bytes = seed.get(&seeds).clone();
            edits.iter().for_each(|edit| apply(&mut bytes, edit, &seeds));
            (target.run)(&bytes);
            Ok(())
        })
        .unwrap();
}

macro_rules! briefly {
    ($($(#[$when:meta])? $name:ident)*) => {
        $(
            $(#[$when])?
            #[test]
            fn $name() {
                briefly(stringify!($name));
            }
        )*

        #[test]
        fn every_target_has_its_test_its_program_and_its_line_in_the_readme() {
            let tests = [$(stringify!($name)),*];
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
            let readme = fs::read_to_string(root.join("README.md")).unwrap();
            for target in fuzz::TARGETS {
                let name = target.name;
                assert!(tests.contains(&name), "{name} has no test");
                assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} has no program");
                assert!(readme.contains(&format!("`{name}`")), "{name} is not in the readme");
            }
        }
    };
}

briefly! {
    #[cfg(feature = "journal")] journal_header
    #[cfg(feature = "journal")] journal_checkpoint
    #[cfg(feature = "journal")] journal_log
    wire_server_handshake
    wire_server_transmission
    wire_client_handshake
    wire_client_replies
    repository_chunk
    repository_documents
    repository_ids
    repository_index
    repository_leases
    repository_map
    repository_names
    repository_pack
    #[cfg(feature = "server")] server_memory
}
