//! Many stories, on several threads, until so many steps were done.
//!
//! | variable | says |
//! |---|---|
//! | `LIFEBOOT_CRASH_STEPS` | how many steps, all threads together |
//! | `LIFEBOOT_CRASH_THREADS` | how many threads |
//! | `LIFEBOOT_CRASH_FIRST_SEED` | the seed of the first story; each one after it takes the next |
//!
//! To see one seed's story again: that seed as the first, one thread, one step.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

use super::guest::Violation;
use super::story::Story;
use super::tally::{Kind, Tally};

/// Steps between two lines that say how far it is.
const STEPS_A_LINE: u64 = 5_000_000;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Campaign {
    pub(super) first_seed: u64,
    pub(super) steps: u64,
    pub(super) threads: u64,
}

/// What all threads have done.
#[derive(Default)]
struct Progress {
    next_seed: AtomicU64,
    tally: Mutex<Tally>,
    /// The lowest seed that found one.
    violation: Mutex<Option<(u64, Violation)>>,
}

/// Names the seed of a story that panics.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {} panicked", self.0);
        }
    }
}

impl Campaign {
    pub(super) fn from_env(steps: u64) -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
        Self {
            first_seed: number("LIFEBOOT_CRASH_FIRST_SEED").unwrap_or(0),
            steps: number("LIFEBOOT_CRASH_STEPS").unwrap_or(steps),
            threads: number("LIFEBOOT_CRASH_THREADS").unwrap_or(2).max(1),
        }
    }

    /// Tells stories until all steps are done, or one finds a violation.
    pub(super) fn run(self) -> Result<Tally, String> {
        let progress = Progress { next_seed: AtomicU64::new(self.first_seed), ..Progress::default() };
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..self.threads {
                scope.spawn(|| self.tell(&progress, began));
            }
        });
        let Progress { next_seed, tally, violation } = progress;
        let (tally, seeds) = (tally.into_inner(), next_seed.into_inner() - self.first_seed);
        let seconds = began.elapsed().as_secs_f64();
        println!(
            "{} steps of {seeds} seeds from {} in {seconds:.1} s by {} threads, {:.0} a second: {tally}",
            tally.of(Kind::Step),
            self.first_seed,
            self.threads,
            tally.of(Kind::Step) as f64 / seconds,
        );
        match violation.into_inner() {
            None => Ok(tally),
            Some((seed, violation)) => Err(format!("seed {seed}: {violation}")),
        }
    }

    fn tell(self, progress: &Progress, began: Instant) {
        loop {
            let done = progress.tally.lock().of(Kind::Step);
            if done >= self.steps || progress.violation.lock().is_some() {
                return;
            }
            let seed = progress.next_seed.fetch_add(1, Ordering::Relaxed);
            let named = Named(seed);
            let mut story = Story::new(seed, None, true);
            let told = story.run();
            let steps = {
                let mut tally = progress.tally.lock();
                tally.add(&story.take_tally());
                tally.of(Kind::Step)
            };
            drop(named);
            if done / STEPS_A_LINE != steps / STEPS_A_LINE {
                println!("{steps} steps after {:.0} s", began.elapsed().as_secs_f64());
            }
            if let Err(violation) = told {
                let mut first = progress.violation.lock();
                if first.as_ref().is_none_or(|(earlier, _)| seed < *earlier) {
                    *first = Some((seed, violation));
                }
                return;
            }
        }
    }
}
