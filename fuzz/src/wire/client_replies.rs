//! A server's bytes to a client in transmission.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | how the rest is torn |
//! | 1 | bit 0: structured replies; bits 1, 2: how many contexts; bits 4 to 6: one less than the requests in flight |
//! | 2.. | each request: kind (1), flags (1), offset (8), length (4); its number is its place |
//! | then | what the server sends |

use std::collections::BTreeMap;

use bytes::BytesMut;
use proto::client::{Event, Replies, ReplyError};
use proto::wire::{
    CommandFlags, CommandKind, ContextId, Cookie, MAX_PAYLOAD_BYTES, MAX_STATUS_DESCRIPTORS, ReplyStyle,
    RequestHeader, SelectedContext,
};

use super::exports;
use crate::input::{Input, pieces};
use crate::memory::bounded;

/// A chunk's header, an error and its message.
const MAX_SMALL_CHUNK_BYTES: usize = 20 + 8 + 6 + 4096;

/// What the client asked before the server sends anything.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) style: ReplyStyle,
    pub(super) contexts: Vec<SelectedContext>,
    pub(super) requests: Vec<RequestHeader>,
}

impl Asked {
    fn take(input: &mut Input<'_>) -> Self {
        let choice = input.u8();
        let style = if choice & 1 == 0 { ReplyStyle::Simple } else { ReplyStyle::Structured };
        let count = usize::from(choice >> 1 & 3);
        let contexts = (1..).zip(exports::contexts().into_iter().take(count));
        let contexts = contexts.map(|(id, context)| SelectedContext { id: ContextId(id), context }).collect();
        let request = |number: u8, input: &mut Input<'_>| RequestHeader {
            kind: CommandKind::from_number(u16::from(input.u8())),
            flags: CommandFlags::from_bits(u16::from(input.u8())),
            cookie: Cookie(u64::from(number)),
            offset: input.u64(),
            len: input.u32(),
        };
        let requests = (0..=choice >> 4 & 7).map(|number| request(number, input)).collect();
        Self { style, contexts, requests }
    }

    /// The input of the target in which this was asked and `bytes` came back.
    pub(super) fn input(&self, pattern: u8, bytes: &[u8]) -> Vec<u8> {
        let mut input = vec![pattern];
        let requests = u8::try_from(self.requests.len() - 1).expect("at most eight");
        let contexts = u8::try_from(self.contexts.len()).expect("at most three");
        input.push(requests << 4 | contexts << 1 | u8::from(self.style == ReplyStyle::Structured));
        for request in &self.requests {
            input.extend([request.kind.number() as u8, request.flags.bits() as u8]);
            input.extend(request.offset.to_be_bytes());
            input.extend(request.len.to_be_bytes());
        }
        input.extend_from_slice(bytes);
        input
    }
}

type Told = (Vec<Event>, Result<(), ReplyError>, Vec<u8>);

fn listen<'a>(asked: &Asked, pieces: impl Iterator<Item = &'a [u8]>) -> Told {
    let mut replies = Replies::new(asked.style, asked.contexts.clone());
    for request in &asked.requests {
        replies.expect(request).expect("each has a number of its own");
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
    done: bool,
}

impl Heard {
    fn piece(&mut self, request: &RequestHeader, offset: u64, len: u64) {
        assert_eq!(request.kind, CommandKind::Read);
        let end = offset.checked_add(len).expect("within the request");
        assert!(offset >= request.offset && end - request.offset <= u64::from(request.len) && len > 0);
        let before = self.pieces.range(..end).next_back();
        assert!(before.is_none_or(|(_, before)| *before <= offset), "the same bytes were told twice");
        self.pieces.insert(offset, end);
    }

    fn is_whole(&self, request: &RequestHeader) -> bool {
        self.pieces.iter().map(|(start, end)| end - start).sum::<u64>() == u64::from(request.len)
    }
}

fn check_events(asked: &Asked, events: &[Event]) {
    let mut heard: Vec<Heard> = asked.requests.iter().map(|_| Heard::default()).collect();
    for event in events {
        let (Event::Data { cookie, .. }
        | Event::Hole { cookie, .. }
        | Event::Status { cookie, .. }
        | Event::Done { cookie, .. }) = event;
        let number = usize::try_from(cookie.0).expect("one that was asked");
        let (heard, request) = (&mut heard[number], &asked.requests[number]);
        assert!(!heard.done, "something was told after the end");
        match event {
            Event::Data { offset, bytes, .. } => heard.piece(request, *offset, bytes.len() as u64),
            Event::Hole { offset, len, .. } => heard.piece(request, *offset, u64::from(*len)),
            Event::Status { context, descriptors, .. } => {
                assert_eq!((request.kind, asked.style), (CommandKind::BlockStatus, ReplyStyle::Structured));
                assert!(asked.contexts.iter().any(|selected| selected.id == *context));
                assert!(!heard.contexts.contains(context), "a context was told twice");
                heard.contexts.push(*context);
                assert!((1..=MAX_STATUS_DESCRIPTORS).contains(&descriptors.len()));
                assert!(descriptors.iter().all(|descriptor| descriptor.len > 0));
                let all_but_last = &descriptors[..descriptors.len() - 1];
                let before_last: u64 = all_but_last.iter().map(|descriptor| u64::from(descriptor.len)).sum();
                assert!(before_last < u64::from(request.len), "an extent begins beyond the request");
            }
            Event::Done { result, .. } => {
                heard.done = true;
                let complete = match request.kind {
                    CommandKind::Read => heard.is_whole(request),
                    CommandKind::BlockStatus if asked.style == ReplyStyle::Structured => {
                        heard.contexts.len() == asked.contexts.len()
                    }
                    _ => true,
                };
                assert!(complete || result.is_err(), "half of a reply was taken for whole");
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
        let longest = asked.requests.iter().map(|request| request.len.min(MAX_PAYLOAD_BYTES)).max();
        let most = MAX_SMALL_CHUNK_BYTES + longest.unwrap_or(0) as usize;
        assert!(status || rest.len() < most, "{} bytes are kept waiting", rest.len());
    }
}
