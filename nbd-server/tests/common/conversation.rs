//! A long valid conversation, as bytes that a client might send without waiting: every option, every command.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use proto::wire::{CommandFlags, CommandKind, ContextFilter, ContextId, Cookie, ReplyStyle, RequestHeader};

use super::{assert_closed, option};

fn named(rest: &[u8]) -> Vec<u8> {
    let mut out = 5_u32.to_be_bytes().to_vec();
    out.extend_from_slice(b"disk0");
    out.extend_from_slice(rest);
    out
}

/// Every kind of option and request. What of it makes no sense with replies of `style` is refused, and the conversation goes on.
/// The client's flags come first, and are to be left out under TLS, with the 4 bytes that they have.
pub(crate) fn conversation(style: ReplyStyle) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    let mut query = 1_u32.to_be_bytes().to_vec();
    query.extend_from_slice(&15_u32.to_be_bytes());
    query.extend_from_slice(b"base:allocation");
    // Extended headers are asked for on top of structured replies, and then never given up.
    let replies: &[u32] = match style {
        ReplyStyle::Simple => &[],
        ReplyStyle::Structured => &[8],
        ReplyStyle::Extended => &[8, 11, 8],
    };
    for kind in replies {
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

/// A handshake that ends in its own way: by EXPORT_NAME, with a request after it, or by ABORT.
pub(crate) fn other_endings() -> [Vec<u8>; 2] {
    let read = RequestHeader {
        flags: CommandFlags::NONE,
        kind: CommandKind::Read,
        cookie: Cookie(9),
        offset: 4096,
        len: 5000,
    };
    let flags = 3_u32.to_be_bytes();
    let by_name = [&flags[..], &option(8, &[]), &option(1, b"disk0"), &read.encode(ReplyStyle::Structured)];
    [by_name.concat(), [&flags[..], &option(3, &[]), &option(2, &[])].concat()]
}

/// Says so much and goes, in one of three ways.
pub(crate) fn talk(path: &Path, bytes: &[u8], how: usize) {
    let mut socket = UnixStream::connect(path).expect("the server listens");
    socket.write_all(bytes).expect("the server reads");
    leave(socket, how);
}

/// Goes: at once and with the replies unread, or with nothing more to say but listening to the end, or after the greeting.
pub(crate) fn leave(mut socket: UnixStream, how: usize) {
    match how {
        0 => {}
        1 => {
            socket.shutdown(Shutdown::Write).expect("it is open");
            assert_closed(&mut socket);
        }
        _ => socket.read_exact(&mut [0; 18]).expect("the greeting comes"),
    }
}

/// How many descriptors this process has: to be asked where nothing else runs in it.
pub(crate) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("Linux has it").count()
}

/// Allows this process as many descriptors as it may have; how many that is.
pub(crate) fn more_descriptors() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // What cannot be raised is still what it was.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.map_or(1 << 20, |count| count as usize)
}

/// A connection that waits while too many others wait to be accepted. A ring of this process may interrupt any thread of it, and
/// std does not try again by itself.
pub(crate) fn connect_patiently(path: &Path) -> UnixStream {
    loop {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            connected => return connected.expect("the server listens"),
        }
    }
}
