//! What a running session tells of itself: to `status`, on the terminal, and as JSON lines.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::record::SessionRecord;
use crate::live::{self, DiskLayout, StatsSnapshot};
use crate::source::FetchStats;
use crate::status::{DamagedRange, Misses, Phase, Status};

/// Over what time a rate is taken.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// How fast a number grows, lately. Pure: moments are given.
#[derive(Debug, Default)]
pub(super) struct RateMeter {
    samples: VecDeque<(Instant, u64)>,
}

impl RateMeter {
    /// The number is `value` at `now`; returns its growth a second.
    pub(super) fn sample(&mut self, now: Instant, value: u64) -> u64 {
        self.samples.push_back((now, value));
        while self.samples.len() > 2 && now.duration_since(self.samples[1].0) >= RATE_WINDOW {
            self.samples.pop_front();
        }
        let (since, before) = self.samples[0];
        let elapsed = now.duration_since(since).as_secs_f64();
        if elapsed <= 0.0 {
            return 0;
        }
        (value.saturating_sub(before) as f64 / elapsed) as u64
    }
}

/// The status of a session that an agent serves.
pub(super) fn status(
    record: &SessionRecord,
    uri: Option<String>,
    stats: &StatsSnapshot,
    fetched: FetchStats,
    bytes_per_second: u64,
) -> Status {
    let layout = DiskLayout { size: record.size, chunk_size: record.chunk_size };
    let left = stats.disk_bytes.saturating_sub(stats.home_bytes);
    Status {
        phase: match stats.phase {
            live::Phase::Filling => Phase::Running,
            live::Phase::Complete => Phase::Complete,
            live::Phase::Poisoned => Phase::Poisoned,
            live::Phase::Parked => Phase::Stopped,
        },
        session: record.session.clone(),
        snapshot: record.snapshot.clone(),
        disk: record.disk.clone(),
        target: record.target.clone(),
        pid: Some(std::process::id()),
        uri,
        size: record.size,
        home_bytes: stats.home_bytes,
        guest_bytes: stats.guest_bytes,
        bytes_per_second,
        seconds_left: (bytes_per_second > 0 && left > 0).then(|| left.div_ceil(bytes_per_second)),
        fetched_bytes: fetched.stored_bytes,
        fetched_plain_bytes: fetched.plain_bytes,
        misses: Misses { count: stats.misses, p50_us: stats.miss_p50_us, p99_us: stats.miss_p99_us },
        damaged_bytes: stats.damaged_bytes,
        damaged: stats
            .damaged
            .iter()
            .map(|run| {
                let range = layout.run_range(&run.chunks);
                DamagedRange { offset: range.start(), len: range.len(), reason: run.reason.clone() }
            })
            .collect(),
        waiting: waiting(stats),
    }
}

fn waiting(stats: &StatsSnapshot) -> Option<String> {
    if let Some(since) = stats.source_away {
        return Some(format!("the repository has been out of reach for {} s", since.as_secs()));
    }
    stats.target_full.then(|| "the target is full: make room, and it goes on by itself".to_owned())
}

/// A line of `live-restore --json`. The last line is `complete`, `settled` or `parked`, unless the command failed.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(super) enum Event<'a> {
    /// Guests may connect.
    Ready {
        uris: &'a [String],
        resumed: bool,
        /// QEMU's arguments for a drive on the first of them.
        qemu: &'a [String],
        #[serde(flatten)]
        status: &'a Status,
    },
    /// How far it is.
    Progress(&'a Status),
    /// Every block is home, and on stable storage.
    Complete(&'a Status),
    /// It ended because all is home but what is damaged, and it was to exit when done; the same command asks for that
    /// again.
    Settled(&'a Status),
    /// It ended in order; the same command goes on.
    Parked(&'a Status),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let mut meter = RateMeter::default();
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        assert_eq!(meter.sample(begun, 1000), 0);
        assert_eq!(meter.sample(at(1), 1500), 500);
        for second in 2..20 {
            meter.sample(at(second), 1500);
        }
        assert_eq!(meter.sample(at(20), 1500), 0, "it has stood still for longer than the window");
        assert_eq!(meter.sample(at(25), 2500), 200);
    }
}
