//! A long valid conversation, cut after every byte of it: the server still serves, and nothing is left over.
//! Alone in its process, so that its descriptors can be counted.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use common::{MemoryDisk, Served, assert_closed, option};
use nbd_server::ServerOptions;
use proto::wire::{CommandFlags, CommandKind, ContextFilter, ContextId, Cookie, ReplyStyle, RequestHeader};

fn named(rest: &[u8]) -> Vec<u8> {
    let mut out = 5_u32.to_be_bytes().to_vec();
    out.extend_from_slice(b"disk0");
    out.extend_from_slice(rest);
    out
}

/// Every kind of option and request, as a client might send it without waiting.
fn conversation(style: ReplyStyle) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    let mut query = 1_u32.to_be_bytes().to_vec();
    query.extend_from_slice(&15_u32.to_be_bytes());
    query.extend_from_slice(b"base:allocation");
    // Extended headers are asked for on top of structured replies, and then never given up.
    let extended: &[u32] = if style.is_extended() { &[8, 11, 8] } else { &[8] };
    for kind in extended {
        bytes.extend_from_slice(&option(*kind, &[]));
    }
    for (kind, data) in [
        (3, vec![]),
        (6, named(&[0, 1, 0, 3])),
        (9, named(&[0; 4])),
        (10, named(&query)),
        (5, vec![]),
        (7, named(&[0, 0])),
    ] {
        bytes.extend_from_slice(&option(kind, &data));
    }
    let payload_flag = CommandFlags::NONE.with_if(style.is_extended(), CommandFlags::PAYLOAD_LEN);
    let mut request = |kind, flags: CommandFlags, offset, len: u64| {
        let cookie = Cookie(bytes.len() as u64);
        let flags = flags.with_if(kind == CommandKind::Write, payload_flag);
        let header = RequestHeader { flags, kind, cookie, offset, len };
        bytes.extend_from_slice(&header.encode(style));
        bytes.extend_from_slice(&vec![0xab; header.payload_len(style) as usize]);
    };
    request(CommandKind::Write, CommandFlags::NONE, 100, 200);
    request(CommandKind::Read, CommandFlags::NONE, 0, 50_000);
    request(CommandKind::Write, CommandFlags::FUA, 4096, 300);
    request(CommandKind::Write, CommandFlags::NONE, u64::MAX - 5, 100);
    request(CommandKind::Read, CommandFlags::DF, 0, 40_000);
    request(CommandKind::Trim, CommandFlags::NONE, 0, 4096);
    request(CommandKind::WriteZeroes, CommandFlags::FUA, 4096, 4096);
    request(CommandKind::BlockStatus, CommandFlags::NONE, 0, 65536);
    request(CommandKind::Cache, CommandFlags::NONE, 0, 65536);
    request(CommandKind::Flush, CommandFlags::NONE, 0, 0);
    if style.is_extended() {
        request(CommandKind::Read, CommandFlags::PAYLOAD_LEN, 0, 100);
        request(CommandKind::Trim, CommandFlags::NONE, 0, 1 << 40);
        let payload = ContextFilter { len: 65536, contexts: vec![ContextId(1)] }.encode();
        request(CommandKind::BlockStatus, CommandFlags::PAYLOAD_LEN, 0, payload.len() as u64);
        let end = bytes.len();
        bytes[end - payload.len()..].copy_from_slice(&payload);
        let goodbye = RequestHeader {
            flags: CommandFlags::NONE,
            kind: CommandKind::Disconnect,
            cookie: Cookie(0),
            offset: 0,
            len: 0,
        };
        bytes.extend_from_slice(&goodbye.encode(style));
        return bytes;
    }
    request(CommandKind::Disconnect, CommandFlags::NONE, 0, 0);
    bytes
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("Linux has it").count()
}

fn talk(path: &Path, bytes: &[u8], how: usize) {
    let mut socket = UnixStream::connect(path).expect("the server listens");
    socket.write_all(bytes).expect("the server reads");
    match how {
        // Gone at once, its replies unread.
        0 => {}
        // Nothing more to say, but listening to the end.
        1 => {
            socket.shutdown(Shutdown::Write).expect("it is open");
            assert_closed(&mut socket);
        }
        // Gone after the greeting.
        _ => socket.read_exact(&mut [0; 18]).expect("the greeting comes"),
    }
}

#[test]
fn a_connection_that_dies_after_any_byte_costs_nothing_but_itself() {
    let styles = [ReplyStyle::Structured, ReplyStyle::Extended];
    for (slow, style) in [false, true].into_iter().flat_map(|slow| styles.map(|style| (slow, style))) {
        let conversation = conversation(style);
        let disk = MemoryDisk::new(1 << 20);
        let disk = if slow { disk.slow() } else { disk };
        let served = Served::new(disk, ServerOptions::default());
        served.check_health();
        let before = descriptors();
        for cut in 0..=conversation.len() {
            talk(&served.path, &conversation[..cut], cut % 3);
            if cut % 3 == 0 {
                talk(&served.path, &conversation[..cut], 1);
            }
        }
        served.check_health();
        assert_eq!(descriptors(), before);
        served.end();
    }
}
