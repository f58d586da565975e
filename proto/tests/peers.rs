//! Both halves against each other, with the bytes between them torn at arbitrary places.

mod common;

use std::collections::HashMap;

use bytes::BytesMut;
use common::{DISK_BYTES, Server};
use proptest::prelude::*;
use proto::client::{Connected, Event, Goal, Handshake, HandshakeError, Progress, Replies, Wish};
use proto::wire::{
    CommandFlags, CommandKind, Cookie, Errno, MetaContext, OptionReplyKind, ReplyStyle, RequestHeader,
};

/// Passes `bytes` on in pieces of the lengths that `cuts` gives, over and over.
fn pieces<'a>(bytes: &'a [u8], cuts: &'a [usize]) -> impl Iterator<Item = &'a [u8]> {
    let mut rest = bytes;
    let mut cuts = cuts.iter().cycle();
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let len = (*cuts.next()?).clamp(1, rest.len());
        let (piece, after) = rest.split_at(len);
        rest = after;
        Some(piece)
    })
}

fn shake_hands(
    server: &mut Server,
    wish: Wish,
    cuts: &[usize],
) -> Result<(Progress, Handshake), HandshakeError> {
    let mut client = Handshake::new(wish);
    let mut last = Progress::Waiting;
    for _ in 0..64 {
        for piece in pieces(&server.take_output(), cuts) {
            last = client.receive(piece)?;
        }
        let sent = client.take_output();
        if last != Progress::Waiting && sent.is_empty() {
            break;
        }
        for piece in pieces(&sent, cuts) {
            server.receive(piece);
        }
        if last != Progress::Waiting {
            break;
        }
    }
    Ok((last, client))
}

fn connect(server: &mut Server, structured: bool, cuts: &[usize]) -> (Connected, Replies) {
    let wish = Wish {
        goal: Goal::Go("disk0".to_owned()),
        structured,
        contexts: vec![MetaContext::Allocation, MetaContext::DirtyBitmap("restore".to_owned())],
    };
    let (progress, _) = shake_hands(server, wish, cuts).expect("both halves are ours");
    let Progress::Ready(connected) = progress else { panic!("the handshake came to {progress:?}") };
    let replies = Replies::new(connected.replies, connected.contexts.clone());
    (*connected, replies)
}

#[derive(Clone, Debug)]
struct Work {
    kind: CommandKind,
    flags: CommandFlags,
    offset: u64,
    len: u32,
    fill: u8,
}

fn work() -> impl Strategy<Value = Work> {
    let kind = prop_oneof![
        4 => Just(CommandKind::Read),
        4 => Just(CommandKind::Write),
        1 => Just(CommandKind::WriteZeroes),
        1 => Just(CommandKind::Flush),
        1 => Just(CommandKind::Trim),
        1 => Just(CommandKind::BlockStatus),
        1 => Just(CommandKind::Cache),
        1 => Just(CommandKind::Unknown(42)),
    ];
    let flags = prop_oneof![4 => Just(0_u16), 1 => 0..32_u16];
    (kind, flags, 0..DISK_BYTES as u64 + 9000, 0..20_000_u32, any::<u8>()).prop_map(
        |(kind, flags, offset, len, fill)| {
            let flush = kind == CommandKind::Flush;
            Work {
                kind,
                flags: CommandFlags::from_bits(flags),
                offset: if flush { 0 } else { offset },
                len: if flush { 0 } else { len },
                fill,
            }
        },
    )
}

fn run(structured: bool, work: &[Work], cuts: &[usize]) {
    let mut server = Server::new();
    let (connected, mut replies) = connect(&mut server, structured, cuts);
    assert_eq!(connected.info.size, DISK_BYTES as u64);
    assert_eq!(connected.info.name, "disk0");
    let mut model = vec![0_u8; DISK_BYTES];
    let mut expected: HashMap<Cookie, Vec<u8>> = HashMap::new();
    let mut sent = BytesMut::new();
    for (number, item) in work.iter().enumerate() {
        let header = RequestHeader {
            flags: item.flags,
            kind: item.kind,
            cookie: Cookie(number as u64 * 3),
            offset: item.offset,
            len: item.len,
        };
        replies.expect(&header).expect("numbers are not reused");
        sent.extend_from_slice(&header.encode());
        sent.extend_from_slice(&vec![item.fill; header.payload_len() as usize]);
        let fits = item.offset + u64::from(item.len) <= DISK_BYTES as u64;
        let allowed = match item.kind {
            CommandKind::Read if structured => CommandFlags::FUA.with(CommandFlags::DF),
            CommandKind::WriteZeroes => CommandFlags::FUA.with(CommandFlags::NO_HOLE),
            _ => CommandFlags::FUA,
        };
        if fits && !item.flags.exceeds(allowed) {
            let range = item.offset as usize..item.offset as usize + item.len as usize;
            match item.kind {
                CommandKind::Write => model[range].fill(item.fill),
                CommandKind::WriteZeroes => model[range].fill(0),
                CommandKind::Read => {
                    expected.insert(header.cookie, model[range].to_vec());
                }
                _ => {}
            }
        }
    }
    for piece in pieces(&sent, cuts) {
        server.receive(piece);
    }
    assert!(!server.closed);
    assert_eq!(server.disk, model);
    let mut received: HashMap<Cookie, Vec<u8>> = HashMap::new();
    let mut input = BytesMut::new();
    for piece in pieces(&server.take_output(), cuts) {
        input.extend_from_slice(piece);
        while let Some(event) = replies.next(&mut input).expect("the server keeps to the protocol") {
            match event {
                Event::Data { cookie, offset, bytes } => {
                    let item = &work[cookie.0 as usize / 3];
                    let buf = received.entry(cookie).or_insert_with(|| vec![0; item.len as usize]);
                    let start = (offset - item.offset) as usize;
                    buf[start..start + bytes.len()].copy_from_slice(&bytes);
                }
                Event::Hole { cookie, .. } => {
                    let item = &work[cookie.0 as usize / 3];
                    received.entry(cookie).or_insert_with(|| vec![0; item.len as usize]);
                }
                Event::Status { descriptors, .. } => assert!(!descriptors.is_empty()),
                Event::Done { cookie, result } => {
                    let item = &work[cookie.0 as usize / 3];
                    if let Some(expected) = expected.remove(&cookie) {
                        assert_eq!(result, Ok(()));
                        assert_eq!(received.remove(&cookie).unwrap_or_default(), expected);
                    } else if matches!(item.kind, CommandKind::Read | CommandKind::Unknown(_)) {
                        assert_eq!(result, Err(Errno::Invalid));
                    }
                }
            }
        }
    }
    assert_eq!(replies.in_flight(), 0);
    assert!(expected.is_empty() && input.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_request_is_answered_right_however_the_bytes_are_torn(
        structured: bool,
        work in prop::collection::vec(work(), 1..40),
        cuts in prop::collection::vec(1..5000_usize, 1..20),
    ) {
        run(structured, &work, &cuts);
    }
}

#[test]
fn a_conversation_byte_by_byte_is_the_same_conversation() {
    let read =
        |offset, len| Work { kind: CommandKind::Read, flags: CommandFlags::NONE, offset, len, fill: 0 };
    let write = Work { kind: CommandKind::Write, flags: CommandFlags::FUA, offset: 4000, len: 300, fill: 9 };
    for structured in [false, true] {
        run(structured, &[read(0, 9000), write.clone(), read(1, 9000), read(0, 0)], &[1]);
    }
}

#[test]
fn list_names_every_export_and_says_goodbye() {
    let mut server = Server::new();
    let wish = Wish { goal: Goal::List, structured: false, contexts: Vec::new() };
    let (progress, _) = shake_hands(&mut server, wish, &[7]).unwrap();
    let Progress::Listed(listed) = progress else { panic!("{progress:?}") };
    assert_eq!(listed.iter().map(|listed| listed.name.as_str()).collect::<Vec<_>>(), ["disk0", "disk1"]);
    assert_eq!(listed[0].description, "the first");
    assert!(server.closed);
}

#[test]
fn info_tells_the_size_and_the_contexts_and_begins_nothing() {
    let mut server = Server::new();
    let wish = Wish {
        goal: Goal::Info(String::new()),
        structured: true,
        contexts: vec![MetaContext::Depth, MetaContext::DirtyBitmap("nothing".to_owned())],
    };
    let (progress, _) = shake_hands(&mut server, wish, &[3, 50]).unwrap();
    let Progress::Told(told) = progress else { panic!("{progress:?}") };
    assert_eq!(told.info.size, DISK_BYTES as u64);
    assert_eq!(told.info.name, "disk0");
    assert_eq!(told.replies, ReplyStyle::Structured);
    assert_eq!(told.contexts.len(), 1);
    assert!(server.closed && server.agreed.is_none());
}

#[test]
fn an_unknown_export_is_refused_with_words() {
    let wish = Wish { goal: Goal::Go("nobody".to_owned()), structured: true, contexts: Vec::new() };
    let error = shake_hands(&mut Server::new(), wish, &[1]).unwrap_err();
    let HandshakeError::Refused { reply, text, .. } = error else { panic!("{error:?}") };
    assert_eq!(reply, OptionReplyKind::ErrUnknown);
    assert_eq!(text, "no such export");
}
