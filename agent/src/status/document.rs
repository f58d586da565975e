//! What is known of a session: what `lifeboot status` shows, and an agent tells about itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cli::Outcome;
use crate::live_restore::SessionRecord;
use crate::output::{Output, tenths_of_percent};
use crate::source::FallbackUse;

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
    /// The longest took so long, in microseconds.
    pub max_us: u64,
    /// Guests that wait just now.
    pub waiting: u64,
}

/// How far a session is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Those among them that are known to be on stable storage.
    pub stable_bytes: u64,
    /// Bytes that the guest has written since the session began.
    pub guest_bytes: u64,
    /// Bytes brought home a second, lately.
    pub bytes_per_second: u64,
    /// When the rest will be home at this rate, or at what the limit allows; `None` where nobody copies it home.
    pub seconds_left: Option<u64>,
    /// Stored bytes fetched from the repository since this agent began.
    pub fetched_bytes: u64,
    /// What they decoded to.
    pub fetched_plain_bytes: u64,
    /// Stored bytes fetched a second, lately.
    pub fetched_bytes_per_second: u64,
    /// Bytes written home because a guest asked for them or for their neighbours, since this agent began.
    pub demanded_bytes: u64,
    /// Bytes that the background brought home since this agent began.
    pub background_bytes: u64,
    /// Bytes of guests' reads that were not home, since this agent began.
    pub missed_bytes: u64,
    /// Decoded bytes fetched for guests, for each byte that they missed: what the chunk's size costs.
    pub amplification: Option<f64>,
    /// How guests' misses went since this agent began.
    pub misses: Misses,
    /// Whether the background brings home what nobody asked for, while an agent runs.
    #[serde(default)]
    pub background: Option<bool>,
    /// Bytes a second that the background of all the agent's disks together may take, while an agent runs; 0 is no limit.
    pub limit: Option<u64>,
    /// Connections to the agent, for whichever of its disks, while one runs.
    pub connections: Option<u64>,
    /// Bytes that are not home because the repository could not give them: all of them.
    pub damaged_bytes: u64,
    /// Where they are, neighbours of one reason together; of very many ranges the first thousand.
    pub damaged: Vec<DamagedRange>,
    /// What came from copies of the repository since this agent began, for all of its disks.
    #[serde(default)]
    pub fallbacks: Vec<FallbackUse>,
    /// A running machine was moved onto the target itself, or is about to be: the target is that machine's disk.
    #[serde(default)]
    pub handed_over: bool,
    /// QEMU has said that the machine runs from the target.
    #[serde(default)]
    pub moved: bool,
    /// Why it does not go on just now: the source is away, the target is full; of a session that no agent serves, what keeps the same
    /// command from going on; of one that was handed over, why what stands at the target's path is not the machine's disk.
    pub waiting: Option<String>,
    /// Of a session that no agent serves: what a guest that lives may have lost and believes to be written, and what to do. Of one
    /// that is served: that its target does not stand at its path any more, and where it is.
    #[serde(default)]
    pub loss: Option<String>,
}

impl Status {
    /// The status of a session that no agent serves, of which nothing is known to be home.
    #[must_use]
    pub fn at_rest(record: &SessionRecord, phase: Phase) -> Self {
        Self {
            phase,
            session: record.session.clone(),
            snapshot: record.snapshot.clone(),
            disk: record.disk.clone(),
            target: record.target.clone(),
            pid: None,
            uri: None,
            size: record.size,
            home_bytes: 0,
            stable_bytes: 0,
            guest_bytes: 0,
            bytes_per_second: 0,
            seconds_left: None,
            fetched_bytes: 0,
            fetched_plain_bytes: 0,
            fetched_bytes_per_second: 0,
            demanded_bytes: 0,
            background_bytes: 0,
            missed_bytes: 0,
            amplification: None,
            misses: Misses::default(),
            background: None,
            limit: None,
            connections: None,
            damaged_bytes: 0,
            damaged: Vec::new(),
            fallbacks: Vec::new(),
            handed_over: record.handed_over,
            moved: false,
            waiting: None,
            loss: None,
        }
    }

    /// Whether something could not be brought home.
    #[must_use]
    pub const fn is_damaged(&self) -> bool {
        self.damaged_bytes > 0
    }

    /// Whether nothing is left to bring home but what is damaged.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        self.is_damaged() && self.home_bytes + self.damaged_bytes >= self.size
    }

    /// Whether an agent serves it that brings home only what guests ask for.
    #[must_use]
    pub fn is_without_background(&self) -> bool {
        self.background == Some(false)
    }

    /// Whether something is coming home that can be had, for whomever.
    #[must_use]
    pub fn is_coming_home(&self) -> bool {
        self.phase == Phase::Running && !self.is_settled()
    }

    /// How long the rest takes at the rate of the last seconds, but no faster than `limit`: bytes a second that the background may
    /// take for this disk, 0 is no limit. What came before that was lowered, or because guests asked for it, does not last. `None`
    /// where nobody copies it home: guests may never ask for it, what is damaged cannot be had, and while something is waited for, what
    /// came home before that, and what guests write, tells nothing of the rest.
    #[must_use]
    pub fn expected_seconds(&self, limit: u64) -> Option<u64> {
        let left = self.size.saturating_sub(self.home_bytes);
        let is_copied = self.is_coming_home() && self.waiting.is_none() && !self.is_without_background();
        if left == 0 || self.bytes_per_second == 0 || !is_copied {
            return None;
        }
        let most = if limit == 0 { u64::MAX } else { limit };
        Some(left.div_ceil(self.bytes_per_second.min(most)))
    }

    /// Names what is damaged on stderr, and says how the verb ended.
    pub fn conclude(&self, output: &Output) -> Outcome {
        if !self.is_damaged() {
            return Outcome::Done;
        }
        let mut listed_bytes = 0;
        for range in &self.damaged {
            let end = range.offset + range.len;
            listed_bytes += range.len;
            output.damaged(format_args!(
                "bytes {}..{end} of {}/{}: {}",
                range.offset, self.snapshot, self.disk, range.reason
            ));
        }
        if self.damaged_bytes > listed_bytes {
            output.damaged(format_args!("and more: {} bytes in all", self.damaged_bytes));
        }
        Outcome::Damaged
    }

    /// How much is home, in percent; 100 only when all of it is.
    #[must_use]
    pub fn percent(&self) -> f64 {
        percent(self.home_bytes, self.size)
    }
}

/// So much of `size`, in percent; 100 only when it is all.
pub(super) fn percent(bytes: u64, size: u64) -> f64 {
    tenths_of_percent(bytes, size) as f64 / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_restore::a_record;

    fn running() -> Status {
        let status = Status::at_rest(&a_record(), Phase::Running);
        Status { size: 1000, home_bytes: 790, bytes_per_second: 100, background: Some(true), ..status }
    }

    #[test]
    fn a_time_is_left_where_somebody_copies_the_rest_home() {
        assert_eq!(running().expected_seconds(0), Some(3));
        assert_eq!(Status { home_bytes: 1000, ..running() }.expected_seconds(0), None);
        assert_eq!(Status { bytes_per_second: 0, ..running() }.expected_seconds(0), None);
        assert_eq!(Status { background: Some(false), ..running() }.expected_seconds(0), None);
        assert_eq!(
            Status { waiting: Some("the target is full".into()), ..running() }.expected_seconds(0),
            None
        );
        let damaged = |damaged_bytes| Status { damaged_bytes, ..running() };
        assert_eq!(damaged(209).expected_seconds(0), Some(3));
        assert_eq!(damaged(210).expected_seconds(0), None, "all is home but what is damaged");
    }

    #[test]
    fn no_more_is_promised_than_the_limit_allows() {
        assert_eq!(running().expected_seconds(10), Some(21));
        assert_eq!(running().expected_seconds(100), Some(3));
        assert_eq!(running().expected_seconds(1 << 40), Some(3));
    }
}
