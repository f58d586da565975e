//! Support for the end-to-end tests: our programs and those of others, run as a user would run them.
//!
//! Nothing of the project's code is linked in here. What the tests and the demo know of Lifeboot is its command
//! line, its JSON and its bytes on a socket; see `tests/` beside this directory for what they ask of them.

pub mod captured;
pub mod disk;
pub mod failing;
pub mod guest;
pub mod lifeboot;
pub mod machine;
pub mod nbd;
pub mod process;
pub mod programs;
pub mod small_guest;
pub mod work_dir;
