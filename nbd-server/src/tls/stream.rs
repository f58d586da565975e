//! A socket under TLS: the same calls as a plain one has, but for `sendfile`.

use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use super::session::{Plain, Problem, Session};
use crate::log_limit::LogLimit;
use crate::socket::Socket;

/// How much one receive may bring: many records at once.
const RECEIVE_BYTES: usize = 128 << 10;
/// How much of a client whose TLS came to nothing is still read, so that it hears why before the connection goes.
const MAX_LINGER_BYTES: usize = 64 << 10;

/// A socket, and the TLS of its connection. What it was given and has not sent is sent, as far as it goes without waiting, when
/// it is dropped, with TLS's own goodbye.
pub(crate) struct TlsSocket {
    wire: Socket,
    session: Session,
    received: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Why a connection has no TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsFailure {
    #[error(transparent)]
    Refused(#[from] Problem),
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
    #[error("the client went away in the middle of the TLS handshake")]
    Gone,
}

impl fmt::Debug for TlsSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsSocket").field("wire", &self.wire).finish_non_exhaustive()
    }
}

/// Writes to a socket without waiting.
struct Wire<'a>(&'a mut Socket);

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_send(&[IoSlice::new(bytes)], false)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_send(slices, false)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TlsSocket {
    /// Shakes hands. May be dropped at any point.
    pub(super) async fn accept(
        wire: Socket,
        session: Session,
        refused: &LogLimit,
    ) -> Result<Self, TlsFailure> {
        let received = vec![0; RECEIVE_BYTES].into_boxed_slice();
        let mut socket = Self { wire, session, received, start: 0, end: 0 };
        match socket.shake_hands().await {
            Ok(()) => Ok(socket),
            Err(failure) => {
                match &failure {
                    TlsFailure::Refused(problem) if !problem.is_logged => {
                        if let Some(left_out) = refused.admit(Instant::now()) {
                            tracing::warn!(left_out, why = %problem, "a client's TLS came to nothing");
                        }
                    }
                    failure => tracing::debug!(%failure, "a client's TLS came to nothing"),
                }
                socket.linger().await;
                Err(failure)
            }
        }
    }

    async fn shake_hands(&mut self) -> Result<(), TlsFailure> {
        loop {
            poll_fn(|cx| self.poll_flush(cx)).await?;
            if !self.session.is_handshaking() {
                tracing::debug!(with = self.session.describe(), "TLS has begun");
                return Ok(());
            }
            if self.start < self.end {
                let taken = self.session.take(&self.received[self.start..self.end])?;
                self.start += taken;
                if taken == 0 && !self.session.has_unsent() {
                    // The client ended TLS before it had begun.
                    return Err(TlsFailure::Gone);
                }
            } else if poll_fn(|cx| self.poll_receive(cx)).await? == 0 {
                return Err(TlsFailure::Gone);
            }
        }
    }

    /// Gives a client whose TLS came to nothing the time to read why: a socket that is closed with bytes unread takes back what it sent.
    async fn linger(&mut self) {
        if poll_fn(|cx| self.poll_flush(cx)).await.is_err() {
            return;
        }
        let _ = rustix::net::shutdown(&self.wire, rustix::net::Shutdown::Write);
        let mut read = 0;
        while read < MAX_LINGER_BYTES {
            (self.start, self.end) = (0, 0);
            match poll_fn(|cx| self.poll_receive(cx)).await {
                Ok(len) if len > 0 => read += len,
                _ => return,
            }
        }
    }

    /// Receives once more, where all that was received before is understood.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let len = ready!(self.wire.poll_read(cx, &mut self.received))?;
        (self.start, self.end) = (0, len);
        Poll::Ready(Ok(len))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.try_flush()? {
            ready!(self.wire.poll_writable(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads plain text that is there, as much as fits; 0 where the peer said that nothing more comes, or just closed.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            if let Some(len) = self.decrypt(buf)? {
                return Poll::Ready(Ok(len));
            }
            // What TLS itself has to say goes out with the next reply where it cannot go now.
            self.try_flush()?;
            // An end without TLS's goodbye is one too: every message of NBD has its length.
            if ready!(self.poll_receive(cx))? == 0 {
                return Poll::Ready(Ok(0));
            }
        }
    }

    /// Reads plain text of what can be received at once, without a word to the event loop; `None` where that is none.
    pub(crate) fn try_read(&mut self, buf: &mut [u8]) -> Option<io::Result<usize>> {
        assert_eq!(self.start, self.end, "what was received before is understood first");
        let len = self.wire.try_receive(&mut self.received)?;
        (self.start, self.end) = (0, len);
        self.decrypt(buf).transpose()
    }

    /// Plain text of what was received, as much as fits, 0 where the peer said that nothing more comes; `None` where more must be
    /// received first.
    fn decrypt(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let mut filled = 0;
        loop {
            match self.session.read(&mut buf[filled..]).map_err(|problem| invalid(&problem.why))? {
                Plain::Bytes(len) => {
                    filled += len;
                    if filled == buf.len() {
                        return Ok(Some(filled));
                    }
                }
                Plain::Ended => return Ok(Some(filled)),
                Plain::NoneYet if self.start < self.end => {
                    let taken = self
                        .session
                        .take(&self.received[self.start..self.end])
                        .map_err(|problem| invalid(&problem.why))?;
                    self.start += taken;
                    if taken == 0 {
                        return Err(invalid("it takes nothing more"));
                    }
                }
                Plain::NoneYet => return Ok(Some(filled).filter(|filled| *filled > 0)),
            }
        }
    }

    pub(crate) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire.poll_writable(cx)
    }

    /// Encrypts from the front of `slices` and sends it as far as it goes: `Ok` means that so much was taken, not that it is sent.
    /// `WouldBlock` while what was taken before is still here.
    pub(crate) fn try_send(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        if !self.try_flush()? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = self.session.write(slices)?;
        self.try_flush()?;
        Ok(taken)
    }

    /// Sends what was encrypted; whether all of it is sent.
    pub(crate) fn try_flush(&mut self) -> io::Result<bool> {
        while self.session.has_unsent() {
            match self.session.send(&mut Wire(&mut self.wire)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    pub(crate) fn enlarge_send_buffer(&self) {
        self.wire.enlarge_send_buffer();
    }

    pub(crate) fn is_flushed(&self) -> bool {
        !self.session.has_unsent()
    }
}

impl Drop for TlsSocket {
    fn drop(&mut self) {
        self.session.end();
        // The peer may be gone: closing tells it the same.
        let _ = self.try_flush();
    }
}

impl AsFd for TlsSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.as_fd()
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS failed: {why}"))
}
