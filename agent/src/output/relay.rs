//! Stdout of a service, written by a thread of its own: a reader who is slow, or has stopped, holds up nobody.
//!
//! What waits is bounded; what does not fit is left out, and said once there is room again. Order is kept. A write that blocks for
//! ever ends with the process.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// What waits at most, in bytes: hours of progress.
const MAX_WAITING_BYTES: usize = 1 << 20;

/// The way to that thread. It ends when this is dropped and all is written.
#[derive(Debug)]
pub(super) struct Relay {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    is_writing: bool,
    left_out: u64,
    /// Why nothing can be written any more.
    failed: Option<io::ErrorKind>,
    is_over: bool,
}

impl Relay {
    /// A thread that writes to `out`.
    pub(super) fn start(out: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        std::thread::Builder::new().name("stdout".into()).spawn(move || writer.write_to(out))?;
        Ok(Self { shared })
    }

    /// Has these bytes written, whole or not at all.
    ///
    /// # Errors
    /// Where earlier ones could not be.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.shared.state.lock();
        if let Some(kind) = state.failed {
            return Err(kind.into());
        }
        if !state.waiting.is_empty() && state.waiting_bytes + bytes.len() > MAX_WAITING_BYTES {
            state.left_out += 1;
            return Ok(());
        }
        state.waiting_bytes += bytes.len();
        state.waiting.push_back(bytes.to_owned());
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Waits until all is written, for so long at most.
    ///
    /// # Errors
    /// Where it could not be; [`io::ErrorKind::TimedOut`] where nobody reads it in that time.
    pub(super) fn settle(&self, patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.state.lock();
        let is_busy =
            |state: &mut State| state.failed.is_none() && (state.is_writing || !state.waiting.is_empty());
        let waited = self.shared.changed.wait_while_until(&mut state, is_busy, deadline);
        let failed = state.failed;
        match failed {
            Some(kind) => Err(kind.into()),
            None if waited.timed_out() && is_busy(&mut state) => Err(io::ErrorKind::TimedOut.into()),
            None => Ok(()),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.state.lock().is_over = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn write_to(&self, mut out: impl Write) {
        while let Some((bytes, left_out)) = self.next() {
            let written = out.write_all(&bytes).and_then(|()| out.flush());
            if left_out > 0 {
                tracing::warn!(left_out, "stdout was not read for so long that some of it was left out");
            }
            let mut state = self.state.lock();
            state.is_writing = false;
            state.failed = written.err().map(|error| error.kind());
            self.changed.notify_all();
            if state.failed.is_some() {
                return;
            }
        }
    }

    /// What is to be written next, and how much was left out before it; `None` at the end.
    fn next(&self) -> Option<(Vec<u8>, u64)> {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.waiting.is_empty() && !state.is_over);
        let bytes = state.waiting.pop_front()?;
        state.waiting_bytes -= bytes.len();
        state.is_writing = true;
        Some((bytes, std::mem::take(&mut state.left_out)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn all_is_written_in_order() {
        let (mut reader, writer) = io::pipe().unwrap();
        let relay = Relay::start(writer).unwrap();
        for number in 0..100 {
            relay.write(format!("{number}\n").as_bytes()).unwrap();
        }
        relay.settle(LONG).unwrap();
        drop(relay);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, (0..100).map(|number| format!("{number}\n")).collect::<String>());
    }

    #[test]
    fn who_does_not_read_holds_up_nobody_and_is_given_what_fits_later() {
        let (mut reader, writer) = io::pipe().unwrap();
        let relay = Relay::start(writer).unwrap();
        let line = [b'x'; 1000];
        for _ in 0..2 * MAX_WAITING_BYTES / line.len() {
            relay.write(&line).unwrap();
        }
        assert_eq!(relay.settle(Duration::from_millis(1)).unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(relay);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert!(read.len() >= MAX_WAITING_BYTES - line.len() && read.len() < 2 * MAX_WAITING_BYTES);
        assert_eq!(read.len() % line.len(), 0, "whole lines");
    }

    #[test]
    fn what_cannot_be_written_is_told_to_whoever_writes_next_or_waits() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let relay = Relay::start(writer).unwrap();
        relay.write(b"lost").unwrap();
        assert_eq!(relay.settle(LONG).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(relay.write(b"lost").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
