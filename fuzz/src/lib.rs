//! What must hold of every parser, whatever bytes it is given.
//!
//! A target is a function that takes bytes and panics where something does not hold. Each stands here once, with the
//! inputs that it begins from, and runs in two ways: under libFuzzer (a program per target in `targets/`), and
//! briefly, on mutations of its seeds, as a test (`tests/briefly.rs`).
//!
//! - [`wire`]: the two halves of NBD, [`wire::server_handshake`] and so on;
//! - [`repository`]: the files of a repository, and names;
//! - `journal` (a feature, on by default): the journal of a live-restore;
//! - `server` (a feature, on by default): the NBD server as a whole;
//! - [`Target`]: all of them by name;
//! - [`memory`]: how much memory a piece of code holds at most; [`input`]: bytes as choices.

pub mod input;
#[cfg(feature = "journal")]
pub mod journal;
pub mod memory;
pub mod repository;
#[cfg(feature = "server")]
pub mod server;
mod target;
pub mod wire;

#[doc(hidden)]
#[cfg(fuzzing)]
pub use libfuzzer_sys;
pub use target::{TARGETS, Target, replay};
