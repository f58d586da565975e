//! What every `BlockDevice` owes its users, held against each engine on each kind of target, and
//! against the simulated disk.

#![allow(clippy::unwrap_used, reason = "all of this is tests, and so are its helpers")]

mod cached;
mod concurrency;
mod disks;
mod engines;
mod limits;
mod model;
mod sparse;
