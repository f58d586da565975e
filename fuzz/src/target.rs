//! All targets by name, and how a program runs one.

#[cfg(feature = "journal")]
use crate::journal;
#[cfg(feature = "server")]
use crate::server;
use crate::{repository, wire};

/// Something that must hold of any bytes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name of its program, and of the directory of its corpus.
    pub name: &'static str,
    /// Panics where it does not hold.
    pub run: fn(&[u8]),
    /// Inputs worth beginning from: most of them are what a well-behaved peer or an intact file says.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    #[cfg(feature = "journal")]
    Target { name: "journal_header", run: journal::header, seeds: journal::header_seeds },
    #[cfg(feature = "journal")]
    Target { name: "journal_checkpoint", run: journal::checkpoint, seeds: journal::checkpoint_seeds },
    #[cfg(feature = "journal")]
    Target { name: "journal_log", run: journal::log, seeds: journal::log_seeds },
    Target {
        name: "wire_server_handshake",
        run: wire::server_handshake,
        seeds: wire::seeds::server_handshake,
    },
    Target {
        name: "wire_server_transmission",
        run: wire::server_transmission,
        seeds: wire::seeds::server_transmission,
    },
    Target {
        name: "wire_client_handshake",
        run: wire::client_handshake,
        seeds: wire::seeds::client_handshake,
    },
    Target { name: "wire_client_replies", run: wire::client_replies, seeds: wire::seeds::client_replies },
    Target { name: "repository_chunk", run: repository::chunk, seeds: repository::chunk_seeds },
    Target { name: "repository_documents", run: repository::documents, seeds: repository::documents_seeds },
    Target { name: "repository_ids", run: repository::ids, seeds: repository::ids_seeds },
    Target { name: "repository_index", run: repository::index, seeds: repository::index_seeds },
    Target { name: "repository_leases", run: repository::leases, seeds: repository::leases_seeds },
    Target { name: "repository_map", run: repository::map, seeds: repository::map_seeds },
    Target { name: "repository_names", run: repository::names, seeds: repository::names_seeds },
    Target { name: "repository_pack", run: repository::pack, seeds: repository::pack_seeds },
    #[cfg(feature = "server")]
    Target { name: "server_memory", run: server::memory, seeds: server::memory_seeds },
];

impl Target {
    /// The target of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }
}

/// What the program of a target does where it was built without libFuzzer: it runs the files that its arguments
/// name, or writes the seeds of every target into the directory after `--seeds`.
///
/// # Errors
/// Where a file cannot be read or written.
///
/// # Panics
/// Where something does not hold.
pub fn replay(name: &str) -> std::io::Result<()> {
    let target = Target::named(name).expect("a program has the name of its target");
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--seeds" {
            let corpus = std::path::PathBuf::from(arguments.next().unwrap_or_else(|| "corpus".into()));
            for target in TARGETS {
                std::fs::create_dir_all(corpus.join(target.name))?;
                for (number, seed) in (target.seeds)().iter().enumerate() {
                    std::fs::write(corpus.join(target.name).join(format!("seed-{number:02}")), seed)?;
                }
            }
            continue;
        }
        (target.run)(&std::fs::read(&argument)?);
        println!("{}: holds", argument.display());
    }
    Ok(())
}

/// The program of a target: under libFuzzer its entry, otherwise [`replay`].
#[macro_export]
macro_rules! program {
    ($name:literal, $run:path) => {
        #[cfg(fuzzing)]
        $crate::libfuzzer_sys::fuzz_target!(|data: &[u8]| $run(data));

        #[cfg(not(fuzzing))]
        fn main() -> std::io::Result<()> {
            $crate::replay($name)
        }
    };
}
