//! A client that blocks: one connection to an export by its URI, with TLS where the URI asks for it, and never without it then.
//!
//! What the server's bytes mean is `proto`'s; here are the socket, TLS, and one request after another ([`Connection`]) or many reads at
//! once ([`Reads`]). For whoever asks a few things of a server or reads an export as a whole.

mod reads;
mod stream;
mod tls;
mod uri;

use std::fmt;
use std::io::{self, Write as _};

use bytes::BytesMut;
use proto::client::{Connected, Event, Goal, Handshake, Progress, Replies, Wish};
use proto::wire::{
    CommandFlags, CommandKind, ContextId, Cookie, Cut, Descriptor, Errno, ExportInfo, MAX_PAYLOAD_BYTES,
    MetaContext, ReplyStyle, RequestHeader, SelectedContext, TransmissionFlags,
};

pub use reads::Reads;
pub use stream::Patience;
pub use uri::{ClientTls, NbdUri};

use crate::{Error, ErrorKind, Result};
use stream::{Stream, Wire};

const RECEIVE_BYTES: usize = 256 << 10;

/// What BLOCK_STATUS told, for each context.
pub type Told = Vec<(ContextId, Vec<Descriptor>)>;

/// A connection to an export. Dropping it says goodbye.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    connected: Box<Connected>,
    replies: Replies,
    input: BytesMut,
    buf: Box<[u8]>,
    last_cookie: u64,
    server: String,
    /// The server and we disagree about what comes next.
    lost: bool,
}

impl Connection {
    /// Connects and shakes hands; `contexts` are asked for, and had where the server has them. Whenever the server is waited for,
    /// now or later, that takes no longer than `patience`.
    ///
    /// # Errors
    /// Where there is no server, it has no such export, or it is not what it must be: with TLS in the URI a server without it, or with a
    /// certificate that is not its own.
    pub fn open(uri: &NbdUri, contexts: Vec<MetaContext>, patience: impl Into<Patience>) -> Result<Self> {
        let wish = Wish { goal: Goal::Go(uri.export.clone()), replies: ReplyStyle::Extended, contexts };
        let prepared = tls::prepare(uri)?;
        let mut handshake = if prepared.is_some() { Handshake::with_tls(wish) } else { Handshake::new(wish) };
        let mut wire = Wire::connect(&uri.address, patience.into())?;
        let server = uri.to_string();
        let mut buf = vec![0; RECEIVE_BYTES].into_boxed_slice();
        let mut stream = match prepared {
            None => Stream::Plain(wire),
            Some(prepared) => {
                loop {
                    let len = read(&mut wire, &mut buf, &server)?;
                    let progress = receive(&mut handshake, &buf[..len], &server)?;
                    wire.write_all(&handshake.take_output()).map_err(|error| failed(&server, &error))?;
                    match progress {
                        Progress::Waiting => {}
                        Progress::StartTls => break,
                        _ => return Err(unexpected(&server, "it went on without TLS")),
                    }
                }
                let mut stream = prepared.begin(wire, uri)?;
                handshake.secured();
                stream.write_all(&handshake.take_output()).map_err(|error| failed(&server, &error))?;
                stream
            }
        };
        loop {
            let len = read(&mut stream, &mut buf, &server)?;
            let progress = receive(&mut handshake, &buf[..len], &server)?;
            stream.write_all(&handshake.take_output()).map_err(|error| failed(&server, &error))?;
            match progress {
                Progress::Waiting => {}
                Progress::Ready(connected) => {
                    let replies = Replies::new(connected.replies, connected.contexts.clone());
                    let input = handshake.into_rest();
                    return Ok(Self {
                        stream,
                        connected,
                        replies,
                        input,
                        buf,
                        last_cookie: 0,
                        server,
                        lost: false,
                    });
                }
                _ => return Err(unexpected(&server, "it answered what was not asked")),
            }
        }
    }

    /// What the server told of the export.
    #[must_use]
    pub fn info(&self) -> &ExportInfo {
        &self.connected.info
    }

    /// Which kind of replies it sends.
    #[must_use]
    pub fn replies(&self) -> ReplyStyle {
        self.connected.replies
    }

    /// The contexts that BLOCK_STATUS tells of.
    #[must_use]
    pub fn contexts(&self) -> &[SelectedContext] {
        &self.connected.contexts
    }

    /// The number of a context, if the server has it.
    #[must_use]
    pub fn context(&self, wanted: &MetaContext) -> Option<ContextId> {
        self.contexts().iter().find(|selected| selected.context == *wanted).map(|selected| selected.id)
    }

    /// Whether further connections read the very same bytes: the server says so, or lets nobody write.
    #[must_use]
    pub fn allows_more(&self) -> bool {
        let flags = self.info().flags;
        flags.contains(TransmissionFlags::CAN_MULTI_CONN) || flags.contains(TransmissionFlags::READ_ONLY)
    }

    /// Reads `buf.len()` bytes at `offset`, in as many requests as it takes. Holes are zeroes. Both must be multiples of what the
    /// server has as its minimum ([`ExportInfo::block_sizes`], at most 64 KiB), or reach to the export's end.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where the server says so; else the connection fails. `buf` then holds nothing that may be believed.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let limit = self.most_in_request(MAX_PAYLOAD_BYTES) as usize;
        let mut at = offset;
        for piece in buf.chunks_mut(limit) {
            let start = at;
            let len = piece.len() as u64;
            self.call(CommandKind::Read, start, len, |event| put(piece, start, &event))?;
            at += len;
        }
        Ok(())
    }

    /// The longest READ that the server takes, up to `wish`; whole blocks, so that the next one begins where it may.
    fn most_in_request(&self, wish: u32) -> u32 {
        let sizes = &self.info().block_sizes;
        let most = sizes.maximum.min(wish).max(sizes.minimum);
        // A minimum is at most 64 KiB: the handshake refuses others.
        most - most % sizes.minimum
    }

    /// What the contexts tell of `len` bytes at `offset`, or of the first of them. Without extended headers the length is below 2^32.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where the server says so; else the connection fails.
    pub fn block_status(&mut self, offset: u64, len: u64) -> Result<Told> {
        let mut told = Told::new();
        self.call(CommandKind::BlockStatus, offset, len, |event| {
            if let Event::Status { context, descriptors, .. } = event {
                told.push((context, descriptors));
            }
        })?;
        Ok(told)
    }

    /// Sends one request and takes all that comes for it.
    fn call(&mut self, kind: CommandKind, offset: u64, len: u64, mut take: impl FnMut(Event)) -> Result<()> {
        let mut request = Vec::new();
        self.announce(kind, offset, len, &mut request)?;
        self.send(&request)?;
        let mut words = Words::default();
        loop {
            match self.next_event()? {
                Event::Done { result, .. } => {
                    return result.map_err(|errno| self.refused(kind, offset, len, errno, &words));
                }
                Event::Failure { offset, message, .. } => words.take(offset, message),
                event => take(event),
            }
        }
    }

    /// Adds a request to what is to be sent, and expects its replies.
    fn announce(&mut self, kind: CommandKind, offset: u64, len: u64, out: &mut Vec<u8>) -> Result<Cookie> {
        self.last_cookie += 1;
        let cookie = Cookie(self.last_cookie);
        let request = RequestHeader { flags: CommandFlags::NONE, kind, cookie, offset, len };
        self.replies.expect(&request).map_err(|error| unexpected(&self.server, &error.to_string()))?;
        out.extend_from_slice(&request.encode(self.connected.replies));
        Ok(cookie)
    }

    /// Sends whole requests.
    fn send(&mut self, requests: &[u8]) -> Result<()> {
        if self.lost {
            return Err(unexpected(&self.server, "the connection failed before"));
        }
        let sent = self.stream.write_all(requests).map_err(|error| failed(&self.server, &error));
        // The rest of half a request would be taken for another one.
        self.lost = sent.is_err();
        sent
    }

    /// What the server tells next, waited for.
    fn next_event(&mut self) -> Result<Event> {
        let event = self.receive_event();
        self.lost |= event.is_err();
        event
    }

    fn receive_event(&mut self) -> Result<Event> {
        loop {
            let next = self.replies.next(&mut self.input);
            if let Some(event) = next.map_err(|error| unexpected(&self.server, &error.to_string()))? {
                return Ok(event);
            }
            let len = read(&mut self.stream, &mut self.buf, &self.server)?;
            self.input.extend_from_slice(&self.buf[..len]);
        }
    }

    fn refused(&self, kind: CommandKind, offset: u64, len: u64, errno: Errno, words: &Words) -> Error {
        let what = format!("it refused {kind:?} of {len} bytes at byte {offset}: {errno}{words}");
        Error::new(ErrorKind::Refused, format!("the server at {}: {what}", self.server))
    }
}

/// What a server says of a request that fails, and at which byte; the first of it.
#[derive(Debug, Default)]
struct Words {
    offset: Option<u64>,
    message: String,
}

impl Words {
    fn take(&mut self, offset: Option<u64>, message: String) {
        self.offset = self.offset.or(offset);
        if self.message.is_empty() {
            self.message = message;
        }
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(offset) = self.offset {
            write!(f, ", at byte {offset}")?;
        }
        if !self.message.is_empty() {
            write!(f, " ({})", Cut(&self.message))?;
        }
        Ok(())
    }
}

/// Puts what was read where it belongs in `piece`, which begins at byte `start` of the export.
fn put(piece: &mut [u8], start: u64, event: &Event) {
    // What lies outside the request was refused before it came here.
    match event {
        Event::Data { offset, bytes, .. } => {
            let place = (offset - start) as usize;
            piece[place..place + bytes.len()].copy_from_slice(bytes);
        }
        Event::Hole { offset, len, .. } => {
            let place = (offset - start) as usize;
            piece[place..place + *len as usize].fill(0);
        }
        _ => {}
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let goodbye = RequestHeader {
            flags: CommandFlags::NONE,
            kind: CommandKind::Disconnect,
            cookie: Cookie(0),
            offset: 0,
            len: 0,
        };
        // A server that is gone needs none.
        if !self.lost && self.stream.write_all(&goodbye.encode(self.connected.replies)).is_ok() {
            self.stream.end();
        }
    }
}

/// Reads what is there, which is at least a byte.
fn read(stream: &mut impl io::Read, buf: &mut [u8], server: &str) -> Result<usize> {
    loop {
        match stream.read(buf) {
            Ok(0) => return Err(unexpected(server, "it hung up")),
            Ok(len) => return Ok(len),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(server, &error)),
        }
    }
}

fn receive(handshake: &mut Handshake, bytes: &[u8], server: &str) -> Result<Progress> {
    handshake.receive(bytes).map_err(|error| unexpected(server, &error.to_string()))
}

fn unexpected(server: &str, why: &str) -> Error {
    Error::new(ErrorKind::Peer, format!("the server at {server}: {why}"))
}

fn failed(server: &str, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => unexpected(server, "it does not answer"),
        _ => match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(alert)) => unexpected(server, &tls::refused(*alert)),
            _ => unexpected(server, &format!("the connection failed: {error}")),
        },
    }
}
