//! Whatever a peer sends, nothing panics, and nothing grows beyond its limit.

mod common;

use bytes::{BufMut, BytesMut};
use common::Server;
use proptest::prelude::*;
use proto::client::{Goal, Handshake, Replies, ReplyError, Wish};
use proto::wire::{
    CLIENT_OPTION_MAGIC, CommandFlags, CommandKind, ContextId, Cookie, EXTENDED_REPLY_MAGIC, MetaContext,
    NBD_MAGIC, OPTION_REPLY_MAGIC, ReplyStyle, RequestHeader, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    SelectedContext,
};

const COOKIE: Cookie = Cookie(5);

fn client() -> Handshake {
    Handshake::new(Wish {
        goal: Goal::Go("disk".to_owned()),
        replies: ReplyStyle::Structured,
        contexts: vec![MetaContext::Allocation],
    })
}

fn greeting() -> BytesMut {
    let mut bytes = BytesMut::new();
    bytes.put_u64(NBD_MAGIC);
    bytes.put_u64(CLIENT_OPTION_MAGIC);
    bytes.put_u16(3);
    bytes
}

fn request(kind: CommandKind, len: u64) -> RequestHeader {
    RequestHeader { flags: CommandFlags::NONE, kind, cookie: COOKIE, offset: 1000, len }
}

fn waiting_for(kind: CommandKind, len: u64) -> Replies {
    waiting(ReplyStyle::Structured, kind, len)
}

fn waiting(style: ReplyStyle, kind: CommandKind, len: u64) -> Replies {
    let contexts = vec![SelectedContext { id: ContextId(1), context: MetaContext::Allocation }];
    let mut replies = Replies::new(style, contexts);
    replies.expect(&request(kind, len)).expect("nothing else is in flight");
    replies
}

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u32(STRUCTURED_REPLY_MAGIC);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(payload.len() as u32);
    out.put_slice(payload);
    out
}

/// A chunk with extended headers, that of the request's offset unless told otherwise.
fn extended_at(offset: u64, kind: u16, payload: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u32(EXTENDED_REPLY_MAGIC);
    out.put_u16(1);
    out.put_u16(kind);
    out.put_u64(COOKIE.0);
    out.put_u64(offset);
    out.put_u64(payload.len() as u64);
    out.put_slice(payload);
    out
}

fn extended(kind: u16, payload: &[u8]) -> BytesMut {
    extended_at(1000, kind, payload)
}

fn extents(context: u32, count: u32, extents: &[(u64, u64)]) -> Vec<u8> {
    let mut out = context.to_be_bytes().to_vec();
    out.extend(count.to_be_bytes());
    for (len, flags) in extents {
        out.extend(len.to_be_bytes());
        out.extend(flags.to_be_bytes());
    }
    out
}

fn data(offset: u64, len: usize) -> Vec<u8> {
    let mut out = offset.to_be_bytes().to_vec();
    out.resize(8 + len, 7);
    out
}

/// What the chunks come to: the first error, or `None`.
fn verdict(mut replies: Replies, chunks: &[BytesMut]) -> Option<ReplyError> {
    let mut input = BytesMut::new();
    for chunk in chunks {
        input.extend_from_slice(chunk);
    }
    loop {
        match replies.next(&mut input) {
            Ok(Some(_)) => {}
            Ok(None) => return None,
            Err(error) => return Some(error),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_server_survives_any_options(
        flags in 0..8_u32,
        options in prop::collection::vec((0..13_u32, prop::collection::vec(any::<u8>(), 0..40), 0..60_u32), 0..50),
    ) {
        let mut server = Server::new();
        server.receive(&flags.to_be_bytes());
        for (kind, data, claimed) in options {
            let mut bytes = BytesMut::new();
            bytes.put_u64(CLIENT_OPTION_MAGIC);
            bytes.put_u32(kind);
            bytes.put_u32(if claimed < 40 { data.len() as u32 } else { claimed });
            bytes.put_slice(&data);
            server.receive(&bytes);
            prop_assert!(server.take_output().len() < 4096);
        }
    }

    #[test]
    fn a_server_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..2000), go: bool) {
        let mut server = Server::new();
        server.receive(&3_u32.to_be_bytes());
        if go {
            let mut option = BytesMut::new();
            option.put_u64(CLIENT_OPTION_MAGIC);
            option.put_u32(7);
            option.put_u32(6);
            option.put_slice(&[0; 6]);
            server.receive(&option);
            prop_assert!(server.agreed.is_some());
        }
        server.receive(&bytes);
    }

    #[test]
    fn a_client_survives_any_handshake(
        replies in prop::collection::vec((prop_oneof![Just(7_u32), Just(8), Just(10), 0..12_u32], 0..6_u32, prop::collection::vec(any::<u8>(), 0..60)), 0..20),
        tail in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut bytes = greeting();
        for (option, kind, data) in replies {
            bytes.put_u64(OPTION_REPLY_MAGIC);
            bytes.put_u32(option);
            bytes.put_u32(kind);
            bytes.put_u32(data.len() as u32);
            bytes.put_slice(&data);
        }
        bytes.put_slice(&tail);
        let mut client = client();
        for piece in bytes.chunks(37) {
            if client.receive(piece).is_err() {
                break;
            }
        }
    }

    #[test]
    fn a_client_survives_any_chunks(
        chunks in prop::collection::vec((0..2_u16, prop_oneof![Just(0_u16), Just(1), Just(2), Just(5), Just(0x8001), Just(0x8002), any::<u16>()], prop_oneof![8 => Just(5_u64), 1 => any::<u64>()], prop::collection::vec(any::<u8>(), 0..50)), 0..20),
        kind in 0..9_u16,
    ) {
        let chunks: Vec<_> = chunks.iter().map(|(flags, kind, cookie, payload)| chunk(*flags, *kind, *cookie, payload)).collect();
        verdict(waiting_for(CommandKind::from_number(kind), 4096), &chunks);
    }

    #[test]
    fn a_client_survives_any_extended_chunks(
        chunks in prop::collection::vec((prop_oneof![8 => Just(1000_u64), 1 => any::<u64>()], prop_oneof![Just(0_u16), Just(1), Just(2), Just(6), Just(0x8001), Just(0x8002), any::<u16>()], prop::collection::vec(any::<u8>(), 0..50)), 0..20),
        kind in 0..9_u16,
        len in prop_oneof![Just(4096_u64), any::<u64>()],
    ) {
        let chunks: Vec<_> = chunks.iter().map(|(offset, kind, payload)| extended_at(*offset, *kind, payload)).collect();
        verdict(waiting(ReplyStyle::Extended, CommandKind::from_number(kind), len), &chunks);
    }

    #[test]
    fn a_client_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        let _ = client().receive(&bytes);
        verdict(waiting_for(CommandKind::Read, 4096), &[BytesMut::from(&bytes[..])]);
    }
}

#[test]
fn a_reply_that_nobody_asked_for_ends_it() {
    let error = verdict(waiting_for(CommandKind::Read, 10), &[chunk(1, 0, 99, &[])]);
    assert_eq!(error, Some(ReplyError::Unsolicited(Cookie(99))));
    let mut simple = BytesMut::new();
    simple.put_u32(SIMPLE_REPLY_MAGIC);
    simple.put_u32(0);
    simple.put_u64(98);
    assert_eq!(
        verdict(waiting_for(CommandKind::Read, 10), &[simple]),
        Some(ReplyError::Unsolicited(Cookie(98)))
    );
}

#[test]
fn chunks_that_overlap_or_leave_the_request_end_it() {
    let wrong = Some(ReplyError::WrongRange(COOKIE));
    let read = || waiting_for(CommandKind::Read, 100);
    assert_eq!(verdict(read(), &[chunk(0, 1, 5, &data(1000, 60)), chunk(1, 1, 5, &data(1050, 50))]), wrong);
    assert_eq!(verdict(read(), &[chunk(1, 1, 5, &data(999, 60))]), wrong);
    assert_eq!(verdict(read(), &[chunk(1, 1, 5, &data(1050, 60))]), wrong);
    assert_eq!(verdict(read(), &[chunk(1, 1, 5, &data(u64::MAX, 60))]), wrong);
    let mut hole = 1000_u64.to_be_bytes().to_vec();
    hole.extend_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(verdict(read(), &[chunk(1, 2, 5, &hole)]), wrong);
}

#[test]
fn data_of_a_read_that_wraps_is_not_believed_and_its_failure_is() {
    let wraps = RequestHeader { offset: u64::MAX - 23, ..request(CommandKind::Read, 100) };
    let waiting = |style| {
        let mut replies = Replies::new(style, Vec::new());
        replies.expect(&wraps).expect("nothing else is in flight");
        replies
    };
    let simple = |error: u32, len: usize| {
        let mut out = BytesMut::new();
        out.put_u32(SIMPLE_REPLY_MAGIC);
        out.put_u32(error);
        out.put_u64(COOKIE.0);
        out.put_bytes(7, len);
        out
    };
    let wrong = Some(ReplyError::WrongRange(COOKIE));
    // Before the data is there, too.
    for len in [0, 100] {
        assert_eq!(verdict(waiting(ReplyStyle::Simple), &[simple(0, len)]), wrong, "{len}");
    }
    assert_eq!(verdict(waiting(ReplyStyle::Simple), &[simple(22, 0)]), None);
    for len in [24, 100] {
        let bytes = data(wraps.offset, len);
        assert_eq!(
            verdict(waiting(ReplyStyle::Structured), &[chunk(0, 1, COOKIE.0, &bytes)]),
            wrong,
            "{len}"
        );
        let torn = [extended_at(wraps.offset, 1, &bytes)];
        assert_eq!(verdict(waiting(ReplyStyle::Extended), &torn), wrong, "{len}");
    }
    let mut hole = BytesMut::from(&wraps.offset.to_be_bytes()[..]);
    hole.put_u32(100);
    assert_eq!(verdict(waiting(ReplyStyle::Structured), &[chunk(0, 2, COOKIE.0, &hole)]), wrong);
    // The bytes before the end of all numbers are as good as any.
    let bytes = data(wraps.offset, 23);
    assert_eq!(verdict(waiting(ReplyStyle::Structured), &[chunk(0, 1, COOKIE.0, &bytes)]), None);
}

#[test]
fn a_read_that_ends_early_is_never_taken_for_whole() {
    let read = || waiting_for(CommandKind::Read, 100);
    let incomplete = Some(ReplyError::Incomplete(COOKIE));
    assert_eq!(verdict(read(), &[chunk(1, 1, 5, &data(1000, 60))]), incomplete);
    assert_eq!(verdict(read(), &[chunk(1, 0, 5, &[])]), incomplete);
    assert_eq!(verdict(waiting_for(CommandKind::BlockStatus, 100), &[chunk(1, 0, 5, &[])]), incomplete);
}

#[test]
fn an_extent_that_begins_beyond_the_request_ends_it() {
    let narrow_extents = |lens: &[u32]| {
        let mut payload = vec![0, 0, 0, 1];
        for len in lens {
            payload.extend_from_slice(&len.to_be_bytes());
            payload.extend_from_slice(&0_u32.to_be_bytes());
        }
        verdict(waiting_for(CommandKind::BlockStatus, 100), &[chunk(1, 5, 5, &payload)])
    };
    assert_eq!(narrow_extents(&[60, 50]), None, "the last one may reach beyond it");
    for wrong in [&[60, 40, 1][..], &[u32::MAX, u32::MAX], &[60, 0]] {
        assert_eq!(narrow_extents(wrong), Some(ReplyError::WrongRange(COOKIE)), "{wrong:?}");
    }
}

#[test]
fn a_chunk_longer_than_its_request_allows_is_refused_before_it_is_there() {
    let mut head = chunk(1, 1, 5, &[]);
    head.truncate(16);
    head.put_u32(u32::MAX);
    assert_eq!(verdict(waiting_for(CommandKind::Read, 100), &[head]), Some(ReplyError::WrongLength(COOKIE)));
}

#[test]
fn a_simple_reply_to_a_read_after_structured_ones_were_agreed_is_refused() {
    let mut simple = BytesMut::new();
    simple.put_u32(SIMPLE_REPLY_MAGIC);
    simple.put_u32(5);
    simple.put_u64(5);
    let error = verdict(waiting_for(CommandKind::Read, 100), &[simple]);
    assert_eq!(error, Some(ReplyError::WrongKind(COOKIE)));
}

#[test]
fn a_simple_reply_after_a_chunk_that_told_of_a_failure_is_refused() {
    let write = || waiting(ReplyStyle::Structured, CommandKind::Write, 100);
    let mut failure = 5_u32.to_be_bytes().to_vec();
    failure.put_u16(0);
    let failure = |flags| chunk(flags, (1 << 15) + 1, 5, &failure);
    assert_eq!(verdict(write(), &[failure(1)]), None);
    let mut simple = BytesMut::new();
    simple.put_u32(SIMPLE_REPLY_MAGIC);
    simple.put_u32(0);
    simple.put_u64(5);
    assert_eq!(verdict(write(), &[failure(0), simple]), Some(ReplyError::WrongKind(COOKIE)));
}

#[test]
fn a_chunk_that_repeats_another_offset_ends_it() {
    let read = || waiting(ReplyStyle::Extended, CommandKind::Read, 100);
    assert_eq!(verdict(read(), &[extended(1, &data(1000, 100))]), None);
    let wrong = Some(ReplyError::WrongOffset(COOKIE));
    assert_eq!(verdict(read(), &[extended_at(1001, 1, &data(1000, 100))]), wrong);
}

#[test]
fn no_kind_of_reply_stands_for_another() {
    let mut simple = BytesMut::new();
    simple.put_u32(SIMPLE_REPLY_MAGIC);
    simple.put_u32(0);
    simple.put_u64(5);
    let wrong = Some(ReplyError::BadMagic);
    let flush = |style| waiting(style, CommandKind::Flush, 0);
    assert_eq!(verdict(flush(ReplyStyle::Extended), std::slice::from_ref(&simple)), wrong);
    assert_eq!(verdict(flush(ReplyStyle::Extended), &[chunk(1, 0, 5, &[])]), wrong);
    assert_eq!(verdict(flush(ReplyStyle::Structured), &[extended(0, &[])]), wrong);
    assert_eq!(verdict(flush(ReplyStyle::Structured), &[simple]), None);
    assert_eq!(verdict(flush(ReplyStyle::Extended), &[extended(0, &[])]), None);
}

#[test]
fn extended_extents_are_counted_and_do_not_wrap() {
    let status = |payload: &[u8]| {
        let replies = waiting(ReplyStyle::Extended, CommandKind::BlockStatus, 1 << 40);
        verdict(replies, &[extended(6, payload)])
    };
    assert_eq!(
        status(&extents(1, 2, &[(1 << 39, 3), (1 << 50, 0)])),
        None,
        "the last one may reach beyond it"
    );
    let length = Some(ReplyError::WrongLength(COOKIE));
    for wrong in [
        extents(1, 1, &[(1, 0), (1, 0)]),
        extents(1, 3, &[(1, 0), (1, 0)]),
        extents(1, 0, &[]),
        extents(1, u32::MAX, &[(1, 0)]),
        extents(1, 1, &[(1, 0)])[..20].to_vec(),
        vec![0, 0, 0, 1],
    ] {
        assert_eq!(status(&wrong), length, "{wrong:?}");
    }
    let range = Some(ReplyError::WrongRange(COOKIE));
    for wrong in [&[(0, 0)][..], &[(1 << 40, 0), (1, 0)], &[(1, 0), (u64::MAX - 1000, 0)], &[(u64::MAX, 0)]] {
        assert_eq!(status(&extents(1, wrong.len() as u32, wrong)), range, "{wrong:?}");
    }
    let kind = Some(ReplyError::WrongKind(COOKIE));
    assert_eq!(status(&extents(2, 1, &[(1, 0)])), kind, "nobody selected that context");
    let narrow = waiting(ReplyStyle::Structured, CommandKind::BlockStatus, 100);
    assert_eq!(verdict(narrow, &[chunk(1, 6, 5, &extents(1, 1, &[(1, 0)]))]), kind);
    let wide = waiting(ReplyStyle::Extended, CommandKind::BlockStatus, 100);
    assert_eq!(verdict(wide, &[extended(5, &[0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0])]), kind);
}

#[test]
fn an_extended_chunk_longer_than_its_request_allows_is_refused_before_it_is_there() {
    for len in [109, 1 << 32, (1 << 32) + 8, u64::MAX] {
        let mut head = extended(1, &[]);
        head.truncate(24);
        head.put_u64(len);
        let error = verdict(waiting(ReplyStyle::Extended, CommandKind::Read, 100), &[head]);
        assert_eq!(error, Some(ReplyError::WrongLength(COOKIE)), "{len}");
    }
}

#[test]
fn a_size_that_no_file_can_have_is_refused() {
    let mut bytes = greeting();
    let mut put = |option: u32, kind: u32, data: &[u8]| {
        bytes.put_u64(OPTION_REPLY_MAGIC);
        bytes.put_u32(option);
        bytes.put_u32(kind);
        bytes.put_u32(data.len() as u32);
        bytes.put_slice(data);
    };
    put(8, 0x8000_0001, &[]);
    put(7, 3, &[0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    let error = client().receive(&bytes).unwrap_err();
    assert_eq!(error, proto::client::HandshakeError::BadSize(1 << 63));
}
