//! How the program talks: lines, tables and documents on stdout; progress, warnings and errors on stderr.
//! Nothing else in this crate prints.
//!
//! On a terminal, people watch: bars, rates, sizes with units. With `--json`, programs listen: one
//! document on stdout, JSON lines on stderr, exact numbers. With `-q`, only errors are said.
//!
//! Everything on stderr goes through one [`LogQueue`], so its lines keep their order and are whole, between the bars; the queue's thread
//! alone writes there. Log lines, which come from threads that serve guests, are left in it and never waited for. What a verb says is
//! waited for as if it wrote itself, so that it stands before what it says next on stdout; but not for longer than
//! [`PATIENCE_AT_END`] where nobody reads.
//!
//! Bars are put aside only for what the same terminal shows: whoever waits for a pipe must not hold their lock meanwhile.

mod progress;
mod relay;
mod table;
mod text;

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use indicatif::MultiProgress;
use nbd_server::log_queue::{LogQueue, PATIENCE_AT_END, has_colours};
use serde::Serialize;

use relay::Relay;

pub use progress::Progress;
pub use table::{Align, Table};
pub use text::{human_count, human_duration, human_size, human_time, tenths_of_percent};

/// How long a service that ends waits for whoever reads its stdout.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The reader of stdout has closed it: nobody wants the rest.
#[derive(Debug, thiserror::Error)]
#[error("stdout is closed")]
pub struct StdoutClosed;

/// How this run talks. Clones talk in the same way to the same places.
#[derive(Clone, Debug)]
pub struct Output {
    json: bool,
    quiet: bool,
    stdout_terminal: bool,
    stderr_terminal: bool,
    bars: MultiProgress,
    /// Writes to stderr.
    log: LogQueue,
    /// Writes to stdout for a service.
    relay: Option<Arc<Relay>>,
    /// Writes to stdout what is said before the work.
    announcements: Arc<OnceLock<Relay>>,
}

impl Output {
    /// Decides how to talk from `--json`, `-q`, and from whether stdout and stderr are terminals.
    #[must_use]
    pub fn new(json: bool, quiet: bool) -> Self {
        let stderr_terminal = io::stderr().is_terminal();
        let bars = MultiProgress::new();
        let between = bars.clone();
        // Whoever closed stderr does not want to know; there is nobody left to tell that.
        let log = LogQueue::new(move |text| {
            let write = || io::stderr().write_all(text);
            let _ = if stderr_terminal { between.suspend(write) } else { write() };
        });
        Self {
            json,
            quiet,
            stdout_terminal: io::stdout().is_terminal(),
            stderr_terminal,
            bars,
            log,
            relay: None,
            announcements: Arc::default(),
        }
    }

    /// The same for a service: where stdout is no terminal, a reader who does not read holds up nothing but what it would read.
    /// At the end, [`Self::settle`] waits for it.
    #[must_use]
    pub fn for_service(&self) -> Self {
        let mut output = self.clone();
        if !self.stdout_terminal {
            output.relay = Some(Arc::new(Relay::to(io::stdout())));
        }
        output
    }

    /// Waits until all that a service said on stdout is written, for a moment at most.
    ///
    /// # Errors
    /// As [`Self::document`]; [`StdoutClosed`] where nobody reads it, too.
    pub fn settle(&self) -> anyhow::Result<()> {
        told(self.relay.as_ref().map_or(Ok(()), |relay| relay.settle(LAST_WORDS)))
    }

    /// Whether `--json` was given.
    #[must_use]
    pub const fn is_json(&self) -> bool {
        self.json
    }

    /// Whether stderr, where bars and logs go, is a terminal.
    #[must_use]
    pub const fn is_terminal(&self) -> bool {
        self.stderr_terminal
    }

    /// The document of a verb on stdout, with `--json` only.
    ///
    /// # Errors
    /// Where stdout cannot be written; [`StdoutClosed`] where nobody reads it.
    pub fn document<T: Serialize + ?Sized>(&self, document: &T) -> anyhow::Result<()> {
        if !self.json {
            return Ok(());
        }
        let mut text = serde_json::to_vec_pretty(document)?;
        text.push(b'\n');
        self.stdout(&text)
    }

    /// One event of a verb that reports states as they come, as one line of JSON on stdout (with `--json` only).
    ///
    /// # Errors
    /// As [`Self::document`].
    pub fn event<T: Serialize + ?Sized>(&self, event: &T) -> anyhow::Result<()> {
        if !self.json {
            return Ok(());
        }
        let mut text = serde_json::to_vec(event)?;
        text.push(b'\n');
        self.stdout(&text)
    }

    /// A line for people on stdout: nothing with `--json` or `-q`.
    ///
    /// # Errors
    /// As [`Self::document`].
    pub fn line(&self, line: impl fmt::Display) -> anyhow::Result<()> {
        if self.json || self.quiet {
            return Ok(());
        }
        self.stdout(format!("{line}\n").as_bytes())
    }

    /// As [`Self::line`], of work that is still to be done, and harms nothing: that it cannot be told is no reason to leave it
    /// undone, nor is a pipe that nobody reads; that is waited for as stderr is. The report at its end tells whether stdout
    /// can be written.
    pub fn announce(&self, line: impl fmt::Display) {
        if self.json || self.quiet {
            return;
        }
        let told = if self.stdout_terminal || self.relay.is_some() {
            self.line(line)
        } else {
            let relay = self.announcements.get_or_init(|| Relay::to(io::stdout()));
            told(relay.write(format!("{line}\n").as_bytes()).and_then(|()| relay.settle(PATIENCE_AT_END)))
        };
        if let Err(error) = told {
            tracing::debug!(%error, "not told");
        }
    }

    /// As [`Self::line`], of what will be lost by work that is still to be done: where it cannot be written, the work is left
    /// undone; that nobody reads it is no reason to.
    ///
    /// # Errors
    /// Where stdout cannot be written.
    pub fn forewarn(&self, line: impl fmt::Display) -> anyhow::Result<()> {
        match self.line(line) {
            Err(error) if error.is::<StdoutClosed>() => Ok(()),
            told => told,
        }
    }

    /// As [`Self::event`], on stderr: for a verb whose stdout is another program's.
    pub fn side_event<T: Serialize + ?Sized>(&self, event: &T) {
        if self.json {
            self.stderr_json(event);
        }
    }

    /// As [`Self::line`], on stderr: for a verb whose stdout is another program's.
    pub fn side_line(&self, line: impl fmt::Display) {
        if !self.json && !self.quiet {
            // The terminal may have been made raw by that program.
            let end = if self.stderr_terminal { "\r\n" } else { "\n" };
            self.stderr(format!("lifeboot: {line}{end}").as_bytes());
        }
    }

    /// A table for people on stdout: nothing with `--json`. It is what was asked for, so `-q` does not hide it.
    ///
    /// # Errors
    /// As [`Self::document`].
    pub fn table(&self, table: &Table) -> anyhow::Result<()> {
        if self.json {
            return Ok(());
        }
        self.stdout(table.render(self.stdout_terminal).as_bytes())
    }

    /// How wide and how high the terminal is that stdout is, just now; `None` where it is none. One that does not say, as
    /// a serial console, is taken to be as terminals were.
    #[must_use]
    pub fn terminal_size(&self) -> Option<(usize, usize)> {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok().filter(|_| self.stdout_terminal)?;
        let or = |told: u16, usual| if told > 0 { told.into() } else { usual };
        Some((or(size.ws_col, 80), or(size.ws_row, 24)))
    }

    /// Bytes on stdout as they are.
    ///
    /// # Errors
    /// As [`Self::document`].
    pub fn stdout(&self, bytes: &[u8]) -> anyhow::Result<()> {
        // What was announced stands before it.
        if let Some(relay) = self.announcements.get() {
            relay.drain();
        }
        let write = || {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes)?;
            stdout.flush()
        };
        told(match &self.relay {
            Some(relay) => relay.write(bytes),
            None if self.stdout_terminal && self.stderr_terminal => self.bars.suspend(write),
            None => write(),
        })
    }

    /// Something that the user should know though the work goes on: on stderr, nothing with `-q`.
    pub fn warn(&self, what: impl fmt::Display) {
        if self.quiet {
            return;
        }
        self.tell("warning", &what.to_string(), None, None);
    }

    /// Names something that is damaged, on stderr, whatever the options: exit code 3 refers to it.
    pub fn damaged(&self, what: impl fmt::Display) {
        self.tell("damaged", &what.to_string(), None, None);
    }

    /// What kept the verb from being done, and what to do.
    pub(crate) fn error(&self, what: &str, advice: Option<&str>, exit_code: u8) {
        self.tell("error", what, advice, Some(exit_code));
    }

    /// Begins to show progress of `what` over `total` bytes, if that is known already.
    #[must_use]
    pub fn progress(&self, what: impl fmt::Display, total: Option<u64>) -> Progress {
        Progress::start(self, what.to_string(), total, true)
    }

    /// As [`Self::progress`], of what may never reach `total`: no time left is shown.
    #[must_use]
    pub fn level(&self, what: impl fmt::Display, total: u64) -> Progress {
        Progress::start(self, what.to_string(), Some(total), false)
    }

    fn tell(&self, kind: &'static str, message: &str, advice: Option<&str>, exit_code: Option<u8>) {
        #[derive(Serialize)]
        struct Told<'a> {
            event: &'static str,
            message: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            advice: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            exit_code: Option<u8>,
        }
        if self.json {
            self.stderr_json(&Told { event: kind, message, advice, exit_code });
            return;
        }
        let mut text = match kind {
            "error" => format!("lifeboot: {message}\n"),
            kind => format!("lifeboot: {kind}: {message}\n"),
        };
        if let Some(advice) = advice {
            text.push_str(&format!("  {advice}\n"));
        }
        self.stderr(text.as_bytes());
    }

    fn stderr_json<T: Serialize + ?Sized>(&self, value: &T) {
        let Ok(mut text) = serde_json::to_vec(value) else { return };
        text.push(b'\n');
        self.stderr(&text);
    }

    fn stderr(&self, text: &[u8]) {
        self.log.put(text);
        self.settle_stderr();
    }

    /// Waits until all that was said on stderr is written, if somebody reads it.
    pub(crate) fn settle_stderr(&self) {
        self.log.flush(PATIENCE_AT_END);
    }

    /// Has panics said on stderr as everything else is.
    pub(crate) fn say_panics(&self) {
        self.log.say_panics("lifeboot");
    }

    /// Where log lines go: to stderr, between the bars, by a thread that nobody waits for.
    pub(crate) fn log(&self) -> LogQueue {
        self.log.clone()
    }

    /// Whether log lines have colours.
    pub(crate) fn has_colours(&self) -> bool {
        has_colours()
    }
}

/// How writing to stdout went.
fn told(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::TimedOut) => {
            Err(StdoutClosed.into())
        }
        Err(error) => Err(anyhow::Error::from(error).context("cannot write to stdout")),
    }
}
