//! TLS with pre-shared keys, by OpenSSL: rustls has none. A session reads and writes memory, never a socket.

use std::io::{self, IoSlice, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use openssl::ex_data::Index;
use openssl::ssl::{
    Error as SslError, ErrorCode, Ssl, SslContext, SslContextBuilder, SslMethod, SslOptions,
    SslSessionCacheMode, SslStream, SslVersion,
};
use proto::wire::Cut;

use super::files;
use super::keys::PskKeys;
use super::session::{MAX_UNSENT_BYTES, Plain, Problem};
use crate::Result;

/// OpenSSL takes the first of these that the client has. A key that was not made for one hash goes with SHA-256 alone.
const TLS13_CIPHERS: &str = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";
/// For TLS 1.2, the one with forward secrecy first.
const TLS12_CIPHERS: &str = "ECDHE-PSK-CHACHA20-POLY1305:PSK-AES128-GCM-SHA256:PSK-AES256-GCM-SHA384";
/// The longest plain text of a record.
const RECORD_BYTES: usize = 16 << 10;
/// How much that was received may wait for being understood.
const MAX_INCOMING_BYTES: usize = 64 << 10;

/// Versions, ciphers and habits that both sides share.
pub(crate) fn harden(builder: &mut SslContextBuilder) -> std::result::Result<(), openssl::error::ErrorStack> {
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_ciphersuites(TLS13_CIPHERS)?;
    builder.set_cipher_list(TLS12_CIPHERS)?;
    builder.set_options(
        SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_TICKET
            | SslOptions::NO_COMPRESSION
            | SslOptions::CIPHER_SERVER_PREFERENCE,
    );
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    Ok(())
}

/// The name that a client gave and that is not among the keys.
type Unknown = Arc<Mutex<Option<String>>>;

/// What every connection of a server with these keys begins from.
#[derive(Clone)]
pub(super) struct PskConfig {
    context: SslContext,
    unknown: Index<Ssl, Unknown>,
    path: PathBuf,
}

impl std::fmt::Debug for PskConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PskConfig").field("path", &self.path).finish_non_exhaustive()
    }
}

impl PskConfig {
    /// Reads the keys.
    pub(super) fn load(path: &Path) -> Result<Self> {
        let keys = PskKeys::load(path)?;
        Self::new(keys, path)
            .map_err(|error| files::invalid(format!("TLS with pre-shared keys cannot be set up: {error}")))
    }

    fn new(keys: PskKeys, path: &Path) -> std::result::Result<Self, openssl::error::ErrorStack> {
        let unknown: Index<Ssl, Unknown> = Ssl::new_ex_index()?;
        let mut builder = SslContext::builder(SslMethod::tls_server())?;
        harden(&mut builder)?;
        builder.set_num_tickets(0)?;
        builder.set_psk_server_callback(move |ssl, name, room| {
            let name = name.map(String::from_utf8_lossy).unwrap_or_default();
            // None of the names, or no room for its key, is a length of zero: the handshake fails.
            let Some(key) = keys.key(&name) else {
                if let Some(unknown) = ssl.ex_data(unknown) {
                    *unknown.lock().unwrap_or_else(PoisonError::into_inner) = Some(Cut(&name).to_string());
                }
                return Ok(0);
            };
            let Some(room) = room.get_mut(..key.len()) else { return Ok(0) };
            room.copy_from_slice(key);
            Ok(key.len())
        });
        Ok(Self { context: builder.build(), unknown, path: path.to_owned() })
    }

    pub(super) fn session(&self) -> std::result::Result<PskSession, String> {
        let unknown = Unknown::default();
        let begin = || {
            let mut ssl = Ssl::new(&self.context)?;
            ssl.set_ex_data(self.unknown, Arc::clone(&unknown));
            ssl.set_accept_state();
            SslStream::new(ssl, Memory::default())
        };
        let tls = begin().map_err(|error| error.to_string())?;
        Ok(PskSession {
            tls,
            handshaking: true,
            ended: false,
            unknown,
            path: self.path.clone(),
            record: Vec::new(),
        })
    }
}

/// What was received and not understood yet, and what is to be sent.
#[derive(Debug, Default)]
struct Memory {
    incoming: Queue,
    outgoing: Queue,
}

/// Bytes put in at the end and taken from the front.
#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    start: usize,
}

impl Queue {
    fn rest(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    fn consume(&mut self, len: usize) {
        self.start += len;
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        if self.start > self.bytes.len() / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }
}

impl Read for Memory {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(self.incoming.rest().len());
        if len == 0 && !buf.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        buf[..len].copy_from_slice(&self.incoming.rest()[..len]);
        self.incoming.consume(len);
        Ok(len)
    }
}

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.outgoing.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One connection's TLS.
#[derive(Debug)]
pub(super) struct PskSession {
    tls: SslStream<Memory>,
    handshaking: bool,
    ended: bool,
    unknown: Unknown,
    path: PathBuf,
    /// Short pieces, put together to be encrypted as one.
    record: Vec<u8>,
}

fn waits(error: &SslError) -> bool {
    matches!(error.code(), ErrorCode::WANT_READ | ErrorCode::WANT_WRITE)
}

impl PskSession {
    pub(super) const fn is_handshaking(&self) -> bool {
        self.handshaking
    }

    pub(super) fn take(&mut self, cipher: &[u8]) -> std::result::Result<usize, Problem> {
        let incoming = &mut self.tls.get_mut().incoming;
        let len = cipher.len().min(MAX_INCOMING_BYTES.saturating_sub(incoming.rest().len()));
        incoming.put(&cipher[..len]);
        if self.handshaking {
            match self.tls.do_handshake() {
                Ok(()) => self.handshaking = false,
                Err(error) if waits(&error) => {}
                Err(error) => return Err(self.explain(&error).into()),
            }
        }
        Ok(len)
    }

    pub(super) fn read(&mut self, buf: &mut [u8]) -> std::result::Result<Plain, Problem> {
        if self.handshaking {
            return Ok(Plain::NoneYet);
        }
        match self.tls.ssl_read(buf) {
            Ok(0) => Ok(Plain::Ended),
            Ok(len) => Ok(Plain::Bytes(len)),
            Err(error) if waits(&error) => Ok(Plain::NoneYet),
            Err(error) if error.code() == ErrorCode::ZERO_RETURN => Ok(Plain::Ended),
            Err(error) => Err(self.explain(&error).into()),
        }
    }

    pub(super) fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut taken = 0;
        let mut slices = slices.iter().map(|slice| &slice[..]).filter(|slice| !slice.is_empty()).peekable();
        let mut rest: &[u8] = slices.next().unwrap_or_default();
        while !rest.is_empty() && self.tls.get_ref().outgoing.rest().len() < MAX_UNSENT_BYTES {
            if rest.len() >= RECORD_BYTES || (self.record.is_empty() && slices.peek().is_none()) {
                let len = rest.len().min(RECORD_BYTES);
                self.tls.ssl_write(&rest[..len]).map_err(io::Error::other)?;
                taken += len;
                rest = &rest[len..];
            } else {
                self.record.clear();
                while self.record.len() < RECORD_BYTES && !rest.is_empty() {
                    let len = rest.len().min(RECORD_BYTES - self.record.len());
                    self.record.extend_from_slice(&rest[..len]);
                    rest = &rest[len..];
                    if rest.is_empty() {
                        rest = slices.next().unwrap_or_default();
                    }
                }
                self.tls.ssl_write(&self.record).map_err(io::Error::other)?;
                taken += self.record.len();
                self.record.clear();
            }
            if rest.is_empty() {
                rest = slices.next().unwrap_or_default();
            }
        }
        Ok(taken)
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.tls.get_ref().outgoing.rest().is_empty()
    }

    pub(super) fn send(&mut self, wire: &mut impl Write) -> io::Result<usize> {
        let outgoing = &mut self.tls.get_mut().outgoing;
        let sent = wire.write(outgoing.rest())?;
        outgoing.consume(sent);
        Ok(sent)
    }

    pub(super) fn end(&mut self) {
        if !self.handshaking && !std::mem::replace(&mut self.ended, true) {
            // Where it cannot be said, closing says it.
            let _ = self.tls.shutdown();
        }
    }

    pub(super) fn describe(&self) -> String {
        let ssl = self.tls.ssl();
        format!(
            "{} {}",
            ssl.version_str(),
            ssl.current_cipher().map(|cipher| cipher.name()).unwrap_or_default()
        )
    }

    fn explain(&self, error: &SslError) -> String {
        if let Some(name) = &*self.unknown.lock().unwrap_or_else(PoisonError::into_inner) {
            return format!("the client's name \"{name}\" has no key in {}", self.path.display());
        }
        let why = error.to_string();
        let says = |word: &str| why.contains(word);
        if says("binder")
            || says("decryption failed")
            || says("bad record mac")
            || says("digest check failed")
        {
            format!("the client's key is not the one that its name has in {} ({why})", self.path.display())
        } else if says("no shared cipher") || says("no suitable") || says("unsupported protocol") {
            format!("the client offered no pre-shared key, or neither TLS 1.2 nor 1.3 with it ({why})")
        } else {
            format!("the client's TLS came to nothing ({why})")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cipher_is_an_authenticated_one() {
        for cipher in TLS13_CIPHERS.split(':').chain(TLS12_CIPHERS.split(':')) {
            assert!(cipher.contains("GCM") || cipher.contains("CHACHA20"), "{cipher}");
        }
    }
}
