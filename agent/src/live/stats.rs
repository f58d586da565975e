//! What a session counts, and the picture of it that `status` and progress lines are made of.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;

use super::damage::{Damage, DamagedRun};
use super::sync::Mutex;

/// The longest wait that the histogram tells from longer ones.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// The counters of one session.
#[derive(Debug)]
pub(super) struct Stats {
    pub(super) filled_on_demand: AtomicU64,
    pub(super) filled_in_background: AtomicU64,
    pub(super) zeroed: AtomicU64,
    pub(super) fetched: AtomicU64,
    pub(super) missed: AtomicU64,
    pub(super) commits: AtomicU64,
    pub(super) target_errors: AtomicU64,
    pub(super) full_episodes: AtomicU64,
    waits: Mutex<Histogram<u32>>,
    /// Taken after `Session::fills` where both are needed.
    pub(super) damage: Mutex<Damage>,
}

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Chunks are still absent.
    Filling,
    /// The whole disk is home, on stable storage.
    Complete,
    /// A sync failed. The same command, run again, goes on from what is known to be stable.
    Poisoned,
    /// Parked, or being parked: nothing is served any more.
    Parked,
}

/// How far a restore is, at one moment.
#[derive(Clone, Debug, serde::Serialize)]
pub struct StatsSnapshot {
    /// Where the session stands.
    pub phase: Phase,
    /// The disk's size in bytes.
    pub disk_bytes: u64,
    /// Bytes that are home.
    pub home_bytes: u64,
    /// Bytes that are home and known to be on stable storage.
    pub stable_bytes: u64,
    /// Bytes that the guest wrote.
    pub guest_bytes: u64,
    /// Bytes that were written home because a guest asked for them, or for their neighbours.
    pub filled_on_demand_bytes: u64,
    /// Bytes that the background brought home.
    pub filled_in_background_bytes: u64,
    /// Bytes of zero chunks that were made zero on the target.
    pub zeroed_bytes: u64,
    /// Decoded bytes that came from the source.
    pub fetched_bytes: u64,
    /// Bytes of guests' reads that were not home.
    pub missed_bytes: u64,
    /// Reads and partial writes that waited for the source.
    pub misses: u64,
    /// How long half of them waited at most, in microseconds.
    pub miss_p50_us: u64,
    /// How long 99 in 100 of them waited at most, in microseconds.
    pub miss_p99_us: u64,
    /// How long the longest of them waited, in microseconds.
    pub miss_max_us: u64,
    /// Guests that wait for the source right now.
    pub waiting: u64,
    /// For how long the source has been out of reach.
    pub source_away: Option<Duration>,
    /// The target is full, as the background found it.
    pub target_full: bool,
    /// How often it became so.
    pub target_full_episodes: u64,
    /// Writes and syncs of the target that failed.
    pub target_errors: u64,
    /// Times that the journal was brought up to date.
    pub commits: u64,
    /// Whether the background brings home what nobody asked for.
    pub background: bool,
    /// Bytes a second that the background may take; 0 is no limit.
    pub limit: u64,
    /// Bytes a second that it may take for the guests' sake (`--guest-p99`); 0 is no limit.
    pub paced_to: u64,
    /// Chunks of the boot trace that are still to be begun.
    pub trace_left: u64,
    /// Bytes that are not home because the repository could not give their chunks: all of them.
    pub damaged_bytes: u64,
    /// Those among them that the background is to ask for once more.
    pub damaged_due_bytes: u64,
    /// Where they are and why, up to a thousand runs.
    pub damaged: Vec<DamagedRun>,
}

impl StatsSnapshot {
    /// Decoded bytes fetched for each byte that a guest missed: what the chunk's size costs.
    #[must_use]
    pub fn amplification(&self) -> Option<f64> {
        (self.missed_bytes > 0).then(|| self.fetched_bytes as f64 / self.missed_bytes as f64)
    }

    /// Whether nothing is left to bring home but what is damaged, all of which was asked for.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        self.damaged_bytes > 0
            && self.damaged_due_bytes == 0
            && self.home_bytes + self.damaged_bytes >= self.disk_bytes
    }
}

impl Stats {
    pub(super) fn new(chunk_count: u64) -> Self {
        let longest = LONGEST_WAIT.as_micros() as u64;
        Self {
            filled_on_demand: AtomicU64::new(0),
            filled_in_background: AtomicU64::new(0),
            zeroed: AtomicU64::new(0),
            fetched: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            commits: AtomicU64::new(0),
            target_errors: AtomicU64::new(0),
            full_episodes: AtomicU64::new(0),
            waits: Mutex::new(Histogram::new_with_bounds(1, longest, 2).expect("the bounds are fit")),
            damage: Mutex::new(Damage::new(chunk_count)),
        }
    }

    pub(super) fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }

    pub(super) fn target_failed(&self) {
        Self::add(&self.target_errors, 1);
    }

    pub(super) fn waited(&self, time: Duration) {
        let time = time.min(LONGEST_WAIT).as_micros() as u64;
        self.waits.lock().saturating_record(time.max(1));
    }

    /// Misses, and the waits that half, 99 in 100 and all of them did not exceed, in microseconds.
    pub(super) fn waits(&self) -> (u64, u64, u64, u64) {
        let waits = self.waits.lock();
        (waits.len(), waits.value_at_quantile(0.5), waits.value_at_quantile(0.99), waits.max())
    }

    /// How many misses waited no longer than each of these times, and how long all of them waited together.
    pub(super) fn waits_within(&self, bounds: &[Duration]) -> (Vec<u64>, Duration) {
        let waits = self.waits.lock();
        let within = |bound: &Duration| waits.count_between(0, bound.as_micros() as u64);
        let sum_us = waits
            .iter_recorded()
            .map(|step| u64::from(step.count_at_value()) * step.value_iterated_to())
            .sum();
        (bounds.iter().map(within).collect(), Duration::from_micros(sum_us))
    }

    pub(super) fn read(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}
