//! Requests that are longer than their connection's share, where others hold all that is common for ever: they go on in parts.

mod common;

use std::time::Duration;

use block::ErrorKind;
use common::{Client, MemoryDisk, STYLES, Served, conversation, descriptors, option, talk};
use nbd_server::{Limits, ServerOptions};
use proto::wire::{CommandFlags, CommandKind, Cookie, Errno, ReplyStyle, RequestHeader};

const DISK_BYTES: usize = 8 << 20;
const COMMON_BYTES: u64 = 32 << 20;
const SHARE_BYTES: u64 = 4 << 20;
/// The length of a part.
const PART_BYTES: u64 = 1 << 20;
const FOR_EVER: Duration = Duration::from_secs(3600);

/// A server with 32 MiB of common memory, and 4 for each connection.
fn served(patience_when_wanted: Duration) -> Served {
    let limits = Limits {
        memory_bytes: 2 * COMMON_BYTES,
        request_bytes: DISK_BYTES as u32,
        connections: (COMMON_BYTES / SHARE_BYTES) as usize,
        patience_when_wanted,
        shutdown_grace: Duration::from_millis(100),
        ..Limits::default()
    };
    Served::new(MemoryDisk::new(DISK_BYTES).slow(), ServerOptions { limits, ..ServerOptions::default() })
}

/// Clients that announce a write and send nothing of it, until they hold all that is common.
fn greedy(served: &Served) -> Vec<Client> {
    let before = served.handle.stats().memory_bytes;
    let clients = (0..COMMON_BYTES / DISK_BYTES as u64)
        .map(|_| {
            let mut client = served.simple_client();
            client.send(CommandKind::Write, CommandFlags::NONE, 0, DISK_BYTES as u64, &[]);
            client
        })
        .collect();
    served.wait_for(|stats| stats.memory_bytes == before + COMMON_BYTES);
    clients
}

/// Bytes of which none is zero, and no two parts are the same.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 251 + at) as u8 | 1).collect()
}

#[test]
fn what_is_read_in_parts_is_what_is_there_in_every_kind_of_replies() {
    let served = served(FOR_EVER);
    let all = pattern(DISK_BYTES);
    served.disk.bytes().copy_from_slice(&all);
    let greedy = greedy(&served);
    for style in STYLES {
        let mut client = served.client_with(style);
        for (offset, len) in [(0, DISK_BYTES), (4097, (5 << 20) + 3), (1, DISK_BYTES - 1)] {
            let reply = client.read(offset as u64, len as u64);
            assert_eq!(reply.result, Ok(()));
            assert!(reply.data == all[offset..offset + len], "{style:?} {offset} {len}");
            let parts = (offset + len).div_ceil(PART_BYTES as usize) - offset / PART_BYTES as usize;
            if style != ReplyStyle::Simple {
                assert_eq!(reply.chunks, parts, "{style:?} {offset} {len}");
                let one = client.call(CommandKind::Read, CommandFlags::DF, offset as u64, len as u64, &[]);
                assert!(one.data == all[offset..offset + len] && one.chunks == 1);
            }
        }
        assert_eq!(client.flush().result, Ok(()), "what comes after it is understood");
        client.disconnect();
    }
    drop(greedy);
    served.check_health();
    served.end();
}

#[test]
fn holes_are_told_of_between_parts() {
    let served = served(FOR_EVER);
    let all = pattern(DISK_BYTES);
    served.disk.bytes()[..3 << 20].copy_from_slice(&all[..3 << 20]);
    served.disk.bytes()[6 << 20..7 << 20].copy_from_slice(&all[..1 << 20]);
    let greedy = greedy(&served);
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        let mut client = served.client_with(style);
        let reply = client.read(0, DISK_BYTES as u64);
        assert_eq!(reply.result, Ok(()));
        assert!(reply.data == *served.disk.bytes());
        assert_eq!((reply.holes, reply.chunks), (2, 6), "{style:?}: a hole of 3 MiB and one of 1, 4 parts");
        client.disconnect();
    }
    drop(greedy);
    served.end();
}

#[test]
fn what_is_written_in_parts_is_there() {
    let served = served(FOR_EVER);
    let greedy = greedy(&served);
    for (number, style) in STYLES.into_iter().enumerate() {
        let mut client = served.client_with(style);
        let data = pattern(DISK_BYTES - 7000);
        let offset = 1000 + number;
        assert_eq!(client.write(offset as u64, &data).result, Ok(()));
        assert!(served.disk.bytes()[offset..offset + data.len()] == data);
        let flushes = served.disk.flushes();
        let reply = client.call(CommandKind::Write, CommandFlags::FUA, 0, 6 << 20, &data[..6 << 20]);
        assert_eq!(reply.result, Ok(()));
        assert!(served.disk.bytes()[..6 << 20] == data[..6 << 20]);
        assert_eq!(served.disk.flushes(), flushes + 1, "it is stable");
        assert_eq!(client.read(0, 4096).data, data[..4096]);
        client.disconnect();
    }
    drop(greedy);
    served.check_health();
    served.end();
}

#[test]
fn requests_around_one_in_parts_are_answered_too() {
    let served = served(FOR_EVER);
    let greedy = greedy(&served);
    for style in STYLES {
        let mut client = served.client_with(style);
        let data = pattern(DISK_BYTES);
        for number in 0..3 {
            client.send(CommandKind::Read, CommandFlags::NONE, 0, 4096, &[]);
            client.send(CommandKind::Write, CommandFlags::NONE, 0, DISK_BYTES as u64, &data);
            client.send(CommandKind::Read, CommandFlags::NONE, number << 12, 7 << 20, &[]);
            client.send(CommandKind::Read, CommandFlags::NONE, 1 << 20, 7 << 20, &[]);
            client.send(CommandKind::Flush, CommandFlags::NONE, 0, 0, &[]);
            for _ in 0..5 {
                let reply = client.receive().unwrap();
                assert_eq!(reply.result, Ok(()), "{style:?}");
                if reply.header.len > 1 << 20 && reply.header.kind == CommandKind::Read {
                    let start = reply.header.offset as usize;
                    assert!(reply.data == data[start..start + (7 << 20)], "{style:?}");
                }
            }
        }
        client.disconnect();
    }
    drop(greedy);
    served.end();
}

#[test]
fn a_read_that_fails_in_some_part_is_an_error_and_no_more() {
    let served = served(FOR_EVER);
    served.disk.bytes().copy_from_slice(&pattern(DISK_BYTES));
    let greedy = greedy(&served);
    for style in STYLES {
        let mut client = served.client_with(style);
        for good in [0, 3, 7] {
            // Where there are chunks, the device is asked for holes first, once.
            let asked = usize::from(style != ReplyStyle::Simple && good == 0);
            served.disk.fail_after(good + asked, ErrorKind::Damaged);
            let reply = client.read(0, DISK_BYTES as u64);
            assert_eq!(reply.result, Err(Errno::Io), "{style:?} {good}");
            if style != ReplyStyle::Simple {
                let (offset, why) = reply.failure.unwrap();
                assert_eq!(offset, Some(good as u64 * PART_BYTES), "{why}");
            }
            served.disk.mend();
            assert_eq!(client.read(5, DISK_BYTES as u64 - 5).result, Ok(()));
        }
        client.disconnect();
    }
    drop(greedy);
    served.check_health();
    served.end();
}

#[test]
fn a_simple_reply_that_cannot_be_gone_on_with_ends_its_connection() {
    let served = served(FOR_EVER);
    served.disk.bytes().copy_from_slice(&pattern(DISK_BYTES));
    let greedy = greedy(&served);
    let mut client = served.simple_client();
    // All of it can be read, and then no more than a part.
    served.disk.fail_after(8 + 3, ErrorKind::Io);
    client.send(CommandKind::Read, CommandFlags::NONE, 0, DISK_BYTES as u64, &[]);
    assert!(client.receive().is_err(), "it is closed in the middle of the reply");
    served.disk.mend();
    drop(greedy);
    served.check_health();
    served.end();
}

#[test]
fn a_write_that_fails_in_some_part_is_an_error_and_the_rest_of_its_payload_no_request() {
    let served = served(FOR_EVER);
    let greedy = greedy(&served);
    let data = pattern(DISK_BYTES);
    for style in STYLES {
        let mut client = served.client_with(style);
        for good in [0, 3, 7] {
            served.disk.fail_after(good, ErrorKind::NoSpace);
            assert_eq!(client.write(0, &data).result, Err(Errno::NoSpace), "{style:?} {good}");
            served.disk.mend();
            assert_eq!(client.read(0, 4096).result, Ok(()));
        }
        // The last operation is the flush that FUA asks for.
        served.disk.fail_after(8, ErrorKind::Io);
        let reply = client.call(CommandKind::Write, CommandFlags::FUA, 0, DISK_BYTES as u64, &data);
        assert_eq!(reply.result, Err(Errno::Io));
        assert!(reply.failure.is_none_or(|(offset, _)| offset.is_none()), "no part of it is stable");
        served.disk.mend();
        client.disconnect();
    }
    drop(greedy);
    served.check_health();
    served.end();
}

#[test]
fn who_takes_or_sends_no_parts_holds_no_more_than_its_share() {
    let served = served(FOR_EVER);
    served.disk.bytes().copy_from_slice(&pattern(DISK_BYTES));
    let greedy = greedy(&served);
    let mut deaf = served.client();
    deaf.send(CommandKind::Read, CommandFlags::NONE, 0, DISK_BYTES as u64, &[]);
    let mut mute = served.client();
    mute.send(
        CommandKind::Write,
        CommandFlags::NONE,
        0,
        DISK_BYTES as u64,
        &pattern(PART_BYTES as usize + 100),
    );
    let mut other = served.client();
    for _ in 0..10 {
        assert_eq!(other.read(0, DISK_BYTES as u64).result, Ok(()));
        assert!(served.handle.stats().memory_bytes <= COMMON_BYTES + 3 * SHARE_BYTES);
    }
    assert!(deaf.receive().unwrap().data == pattern(DISK_BYTES));
    drop((deaf, mute, other, greedy));
    served.check_health();
    served.end();
}

#[test]
fn who_holds_what_is_common_and_does_nothing_is_closed_though_others_go_on_in_parts() {
    let served = served(Duration::from_millis(20));
    let greedy = greedy(&served);
    let mut client = served.client();
    while served.handle.stats().connections > greedy.len() {
        assert_eq!(client.write(0, &pattern(DISK_BYTES)).result, Ok(()));
    }
    assert_eq!(client.flush().result, Ok(()), "it was one of the others");
    drop((client, greedy));
    served.check_health();
    served.end();
}

#[test]
fn one_request_that_had_to_do_without_is_enough_for_that() {
    let served = served(Duration::from_millis(200));
    let greedy = greedy(&served);
    let mut client = served.client();
    assert_eq!(client.read(0, DISK_BYTES as u64).result, Ok(()));
    served.wait_for(|stats| stats.connections <= greedy.len());
    assert_eq!(client.flush().result, Ok(()), "it was one of the others");
    drop((client, greedy));
    served.check_health();
    served.end();
}

#[test]
fn what_is_in_parts_when_the_server_ends_ends_too() {
    for write in [false, true] {
        let served = served(FOR_EVER);
        let greedy = greedy(&served);
        served.disk.close_gate();
        let mut client = served.simple_client();
        if write {
            client.send(
                CommandKind::Write,
                CommandFlags::NONE,
                0,
                DISK_BYTES as u64,
                &pattern(PART_BYTES as usize + 100),
            );
        } else {
            client.send(CommandKind::Read, CommandFlags::NONE, 0, DISK_BYTES as u64, &[]);
        }
        served.disk.wait_for_waiting(1);
        drop(greedy);
        served.handle.shutdown();
        served.disk.open_gate();
        // A READ is answered; the payload of a WRITE that has not come is not waited for.
        let reply = client.receive();
        assert!(write || reply.unwrap().result == Ok(()));
        served.end();
    }
}

#[test]
fn a_connection_that_dies_in_some_part_costs_nothing_but_itself() {
    // Shares of 40 KiB, so that what is read and written here is in parts, and 34 requests that hold the rest.
    let limits =
        Limits { memory_bytes: 4 << 20, request_bytes: 64 << 10, connections: 48, ..Limits::default() };
    let served =
        Served::new(MemoryDisk::new(1 << 20).slow(), ServerOptions { limits, ..ServerOptions::default() });
    served.disk.bytes().fill(7);
    served.check_health();
    let before = descriptors();
    let holders: Vec<Client> = (0..34)
        .map(|_| {
            let mut client = served.simple_client();
            client.send(CommandKind::Write, CommandFlags::FUA, 0, 64 << 10, &[]);
            client
        })
        .collect();
    served.wait_for(|stats| stats.memory_bytes == 34 << 16);
    let len = 60_000_u32;
    let mut client = served.client();
    assert_eq!(client.read(0, len.into()).chunks, 3, "it is in parts");
    client.disconnect();
    served.wait_for(|stats| stats.connections == holders.len());
    let write = RequestHeader {
        flags: CommandFlags::FUA,
        kind: CommandKind::Write,
        cookie: Cookie(9),
        offset: 4096,
        len: len.into(),
    };
    let by_name = [
        &3_u32.to_be_bytes()[..],
        &option(1, b"disk0"),
        &write.encode(ReplyStyle::Simple),
        &vec![7; len as usize],
        &write.encode(ReplyStyle::Simple),
        &vec![7; len as usize],
    ];
    let held = served.handle.stats();
    for (conversation, step) in
        STYLES.map(|style| (conversation(style), 7)).into_iter().chain([(by_name.concat(), 509)])
    {
        for cut in (0..=conversation.len()).step_by(step) {
            talk(&served.path, &conversation[..cut], cut % 3);
        }
        served.wait_for(|stats| stats == held);
    }
    drop(holders);
    served.check_health();
    assert_eq!(descriptors(), before);
    served.end();
}
