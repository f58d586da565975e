//! Ctrl-C and its kin, as a flag that long loops ask for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

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

/// Whether the program was asked to end. Clones share one answer.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    signal: Arc<AtomicU8>,
}

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP: the first raises the flag, the second ends the program.
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
                loop {
                    let [interrupt, terminate, hangup] = &mut sources;
                    let number = tokio::select! {
                        _ = interrupt.recv() => libc::SIGINT,
                        _ = terminate.recv() => libc::SIGTERM,
                        _ = hangup.recv() => libc::SIGHUP,
                    };
                    let number = u8::try_from(number).expect("these three signals have small numbers");
                    if raised.swap(number, Ordering::SeqCst) != 0 {
                        std::process::exit(128 + i32::from(number));
                    }
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
