//! Model checks: the locks, the map's lists, flush and parking, with threads that shuttle stops between any two steps.
//!
//! The code is the production code; [`super::sync`] is where it is stopped. Each check runs many schedules from one
//! seed, and fails with the schedule that broke it. Each mistake named in a check must break it.
//!
//! `LIFEBOOT_MODEL_SCHEDULES` sets how many schedules a check runs.

mod holds;
mod map;
mod rig;
mod session;

use std::panic::{AssertUnwindSafe, catch_unwind};

use shuttle::scheduler::RandomScheduler;
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

use super::mistakes::{Making, Mistake};
use super::sync::Modelled;

const SCHEDULES: usize = 1500;
/// Schedules in which a mistake must show.
const MISTAKE_SCHEDULES: usize = 20_000;
const SEED: u64 = 0x5eed;
/// Whoever takes more steps than this waits for a lock that nobody gives back.
const MAX_STEPS: usize = 100_000;
const STACK_BYTES: usize = 1 << 18;

fn run(schedules: usize, model: fn()) {
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(MAX_STEPS);
    config.silence_warnings = true;
    let _modelled = Modelled::new();
    Runner::new(RandomScheduler::new_from_seed(SEED, schedules), config).run(model);
}

/// Fails where some schedule breaks `model`.
fn holds(model: fn()) {
    let schedules = std::env::var("LIFEBOOT_MODEL_SCHEDULES").ok().and_then(|value| value.parse().ok());
    run(schedules.unwrap_or(SCHEDULES), model);
}

/// Fails where no schedule breaks `model` although the engine makes `mistake`.
fn is_broken_by(mistake: Mistake, model: fn()) {
    let _making = Making::new(Some(mistake));
    let result = catch_unwind(AssertUnwindSafe(|| run(MISTAKE_SCHEDULES, model)));
    assert!(result.is_err(), "{MISTAKE_SCHEDULES} schedules did not notice {mistake:?}");
}
