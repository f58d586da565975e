//! Both halves against each other, with the bytes between them torn at arbitrary places.

mod common;

use std::collections::HashMap;

use bytes::BytesMut;
use common::{DISK_BYTES, Server};
use proptest::prelude::*;
use proto::client::{Connected, Event, Goal, Handshake, HandshakeError, Progress, Replies, Wish};
use proto::wire::{
    CommandFlags, CommandKind, ContextFilter, Cookie, Errno, MetaContext, OptionReplyKind, ReplyStyle,
    RequestHeader,
};

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];

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

fn connect(server: &mut Server, style: ReplyStyle, cuts: &[usize]) -> (Connected, Replies) {
    let wish = Wish {
        goal: Goal::Go("disk0".to_owned()),
        replies: style,
        contexts: vec![MetaContext::Allocation, MetaContext::DirtyBitmap("restore".to_owned())],
    };
    let (progress, _) = shake_hands(server, wish, cuts).expect("both halves are ours");
    let Progress::Ready(connected) = progress else { panic!("the handshake came to {progress:?}") };
    assert_eq!(connected.replies, style);
    let replies = Replies::new(connected.replies, connected.contexts.clone());
    (*connected, replies)
}

#[derive(Clone, Debug)]
struct Work {
    kind: CommandKind,
    flags: CommandFlags,
    offset: u64,
    len: u64,
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
    (kind, flags, 0..DISK_BYTES as u64 + 9000, 0..20_000_u64, any::<u8>()).prop_map(
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

fn run(style: ReplyStyle, work: &[Work], cuts: &[usize]) {
    let mut server = Server::new();
    let (connected, mut replies) = connect(&mut server, style, cuts);
    assert_eq!(connected.info.size, DISK_BYTES as u64);
    assert_eq!(connected.info.name, "disk0");
    let mut model = vec![0_u8; DISK_BYTES];
    let mut expected: HashMap<Cookie, Vec<u8>> = HashMap::new();
    let mut sent = BytesMut::new();
    for (number, item) in work.iter().enumerate() {
        let header = RequestHeader {
            flags: wire_flags(item, style),
            kind: item.kind,
            cookie: Cookie(number as u64 * 3),
            offset: item.offset,
            len: item.len,
        };
        replies.expect(&header).expect("numbers are not reused");
        sent.extend_from_slice(&header.encode(style));
        sent.extend_from_slice(&vec![item.fill; header.payload_len(style) as usize]);
        let fits = item.offset + item.len <= DISK_BYTES as u64;
        let allowed = match item.kind {
            CommandKind::Read if style.has_chunks() => CommandFlags::FUA.with(CommandFlags::DF),
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
                Event::Failure { cookie, errno, offset, message } => {
                    let item = &work[cookie.0 as usize / 3];
                    let begin = (errno == Errno::NoSpace && item.len > 0).then_some(item.offset);
                    assert_eq!((offset, message.as_str()), (begin, "so it is"));
                }
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

/// With extended headers a WRITE says that its bytes follow, and nothing else does.
fn wire_flags(item: &Work, style: ReplyStyle) -> CommandFlags {
    let writes = item.kind == CommandKind::Write && style.is_extended();
    item.flags.with_if(writes, CommandFlags::PAYLOAD_LEN)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_request_is_answered_right_however_the_bytes_are_torn(
        style in prop::sample::select(&STYLES[..]),
        work in prop::collection::vec(work(), 1..40),
        cuts in prop::collection::vec(1..5000_usize, 1..20),
    ) {
        run(style, &work, &cuts);
    }
}

#[test]
fn a_conversation_byte_by_byte_is_the_same_conversation() {
    let read =
        |offset, len| Work { kind: CommandKind::Read, flags: CommandFlags::NONE, offset, len, fill: 0 };
    let write = Work { kind: CommandKind::Write, flags: CommandFlags::FUA, offset: 4000, len: 300, fill: 9 };
    for style in STYLES {
        run(style, &[read(0, 9000), write.clone(), read(1, 9000), read(0, 0)], &[1]);
    }
}

#[test]
fn list_names_every_export_and_says_goodbye() {
    let mut server = Server::new();
    let wish = Wish { goal: Goal::List, replies: ReplyStyle::Simple, contexts: Vec::new() };
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
        replies: ReplyStyle::Structured,
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
    let wish =
        Wish { goal: Goal::Go("nobody".to_owned()), replies: ReplyStyle::Structured, contexts: Vec::new() };
    let error = shake_hands(&mut Server::new(), wish, &[1]).unwrap_err();
    let HandshakeError::Refused { reply, text, .. } = error else { panic!("{error:?}") };
    assert_eq!(reply, OptionReplyKind::ErrUnknown);
    assert_eq!(text, "no such export");
}

/// All events of one request, which is sent alone.
fn ask(
    server: &mut Server,
    replies: &mut Replies,
    header: &RequestHeader,
    payload: &[u8],
) -> (Vec<Event>, Result<(), Errno>) {
    server.receive(&[&header.encode(ReplyStyle::Extended)[..], payload].concat());
    let mut input = server.take_output();
    let mut events = Vec::new();
    while let Some(event) = replies.next(&mut input).expect("the server keeps to the protocol") {
        if let Event::Done { result, .. } = event {
            assert!(input.is_empty());
            return (events, result);
        }
        events.push(event);
    }
    panic!("no answer to {header:?}");
}

#[test]
fn a_filter_is_obeyed_and_a_wrong_one_refused() {
    let mut server = Server::new();
    let (connected, mut replies) = connect(&mut server, ReplyStyle::Extended, &[11]);
    let ids: Vec<_> = connected.contexts.iter().map(|selected| selected.id).collect();
    for (number, (contexts, expected)) in [
        (vec![ids[1]], Ok(1)),
        (vec![ids[1], ids[0]], Ok(2)),
        (vec![], Err(Errno::Invalid)),
        (vec![ids[0], ids[0]], Err(Errno::Invalid)),
        (vec![proto::wire::ContextId(77)], Err(Errno::Invalid)),
    ]
    .into_iter()
    .enumerate()
    {
        let filter = ContextFilter { len: 8192, contexts };
        let payload = filter.encode();
        let header = RequestHeader {
            flags: CommandFlags::PAYLOAD_LEN,
            kind: CommandKind::BlockStatus,
            cookie: Cookie(number as u64),
            offset: 4096,
            len: payload.len() as u64,
        };
        replies.expect_filtered(&header, &filter).unwrap();
        let (events, result) = ask(&mut server, &mut replies, &header, &payload);
        let told: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                Event::Status { context, .. } => Some(*context),
                _ => None,
            })
            .collect();
        assert_eq!(result.map(|()| told.len()), expected, "{filter:?}");
        assert!(result.is_err() || told == filter.contexts);
    }
}

#[test]
fn an_error_says_where_and_why_in_one_line_of_bounded_length() {
    use proto::server::ReplyEncoder;
    let header = RequestHeader {
        flags: CommandFlags::NONE,
        kind: CommandKind::Read,
        cookie: Cookie(3),
        offset: 1 << 40,
        len: 100,
    };
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        for (at, told) in [(header.offset + 99, Some(header.offset + 99)), (header.offset + 100, None)] {
            let mut replies = Replies::new(style, Vec::new());
            replies.expect(&header).unwrap();
            let why = format!("chunk 7 of disk0:\n{}", "ü".repeat(5000));
            let reply = ReplyEncoder::new(style).failed(&header, Errno::Io, Some(at), &why);
            let mut input = BytesMut::from(&reply[..]);
            let event = replies.next(&mut input).unwrap();
            let Some(Event::Failure { offset, message, errno, .. }) = event else { panic!("{event:?}") };
            assert_eq!((offset, errno), (told, Errno::Io));
            assert!(message.starts_with("chunk 7 of disk0: ü") && message.len() <= 4096);
            let done = Event::Done { cookie: Cookie(3), result: Err(Errno::Io) };
            assert_eq!(replies.next(&mut input), Ok(Some(done)));
        }
    }
    let simple = ReplyEncoder::new(ReplyStyle::Simple).failed(&header, Errno::Io, Some(1), "why");
    assert_eq!(simple.len(), 16);
}

#[test]
fn a_client_does_with_the_best_replies_that_a_server_has() {
    use bytes::BufMut;
    use proto::wire::{CLIENT_OPTION_MAGIC, NBD_MAGIC, OPTION_REPLY_MAGIC};
    for (refused, style) in [
        (&[][..], ReplyStyle::Extended),
        (&[11][..], ReplyStyle::Structured),
        (&[11, 8][..], ReplyStyle::Simple),
    ] {
        let wish =
            Wish { goal: Goal::Go(String::new()), replies: ReplyStyle::Extended, contexts: Vec::new() };
        let mut client = Handshake::new(wish);
        let mut greeting = BytesMut::new();
        greeting.put_u64(NBD_MAGIC);
        greeting.put_u64(CLIENT_OPTION_MAGIC);
        greeting.put_u16(3);
        assert_eq!(client.receive(&greeting), Ok(Progress::Waiting));
        let mut asked = Vec::new();
        let mut sent = client.take_output().split_off(4);
        let ready = loop {
            let option = u32::from_be_bytes(sent[8..12].try_into().unwrap());
            asked.push(option);
            let mut reply = BytesMut::new();
            let mut put = |kind: u32, data: &[u8]| {
                reply.put_u64(OPTION_REPLY_MAGIC);
                reply.put_u32(option);
                reply.put_u32(kind);
                reply.put_u32(data.len() as u32);
                reply.put_slice(data);
            };
            if refused.contains(&option) {
                put(0x8000_0001, b"no");
            } else {
                if option == 7 {
                    put(3, &[0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 1]);
                }
                put(1, &[]);
            }
            match client.receive(&reply).unwrap() {
                Progress::Waiting => sent = client.take_output(),
                progress => break progress,
            }
        };
        let Progress::Ready(connected) = ready else { panic!("{ready:?}") };
        assert_eq!(connected.replies, style, "after {asked:?}");
    }
}
