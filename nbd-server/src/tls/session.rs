//! TLS without a socket: what was received goes in, plain text comes out, and the other way round.

use std::io::{self, IoSlice, Write};

#[cfg(feature = "psk")]
use super::psk::PskSession;
use super::x509::X509Session;

/// How much may be encrypted and not sent, in bytes: beyond it nothing more is taken from whoever writes.
pub(crate) const MAX_UNSENT_BYTES: usize = 256 << 10;

/// What came of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plain {
    /// So many bytes.
    Bytes(usize),
    /// More must be received first.
    NoneYet,
    /// The peer said that nothing more comes.
    Ended,
}

/// What is wrong with the peer's TLS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub(crate) struct Problem {
    pub(super) why: String,
    /// The log has a line of it already.
    pub(super) is_logged: bool,
}

impl From<String> for Problem {
    fn from(why: String) -> Self {
        Self { why, is_logged: false }
    }
}

/// One connection's TLS, whichever library it is of.
#[derive(Debug)]
pub(super) enum Session {
    X509(X509Session),
    #[cfg(feature = "psk")]
    Psk(Box<PskSession>),
}

macro_rules! of_either {
    ($session:expr, $inner:ident => $call:expr) => {
        match $session {
            Session::X509($inner) => $call,
            #[cfg(feature = "psk")]
            Session::Psk($inner) => $call,
        }
    };
}

impl Session {
    /// Whether the handshake is under way.
    pub(super) fn is_handshaking(&self) -> bool {
        of_either!(self, session => session.is_handshaking())
    }

    /// Takes what was received, from its front; how much it was. It takes nothing while there is plain text to read, and in the
    /// handshake while there is something to send.
    pub(super) fn take(&mut self, cipher: &[u8]) -> Result<usize, Problem> {
        of_either!(self, session => session.take(cipher))
    }

    /// Reads plain text.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> Result<Plain, Problem> {
        of_either!(self, session => session.read(buf))
    }

    /// Encrypts from the front of `slices`; how much it was, which is nothing where too much is unsent.
    pub(super) fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        of_either!(self, session => session.write(slices))
    }

    /// Whether there is something to send.
    pub(super) fn has_unsent(&self) -> bool {
        of_either!(self, session => session.has_unsent())
    }

    /// Sends as much as one call takes.
    pub(super) fn send(&mut self, wire: &mut impl Write) -> io::Result<usize> {
        of_either!(self, session => session.send(wire))
    }

    /// Says that nothing more comes.
    pub(super) fn end(&mut self) {
        of_either!(self, session => session.end());
    }

    /// Version and cipher, for the log.
    pub(super) fn describe(&self) -> String {
        of_either!(self, session => session.describe())
    }
}
