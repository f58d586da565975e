//! Time, given to the engine from outside: production has tokio's, a simulation has none but its steps.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

/// A clock that one thread waits by.
pub trait Clock: Send + Sync {
    /// The time since some fixed moment. It never goes back.
    fn now(&self) -> Duration;

    /// Ends after about `time`. Awaited on a shard's thread; may be dropped before its end.
    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()>>>;
}

/// The clock of the tokio runtime that the caller is in.
#[derive(Clone, Copy, Debug)]
pub struct TokioClock {
    start: Instant,
}

impl TokioClock {
    /// A clock that begins now.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for TokioClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for TokioClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(tokio::time::sleep(time))
    }
}
