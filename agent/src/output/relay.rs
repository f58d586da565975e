//! Stdout, written by a thread of its own: a reader who is slow, or has stopped, holds up no service, and no work that is only announced.
//!
//! It is a [`LogQueue`] that remembers why it could not write. A write that blocks for ever ends with the process.

use std::io::{self, Write};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nbd_server::log_queue::LogQueue;

/// The way to that thread. It ends when this is dropped and all is written.
#[derive(Debug)]
pub(super) struct Relay {
    queue: LogQueue,
    /// Why nothing can be written any more.
    failed: Arc<OnceLock<io::ErrorKind>>,
}

impl Relay {
    /// To `out`.
    pub(super) fn to(mut out: impl Write + Send + 'static) -> Self {
        let failed: Arc<OnceLock<io::ErrorKind>> = Arc::default();
        let failing = Arc::clone(&failed);
        let write = move |bytes: &[u8]| {
            if failing.get().is_none()
                && let Err(error) = out.write_all(bytes).and_then(|()| out.flush())
            {
                let _ = failing.set(error.kind());
            }
        };
        let tell = |left_out| {
            tracing::warn!(left_out, "stdout was not read for so long that some of it was left out");
        };
        Self { queue: LogQueue::new(write).telling(tell), failed }
    }

    /// Has these bytes written, whole or not at all.
    ///
    /// # Errors
    /// Where earlier ones could not be.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        self.check()?;
        self.queue.put(bytes);
        Ok(())
    }

    /// Waits until all is written, for so long at most.
    ///
    /// # Errors
    /// Where it could not be; [`io::ErrorKind::TimedOut`] where nobody reads it in that time.
    pub(super) fn settle(&self, patience: Duration) -> io::Result<()> {
        let is_written = self.queue.flush(patience);
        self.check()?;
        if is_written { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }

    /// Waits until all is written, or cannot be, however long nobody reads it.
    pub(super) fn drain(&self) {
        self.queue.drain();
    }

    fn check(&self) -> io::Result<()> {
        self.failed.get().map_or(Ok(()), |kind| Err((*kind).into()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nbd_server::log_queue::MAX_BYTES;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn all_is_written_in_order() {
        let (mut reader, writer) = io::pipe().unwrap();
        let relay = Relay::to(writer);
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
        let relay = Relay::to(writer);
        let line = [b'x'; 1000];
        for _ in 0..2 * MAX_BYTES / line.len() {
            relay.write(&line).unwrap();
        }
        assert_eq!(relay.settle(Duration::from_millis(1)).unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(relay);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert!(read.len() >= MAX_BYTES - line.len() && read.len() < 2 * MAX_BYTES);
        assert_eq!(read.len() % line.len(), 0, "whole lines");
    }

    #[test]
    fn what_cannot_be_written_is_told_to_whoever_writes_next_or_waits() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let relay = Relay::to(writer);
        relay.write(b"lost").unwrap();
        assert_eq!(relay.settle(LONG).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(relay.write(b"lost").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
