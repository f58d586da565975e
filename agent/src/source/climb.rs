//! How much in flight is enough, found by trying.
//!
//! Where fetches take unevenly long (a busy machine, an object store, a seek now and then), the shortest delay says
//! little about what keeps the path busy. So while no guest asks, a little more and a little less is tried in turn:
//! more stays where it is delivered faster for it, less stays where it is delivered as fast. On an even path that
//! ends where the wire is just full, and on an uneven one beyond it. Pure: times are given.

use std::time::Duration;

/// The smallest step, up or down.
const STEP: f64 = 1.25;
/// The largest step up, after several that paid.
const LARGEST_STEP: f64 = 2.0;
/// More in flight stays if deliveries became faster by this part of the step.
const PAYS: f64 = 0.4;
/// Less in flight stays if deliveries are still this fast.
const AS_FAST: f64 = 0.95;
/// A measurement takes at least so long, and [`ROUNDS`].
const SHORTEST: Duration = Duration::from_millis(50);
/// For how many times the size deliveries are watched, after one that is not.
const ROUNDS: f64 = 2.0;
/// A measurement counts if at least this part of its fetches met a full window.
const MOSTLY: f64 = 0.8;

/// What is being tried.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trial {
    /// How fast it is as it is.
    Same,
    /// So many times as much.
    More(f64),
    Less,
}

/// Climbs to the size at which more is not faster.
#[derive(Debug)]
pub(super) struct Climb {
    /// The size that was found good.
    base: f64,
    /// How fast it delivered, in bytes a second.
    rate: f64,
    trial: Trial,
    /// The next step up.
    step: f64,
    measured: Measured,
}

/// A measurement under way.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    /// Bytes of fetches that began before the size was what it is.
    settled: f64,
    /// When deliveries began to count.
    since: Option<Duration>,
    bytes: f64,
    fetches: u32,
    full: u32,
}

impl Climb {
    pub(super) const fn new(size: u64) -> Self {
        Self {
            base: size as f64,
            rate: 0.0,
            trial: Trial::Same,
            step: STEP,
            measured: Measured { settled: 0.0, since: None, bytes: 0.0, fetches: 0, full: 0 },
        }
    }

    /// How much may be in flight now.
    pub(super) fn size(&self) -> u64 {
        self.size_of(self.trial) as u64
    }

    /// The size that was found good so far.
    pub(super) const fn found(&self) -> u64 {
        self.base as u64
    }

    fn size_of(&self, trial: Trial) -> f64 {
        match trial {
            Trial::Same => self.base,
            Trial::More(step) => self.base * step,
            Trial::Less => self.base / STEP,
        }
    }

    /// Gives up what is being tried, and keeps what was found.
    pub(super) fn pause(&mut self) {
        self.trial = Trial::Same;
        self.measured = Measured::default();
    }

    /// `bytes` were delivered at `now`; `was_full` where the window was full when they were asked for. Sizes stay
    /// within `smallest..=largest`.
    pub(super) fn delivered(
        &mut self,
        bytes: u64,
        was_full: bool,
        now: Duration,
        (smallest, largest): (u64, u64),
    ) {
        let size = self.size_of(self.trial);
        let measured = &mut self.measured;
        let Some(since) = measured.since else {
            measured.settled += bytes as f64;
            if measured.settled >= size {
                measured.since = Some(now);
            }
            return;
        };
        measured.bytes += bytes as f64;
        measured.fetches += 1;
        measured.full += u32::from(was_full);
        let took = now.saturating_sub(since);
        if measured.bytes < ROUNDS * size || took < SHORTEST {
            return;
        }
        let counts = f64::from(measured.full) >= f64::from(measured.fetches) * MOSTLY;
        let rate = measured.bytes / took.as_secs_f64();
        self.measured = Measured::default();
        if counts {
            self.judge(rate);
        } else {
            // Something else held it back: this says nothing of the size.
            self.trial = Trial::Same;
        }
        self.base = self.base.clamp(smallest as f64, largest as f64);
    }

    fn judge(&mut self, rate: f64) {
        match self.trial {
            Trial::Same => {
                self.rate = rate;
                self.trial = Trial::More(self.step);
            }
            Trial::More(step) if rate >= self.rate * (1.0 + (step - 1.0) * PAYS) => {
                (self.base, self.rate) = (self.base * step, rate);
                self.step = (step * STEP).min(LARGEST_STEP);
                self.trial = Trial::More(self.step);
            }
            Trial::More(_) => {
                self.step = STEP;
                self.trial = Trial::Less;
            }
            Trial::Less => {
                if rate >= self.rate * AS_FAST {
                    self.base /= STEP;
                }
                self.trial = Trial::Same;
            }
        }
    }
}
