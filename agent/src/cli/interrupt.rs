//! Ctrl-C and its kin, as a flag that long loops ask for.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nbd_server::hangup::{Asks, Hangup};
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

/// Whether a signal that came now is another wish than the last one.
fn is_another(last: Instant, now: Instant) -> bool {
    now.saturating_duration_since(last) >= SAME
}

/// Whether the program was asked to end. Clones share one answer.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    signal: Arc<AtomicU8>,
    /// How often it was asked to end.
    wishes: Arc<AtomicU8>,
    /// Somebody sees to each of them: none ends the program at once.
    is_seen_to: Arc<AtomicBool>,
    /// What SIGHUP does in place of ending the program, unless it says that the program's terminal is gone.
    on_hangup: Arc<OnceLock<OnHangup>>,
}

/// What a SIGHUP that asks for it has read anew.
struct OnHangup(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for OnHangup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnHangup").finish_non_exhaustive()
    }
}

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP: the first raises the flag, another one a second later or more
    /// ends the program, whatever it leaves behind. Where SIGHUP was ignored, as `nohup` has it, it goes on being so. SIGXFSZ is
    /// taken too: beyond a limit of file sizes a write fails, and no more.
    ///
    /// # Errors
    /// Where the operating system refuses the handlers or the thread.
    pub fn watch() -> io::Result<Self> {
        let interrupt = Self::default();
        let watched = interrupt.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let start = Hangup::at_start();
        let entered = runtime.enter();
        let mut sources = [
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ];
        // It stays taken, though nobody waits for it.
        drop(signal(SignalKind::from_raw(libc::SIGXFSZ))?);
        drop(entered);
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                let mut last = None;
                loop {
                    let [interrupt, terminate, hangup] = &mut sources;
                    let number = tokio::select! {
                        _ = interrupt.recv() => libc::SIGINT,
                        _ = terminate.recv() => libc::SIGTERM,
                        _ = hangup.recv() => libc::SIGHUP,
                    };
                    if number == libc::SIGHUP {
                        let hook = watched.on_hangup.get();
                        match (start.asks(hook.is_some()), hook) {
                            (Asks::End, _) => {}
                            (Asks::Reload, Some(OnHangup(reload))) => {
                                reload();
                                continue;
                            }
                            (Asks::Reload | Asks::Nothing, _) => continue,
                        }
                    }
                    let now = Instant::now();
                    if last.is_some_and(|last| !is_another(last, now)) {
                        continue;
                    }
                    if last.is_some() && !watched.is_seen_to.load(Ordering::SeqCst) {
                        std::process::exit(128 + number);
                    }
                    last = Some(now);
                    let number = u8::try_from(number).expect("these three signals have small numbers");
                    watched.wish(number);
                }
            });
        })?;
        Ok(interrupt)
    }

    /// From now on SIGHUP calls this, which must be short, in place of ending the program; unless it came because the program's
    /// terminal is gone. Only the first call has an effect.
    pub(crate) fn on_hangup(&self, call: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_hangup.set(OnHangup(Box::new(call)));
    }

    /// Has whoever asks this one end, as a signal would.
    pub(crate) fn raise(&self) {
        self.wish(u8::try_from(libc::SIGTERM).expect("its number is small"));
    }

    fn wish(&self, signal: u8) {
        // The exit code tells of the first.
        let _ = self.signal.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
        let _ = self.wishes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |wishes| wishes.checked_add(1));
    }

    /// From now on no signal ends the program at once: whoever calls this sees to [`Self::wishes`].
    pub(crate) fn see_to_all(&self) {
        self.is_seen_to.store(true, Ordering::SeqCst);
    }

    /// How often the program was asked to end, at least a second apart.
    pub(crate) fn wishes(&self) -> u8 {
        self.wishes.load(Ordering::SeqCst)
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
