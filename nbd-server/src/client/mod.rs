//! A client that blocks: one connection to an export by its URI, with TLS where the URI asks for it, and never without it then.
//!
//! What the server's bytes mean is `proto`'s; here are the socket, TLS, and one request after another. For whoever asks a few things of a
//! server or reads an export as a whole.

mod stream;
mod tls;
mod uri;

use std::io::{self, Write as _};
use std::time::Duration;

use bytes::BytesMut;
use proto::client::{Connected, Event, Goal, Handshake, Progress, Replies, Wish};
use proto::wire::{
    CommandFlags, CommandKind, ContextId, Cookie, Cut, Descriptor, ExportInfo, MAX_PAYLOAD_BYTES,
    MetaContext, ReplyStyle, RequestHeader, SelectedContext,
};

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
    /// Connects and shakes hands; `contexts` are asked for, and had where the server has them. No read or write takes longer than
    /// `patience`.
    ///
    /// # Errors
    /// Where there is no server, it has no such export, or it is not what it must be: with TLS in the URI a server without it, or with a
    /// certificate that is not its own.
    pub fn open(uri: &NbdUri, contexts: Vec<MetaContext>, patience: Duration) -> Result<Self> {
        let wish = Wish { goal: Goal::Go(uri.export.clone()), replies: ReplyStyle::Extended, contexts };
        let prepared = tls::prepare(uri)?;
        let mut handshake = if prepared.is_some() { Handshake::with_tls(wish) } else { Handshake::new(wish) };
        let mut wire = Wire::connect(&uri.address, patience)?;
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

    /// Reads `buf.len()` bytes at `offset`, in as many requests as it takes. Holes are zeroes.
    ///
    /// # Errors
    /// Where the server says so, or the connection fails; `buf` then holds nothing that may be believed.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        // Any server takes a request of its own limit's length that begins where the last one ended.
        let limit = self.info().block_sizes.maximum.clamp(1, MAX_PAYLOAD_BYTES) as usize;
        let mut at = offset;
        for piece in buf.chunks_mut(limit) {
            let len = u32::try_from(piece.len()).expect("a request has at most 32 MiB");
            let start = at;
            self.call(CommandKind::Read, start, u64::from(len), |event| match event {
                // What lies outside the request was refused before it came here.
                Event::Data { offset, bytes, .. } => {
                    let place = (offset - start) as usize;
                    piece[place..place + bytes.len()].copy_from_slice(&bytes);
                }
                Event::Hole { offset, len, .. } => {
                    let place = (offset - start) as usize;
                    piece[place..place + len as usize].fill(0);
                }
                _ => {}
            })?;
            at += u64::from(len);
        }
        Ok(())
    }

    /// What the contexts tell of `len` bytes at `offset`, or of the first of them. Without extended headers the length is below 2^32.
    ///
    /// # Errors
    /// Where the server says so, or the connection fails.
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
        if self.lost {
            return Err(unexpected(&self.server, "the connection failed before"));
        }
        // Whatever happens in the middle of an answer, the rest of it would be taken for another's.
        self.lost = true;
        self.last_cookie += 1;
        let request =
            RequestHeader { flags: CommandFlags::NONE, kind, cookie: Cookie(self.last_cookie), offset, len };
        self.replies.expect(&request).map_err(|error| unexpected(&self.server, &error.to_string()))?;
        self.stream
            .write_all(&request.encode(self.connected.replies))
            .map_err(|error| failed(&self.server, &error))?;
        let mut why = String::new();
        loop {
            let next = self.replies.next(&mut self.input);
            match next.map_err(|error| unexpected(&self.server, &error.to_string()))? {
                Some(Event::Done { result, .. }) => {
                    self.lost = false;
                    return result.map_err(|errno| {
                        let words = if why.is_empty() { String::new() } else { format!(" ({})", Cut(&why)) };
                        let what = format!("{kind:?} of {len} bytes at byte {offset}: {errno}{words}");
                        unexpected(&self.server, &format!("it refused {what}"))
                    });
                }
                Some(Event::Failure { message, .. }) => why = message,
                Some(event) => take(event),
                None => {
                    let len = read(&mut self.stream, &mut self.buf, &self.server)?;
                    self.input.extend_from_slice(&self.buf[..len]);
                }
            }
        }
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
