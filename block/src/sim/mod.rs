//! A simulated disk, and the executor to run code on it, for tests of what a crash leaves behind.
//!
//! [`SimDisk`] implements [`crate::BlockDevice`] in memory. What it does to those who trust it:
//!
//! | event | what it does | as in life |
//! |---|---|---|
//! | any operation | completes a seeded number of polls later; a write lands sector by sector, in any order | a queue of requests |
//! | [`SimDisk::power_cut`] | of the sectors written since the last sync, each keeps its old contents or any later version; by whole writes or torn within one | a volatile cache |
//! | dropping a future | the write lands some time until [`SimDisk::drain`]: whole, in part or not at all | a killed process |
//! | a failed sync | each unsynced sector is written, or kept in memory and never written, or lost at once; the next sync succeeds | Linux |
//! | [`Faults`] | reads, writes, syncs fail at random; the disk is full | media, quotas |
//!
//! A trim makes each sector zero or leaves it. A sync covers exactly the writes that completed before it began.
//!
//! [`Executor`] runs tasks on one thread and picks the next one at random. Nothing here reads a
//! clock: the same seed gives the same run, and a failing test prints its seed. The disk needs
//! nothing of the executor; it works on any runtime.

mod device;
mod disk;
mod executor;
mod rng;

pub use disk::{Faults, SECTOR, SimDisk, SimOptions, SimStats, UnderWay};
pub use executor::{Executor, Join, Spawner, Stop, yield_now};
pub use rng::Rng;
