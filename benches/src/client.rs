//! An NBD client with one request in flight, as a booting guest mostly has: `proto`'s client half on a plain socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use bytes::BytesMut;
use proto::client::{Event, Goal, Handshake, Progress, Replies, Wish};
use proto::wire::{CommandFlags, CommandKind, Cookie, ReplyStyle, RequestHeader};

/// The kind of replies that most guests' clients have today.
const STYLE: ReplyStyle = ReplyStyle::Structured;
const RECEIVE_BYTES: usize = 256 << 10;

/// A connection in transmission.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    style: ReplyStyle,
    replies: Replies,
    input: BytesMut,
    received: Vec<u8>,
    size: u64,
    last_cookie: u64,
}

impl Client {
    /// Connects to the server at `socket` and goes to its export of that name.
    pub(crate) fn connect(socket: &Path, export: &str) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        let wish = Wish { goal: Goal::Go(export.to_owned()), replies: STYLE, contexts: Vec::new() };
        let mut handshake = Handshake::new(wish);
        let mut received = vec![0; RECEIVE_BYTES];
        let connected = loop {
            let count = (&stream).read(&mut received)?;
            ensure!(count > 0, "the server hung up during the handshake");
            let progress = handshake.receive(&received[..count])?;
            (&stream).write_all(&handshake.take_output())?;
            match progress {
                Progress::Waiting => {}
                Progress::Ready(connected) => break connected,
                Progress::StartTls | Progress::Told(_) | Progress::Listed(_) => {
                    bail!("the server answered what was not asked");
                }
            }
        };
        Ok(Self {
            stream,
            style: connected.replies,
            replies: Replies::new(connected.replies, connected.contexts),
            input: handshake.into_rest(),
            received,
            size: connected.info.size,
            last_cookie: 0,
        })
    }

    /// The export's size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `out` from `offset`.
    pub(crate) fn read(&mut self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.request(CommandKind::Read, offset, out.len() as u64, &[], |at, piece| match piece {
            Piece::Bytes(bytes) => out[at..at + bytes.len()].copy_from_slice(bytes),
            Piece::Zeroes(len) => out[at..at + len].fill(0),
        })
    }

    /// Writes `data` at `offset`.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.request(CommandKind::Write, offset, data.len() as u64, data, |_, _| {})
    }

    /// Has everything acknowledged put on stable storage.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.request(CommandKind::Flush, 0, 0, &[], |_, _| {})
    }

    fn request(
        &mut self,
        kind: CommandKind,
        offset: u64,
        len: u64,
        payload: &[u8],
        mut take: impl FnMut(usize, Piece<'_>),
    ) -> Result<()> {
        self.last_cookie += 1;
        let header =
            RequestHeader { flags: CommandFlags::NONE, kind, cookie: Cookie(self.last_cookie), offset, len };
        self.replies.expect(&header)?;
        if payload.is_empty() {
            self.stream.write_all(&header.encode(self.style))?;
        } else {
            let mut message = Vec::with_capacity(RequestHeader::EXTENDED_BYTES + payload.len());
            message.extend_from_slice(&header.encode(self.style));
            message.extend_from_slice(payload);
            self.stream.write_all(&message)?;
        }
        loop {
            while let Some(event) = self.replies.next(&mut self.input)? {
                match event {
                    Event::Data { offset: at, bytes, .. } => {
                        take(usize::try_from(at - offset)?, Piece::Bytes(&bytes));
                    }
                    Event::Hole { offset: at, len, .. } => {
                        take(usize::try_from(at - offset)?, Piece::Zeroes(len as usize));
                    }
                    Event::Status { .. } | Event::Failure { .. } => {}
                    Event::Done { result, .. } => {
                        return result.map_err(|errno| {
                            anyhow::anyhow!("{kind:?} of {len} bytes at {offset} failed: {errno:?}")
                        });
                    }
                }
            }
            let count = self.stream.read(&mut self.received)?;
            ensure!(count > 0, "the server hung up");
            self.input.extend_from_slice(&self.received[..count]);
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let header = RequestHeader {
            flags: CommandFlags::NONE,
            kind: CommandKind::Disconnect,
            cookie: Cookie(u64::MAX),
            offset: 0,
            len: 0,
        };
        // A server that is gone already needs no goodbye.
        let _ = self.stream.write_all(&header.encode(self.style));
    }
}

enum Piece<'a> {
    Bytes(&'a [u8]),
    Zeroes(usize),
}
