//! Ctrl-C and its kin, as a flag that long loops ask for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

/// A signal asked the program to end.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted by {}", self.signal_name())]
pub struct Interrupted {
    signal: u8,
}

impl Interrupted {
    pub(super) const fn by(signal: u8) -> Self {
        Self { signal }
    }

    /// The signal's number.
    #[must_use]
    pub const fn signal_number(self) -> u8 {
        self.signal
    }

    fn signal_name(self) -> &'static str {
        match i32::from(self.signal) {
            libc::SIGINT => "Ctrl-C",
            libc::SIGTERM => "SIGTERM",
            _ => "SIGHUP",
        }
    }
}

/// Signals this close to the first are the same wish: `timeout` and shells send one to the program and one to its
/// group.
const SAME: Duration = Duration::from_secs(1);

/// Whether a signal that came now, after the first, says that the end is to come at once.
fn is_another(first: Instant, now: Instant) -> bool {
    now.saturating_duration_since(first) >= SAME
}

/// Whether the program was asked to end. Clones share one answer.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    signal: Arc<AtomicU8>,
}

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP: the first raises the flag, another one a second later or more
    /// ends the program, whatever it leaves behind.
    ///
    /// # Errors
    /// Where the operating system refuses the handlers or the thread.
    pub fn watch() -> io::Result<Self> {
        let interrupt = Self::default();
        let raised = Arc::clone(&interrupt.signal);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let entered = runtime.enter();
        let mut sources = [
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ];
        drop(entered);
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                let mut first = None;
                loop {
                    let [interrupt, terminate, hangup] = &mut sources;
                    let number = tokio::select! {
                        _ = interrupt.recv() => libc::SIGINT,
                        _ = terminate.recv() => libc::SIGTERM,
                        _ = hangup.recv() => libc::SIGHUP,
                    };
                    let now = Instant::now();
                    let first = *first.get_or_insert(now);
                    if is_another(first, now) {
                        std::process::exit(128 + number);
                    }
                    let number = u8::try_from(number).expect("these three signals have small numbers");
                    // The exit code tells of the first.
                    let _ = raised.compare_exchange(0, number, Ordering::SeqCst, Ordering::SeqCst);
                }
            });
        })?;
        Ok(interrupt)
    }

    /// Whether the program was asked to end.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }

    /// Fails once the program was asked to end.
    ///
    /// # Errors
    /// [`Interrupted`], which becomes the exit code 130 (Ctrl-C) or 143 (SIGTERM).
    pub fn check(&self) -> Result<(), Interrupted> {
        match self.signal.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(Interrupted::by(signal)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_close_to_the_first_are_the_same_wish() {
        let first = Instant::now();
        assert!(!is_another(first, first));
        assert!(!is_another(first, first + SAME - Duration::from_millis(1)));
        assert!(is_another(first, first + SAME));
    }
}
