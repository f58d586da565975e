//! The server's handshake with options in any order, twice, refused, too long, and too many.

mod common;

use bytes::{BufMut, BytesMut};
use common::{Exports, Server};
use proto::server::{Ending, Handshake, Step};
use proto::wire::{
    CLIENT_OPTION_MAGIC, MAX_OPTION_BYTES, OPTION_REPLY_MAGIC, Reader, ReplyStyle, TransmissionFlags,
    max_options,
};

const FIXED_NO_ZEROES: u32 = 3;
const ACK: u32 = 1;
const META: u32 = 4;
const UNSUPPORTED: u32 = 0x8000_0001;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;
const EXTENDED_REQUIRED: u32 = 0x8000_000a;

fn option(kind: u32, data: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u64(CLIENT_OPTION_MAGIC);
    out.put_u32(kind);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    let mut out = (name.len() as u32).to_be_bytes().to_vec();
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(rest);
    out
}

fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut rest = (queries.len() as u32).to_be_bytes().to_vec();
    for query in queries {
        rest.extend_from_slice(&named(query, &[]));
    }
    named(name, &rest)
}

/// A server past the greeting, whose replies are read as (option, kind, data).
struct Talk(Server);

impl Talk {
    fn new(flags: u32) -> Self {
        let mut server = Server::new();
        assert_eq!(server.take_output().len(), 18);
        server.receive(&flags.to_be_bytes());
        Self(server)
    }

    fn ask(&mut self, kind: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.0.receive(&option(kind, data));
        let output = self.0.take_output();
        let mut reader = Reader::new(&output);
        let mut replies = Vec::new();
        while reader.remaining() > 0 {
            assert_eq!(reader.u64(), Ok(OPTION_REPLY_MAGIC));
            assert_eq!(reader.u32(), Ok(kind));
            let reply = reader.u32().expect("a reply's kind");
            let len = reader.u32().expect("a reply's length") as usize;
            replies.push((reply, reader.bytes(len).expect("a reply's data").to_vec()));
        }
        replies
    }

    fn kinds(&mut self, kind: u32, data: &[u8]) -> Vec<u32> {
        self.ask(kind, data).into_iter().map(|(reply, _)| reply).collect()
    }
}

#[test]
fn what_is_not_offered_yet_is_refused_and_the_handshake_goes_on() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    assert_eq!(talk.kinds(5, &[]), [POLICY], "STARTTLS");
    assert_eq!(talk.kinds(4711, b"whatever"), [UNSUPPORTED]);
    assert_eq!(talk.kinds(7, &named("disk0", &[0, 0])), [3, ACK]);
    assert!(talk.0.agreed.is_some());
}

#[test]
fn extended_headers_can_be_had_before_and_after_structured_replies_and_are_not_given_up() {
    for before in [&[][..], &[8]] {
        let mut talk = Talk::new(FIXED_NO_ZEROES);
        for option in before {
            assert_eq!(talk.kinds(*option, &[]), [ACK]);
        }
        assert_eq!(talk.kinds(11, b"x"), [INVALID], "it takes no data");
        assert_eq!(talk.kinds(11, &[]), [ACK]);
        assert_eq!(talk.kinds(11, &[]), [ACK], "twice is the same as once");
        assert_eq!(talk.kinds(8, b"x"), [INVALID]);
        assert_eq!(talk.kinds(8, &[]), [EXTENDED_REQUIRED]);
        assert_eq!(talk.kinds(10, &queries("disk0", &["base:allocation"])), [META, ACK]);
        assert_eq!(talk.kinds(7, &named("disk0", &[0, 0])), [3, ACK]);
        let agreed = talk.0.agreed.unwrap();
        assert_eq!((agreed.replies, agreed.contexts.len()), (ReplyStyle::Extended, 1));
        assert!(agreed.info.flags.contains(TransmissionFlags::SEND_DF));
    }
}

#[test]
fn contexts_selected_before_extended_headers_stay_selected() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    assert_eq!(talk.kinds(8, &[]), [ACK]);
    assert_eq!(talk.kinds(10, &queries("disk0", &["base:allocation"])), [META, ACK]);
    assert_eq!(talk.kinds(11, &[]), [ACK]);
    talk.kinds(7, &named("disk0", &[0, 0]));
    assert_eq!(talk.0.agreed.unwrap().contexts.len(), 1);
}

#[test]
fn filtering_is_offered_with_extended_headers_to_those_who_selected_or_only_ask() {
    let flags = |replies: &[(u32, Vec<u8>)]| {
        let export = &replies[0].1;
        TransmissionFlags::from_bits(u16::from_be_bytes([export[10], export[11]]))
    };
    let filters =
        |replies: &[(u32, Vec<u8>)]| flags(replies).contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
    for (replies, selected, told_on_info, told_on_go) in [
        (8, &["base:allocation"][..], false, false),
        (11, &[][..], true, false),
        (11, &["base:allocation"][..], true, true),
    ] {
        let mut talk = Talk::new(FIXED_NO_ZEROES);
        talk.kinds(replies, &[]);
        talk.kinds(10, &queries("disk0", selected));
        assert_eq!(filters(&talk.ask(6, &named("disk0", &[0, 0]))), told_on_info);
        assert_eq!(filters(&talk.ask(7, &named("disk0", &[0, 0]))), told_on_go, "{replies} {selected:?}");
    }
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    talk.kinds(11, &[]);
    talk.kinds(10, &queries("disk0", &["base:allocation"]));
    assert!(!filters(&talk.ask(7, &named("disk1", &[0, 0]))), "they were selected on another export");
}

#[test]
fn export_name_cannot_have_extended_headers() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    assert_eq!(talk.kinds(11, &[]), [ACK]);
    talk.0.receive(&option(1, b"disk0"));
    assert!(talk.0.closed && talk.0.agreed.is_none() && talk.0.take_output().is_empty());
}

#[test]
fn contexts_of_another_export_do_not_follow_to_transmission() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    assert_eq!(talk.kinds(8, &[]), [ACK]);
    assert_eq!(talk.kinds(10, &queries("disk0", &["base:allocation"])), [META, ACK]);
    assert_eq!(talk.kinds(6, &named("disk0", &[0, 0])), [3, ACK]);
    assert_eq!(talk.kinds(7, &named("disk1", &[0, 0])), [3, ACK]);
    assert!(talk.0.agreed.unwrap().contexts.is_empty());
}

#[test]
fn contexts_of_the_default_export_hold_under_its_own_name() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    talk.kinds(8, &[]);
    talk.kinds(10, &queries("", &["base:allocation", "qemu:dirty-bitmap:restore"]));
    talk.kinds(7, &named("disk0", &[0, 0]));
    assert_eq!(talk.0.agreed.unwrap().contexts.len(), 2);
}

#[test]
fn a_second_selection_replaces_the_first_even_when_it_fails() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    assert_eq!(talk.kinds(10, &queries("disk0", &["base:allocation"])), [INVALID], "not before replies");
    assert_eq!(talk.kinds(8, &[]), [ACK]);
    assert_eq!(talk.kinds(8, &[]), [ACK], "twice is the same as once");
    assert_eq!(talk.kinds(10, &queries("disk0", &["base:allocation"])), [META, ACK]);
    assert_eq!(talk.kinds(10, &queries("disk0", &["noNamespace"])), [INVALID]);
    talk.kinds(7, &named("disk0", &[0, 0]));
    assert!(talk.0.agreed.unwrap().contexts.is_empty());
}

#[test]
fn listing_contexts_takes_wildcards_and_selects_nothing() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    talk.kinds(8, &[]);
    assert_eq!(talk.kinds(9, &queries("disk0", &[])), [META, META, META, ACK]);
    assert_eq!(talk.kinds(9, &queries("disk0", &["qemu:"])), [META, META, ACK]);
    assert_eq!(talk.kinds(9, &queries("disk1", &["qemu:dirty-bitmap:"])), [ACK]);
    assert_eq!(talk.kinds(9, &queries("disk0", &["x-other:thing"])), [ACK]);
    assert_eq!(talk.kinds(9, &queries("nobody", &[])), [UNKNOWN]);
    assert_eq!(talk.kinds(10, &queries("disk0", &["qemu:", "base:"])), [ACK], "no wildcard selects");
    talk.kinds(7, &named("disk0", &[0, 0]));
    assert!(talk.0.agreed.unwrap().contexts.is_empty());
}

#[test]
fn lengths_that_lie_are_invalid_and_desynchronise_nothing() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    talk.kinds(8, &[]);
    let mut lying_name = named("disk0", &[0, 0]);
    lying_name[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let long_name = named(&"n".repeat(4097), &[0, 0]);
    for data in [
        &lying_name[..],
        &[],
        &[0, 0, 0],
        &named("disk0", &[0, 9, 0]),
        &named("disk0", &[0, 0, 0]),
        &long_name,
    ] {
        assert_eq!(talk.kinds(6, data), [INVALID], "{} bytes", data.len());
        assert_eq!(talk.kinds(7, data), [INVALID], "{} bytes", data.len());
    }
    assert_eq!(talk.kinds(3, b"x"), [INVALID], "LIST takes no data");
    let mut many = named("disk0", &u32::MAX.to_be_bytes());
    assert_eq!(talk.kinds(10, &many), [TOO_BIG]);
    many[12] = 1;
    assert_eq!(talk.kinds(3, &[]), [2, 2, ACK]);
}

#[test]
fn contexts_are_asked_for_by_so_many_queries_and_no_more() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    talk.kinds(8, &[]);
    let most = vec!["base:allocation"; 256];
    assert_eq!(talk.kinds(10, &queries("disk0", &most)), [META, ACK]);
    let more = vec!["base:allocation"; 257];
    for kind in [9, 10] {
        assert_eq!(talk.kinds(kind, &queries("disk0", &more)), [TOO_BIG]);
    }
    assert_eq!(talk.kinds(3, &[]), [2, 2, ACK], "the handshake goes on");
}

#[test]
fn an_option_that_is_too_long_ends_the_handshake_before_its_data_is_there() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    let header = &option(3, &vec![0; MAX_OPTION_BYTES + 1])[..16];
    talk.0.receive(header);
    assert!(talk.0.closed);
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    assert_eq!(talk.kinds(3, &vec![0; MAX_OPTION_BYTES]), [INVALID]);
    assert!(!talk.0.closed);
}

#[test]
fn one_option_too_many_ends_the_handshake() {
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    // It lists two exports.
    for _ in 0..max_options(2) {
        assert_eq!(talk.kinds(8, &[]), [ACK]);
    }
    assert_eq!(talk.kinds(8, &[]), [POLICY]);
    assert!(talk.0.closed);
}

#[test]
fn unknown_client_flags_and_wrong_magic_end_the_handshake() {
    assert!(Talk::new(4).0.closed);
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    talk.0.receive(b"GET / HTTP/1.1\r\n");
    assert!(talk.0.closed);
}

#[test]
fn export_name_begins_with_and_without_zeroes_and_closes_where_it_cannot() {
    for (flags, len) in [(3, 10), (1, 134), (0, 134)] {
        let mut talk = Talk::new(flags);
        talk.0.receive(&option(1, b"disk1"));
        assert_eq!(talk.0.take_output().len(), len);
        assert!(talk.0.agreed.is_some());
    }
    let mut talk = Talk::new(3);
    talk.0.receive(&option(1, b"nobody"));
    assert!(talk.0.closed && talk.0.take_output().is_empty());
}

#[test]
fn what_follows_the_last_option_is_kept_for_transmission() {
    let mut handshake = Handshake::new();
    handshake.receive(&FIXED_NO_ZEROES.to_be_bytes());
    handshake.receive(&option(7, &named("", &[0, 0])));
    handshake.receive(b"requests");
    assert_eq!(handshake.step(&Exports::two()), Step::Answered);
    assert!(matches!(handshake.step(&Exports::two()), Step::Transmission(_)));
    assert_eq!(&handshake.into_rest()[..], b"requests");
}

#[test]
fn abort_is_acknowledged() {
    let mut handshake = Handshake::new();
    handshake.receive(&FIXED_NO_ZEROES.to_be_bytes());
    handshake.receive(&option(2, &[]));
    handshake.step(&Exports::two());
    handshake.take_output();
    assert_eq!(handshake.step(&Exports::two()), Step::Closed(Ending::Aborted));
    assert_eq!(handshake.take_output().len(), 20);
}

#[test]
fn a_former_name_is_refused_by_policy_with_the_reason_and_the_handshake_goes_on() {
    const INFO: u32 = 6;
    const GO: u32 = 7;
    let mut talk = Talk::new(FIXED_NO_ZEROES);
    for kind in [INFO, GO] {
        assert_eq!(talk.ask(kind, &named("former", &[0, 0])), [(POLICY, b"it is no more".to_vec())]);
        assert_eq!(talk.ask(kind, &named("never", &[0, 0])), [(UNKNOWN, b"no such export".to_vec())]);
    }
    assert_eq!(talk.ask(INFO, &named("disk0", &[0, 0])).last().unwrap().0, ACK);
}
