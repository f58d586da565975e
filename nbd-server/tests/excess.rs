//! What no client should ask, one by one: it is refused, or costs its connection, and nothing is allocated or waited for.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{Client, MemoryDisk, STYLES, Served, assert_closed, begin_hand_made, option};
use nbd_server::{Limits, ServerOptions};
use proto::wire::{
    CommandFlags, CommandKind, Errno, MAX_NAME_BYTES, MAX_OPTION_BYTES, ReplyStyle, max_options,
};

const SIZE: u64 = 1 << 20;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const SET_META_CONTEXT: u32 = 10;
const EXTENDED_HEADERS: u32 = 11;

const ACK: u32 = 1;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_POLICY: u32 = 0x8000_0002;
const ERR_TOO_BIG: u32 = 0x8000_0009;
const ERR_UNKNOWN: u32 = 0x8000_0006;
const ERR_EXTENDED_HEADERS_REQUIRED: u32 = 0x8000_000a;

fn served() -> Served {
    Served::new(MemoryDisk::new(SIZE as usize), ServerOptions::default())
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().unwrap())
}

/// The kind of the last reply to an option, and how many came before it.
fn answer(socket: &mut UnixStream) -> (u32, usize) {
    for before in 0.. {
        let mut head = [0; 20];
        socket.read_exact(&mut head).unwrap();
        let mut data = vec![0; number(&head[16..]) as usize];
        socket.read_exact(&mut data).unwrap();
        let kind = number(&head[12..16]);
        if kind == ACK || kind >> 31 == 1 {
            return (kind, before);
        }
    }
    unreachable!("it ends by a reply")
}

fn ask(socket: &mut UnixStream, kind: u32, data: &[u8]) -> (u32, usize) {
    socket.write_all(&option(kind, data)).unwrap();
    answer(socket)
}

fn with_name(name: &str, rest: &[u8]) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), rest].concat()
}

fn selecting(name: &str) -> Vec<u8> {
    with_name(name, &[&[0, 0, 0, 1, 0, 0, 0, 15][..], b"base:allocation"].concat())
}

#[test]
fn an_option_one_byte_too_long_is_refused_before_its_data_is_there() {
    let served = served();
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    assert_eq!(ask(&mut socket, LIST, &vec![0; MAX_OPTION_BYTES]).0, ERR_INVALID);
    let long = option(LIST, &vec![0; MAX_OPTION_BYTES + 1]);
    socket.write_all(&long[..16]).unwrap();
    assert_eq!(answer(&mut socket).0, ERR_TOO_BIG);
    assert_closed(&mut socket);
    served.check_health();
    served.end();
}

#[test]
fn a_name_one_byte_too_long_is_invalid_where_the_longest_is_only_unknown() {
    let served = served();
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    let longest = "a".repeat(MAX_NAME_BYTES);
    let too_long = "a".repeat(MAX_NAME_BYTES + 1);
    ask(&mut socket, STRUCTURED_REPLY, &[]);
    for kind in [INFO, GO] {
        assert_eq!(ask(&mut socket, kind, &with_name(&longest, &[0, 0])).0, ERR_UNKNOWN);
        assert_eq!(ask(&mut socket, kind, &with_name(&too_long, &[0, 0])).0, ERR_INVALID);
    }
    assert_eq!(ask(&mut socket, SET_META_CONTEXT, &selecting(&longest)).0, ERR_UNKNOWN);
    assert_eq!(ask(&mut socket, SET_META_CONTEXT, &selecting(&too_long)).0, ERR_INVALID);
    // Its length may also lie.
    let mut lying = with_name("disk0", &[0, 0]);
    lying[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(ask(&mut socket, GO, &lying).0, ERR_INVALID);
    assert_eq!(ask(&mut socket, GO, &with_name("disk0", &[0, 0])).0, ACK);
    for name in [&longest, &too_long] {
        let mut socket = begin_hand_made(&served.path, 3).unwrap();
        socket.write_all(&option(EXPORT_NAME, name.as_bytes())).unwrap();
        assert_closed(&mut socket);
    }
    drop(socket);
    served.check_health();
    served.end();
}

#[test]
fn the_option_after_the_last_that_is_allowed_ends_the_handshake() {
    let served = served();
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    // It lists two names.
    for _ in 1..max_options(2) {
        assert_eq!(ask(&mut socket, LIST, &[]), (ACK, 2));
    }
    assert_eq!(ask(&mut socket, 4711, &[]).0, 0x8000_0001, "unknown options count too");
    assert_eq!(ask(&mut socket, GO, &with_name("disk0", &[0, 0])).0, ERR_POLICY);
    assert_closed(&mut socket);
    served.check_health();
    served.end();
}

#[test]
fn a_byte_now_and_then_for_ever_lasts_as_long_as_a_handshake_may() {
    let limits = Limits { handshake_timeout: Duration::from_millis(300), ..Limits::default() };
    let served =
        Served::new(MemoryDisk::new(SIZE as usize), ServerOptions { limits, ..ServerOptions::default() });
    // Of the flags, of an option's head, and of its data.
    let message = [&3_u32.to_be_bytes()[..], &option(GO, &[0; 60_000])].concat();
    let dribblers = (0..30).map(|at| {
        let mut socket = UnixStream::connect(&served.path).unwrap();
        let begun = message.len() * at / 30;
        socket.write_all(&message[..begun]).unwrap();
        (socket, begun)
    });
    let mut dribblers: Vec<_> = dribblers.collect();
    // They end by the server's closing, not by ours: what they have to say lasts longer than the limit.
    let mut says_more = true;
    while says_more {
        says_more = false;
        for (socket, at) in &mut dribblers {
            if *at + 1 < message.len() && socket.write_all(&message[*at..=*at]).is_ok() {
                *at += 1;
                says_more = true;
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    for (socket, at) in &mut dribblers {
        assert!(*at + 1 < message.len(), "it came to the end of its message");
        assert_closed(socket);
    }
    served.check_health();
    served.end();
}

#[test]
fn a_write_of_four_gibibytes_is_neither_waited_for_nor_allocated() {
    let served = served();
    for (style, len) in [
        (ReplyStyle::Simple, u64::from(u32::MAX)),
        (ReplyStyle::Structured, u64::from(u32::MAX)),
        (ReplyStyle::Extended, 1 << 32),
        (ReplyStyle::Extended, 1 << 63),
        (ReplyStyle::Extended, u64::MAX),
    ] {
        for offset in [0, u64::MAX] {
            let mut client = served.client_with(style);
            let header = client.header(CommandKind::Write, CommandFlags::NONE, offset, len);
            client.socket.write_all(&client.encode(&header)).unwrap();
            // It closes without waiting for any of it.
            client.assert_closed();
            assert_eq!(served.handle.stats().memory_bytes, 0, "{style:?} {len}");
        }
    }
    // Other payloads are as long as they say.
    let mut client = served.client_with(ReplyStyle::Extended);
    let header = client.header(CommandKind::BlockStatus, CommandFlags::PAYLOAD_LEN, 0, 1 << 63);
    client.socket.write_all(&client.encode(&header)).unwrap();
    client.assert_closed();
    served.check_health();
    served.end();
}

#[test]
fn lengths_that_wrap_are_refused_and_the_conversation_goes_on() {
    let served = served();
    for style in STYLES {
        let mut client = served.client_with(style);
        let most = if style.is_extended() { u64::MAX } else { u64::from(u32::MAX) };
        for kind in [
            CommandKind::Read,
            CommandKind::Trim,
            CommandKind::WriteZeroes,
            CommandKind::Cache,
            CommandKind::BlockStatus,
        ] {
            let errno = if kind == CommandKind::WriteZeroes { Errno::NoSpace } else { Errno::Invalid };
            for (offset, len) in [
                (u64::MAX, 1),
                (u64::MAX, most),
                (u64::MAX - 4095, 4096),
                (u64::MAX - 4095, 4097),
                (1, most),
                (SIZE, 1),
                (SIZE - 1, most),
                // Truncated to 32 bits it would fit.
                (1 << 32, 4096),
                (1 << 63, 4096),
            ] {
                let reply = client.call(kind, CommandFlags::NONE, offset, len, &[]);
                assert_eq!(reply.result, Err(errno), "{style:?} {kind:?} {offset} {len}");
            }
        }
        for offset in [u64::MAX, u64::MAX - 4095, SIZE, SIZE - 4095, 1 << 32] {
            assert_eq!(client.write(offset, &[1; 4096]).result, Err(Errno::NoSpace), "{style:?} {offset}");
        }
        assert_eq!(client.read(0, 4096).data, [0; 4096]);
        client.disconnect();
    }
    assert!(served.disk.bytes().iter().all(|byte| *byte == 0));
    served.check_health();
    served.end();
}

#[test]
fn options_out_of_order_or_twice_are_refused_or_hold_as_they_were_last_said() {
    let served = served();
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    // Contexts before structured replies, and these twice.
    assert_eq!(ask(&mut socket, SET_META_CONTEXT, &selecting("disk0")).0, ERR_INVALID);
    assert_eq!(ask(&mut socket, STRUCTURED_REPLY, &[]), (ACK, 0));
    assert_eq!(ask(&mut socket, STRUCTURED_REPLY, &[]), (ACK, 0));
    assert_eq!(ask(&mut socket, EXTENDED_HEADERS, &[]), (ACK, 0));
    assert_eq!(ask(&mut socket, EXTENDED_HEADERS, &[]), (ACK, 0));
    assert_eq!(ask(&mut socket, STRUCTURED_REPLY, &[]), (ERR_EXTENDED_HEADERS_REQUIRED, 0));
    // EXPORT_NAME cannot say no but by closing.
    socket.write_all(&option(EXPORT_NAME, b"disk0")).unwrap();
    assert_closed(&mut socket);

    // Nothing is an option any more once GO was granted: it is a request that nobody understands.
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    assert_eq!(ask(&mut socket, GO, &with_name("disk0", &[0, 0])).0, ACK);
    let _ = socket.write_all(&[&option(LIST, &[])[..], &[0; 64]].concat());
    assert_closed(&mut socket);

    // Nor after ABORT.
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    let _ = socket.write_all(&[option(ABORT, &[]), option(LIST, &[])].concat());
    assert_eq!(answer(&mut socket), (ACK, 0));
    assert_closed(&mut socket);
    served.check_health();
    served.end();
}

#[test]
fn what_was_said_of_another_export_does_not_count_for_this_one() {
    let served = served();
    let flags_of = |data: &[u8]| u16::from_be_bytes(data[30..32].try_into().unwrap());
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    ask(&mut socket, STRUCTURED_REPLY, &[]);
    assert_eq!(ask(&mut socket, SET_META_CONTEXT, &selecting("disk0")), (ACK, 1));
    let mut told = Vec::new();
    // The read-only one is looked at, then another is taken; and the other way round.
    for (kind, name) in [(INFO, "frozen"), (INFO, "disk0"), (INFO, "nobody"), (GO, "frozen")] {
        socket.write_all(&option(kind, &with_name(name, &[0, 0]))).unwrap();
        if name == "nobody" {
            assert_eq!(answer(&mut socket).0, ERR_UNKNOWN);
            continue;
        }
        let mut info = [0; 20 + 12];
        socket.read_exact(&mut info).unwrap();
        assert_eq!(answer(&mut socket), (ACK, 0));
        told.push(flags_of(&info) & 2 != 0);
    }
    assert_eq!(told, [true, false, true], "which of them are read-only");
    // Transmission is of the last: no write, and no context, which was selected on the other.
    for (kind, payload) in [(CommandKind::Write, &[1; 512][..]), (CommandKind::BlockStatus, &[])] {
        let header = proto::wire::RequestHeader {
            flags: CommandFlags::NONE,
            kind,
            cookie: proto::wire::Cookie(3),
            offset: 0,
            len: 512,
        };
        socket.write_all(&[&header.encode(ReplyStyle::Structured)[..], payload].concat()).unwrap();
        let mut chunk = [0; 20];
        socket.read_exact(&mut chunk[..16]).unwrap();
        let code = match number(&chunk[..4]) {
            proto::wire::SIMPLE_REPLY_MAGIC => number(&chunk[4..8]),
            _ => {
                socket.read_exact(&mut chunk[16..]).unwrap();
                let mut error = vec![0; number(&chunk[16..]) as usize];
                socket.read_exact(&mut error).unwrap();
                number(&error[..4])
            }
        };
        let errno = if kind == CommandKind::Write { Errno::NotPermitted } else { Errno::Invalid };
        assert_eq!(Errno::from_code(code), errno, "{kind:?}");
    }
    drop(socket);
    assert!(served.disk.bytes().iter().all(|byte| *byte == 0));
    served.check_health();
    served.end();
}

#[test]
fn a_client_that_vanishes_with_64_requests_in_flight_costs_nothing_but_their_end() {
    for style in STYLES {
        let served = Served::new(MemoryDisk::new(SIZE as usize).slow(), ServerOptions::default());
        served.disk.close_gate();
        let mut client: Client = served.client_with(style);
        for number in 0..16 {
            let at = number * 4096;
            client.send(CommandKind::Read, CommandFlags::NONE, at, 100_000, &[]);
            client.send(CommandKind::Write, CommandFlags::FUA, at, 4096, &[1; 4096]);
            client.send(CommandKind::WriteZeroes, CommandFlags::NONE, at, 4096, &[]);
            client.send(CommandKind::Cache, CommandFlags::NONE, at, 4096, &[]);
        }
        served.disk.wait_for_waiting(64);
        drop(client);
        assert_eq!(served.handle.stats().operations, 64);
        // Meanwhile nobody else is held up.
        let mut other = served.client();
        assert_eq!(other.read(SIZE, 1).result, Err(Errno::Invalid));
        other.disconnect();
        served.disk.open_gate();
        served.check_health();
        served.end();
    }
}
