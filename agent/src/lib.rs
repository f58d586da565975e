//! The `lifeboot` program: captures disks into a repository, restores them, and boots machines from
//! their backup. Each verb of the command line has a module of its own; [`cli`] puts them together.

mod blank;
pub mod boot;
pub mod capture;
pub mod cli;
pub mod discard;
mod in_use;
pub mod live;
pub mod live_restore;
pub mod output;
pub mod pivot;
mod private_dir;
pub mod restore;
pub mod save;
pub mod serve;
pub mod source;
pub mod status;
mod target_path;
pub mod trace;
