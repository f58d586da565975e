//! STARTTLS on both sides: what may come before it, what it forgets, and what ends the connection. Nothing is encrypted here.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use bytes::{BufMut, BytesMut};
use common::Exports;
use proto::client::{Goal, Handshake as Client, HandshakeError, Progress, Wish};
use proto::server::{Ending, Handshake, Step, TlsMode};
use proto::wire::{
    CLIENT_OPTION_MAGIC, NBD_MAGIC, OPTION_REPLY_MAGIC, OptionKind, OptionReplyKind, Reader, ReplyStyle,
};

const FLAGS: u32 = 3;

fn option(kind: OptionKind, data: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u64(CLIENT_OPTION_MAGIC);
    out.put_u32(kind.number());
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out
}

/// The data of INFO and GO for the first export.
fn first_export() -> Vec<u8> {
    vec![0; 6]
}

fn server(mode: TlsMode) -> Handshake {
    let mut handshake = Handshake::with_tls(mode);
    assert_eq!(handshake.take_output().len(), 18);
    handshake.receive(&FLAGS.to_be_bytes());
    assert_eq!(handshake.step(&Exports::two()), Step::Answered);
    handshake
}

/// Sends one option; what the step was, and how its last reply was called, with its text.
fn ask(
    handshake: &mut Handshake,
    kind: OptionKind,
    data: &[u8],
) -> (Step, Option<(OptionReplyKind, String)>) {
    handshake.receive(&option(kind, data));
    let step = handshake.step(&Exports::two());
    let output = handshake.take_output();
    let mut reader = Reader::new(&output);
    let mut last = None;
    while reader.remaining() > 0 {
        assert_eq!(reader.u64(), Ok(OPTION_REPLY_MAGIC));
        assert_eq!(reader.u32(), Ok(kind.number()));
        let reply = OptionReplyKind::from_number(reader.u32().unwrap());
        let len = reader.u32().unwrap() as usize;
        last = Some((reply, String::from_utf8_lossy(reader.bytes(len).unwrap()).into_owned()));
    }
    (step, last)
}

fn reply(handshake: &mut Handshake, kind: OptionKind, data: &[u8]) -> OptionReplyKind {
    let (step, reply) = ask(handshake, kind, data);
    assert_eq!(step, Step::Answered, "{kind:?}");
    reply.expect("there is a reply").0
}

const EVERY_OTHER: [OptionKind; 8] = [
    OptionKind::List,
    OptionKind::Info,
    OptionKind::Go,
    OptionKind::StructuredReply,
    OptionKind::ListMetaContext,
    OptionKind::SetMetaContext,
    OptionKind::ExtendedHeaders,
    OptionKind::Unknown(77),
];

#[test]
fn where_tls_is_required_nothing_is_answered_before_it_but_starttls_and_abort() {
    for kind in EVERY_OTHER {
        for data in [vec![], first_export(), vec![0xff; 9]] {
            let mut handshake = server(TlsMode::Required);
            assert!(!handshake.missed_tls());
            let (step, answer) = ask(&mut handshake, kind, &data);
            let (answer, text) = answer.expect("there is an answer");
            assert_eq!((step, answer), (Step::Answered, OptionReplyKind::ErrTlsRequired), "{kind:?}");
            assert!(text.contains("TLS") && text.contains("nbds"), "{text}");
            assert!(handshake.missed_tls());
            assert_eq!(ask(&mut handshake, OptionKind::StartTls, &[]).0, Step::StartTls);
            handshake.secured();
            assert!(!handshake.missed_tls(), "it has TLS now");
        }
    }
    let mut handshake = server(TlsMode::Required);
    let (step, _) = ask(&mut handshake, OptionKind::ExportName, b"disk0");
    assert_eq!(step, Step::Closed(Ending::TlsRequired));
    assert!(handshake.missed_tls());
    let mut handshake = server(TlsMode::Required);
    let (step, answer) = ask(&mut handshake, OptionKind::Abort, &[]);
    assert_eq!(step, Step::Closed(Ending::Aborted));
    assert_eq!(answer.map(|answer| answer.0), Some(OptionReplyKind::Ack));
}

#[test]
fn once_tls_has_begun_nobody_is_told_to_begin_it() {
    for mode in [TlsMode::On, TlsMode::Required] {
        let mut handshake = server(mode);
        let (step, answer) = ask(&mut handshake, OptionKind::StartTls, &[]);
        assert_eq!(step, Step::StartTls);
        assert_eq!(answer, Some((OptionReplyKind::Ack, String::new())));
        handshake.secured();
        assert_eq!(reply(&mut handshake, OptionKind::StartTls, &[]), OptionReplyKind::ErrInvalid);
        for kind in EVERY_OTHER {
            if kind != OptionKind::Go {
                let answer = reply(&mut handshake, kind, &[0xff; 9]);
                assert_ne!(answer, OptionReplyKind::ErrTlsRequired, "{kind:?}");
            }
        }
        let (step, _) = ask(&mut handshake, OptionKind::Go, &first_export());
        assert!(matches!(step, Step::Transmission(_)), "{step:?}");
    }
}

#[test]
fn a_server_without_tls_says_so_and_goes_on() {
    let mut handshake = server(TlsMode::Off);
    assert_eq!(reply(&mut handshake, OptionKind::StartTls, &[]), OptionReplyKind::ErrPolicy);
    let (step, _) = ask(&mut handshake, OptionKind::Go, &first_export());
    assert!(matches!(step, Step::Transmission(_)));
    assert!(!handshake.missed_tls());
}

#[test]
fn starttls_takes_no_data() {
    let mut handshake = server(TlsMode::On);
    assert_eq!(reply(&mut handshake, OptionKind::StartTls, b"x"), OptionReplyKind::ErrInvalid);
    assert_eq!(ask(&mut handshake, OptionKind::StartTls, &[]).0, Step::StartTls);
}

#[test]
fn what_was_agreed_on_without_tls_is_forgotten() {
    let mut handshake = server(TlsMode::On);
    assert_eq!(reply(&mut handshake, OptionKind::StructuredReply, &[]), OptionReplyKind::Ack);
    let mut query = first_export();
    query.splice(4.., [0, 0, 0, 1, 0, 0, 0, 15]);
    query.extend_from_slice(b"base:allocation");
    assert_eq!(reply(&mut handshake, OptionKind::SetMetaContext, &query), OptionReplyKind::Ack);
    assert_eq!(ask(&mut handshake, OptionKind::StartTls, &[]).0, Step::StartTls);
    handshake.secured();
    // Structured replies are not agreed on any more, so contexts cannot be asked for.
    assert_eq!(reply(&mut handshake, OptionKind::SetMetaContext, &query), OptionReplyKind::ErrInvalid);
    let (step, _) = ask(&mut handshake, OptionKind::Go, &first_export());
    let Step::Transmission(agreed) = step else { panic!("{step:?}") };
    assert_eq!((agreed.replies, agreed.contexts), (ReplyStyle::Simple, Vec::new()));
}

#[test]
fn plain_bytes_after_starttls_end_the_connection_before_it_is_granted() {
    let mut handshake = server(TlsMode::On);
    let mut bytes = option(OptionKind::StartTls, &[]);
    bytes.extend_from_slice(&option(OptionKind::StructuredReply, &[]));
    for len in 17..=bytes.len() {
        let mut handshake = server(TlsMode::On);
        handshake.receive(&bytes[..len]);
        assert_eq!(handshake.step(&Exports::two()), Step::Closed(Ending::PlainAfterStartTls), "{len} bytes");
        assert!(handshake.take_output().is_empty(), "it was not granted");
    }
    // They come a moment later: still before TLS.
    handshake.receive(&bytes[..16]);
    assert_eq!(handshake.step(&Exports::two()), Step::StartTls);
    handshake.receive(&bytes[16..]);
    handshake.secured();
    let step = handshake.step(&Exports::two());
    assert_eq!(step, Step::Closed(Ending::PlainAfterStartTls));
}

fn greeting() -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u64(NBD_MAGIC);
    out.put_u64(CLIENT_OPTION_MAGIC);
    out.put_u16(3);
    out
}

fn answer(kind: OptionReplyKind, text: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(OptionKind::StartTls.number());
    out.put_u32(kind.number());
    out.put_u32(text.len() as u32);
    out.put_slice(text);
    out
}

/// A client that asked for TLS and waits for the answer.
fn asking() -> Client {
    let wish = Wish { goal: Goal::Go(String::new()), replies: ReplyStyle::Structured, contexts: Vec::new() };
    let mut client = Client::with_tls(wish);
    assert_eq!(client.receive(&greeting()), Ok(Progress::Waiting));
    let mut first = BytesMut::from(&FLAGS.to_be_bytes()[..]);
    first.extend_from_slice(&option(OptionKind::StartTls, &[]));
    assert_eq!(client.take_output(), first, "nothing is asked before TLS");
    client
}

#[test]
fn a_client_that_wants_tls_has_it_or_nothing() {
    for refusal in [OptionReplyKind::ErrUnsupported, OptionReplyKind::ErrPolicy, OptionReplyKind::ErrInvalid]
    {
        let mut client = asking();
        let error = client.receive(&answer(refusal, b"no")).unwrap_err();
        let HandshakeError::Refused { kind, reply, text } = error else { panic!("{error}") };
        assert_eq!((kind, reply, text.as_str()), (OptionKind::StartTls, refusal, "no"));
        assert!(client.take_output().is_empty(), "nothing is asked without TLS");
    }
    let mut client = asking();
    assert_eq!(client.receive(&answer(OptionReplyKind::Ack, &[])), Ok(Progress::StartTls));
    assert!(client.take_output().is_empty());
    client.secured();
    assert_eq!(client.take_output(), option(OptionKind::StructuredReply, &[]));
}

#[test]
fn a_client_takes_no_plain_byte_after_the_reply_to_starttls() {
    let mut granted = answer(OptionReplyKind::Ack, &[]);
    granted.put_u8(0x16);
    assert_eq!(asking().receive(&granted), Err(HandshakeError::PlainAfterStartTls));
    let mut client = asking();
    assert_eq!(client.receive(&granted[..20]), Ok(Progress::StartTls));
    assert_eq!(client.receive(&granted[20..]), Err(HandshakeError::PlainAfterStartTls));
}
