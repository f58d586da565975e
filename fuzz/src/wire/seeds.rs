//! What well-behaved peers say to each other: the inputs from which fuzzing begins.

use proto::client::{Handshake as Client, Progress};
use proto::server::{Handshake as Server, ReplyEncoder, Step};
use proto::wire::{
    CommandFlags, CommandKind, ContextFilter, ContextId, Cookie, Descriptor, Errno, OptionKind, ReplyStyle,
    RequestHeader, SelectedContext,
};

use super::client_handshake::wish;
use super::client_replies::Asked;
use super::exports::{self, Exports};

const CHOICES: [u8; 8] = [0, 1, 2, 4, 6 | 8, 4 | 8, 16, 16 | 2 | 8];

/// Both directions of a handshake of two halves of ours: the client's bytes, the server's bytes.
fn conversation(choice: u8) -> (Vec<u8>, Vec<u8>) {
    let (mut client, mut server) = (Client::new(wish(choice)), Server::new());
    let (mut from_client, mut from_server) = (Vec::new(), Vec::new());
    let mut progress = Progress::Waiting;
    loop {
        let said = server.take_output();
        from_server.extend_from_slice(&said);
        if progress == Progress::Waiting {
            progress = client.receive(&said).expect("both halves are ours");
        }
        let said = client.take_output();
        from_client.extend_from_slice(&said);
        server.receive(&said);
        match server.step(&Exports) {
            Step::Waiting if said.is_empty() => return (from_client, from_server),
            Step::Waiting | Step::Answered => {}
            Step::StartTls | Step::Transmission(_) | Step::Closed(_) => {
                from_server.extend_from_slice(&server.take_output());
                return (from_client, from_server);
            }
        }
    }
}

fn with_head(head: &[u8], bytes: &[u8]) -> Vec<u8> {
    [head, bytes].concat()
}

/// A client's flags, then options.
fn options(flags: u32, options: &[(OptionKind, &[u8])]) -> Vec<u8> {
    let mut bytes = flags.to_be_bytes().to_vec();
    for (kind, data) in options {
        bytes.extend(proto::wire::CLIENT_OPTION_MAGIC.to_be_bytes());
        bytes.extend(kind.number().to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
    }
    bytes
}

/// The data of a context option: no name, and these queries.
fn queries(queries: &[&str]) -> Vec<u8> {
    let mut data = vec![0; 4];
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

/// For [`super::server_handshake`].
#[must_use]
pub fn server_handshake() -> Vec<Vec<u8>> {
    let mut seeds: Vec<_> = CHOICES.iter().map(|choice| with_head(&[7], &conversation(*choice).0)).collect();
    let go: &[u8] = &[0; 6];
    let structured = (OptionKind::StructuredReply, &[][..]);
    let all = queries(&["base:", "qemu:", "qemu:dirty-bitmap:restore"]);
    let exact = queries(&["base:allocation", "qemu:dirty-bitmap:b 1"]);
    let many = vec![structured; 34];
    let extended = (OptionKind::ExtendedHeaders, &[][..]);
    let scripts: [&[(OptionKind, &[u8])]; 9] = [
        &[(OptionKind::ExportName, b"disk0")],
        &[(OptionKind::ExportName, b"nowhere")],
        &[(OptionKind::List, b""), (OptionKind::List, b"x"), (OptionKind::Abort, b"")],
        &[
            structured,
            (OptionKind::ListMetaContext, &all),
            (OptionKind::SetMetaContext, &exact),
            (OptionKind::Go, go),
        ],
        &[(OptionKind::StartTls, b""), (OptionKind::ExtendedHeaders, b""), (OptionKind::Unknown(99), b"?")],
        &[
            (OptionKind::Info, b"\0\0\0\x06broken\0\0"),
            (OptionKind::Go, b"\0\0\0\x07gr\xc3\xb6\xc3\x9fe\0\x01\0\x03"),
        ],
        &many,
        &[structured, extended, structured, (OptionKind::SetMetaContext, &exact), (OptionKind::Go, go)],
        &[extended, (OptionKind::ExtendedHeaders, b"x"), (OptionKind::ExportName, b"disk0")],
    ];
    for (number, script) in scripts.iter().enumerate() {
        let flags = if number == 0 { 0 } else { 3 };
        seeds.push(with_head(&[3], &options(flags, script)));
    }
    seeds
}

/// For [`super::client_handshake`].
#[must_use]
pub fn client_handshake() -> Vec<Vec<u8>> {
    CHOICES.iter().map(|choice| with_head(&[7, *choice], &conversation(*choice).1)).collect()
}

fn request(kind: CommandKind, number: u64, offset: u64, len: u64) -> RequestHeader {
    RequestHeader { flags: CommandFlags::NONE, kind, cookie: Cookie(number), offset, len }
}

/// For [`super::server_transmission`].
#[must_use]
pub fn server_transmission() -> Vec<Vec<u8>> {
    let work = [
        request(CommandKind::Write, 1, 4096, 512),
        RequestHeader { flags: CommandFlags::FUA, ..request(CommandKind::Write, 2, 1 << 20, 5) },
        request(CommandKind::Read, 3, 0, 16384),
        RequestHeader { flags: CommandFlags::DF, ..request(CommandKind::Read, 4, 5000, 8192) },
        request(CommandKind::BlockStatus, 5, 0, 1 << 20),
        RequestHeader { flags: CommandFlags::REQ_ONE, ..request(CommandKind::BlockStatus, 6, 0, 1 << 20) },
        request(CommandKind::Trim, 7, 4096, 4096),
        request(CommandKind::WriteZeroes, 8, 1 << 20, 5),
        request(CommandKind::Flush, 9, 0, 0),
        request(CommandKind::Cache, 10, 0, 1 << 20),
        request(CommandKind::Write, 11, 1 << 20, 6),
        request(CommandKind::Read, 12, u64::MAX, 512),
        request(CommandKind::Unknown(77), 13, 0, 0),
        request(CommandKind::Disconnect, 14, 0, 0),
    ];
    let bytes = |work: &[RequestHeader], style| -> Vec<u8> {
        let message = |header: &RequestHeader| {
            let payload = vec![0xa5; header.payload_len(style) as usize];
            [&header.encode(style)[..], &payload].concat()
        };
        work.iter().flat_map(message).collect()
    };
    let heads: [[u8; 4]; 3] = [[9, 0xf0, 0x0d, 0x7d], [9, 0xb7, 0x0d, 0x7d], [9, 0xb3, 0x00, 0x07]];
    let compact = bytes(&work, ReplyStyle::Structured);
    let mut seeds: Vec<_> = heads.iter().map(|head| with_head(head, &compact)).collect();

    let style = ReplyStyle::Extended;
    let with_payload = |header: RequestHeader| RequestHeader {
        flags: header.flags.with(CommandFlags::PAYLOAD_LEN),
        ..header
    };
    let (goodbye, work) = work.split_last().expect("there is work");
    let work: Vec<_> = work
        .iter()
        .map(|header| if header.kind == CommandKind::Write { with_payload(*header) } else { *header })
        .collect();
    let mut extended = bytes(&work, style);
    for contexts in [&[2][..], &[1, 2], &[1, 1], &[9]] {
        let contexts = contexts.iter().copied().map(ContextId).collect();
        let payload = ContextFilter { len: 1 << 20, contexts }.encode();
        let header = with_payload(request(CommandKind::BlockStatus, 20, 0, payload.len() as u64));
        extended.extend_from_slice(&header.encode(style));
        extended.extend(payload);
    }
    let odd = [
        with_payload(request(CommandKind::Read, 30, 0, 9)),
        request(CommandKind::Write, 31, 0, 512),
        request(CommandKind::Trim, 32, 0, 1 << 40),
        request(CommandKind::WriteZeroes, 33, u64::MAX - 5, u64::MAX),
        *goodbye,
    ];
    extended.extend(bytes(&odd, style));
    seeds.push(with_head(&[9, 0xfc, 0x1d, 0x7d], &extended));
    seeds.push(with_head(&[9, 0x3e, 0x1d, 0x7d], &extended));
    seeds
}

/// For [`super::client_replies`].
#[must_use]
pub fn client_replies() -> Vec<Vec<u8>> {
    let read = request(CommandKind::Read, 0, 1000, 100);
    let requests = vec![
        read,
        request(CommandKind::Write, 1, 0, 4096),
        request(CommandKind::Flush, 2, 0, 0),
        request(CommandKind::BlockStatus, 3, 0, 1 << 20),
    ];
    let simple = Asked {
        style: ReplyStyle::Simple,
        contexts: Vec::new(),
        requests: requests[..3].to_vec(),
        filtered: false,
    };
    let encoder = ReplyEncoder::new(ReplyStyle::Simple);
    let mut bytes = encoder.done(&requests[2]).to_vec();
    bytes.extend_from_slice(&encoder.data(&read));
    bytes.extend_from_slice(&[7; 100]);
    bytes.extend_from_slice(&encoder.refused(&requests[1], Errno::NoSpace));
    let mut seeds = vec![simple.input(5, &bytes)];

    let contexts: Vec<_> = (1..)
        .zip(exports::contexts().into_iter().take(2))
        .map(|(id, context)| SelectedContext { id: ContextId(id), context })
        .collect();
    for (style, filtered) in
        [(ReplyStyle::Structured, false), (ReplyStyle::Extended, false), (ReplyStyle::Extended, true)]
    {
        let mut requests = requests.clone();
        if style.is_extended() {
            requests[3].len = 1 << 40;
        }
        let [_, write, flush, status] = requests[..] else { return seeds };
        let asked = Asked { style, contexts: contexts.clone(), requests, filtered };
        let encoder = ReplyEncoder::new(style);
        let mut out = bytes::BytesMut::new();
        out.extend_from_slice(&encoder.hole_chunk(&read, 1040, 60, false));
        let descriptors = [Descriptor { len: 4096, flags: 3 }, Descriptor { len: 1 << 20, flags: 0 }];
        if !filtered {
            encoder.status_chunk(&mut out, &status, ContextId(2), &descriptors, false);
        }
        out.extend_from_slice(&encoder.failed(&write, Errno::NoSpace, Some(77), "no room at 77"));
        out.extend_from_slice(&encoder.data_chunk(&read, 1000, 40, true));
        out.extend_from_slice(&[7; 40]);
        encoder.status_chunk(&mut out, &status, ContextId(1), &descriptors[..1], true);
        out.extend_from_slice(&encoder.done(&flush));
        seeds.push(asked.input(5, &out));
    }
    seeds
}
