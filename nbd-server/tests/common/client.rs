//! A client that blocks, made of the pure client half and a socket.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use proto::client::{Connected, Event, Goal, Handshake, HandshakeError, Progress, Replies, Wish};
use proto::wire::{
    CLIENT_OPTION_MAGIC, CommandFlags, CommandKind, ContextFilter, ContextId, Cookie, Descriptor, Errno,
    MetaContext, ReplyStyle, RequestBytes, RequestHeader,
};

/// So that a test that fails ends: no test waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Client {
    pub(crate) socket: UnixStream,
    pub(crate) connected: Connected,
    replies: Replies,
    input: BytesMut,
    next_cookie: u64,
    partial: HashMap<Cookie, Reply>,
}

/// All that came for one request.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) header: RequestHeader,
    pub(crate) result: Result<(), Errno>,
    pub(crate) data: Vec<u8>,
    pub(crate) holes: usize,
    pub(crate) chunks: usize,
    pub(crate) status: HashMap<ContextId, Vec<Descriptor>>,
    /// Where it failed, as far as that was told, and the server's words.
    pub(crate) failure: Option<(Option<u64>, String)>,
}

/// What most tests want of a handshake.
pub(crate) fn wish(name: &str, replies: ReplyStyle) -> Wish {
    let contexts =
        vec![MetaContext::Allocation, MetaContext::Depth, MetaContext::DirtyBitmap("restore".to_owned())];
    Wish { goal: Goal::Go(name.to_owned()), replies, contexts }
}

/// A connection whose handshake is made by hand: the greeting was read and flags were sent.
pub(crate) fn begin_hand_made(path: &Path, flags: u32) -> io::Result<UnixStream> {
    let mut socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.read_exact(&mut [0; 18])?;
    socket.write_all(&flags.to_be_bytes())?;
    Ok(socket)
}

/// Reads what is there. A ring of this process may interrupt any thread of it.
fn read_some(socket: &mut UnixStream, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.read(buf) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// An option's bytes.
pub(crate) fn option(kind: u32, data: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u64(CLIENT_OPTION_MAGIC);
    out.put_u32(kind);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out
}

impl Client {
    pub(crate) fn connect(path: &Path, wish: Wish) -> io::Result<Self> {
        Self::over(UnixStream::connect(path)?, wish)
    }

    /// Over a stream of any kind.
    pub(crate) fn over(mut socket: UnixStream, wish: Wish) -> io::Result<Self> {
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut handshake = Handshake::new(wish);
        let mut buf = [0; 4096];
        loop {
            let len = read_some(&mut socket, &mut buf)?;
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let progress =
                handshake.receive(&buf[..len]).map_err(|error: HandshakeError| io::Error::other(error))?;
            socket.write_all(&handshake.take_output())?;
            if let Progress::Ready(connected) = progress {
                let replies = Replies::new(connected.replies, connected.contexts.clone());
                return Ok(Self {
                    socket,
                    connected: *connected,
                    replies,
                    input: handshake.into_rest(),
                    next_cookie: 1 << 40,
                    partial: HashMap::new(),
                });
            }
        }
    }

    /// A header with a number of its own, announced.
    pub(crate) fn header(
        &mut self,
        kind: CommandKind,
        flags: CommandFlags,
        offset: u64,
        len: u64,
    ) -> RequestHeader {
        self.next_cookie += 1;
        let is_long_write = kind == CommandKind::Write && self.style().is_extended();
        let flags = flags.with_if(is_long_write, CommandFlags::PAYLOAD_LEN);
        let header = RequestHeader { flags, kind, cookie: Cookie(self.next_cookie), offset, len };
        self.announce(header);
        header
    }

    /// Awaits the reply to a header that somebody else made.
    pub(crate) fn announce(&mut self, header: RequestHeader) {
        self.replies.expect(&header).expect("numbers are not reused");
        self.await_reply(header);
    }

    pub(crate) const fn style(&self) -> ReplyStyle {
        self.connected.replies
    }

    /// The header as this connection has it on the wire.
    pub(crate) fn encode(&self, header: &RequestHeader) -> RequestBytes {
        header.encode(self.style())
    }

    fn await_reply(&mut self, header: RequestHeader) {
        let RequestHeader { kind, len, .. } = header;
        let reply = Reply {
            header,
            result: Ok(()),
            data: vec![0; if kind == CommandKind::Read { len.min(64 << 20) as usize } else { 0 }],
            holes: 0,
            chunks: 0,
            status: HashMap::new(),
            failure: None,
        };
        self.partial.insert(header.cookie, reply);
    }

    /// Asks for these contexts of a range, and waits.
    pub(crate) fn filtered_status(&mut self, offset: u64, filter: &ContextFilter) -> Reply {
        let payload = filter.encode();
        self.next_cookie += 1;
        let header = RequestHeader {
            flags: CommandFlags::PAYLOAD_LEN,
            kind: CommandKind::BlockStatus,
            cookie: Cookie(self.next_cookie),
            offset,
            len: payload.len() as u64,
        };
        self.replies.expect_filtered(&header, filter).expect("numbers are not reused");
        self.await_reply(header);
        let message = [&self.encode(&header)[..], &payload].concat();
        self.socket.write_all(&message).expect("the server reads");
        self.receive().expect("the server answers")
    }

    pub(crate) fn send(
        &mut self,
        kind: CommandKind,
        flags: CommandFlags,
        offset: u64,
        len: u64,
        payload: &[u8],
    ) -> Cookie {
        let header = self.header(kind, flags, offset, len);
        let mut message = self.encode(&header).to_vec();
        message.extend_from_slice(payload);
        self.socket.write_all(&message).expect("the server reads");
        header.cookie
    }

    /// The next reply to arrive whole.
    pub(crate) fn receive(&mut self) -> io::Result<Reply> {
        let mut buf = vec![0; 1 << 20];
        loop {
            while let Some(event) = self.replies.next(&mut self.input).map_err(io::Error::other)? {
                if let Some(reply) = self.take(event) {
                    return Ok(reply);
                }
            }
            let len = read_some(&mut self.socket, &mut buf)?;
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.input.extend_from_slice(&buf[..len]);
        }
    }

    fn take(&mut self, event: Event) -> Option<Reply> {
        match event {
            Event::Data { cookie, offset, bytes } => {
                let reply = self.partial.get_mut(&cookie)?;
                let start = (offset - reply.header.offset) as usize;
                reply.data[start..start + bytes.len()].copy_from_slice(&bytes);
                reply.chunks += 1;
                None
            }
            Event::Hole { cookie, .. } => {
                let reply = self.partial.get_mut(&cookie)?;
                reply.holes += 1;
                reply.chunks += 1;
                None
            }
            Event::Status { cookie, context, descriptors } => {
                self.partial.get_mut(&cookie)?.status.insert(context, descriptors);
                None
            }
            Event::Failure { cookie, offset, message, .. } => {
                self.partial.get_mut(&cookie)?.failure = Some((offset, message));
                None
            }
            Event::Done { cookie, result } => {
                let mut reply = self.partial.remove(&cookie)?;
                reply.result = result;
                Some(reply)
            }
        }
    }

    /// Sends one request and waits for its reply, with no other in flight.
    pub(crate) fn call(
        &mut self,
        kind: CommandKind,
        flags: CommandFlags,
        offset: u64,
        len: u64,
        payload: &[u8],
    ) -> Reply {
        let cookie = self.send(kind, flags, offset, len, payload);
        let reply = self.receive().expect("the server answers");
        assert_eq!(reply.header.cookie, cookie);
        reply
    }

    pub(crate) fn read(&mut self, offset: u64, len: u64) -> Reply {
        self.call(CommandKind::Read, CommandFlags::NONE, offset, len, &[])
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Reply {
        self.call(CommandKind::Write, CommandFlags::NONE, offset, data.len() as u64, data)
    }

    pub(crate) fn flush(&mut self) -> Reply {
        self.call(CommandKind::Flush, CommandFlags::NONE, 0, 0, &[])
    }

    /// The descriptors of one context.
    pub(crate) fn status(
        &mut self,
        context: &MetaContext,
        flags: CommandFlags,
        offset: u64,
        len: u64,
    ) -> Vec<Descriptor> {
        let id = self.connected.contexts.iter().find(|selected| selected.context == *context);
        let id = id.expect("the context was selected").id;
        let mut reply = self.call(CommandKind::BlockStatus, flags, offset, len, &[]);
        assert_eq!(reply.result, Ok(()));
        reply.status.remove(&id).expect("every context is told of")
    }

    /// Says goodbye and waits for the server to close.
    pub(crate) fn disconnect(mut self) {
        let header = RequestHeader {
            flags: CommandFlags::NONE,
            kind: CommandKind::Disconnect,
            cookie: Cookie(0),
            offset: 0,
            len: 0,
        };
        self.socket.write_all(&header.encode(self.style())).expect("the server reads");
        self.assert_closed();
    }

    /// Whatever else comes, the server closes the connection.
    pub(crate) fn assert_closed(&mut self) {
        assert_closed(&mut self.socket);
    }
}

/// Whatever else comes, the server closes the connection.
pub(crate) fn assert_closed(socket: &mut UnixStream) {
    let mut rest = Vec::new();
    match socket.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
    }
}
