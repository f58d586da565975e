//! Replies in transmission: each is checked against the request that it answers before anything of it is believed.

use std::collections::{HashMap, VecDeque};

use bytes::{Buf, Bytes, BytesMut};

use super::ReplyError;
use super::coverage::Coverage;
use crate::wire::{
    ChunkKind, CommandKind, ContextId, Cookie, Descriptor, Errno, MAX_PAYLOAD_BYTES, MAX_STATUS_DESCRIPTORS,
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
        len: u32,
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
        let cookie = request.cookie;
        if self.pending.contains_key(&cookie) {
            return Err(ReplyError::DuplicateCookie(cookie));
        }
        let pending = Pending {
            request: *request,
            covered: Coverage::default(),
            contexts_told: Vec::new(),
            error: None,
        };
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
                (SIMPLE_REPLY_MAGIC, _) => self.take_simple(input)?,
                (STRUCTURED_REPLY_MAGIC, ReplyStyle::Structured) => self.take_chunk(input)?,
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
        if self.style == ReplyStyle::Structured && (is_read || request.kind == CommandKind::BlockStatus) {
            return Err(ReplyError::WrongKind(cookie));
        }
        let payload = if is_read && error == 0 { request.len as usize } else { 0 };
        if input.len() < SIMPLE_REPLY_BYTES + payload {
            return Ok(false);
        }
        input.advance(SIMPLE_REPLY_BYTES);
        if payload > 0 {
            let bytes = input.split_to(payload).freeze();
            self.ready.push_back(Event::Data { cookie, offset: request.offset, bytes });
        }
        self.pending.remove(&cookie);
        let result = if error == 0 { Ok(()) } else { Err(Errno::from_code(error)) };
        self.ready.push_back(Event::Done { cookie, result });
        Ok(true)
    }

    fn take_chunk(&mut self, input: &mut BytesMut) -> Result<bool, ReplyError> {
        let mut reader = Reader::new(input);
        let (Ok(_), Ok(flags), Ok(kind), Ok(cookie), Ok(len)) =
            (reader.u32(), reader.u16(), reader.u16(), reader.u64(), reader.u32())
        else {
            return Ok(false);
        };
        let (kind, cookie) = (ChunkKind::from_number(kind), Cookie(cookie));
        let last = ReplyFlags::from_bits(flags).contains(ReplyFlags::DONE);
        let pending = self.pending.get_mut(&cookie).ok_or(ReplyError::Unsolicited(cookie))?;
        if len > chunk_limit(kind, &pending.request) {
            return Err(ReplyError::WrongLength(cookie));
        }
        let len = len as usize;
        if input.len() < STRUCTURED_REPLY_BYTES + len {
            return Ok(false);
        }
        input.advance(STRUCTURED_REPLY_BYTES);
        let payload = input.split_to(len).freeze();
        if let Some(event) = pending.take(kind, payload, last, &self.contexts)? {
            self.ready.push_back(event);
        }
        if last && let Some(pending) = self.pending.remove(&cookie) {
            let result = pending.finish(&self.contexts)?;
            self.ready.push_back(Event::Done { cookie, result });
        }
        Ok(true)
    }
}

/// The longest chunk of this kind that this request can have: what bounds the input that a caller keeps.
fn chunk_limit(kind: ChunkKind, request: &RequestHeader) -> u32 {
    match kind {
        ChunkKind::None => 0,
        ChunkKind::OffsetData => 8 + request.len.min(MAX_PAYLOAD_BYTES),
        ChunkKind::OffsetHole => 12,
        ChunkKind::BlockStatus => {
            4 + u32::try_from(MAX_STATUS_DESCRIPTORS * Descriptor::BYTES).expect("a constant of 8 MiB")
        }
        // An error and its message.
        _ => 8 + 6 + 4096,
    }
}

impl Pending {
    fn take(
        &mut self,
        kind: ChunkKind,
        payload: Bytes,
        last: bool,
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
                let len = u32::try_from(reader.remaining()).map_err(|_| ReplyError::WrongLength(cookie))?;
                self.cover(offset, len)?;
                Ok(Some(Event::Data { cookie, offset, bytes: payload.slice(8..) }))
            }
            ChunkKind::OffsetHole if is_read => {
                let offset = reader.u64().map_err(wrong_length)?;
                let len = reader.u32().map_err(wrong_length)?;
                reader.finish().map_err(wrong_length)?;
                self.cover(offset, len)?;
                Ok(Some(Event::Hole { cookie, offset, len }))
            }
            ChunkKind::BlockStatus if self.request.kind == CommandKind::BlockStatus => {
                self.take_status(&mut reader, contexts).map(Some)
            }
            kind if kind.is_error() => {
                let code = reader.u32().map_err(wrong_length)?;
                let message = usize::from(reader.u16().map_err(wrong_length)?);
                reader.bytes(message).map_err(wrong_length)?;
                if kind == ChunkKind::ErrorOffset {
                    reader.u64().map_err(wrong_length)?;
                }
                if matches!(kind, ChunkKind::Error | ChunkKind::ErrorOffset) {
                    reader.finish().map_err(wrong_length)?;
                }
                // An error of 0 would be a contradiction: it is an error all the same.
                self.error.get_or_insert(Errno::from_code(code));
                Ok(None)
            }
            _ => Err(ReplyError::WrongKind(cookie)),
        }
    }

    fn cover(&mut self, offset: u64, len: u32) -> Result<(), ReplyError> {
        let wrong = ReplyError::WrongRange(self.request.cookie);
        let start = offset.checked_sub(self.request.offset).ok_or(wrong)?;
        let start = u32::try_from(start).map_err(|_| wrong)?;
        let end = start.checked_add(len).filter(|end| *end <= self.request.len).ok_or(wrong)?;
        if len == 0 || !self.covered.add(start, end) { Err(wrong) } else { Ok(()) }
    }

    fn take_status(
        &mut self,
        reader: &mut Reader<'_>,
        contexts: &[SelectedContext],
    ) -> Result<Event, ReplyError> {
        let cookie = self.request.cookie;
        let wrong_length = |_| ReplyError::WrongLength(cookie);
        let context = ContextId(reader.u32().map_err(wrong_length)?);
        if !contexts.iter().any(|selected| selected.id == context) || self.contexts_told.contains(&context) {
            return Err(ReplyError::WrongKind(cookie));
        }
        self.contexts_told.push(context);
        let mut descriptors = Vec::with_capacity(reader.remaining() / Descriptor::BYTES);
        let mut told = 0;
        while reader.remaining() > 0 {
            let len = reader.u32().map_err(wrong_length)?;
            let flags = reader.u32().map_err(wrong_length)?;
            // The last extent may reach beyond the request; none may begin there.
            if len == 0 || told >= u64::from(self.request.len) {
                return Err(ReplyError::WrongRange(cookie));
            }
            told += u64::from(len);
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
            CommandKind::BlockStatus => self.contexts_told.len() == contexts.len(),
            _ => true,
        };
        if whole { Ok(Ok(())) } else { Err(ReplyError::Incomplete(self.request.cookie)) }
    }
}
