//! Replies in transmission: each is checked against the request that it answers before anything of it is believed.

use std::collections::{HashMap, VecDeque};

use bytes::{Buf, Bytes, BytesMut};

use super::ReplyError;
use super::coverage::Coverage;
use crate::wire::{
    ChunkKind, CommandKind, ContextFilter, ContextId, Cookie, Descriptor, EXTENDED_REPLY_BYTES,
    EXTENDED_REPLY_MAGIC, Errno, MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES, MAX_STATUS_DESCRIPTORS, Malformed,
    Reader, ReplyFlags, ReplyStyle, RequestHeader, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_BYTES, STRUCTURED_REPLY_MAGIC, SelectedContext,
};

/// What a server told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes of a READ.
    Data {
        /// Of which request.
        cookie: Cookie,
        /// Their place in the export.
        offset: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// Zeroes of a READ.
    Hole {
        /// Of which request.
        cookie: Cookie,
        /// Their place in the export.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Extents of a BLOCK_STATUS.
    Status {
        /// Of which request.
        cookie: Cookie,
        /// In which context.
        context: ContextId,
        /// In order, from the request's offset, without gaps. Each begins within the request; the last may reach beyond it.
        descriptors: Vec<Descriptor>,
    },
    /// The server says why the request fails, or where. What follows in [`Event::Done`] is the first of these.
    Failure {
        /// Of which request.
        cookie: Cookie,
        /// What kind of failure it is.
        errno: Errno,
        /// At which byte of the export, which lies within the request; `None` where that was not told.
        offset: Option<u64>,
        /// The server's words, of at most 4096 bytes before what was no text in them was replaced; often none.
        message: String,
    },
    /// The request is over; its number is free again.
    Done {
        /// Which.
        cookie: Cookie,
        /// Whether it was done.
        result: Result<(), Errno>,
    },
}

#[derive(Debug)]
struct Pending {
    request: RequestHeader,
    covered: Coverage,
    /// The contexts of a BLOCK_STATUS that is not about all.
    filter: Option<Vec<ContextId>>,
    contexts_told: Vec<ContextId>,
    error: Option<Errno>,
}

/// The requests in flight, and what is still to come for them.
#[derive(Debug)]
pub struct Replies {
    style: ReplyStyle,
    contexts: Vec<SelectedContext>,
    pending: HashMap<Cookie, Pending>,
    ready: VecDeque<Event>,
}

impl Replies {
    /// Nothing in flight, on a connection with replies of `style` and these contexts.
    #[must_use]
    pub fn new(style: ReplyStyle, contexts: Vec<SelectedContext>) -> Self {
        Self { style, contexts, pending: HashMap::new(), ready: VecDeque::new() }
    }

    /// How many requests are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Announces a request that is being sent.
    ///
    /// # Errors
    /// Where a request in flight has its number.
    pub fn expect(&mut self, request: &RequestHeader) -> Result<(), ReplyError> {
        self.announce(*request, None)
    }

    /// Announces a BLOCK_STATUS that is being sent with this filter as its payload.
    ///
    /// # Errors
    /// Where a request in flight has its number.
    pub fn expect_filtered(
        &mut self,
        request: &RequestHeader,
        filter: &ContextFilter,
    ) -> Result<(), ReplyError> {
        self.announce(RequestHeader { len: filter.len, ..*request }, Some(filter.contexts.clone()))
    }

    fn announce(&mut self, request: RequestHeader, filter: Option<Vec<ContextId>>) -> Result<(), ReplyError> {
        let cookie = request.cookie;
        if self.pending.contains_key(&cookie) {
            return Err(ReplyError::DuplicateCookie(cookie));
        }
        let pending =
            Pending { request, covered: Coverage::default(), filter, contexts_told: Vec::new(), error: None };
        self.pending.insert(cookie, pending);
        Ok(())
    }

    /// The next thing that the server told, taken from the front of `input`; `None` where more bytes are needed.
    ///
    /// # Errors
    /// Where the server sent what no server may; the connection is then of no use.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Event>, ReplyError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let Ok(magic) = Reader::new(input).u32() else { return Ok(None) };
            let taken = match (magic, self.style) {
                (SIMPLE_REPLY_MAGIC, ReplyStyle::Simple | ReplyStyle::Structured) => {
                    self.take_simple(input)?
                }
                (STRUCTURED_REPLY_MAGIC, ReplyStyle::Structured)
                | (EXTENDED_REPLY_MAGIC, ReplyStyle::Extended) => self.take_chunk(input)?,
                _ => return Err(ReplyError::BadMagic),
            };
            if !taken {
                return Ok(None);
            }
        }
    }

    fn take_simple(&mut self, input: &mut BytesMut) -> Result<bool, ReplyError> {
        let mut reader = Reader::new(input);
        let (Ok(_), Ok(error), Ok(cookie)) = (reader.u32(), reader.u32(), reader.u64()) else {
            return Ok(false);
        };
        let cookie = Cookie(cookie);
        let pending = self.pending.get(&cookie).ok_or(ReplyError::Unsolicited(cookie))?;
        let request = pending.request;
        let is_read = request.kind == CommandKind::Read;
        // What begins in chunks ends with one: the failure that one told of would be forgotten.
        let needs_chunks = is_read || request.kind == CommandKind::BlockStatus || pending.error.is_some();
        if self.style == ReplyStyle::Structured && needs_chunks {
            return Err(ReplyError::WrongKind(cookie));
        }
        let payload = if is_read && error == 0 { request.len } else { 0 };
        // As for chunks: of a READ that wraps only its failure is believed.
        request.offset.checked_add(payload).ok_or(ReplyError::WrongRange(cookie))?;
        if ((input.len() - SIMPLE_REPLY_BYTES) as u64) < payload {
            return Ok(false);
        }
        input.advance(SIMPLE_REPLY_BYTES);
        if payload > 0 {
            let bytes = input.split_to(payload as usize).freeze();
            self.ready.push_back(Event::Data { cookie, offset: request.offset, bytes });
        }
        self.pending.remove(&cookie);
        let result = if error == 0 { Ok(()) } else { Err(Errno::from_code(error)) };
        self.ready.push_back(Event::Done { cookie, result });
        Ok(true)
    }

    fn take_chunk(&mut self, input: &mut BytesMut) -> Result<bool, ReplyError> {
        let Ok(ChunkHeader { kind, last, cookie, offset, len }) = ChunkHeader::read(input, self.style) else {
            return Ok(false);
        };
        let pending = self.pending.get_mut(&cookie).ok_or(ReplyError::Unsolicited(cookie))?;
        if offset.is_some_and(|offset| offset != pending.request.offset) {
            return Err(ReplyError::WrongOffset(cookie));
        }
        if len > chunk_limit(kind, &pending.request) {
            return Err(ReplyError::WrongLength(cookie));
        }
        let extended = self.style.is_extended();
        let header_len = if extended { EXTENDED_REPLY_BYTES } else { STRUCTURED_REPLY_BYTES };
        let len = usize::try_from(len).map_err(|_| ReplyError::WrongLength(cookie))?;
        if input.len() < header_len + len {
            return Ok(false);
        }
        input.advance(header_len);
        let payload = input.split_to(len).freeze();
        if let Some(event) = pending.take(kind, payload, last, self.style, &self.contexts)? {
            self.ready.push_back(event);
        }
        if last && let Some(pending) = self.pending.remove(&cookie) {
            let result = pending.finish(&self.contexts)?;
            self.ready.push_back(Event::Done { cookie, result });
        }
        Ok(true)
    }
}

struct ChunkHeader {
    kind: ChunkKind,
    last: bool,
    cookie: Cookie,
    /// The request's, which an extended header repeats.
    offset: Option<u64>,
    len: u64,
}

impl ChunkHeader {
    fn read(input: &[u8], style: ReplyStyle) -> Result<Self, Malformed> {
        let extended = style.is_extended();
        let mut reader = Reader::new(input);
        reader.u32()?;
        let flags = ReplyFlags::from_bits(reader.u16()?);
        Ok(Self {
            last: flags.contains(ReplyFlags::DONE),
            kind: ChunkKind::from_number(reader.u16()?),
            cookie: Cookie(reader.u64()?),
            offset: if extended { Some(reader.u64()?) } else { None },
            len: if extended { reader.u64()? } else { u64::from(reader.u32()?) },
        })
    }
}

/// The longest chunk of this kind that this request can have: what bounds the input that a caller keeps.
fn chunk_limit(kind: ChunkKind, request: &RequestHeader) -> u64 {
    match kind {
        ChunkKind::None => 0,
        ChunkKind::OffsetData => 8 + request.len.min(u64::from(MAX_PAYLOAD_BYTES)),
        ChunkKind::OffsetHole => 12,
        ChunkKind::BlockStatus => 4 + (MAX_STATUS_DESCRIPTORS * Descriptor::BYTES) as u64,
        ChunkKind::BlockStatusExt => 8 + (MAX_STATUS_DESCRIPTORS * Descriptor::EXTENDED_BYTES) as u64,
        // An error and its message.
        _ => (8 + 6 + MAX_MESSAGE_BYTES) as u64,
    }
}

impl Pending {
    fn take(
        &mut self,
        kind: ChunkKind,
        payload: Bytes,
        last: bool,
        style: ReplyStyle,
        contexts: &[SelectedContext],
    ) -> Result<Option<Event>, ReplyError> {
        let cookie = self.request.cookie;
        let wrong_length = |_| ReplyError::WrongLength(cookie);
        let is_read = self.request.kind == CommandKind::Read;
        let mut reader = Reader::new(&payload);
        match kind {
            ChunkKind::None if last => Ok(None),
            ChunkKind::OffsetData if is_read => {
                let offset = reader.u64().map_err(wrong_length)?;
                self.cover(offset, reader.remaining() as u64)?;
                Ok(Some(Event::Data { cookie, offset, bytes: payload.slice(8..) }))
            }
            ChunkKind::OffsetHole if is_read => {
                let offset = reader.u64().map_err(wrong_length)?;
                let len = u64::from(reader.u32().map_err(wrong_length)?);
                reader.finish().map_err(wrong_length)?;
                self.cover(offset, len)?;
                Ok(Some(Event::Hole { cookie, offset, len }))
            }
            ChunkKind::BlockStatus | ChunkKind::BlockStatusExt => {
                let extended = kind == ChunkKind::BlockStatusExt;
                if self.request.kind != CommandKind::BlockStatus || extended != style.is_extended() {
                    return Err(ReplyError::WrongKind(cookie));
                }
                self.take_status(&mut reader, extended, contexts).map(Some)
            }
            kind if kind.is_error() => self.take_error(kind, &mut reader).map(Some).map_err(wrong_length),
            _ => Err(ReplyError::WrongKind(cookie)),
        }
    }

    fn take_error(&mut self, kind: ChunkKind, reader: &mut Reader<'_>) -> Result<Event, Malformed> {
        let RequestHeader { cookie, offset: start, len, .. } = self.request;
        // An error of 0 would be a contradiction: it is an error all the same.
        let errno = Errno::from_code(reader.u32()?);
        let message_len = usize::from(reader.u16()?);
        let message = String::from_utf8_lossy(reader.bytes(message_len)?).into_owned();
        let told = if kind == ChunkKind::ErrorOffset { Some(reader.u64()?) } else { None };
        if matches!(kind, ChunkKind::Error | ChunkKind::ErrorOffset) {
            reader.clone().finish()?;
        }
        let offset = told.filter(|at| at.checked_sub(start).is_some_and(|after| after < len));
        self.error.get_or_insert(errno);
        Ok(Event::Failure { cookie, errno, offset, message })
    }

    fn cover(&mut self, offset: u64, len: u64) -> Result<(), ReplyError> {
        let wrong = ReplyError::WrongRange(self.request.cookie);
        let start = offset.checked_sub(self.request.offset).ok_or(wrong)?;
        // A request that wraps is its client's mistake; bytes that do are not believed all the same.
        offset.checked_add(len).ok_or(wrong)?;
        let end = start.checked_add(len).filter(|end| *end <= self.request.len).ok_or(wrong)?;
        if len == 0 || !self.covered.add(start, end) { Err(wrong) } else { Ok(()) }
    }

    fn take_status(
        &mut self,
        reader: &mut Reader<'_>,
        extended: bool,
        contexts: &[SelectedContext],
    ) -> Result<Event, ReplyError> {
        let cookie = self.request.cookie;
        let wrong_length = |_| ReplyError::WrongLength(cookie);
        let context = ContextId(reader.u32().map_err(wrong_length)?);
        let asked = match &self.filter {
            Some(filter) => filter.contains(&context),
            None => contexts.iter().any(|selected| selected.id == context),
        };
        if !asked || self.contexts_told.contains(&context) {
            return Err(ReplyError::WrongKind(cookie));
        }
        self.contexts_told.push(context);
        let each = if extended { Descriptor::EXTENDED_BYTES } else { Descriptor::BYTES };
        let count = if extended { Some(reader.u32().map_err(wrong_length)?) } else { None };
        if count.is_some_and(|count| count as usize != reader.remaining() / each) {
            return Err(ReplyError::WrongLength(cookie));
        }
        let mut descriptors = Vec::with_capacity(reader.remaining() / each);
        let mut told: u64 = 0;
        // Extents that wrap are of no disk; whoever adds them up need not look.
        let most = u64::MAX - self.request.offset;
        while reader.remaining() > 0 {
            let mut number =
                || if extended { reader.u64() } else { reader.u32().map(u64::from) }.map_err(wrong_length);
            let (len, flags) = (number()?, number()?);
            // The last extent may reach beyond the request; none may begin there.
            if len == 0 || told >= self.request.len || len > most - told {
                return Err(ReplyError::WrongRange(cookie));
            }
            told += len;
            descriptors.push(Descriptor { len, flags });
        }
        if descriptors.is_empty() {
            return Err(ReplyError::WrongLength(cookie));
        }
        Ok(Event::Status { cookie, context, descriptors })
    }

    fn finish(&self, contexts: &[SelectedContext]) -> Result<Result<(), Errno>, ReplyError> {
        if let Some(errno) = self.error {
            return Ok(Err(errno));
        }
        let whole = match self.request.kind {
            CommandKind::Read => self.covered.is_whole(self.request.len),
            CommandKind::BlockStatus => {
                self.contexts_told.len() == self.filter.as_ref().map_or(contexts.len(), Vec::len)
            }
            _ => true,
        };
        if whole { Ok(Ok(())) } else { Err(ReplyError::Incomplete(self.request.cookie)) }
    }
}
