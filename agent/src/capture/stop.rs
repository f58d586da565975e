//! Why work that is spread over threads ends early: the first failure, or the user's interrupt.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::cli::Interrupt;

/// Asked by all threads of a job between two steps. The first failure is kept; later ones follow from it.
#[derive(Debug)]
pub(crate) struct Stop {
    interrupt: Interrupt,
    failed: AtomicBool,
    failure: Mutex<Option<anyhow::Error>>,
}

/// Another thread failed, and has said why.
#[derive(Debug, thiserror::Error)]
#[error("stopped because another part failed")]
struct Stopped;

impl Stop {
    pub(crate) fn new(interrupt: Interrupt) -> Self {
        Self { interrupt, failed: AtomicBool::new(false), failure: Mutex::new(None) }
    }

    /// Fails once anything of the job has failed, or the user interrupted it.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(Stopped.into());
        }
        self.interrupt.check()?;
        Ok(())
    }

    /// Keeps the first failure, and makes all others stop.
    pub(crate) fn keep(&self, error: anyhow::Error) {
        let mut failure = self.failure.lock();
        if failure.is_none() && !error.is::<Stopped>() {
            *failure = Some(error);
        }
        self.failed.store(true, Ordering::Release);
    }

    /// The failure that ended the job, once all its threads are done.
    pub(crate) fn conclude(self) -> anyhow::Result<()> {
        match self.failure.into_inner() {
            Some(error) => Err(error),
            None if self.failed.load(Ordering::Acquire) => Err(Stopped.into()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_the_one_that_is_told() {
        let stop = Stop::new(Interrupt::default());
        stop.check().unwrap();
        stop.keep(anyhow::anyhow!("disk full"));
        let consequence = stop.check().unwrap_err();
        stop.keep(consequence);
        stop.keep(anyhow::anyhow!("later"));
        assert_eq!(stop.conclude().unwrap_err().to_string(), "disk full");
    }
}
