//! What a running session tells of itself, as a status.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::fetching::Fetching;
use super::service::ServedDisk;
use crate::live::{self, DamagedRun, DiskLayout, StatsSnapshot};
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

/// The status of a disk that an agent serves, but for what all of its disks share.
pub(super) fn status(disk: &ServedDisk, stats: &StatsSnapshot) -> Status {
    let record = &disk.record;
    let layout = record.layout();
    let fetched = disk.fetched();
    let phase = match stats.phase {
        live::Phase::Filling => Phase::Running,
        live::Phase::Complete => Phase::Complete,
        live::Phase::Poisoned => Phase::Poisoned,
        live::Phase::Parked => Phase::Stopped,
    };
    Status {
        pid: Some(std::process::id()),
        uri: disk.uris().into_iter().next(),
        home_bytes: stats.home_bytes,
        stable_bytes: stats.stable_bytes,
        guest_bytes: stats.guest_bytes,
        bytes_per_second: disk.rates.home.load(Ordering::Relaxed),
        fetched_bytes: fetched.stored_bytes,
        fetched_plain_bytes: fetched.plain_bytes,
        fetched_bytes_per_second: disk.rates.fetched.load(Ordering::Relaxed),
        demanded_bytes: stats.filled_on_demand_bytes,
        background_bytes: stats.filled_in_background_bytes,
        missed_bytes: stats.missed_bytes,
        amplification: stats.amplification(),
        misses: Misses {
            count: stats.misses,
            p50_us: stats.miss_p50_us,
            p99_us: stats.miss_p99_us,
            max_us: stats.miss_max_us,
            waiting: stats.waiting,
        },
        damaged_bytes: stats.damaged_bytes,
        damaged: damaged_ranges(stats, layout),
        fallbacks: disk.fetching.as_ref().map(Fetching::fallbacks).unwrap_or_default(),
        waiting: waiting(stats),
        handed_over: disk.is_marked(),
        moved: disk.handed_over().is_some(),
        background: Some(stats.background),
        ..Status::at_rest(record, phase)
    }
}

/// What could not be brought home so far.
pub(crate) fn damaged_ranges(stats: &StatsSnapshot, layout: DiskLayout) -> Vec<DamagedRange> {
    let of = |run: &DamagedRun| {
        let range = layout.run_range(&run.chunks);
        DamagedRange { offset: range.start(), len: range.len(), reason: run.reason.clone() }
    };
    stats.damaged.iter().map(of).collect()
}

fn waiting(stats: &StatsSnapshot) -> Option<String> {
    if let Some(since) = stats.source_away {
        return Some(match since.as_secs() {
            0 => "the repository is out of reach".to_owned(),
            seconds => format!("the repository has been out of reach for {seconds} s"),
        });
    }
    stats.target_full.then(|| "the target is full: make room, and it goes on by itself".to_owned())
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
