//! A server's bytes to a client in transmission.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | how the rest is torn |
//! | 1 | bit 0: structured replies; bits 1, 2: how many contexts; bit 3: extended headers; bits 4 to 6: one less than the requests in flight; bit 7: a BLOCK_STATUS is about the first context alone |
//! | 2.. | each request: kind (1), flags (1), offset (8), length (4, with extended headers 8); its number is its place |
//! | then | what the server sends |

use std::collections::BTreeMap;

use bytes::BytesMut;
use proto::client::{Event, Replies, ReplyError};
use proto::wire::{
    CommandFlags, CommandKind, ContextFilter, ContextId, Cookie, Errno, MAX_PAYLOAD_BYTES,
    MAX_STATUS_DESCRIPTORS, ReplyStyle, RequestHeader, SelectedContext,
};

use super::exports;
use crate::input::{Input, pieces};
use crate::memory::bounded;

/// A chunk's header, an error and its message.
const MAX_SMALL_CHUNK_BYTES: usize = 32 + 8 + 6 + 4096;

/// What the client asked before the server sends anything.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) style: ReplyStyle,
    pub(super) contexts: Vec<SelectedContext>,
    pub(super) requests: Vec<RequestHeader>,
    /// Whether each BLOCK_STATUS is about the first context alone.
    pub(super) filtered: bool,
}

impl Asked {
    fn take(input: &mut Input<'_>) -> Self {
        let choice = input.u8();
        let style = exports::style(choice);
        let count = usize::from(choice >> 1 & 3);
        let contexts = (1..).zip(exports::contexts().into_iter().take(count));
        let contexts = contexts.map(|(id, context)| SelectedContext { id: ContextId(id), context }).collect();
        let request = |number: u8, input: &mut Input<'_>| RequestHeader {
            kind: CommandKind::from_number(u16::from(input.u8())),
            flags: CommandFlags::from_bits(u16::from(input.u8())),
            cookie: Cookie(u64::from(number)),
            offset: input.u64(),
            len: if style.is_extended() { input.u64() } else { u64::from(input.u32()) },
        };
        let requests = (0..=choice >> 4 & 7).map(|number| request(number, input)).collect();
        Self { style, contexts, requests, filtered: choice & 0x80 != 0 }
    }

    /// The contexts that a BLOCK_STATUS is about.
    fn contexts(&self) -> Vec<ContextId> {
        let count = if self.filtered { 1 } else { self.contexts.len() };
        self.contexts.iter().take(count).map(|selected| selected.id).collect()
    }

    /// The input of the target in which this was asked and `bytes` came back.
    pub(super) fn input(&self, pattern: u8, bytes: &[u8]) -> Vec<u8> {
        let mut input = vec![pattern];
        let requests = u8::try_from(self.requests.len() - 1).expect("at most eight");
        let contexts = u8::try_from(self.contexts.len()).expect("at most three");
        let style = match self.style {
            ReplyStyle::Simple => 0,
            ReplyStyle::Structured => 1,
            ReplyStyle::Extended => 8,
        };
        input.push(u8::from(self.filtered) << 7 | requests << 4 | contexts << 1 | style);
        for request in &self.requests {
            input.extend([request.kind.number() as u8, request.flags.bits() as u8]);
            input.extend(request.offset.to_be_bytes());
            let len = request.len.to_be_bytes();
            input.extend(if self.style.is_extended() { &len[..] } else { &len[4..] });
        }
        input.extend_from_slice(bytes);
        input
    }
}

type Told = (Vec<Event>, Result<(), ReplyError>, Vec<u8>);

fn listen<'a>(asked: &Asked, pieces: impl Iterator<Item = &'a [u8]>) -> Told {
    let mut replies = Replies::new(asked.style, asked.contexts.clone());
    for request in &asked.requests {
        if asked.filtered && request.kind == CommandKind::BlockStatus {
            let filter = ContextFilter { len: request.len, contexts: asked.contexts() };
            replies.expect_filtered(request, &filter).expect("each has a number of its own");
        } else {
            replies.expect(request).expect("each has a number of its own");
        }
    }
    let mut input = BytesMut::new();
    let mut events = Vec::new();
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match replies.next(&mut input) {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(error) => return (events, Err(error), Vec::new()),
            }
        }
    }
    let done = events.iter().filter(|event| matches!(event, Event::Done { .. })).count();
    assert_eq!(replies.in_flight() + done, asked.requests.len(), "a request is done once");
    (events, Ok(()), input.to_vec())
}

/// What one request was told: the ends of its pieces by their starts, and the contexts.
#[derive(Default)]
struct Heard {
    pieces: BTreeMap<u64, u64>,
    contexts: Vec<ContextId>,
    failure: Option<Errno>,
    done: bool,
}

impl Heard {
    fn piece(&mut self, request: &RequestHeader, offset: u64, len: u64) {
        assert_eq!(request.kind, CommandKind::Read);
        let end = offset.checked_add(len).expect("within the request");
        assert!(offset >= request.offset && end - request.offset <= request.len && len > 0);
        let before = self.pieces.range(..end).next_back();
        assert!(before.is_none_or(|(_, before)| *before <= offset), "the same bytes were told twice");
        self.pieces.insert(offset, end);
    }

    fn is_whole(&self, request: &RequestHeader) -> bool {
        self.pieces.iter().map(|(start, end)| end - start).sum::<u64>() == request.len
    }
}

fn check_events(asked: &Asked, events: &[Event]) {
    let mut heard: Vec<Heard> = asked.requests.iter().map(|_| Heard::default()).collect();
    for event in events {
        let (Event::Data { cookie, .. }
        | Event::Hole { cookie, .. }
        | Event::Status { cookie, .. }
        | Event::Failure { cookie, .. }
        | Event::Done { cookie, .. }) = event;
        let number = usize::try_from(cookie.0).expect("one that was asked");
        let (heard, request) = (&mut heard[number], &asked.requests[number]);
        assert!(!heard.done, "something was told after the end");
        match event {
            Event::Data { offset, bytes, .. } => heard.piece(request, *offset, bytes.len() as u64),
            Event::Hole { offset, len, .. } => heard.piece(request, *offset, *len),
            Event::Status { context, descriptors, .. } => {
                assert!(request.kind == CommandKind::BlockStatus && asked.style.has_chunks());
                assert!(asked.contexts().contains(context), "nobody asked for this context");
                assert!(!heard.contexts.contains(context), "a context was told twice");
                heard.contexts.push(*context);
                assert!((1..=MAX_STATUS_DESCRIPTORS).contains(&descriptors.len()));
                assert!(descriptors.iter().all(|descriptor| descriptor.len > 0));
                let all_but_last = &descriptors[..descriptors.len() - 1];
                let before_last: u64 = all_but_last.iter().map(|descriptor| descriptor.len).sum();
                assert!(before_last < request.len, "an extent begins beyond the request");
                let last = descriptors[descriptors.len() - 1].len;
                assert!(request.offset.checked_add(before_last + last).is_some(), "the extents wrap");
            }
            Event::Failure { errno, offset, message, .. } => {
                assert!(asked.style.has_chunks() && message.len() <= 3 * 4096);
                let within = |at: u64| at >= request.offset && at - request.offset < request.len;
                assert!(offset.is_none_or(within), "an error elsewhere");
                heard.failure.get_or_insert(*errno);
            }
            Event::Done { result, .. } => {
                heard.done = true;
                let complete = match request.kind {
                    CommandKind::Read => heard.is_whole(request),
                    CommandKind::BlockStatus if asked.style.has_chunks() => {
                        heard.contexts.len() == asked.contexts().len()
                    }
                    _ => true,
                };
                assert!(complete || result.is_err(), "half of a reply was taken for whole");
                assert!(heard.failure.is_none_or(|errno| *result == Err(errno)), "a failure was forgotten");
            }
        }
    }
}

/// A client in transmission, given a server's bytes: how they are torn does not matter; it believes only what
/// answers a request of its own, within its range, each byte once; success means that all of it was told; no more is
/// kept waiting than the largest reply to what is in flight.
pub fn client_replies(data: &[u8]) {
    let mut input = Input::new(data);
    let pattern = input.u8();
    let asked = Asked::take(&mut input);
    let bytes = input.rest();
    let told = bounded(bytes.len(), 32, 64 << 10, || listen(&asked, std::iter::once(bytes)));
    assert!(listen(&asked, pieces(bytes, pattern)) == told, "it matters how the bytes were torn");
    let (events, end, rest) = told;
    check_events(&asked, &events);
    if end.is_ok() {
        let status = asked.requests.iter().any(|request| request.kind == CommandKind::BlockStatus);
        let longest =
            asked.requests.iter().map(|request| request.len.min(u64::from(MAX_PAYLOAD_BYTES))).max();
        let most = MAX_SMALL_CHUNK_BYTES + longest.unwrap_or(0) as usize;
        assert!(status || rest.len() < most, "{} bytes are kept waiting", rest.len());
    }
}
