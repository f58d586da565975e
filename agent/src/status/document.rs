//! What is known of a session: what `lifeboot status` shows, and an agent tells about itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a session is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// An agent serves it, and copies the disk home.
    Running,
    /// Every block is home.
    Complete,
    /// No agent runs; the same command goes on where it stopped.
    Stopped,
    /// A sync failed: every flush fails until the session is started again.
    Poisoned,
}

/// A part of the disk that could not be brought home.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedRange {
    /// The first byte on the disk.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// How guests' misses went: reads that had to wait for the repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Misses {
    /// How many there were.
    pub count: u64,
    /// Half of them took no longer, in microseconds.
    pub p50_us: u64,
    /// 99 of 100 took no longer, in microseconds.
    pub p99_us: u64,
}

/// How far a session is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it is doing.
    pub phase: Phase,
    /// The session's id.
    pub session: String,
    /// The snapshot's full name.
    pub snapshot: String,
    /// The disk's name within it.
    pub disk: String,
    /// Where it is brought home to.
    pub target: PathBuf,
    /// The agent's process, while one runs.
    pub pid: Option<u32>,
    /// Where it is served, while an agent runs.
    pub uri: Option<String>,
    /// The disk's size in bytes.
    pub size: u64,
    /// Bytes whose truth is on the target.
    pub home_bytes: u64,
    /// Bytes that the guest has written since the session began.
    pub guest_bytes: u64,
    /// Bytes brought home a second, lately.
    pub bytes_per_second: u64,
    /// When the rest will be home at this rate.
    pub seconds_left: Option<u64>,
    /// Stored bytes fetched from the repository since this agent began.
    pub fetched_bytes: u64,
    /// What they decoded to.
    pub fetched_plain_bytes: u64,
    /// How guests' misses went since this agent began.
    pub misses: Misses,
    /// What could not be brought home.
    pub damaged: Vec<DamagedRange>,
    /// Why it does not go on just now: the source is away, the target is full.
    pub waiting: Option<String>,
}

impl Status {
    /// How much is home, in percent; 100 only when all of it is.
    #[must_use]
    pub fn percent(&self) -> f64 {
        if self.home_bytes >= self.size {
            return 100.0;
        }
        (self.home_bytes as f64 / self.size as f64 * 1000.0).floor() / 10.0
    }
}
