//! Extended headers: lengths beyond 32 bits, payloads that say so, contexts that are asked for one by one; and what replies in
//! chunks tell of zeroes and of damage.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::sync::Arc;

use block::{ByteRange, Durability};
use common::{Asked, Client, MemoryDisk, STYLES, Served, VastDisk, engine, wish};
use nbd_server::{Export, ListenAddress, Server, ServerHandle, ServerOptions};
use proto::wire::{
    CommandFlags, CommandKind, ContextFilter, ContextId, Cookie, Descriptor, Errno, MAX_PAYLOAD_BYTES,
    MetaContext, ReplyStyle, RequestHeader, TransmissionFlags,
};

const GIB: u64 = 1 << 30;
const SIZE: u64 = 2048 * GIB + 512;

struct Vast {
    disk: VastDisk,
    handle: ServerHandle,
    dir: tempfile::TempDir,
}

impl Vast {
    fn serve(disk: VastDisk) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let export = Export {
            dirty_bitmap: Some("restore".to_owned()),
            ..Export::new("vast", Arc::new(disk.clone()))
        };
        let address = ListenAddress::Unix(dir.path().join("s"));
        let server = Server::bind(&[address], vec![export], ServerOptions::default()).unwrap();
        let handle = server.run(1, engine()).unwrap();
        Self { disk, handle, dir }
    }

    fn client(&self, style: ReplyStyle) -> Client {
        Client::connect(&self.dir.path().join("s"), wish("vast", style)).unwrap()
    }

    fn end(self) {
        self.handle.shutdown();
        self.handle.join().unwrap();
    }
}

/// The parts of one kind, which must follow each other without a gap, as one range.
fn joined(parts: &[ByteRange]) -> ByteRange {
    for pair in parts.windows(2) {
        assert_eq!(pair[0].end(), pair[1].start(), "{parts:?}");
    }
    ByteRange::from_bounds(parts[0].start(), parts[parts.len() - 1].end())
}

#[test]
fn a_trim_a_zeroing_and_a_cache_of_terabytes_reach_the_device_in_bounded_steps() {
    let vast = Vast::serve(VastDisk::new(SIZE));
    let mut client = vast.client(ReplyStyle::Extended);
    let (start, len) = (12_345, SIZE - 12_345 - 77);
    let whole = ByteRange::from_bounds(start, start + len);
    for kind in [CommandKind::Trim, CommandKind::WriteZeroes, CommandKind::Cache] {
        let reply = client.call(kind, CommandFlags::NONE, start, len, &[]);
        assert_eq!(reply.result, Ok(()), "{kind:?}");
        let parts: Vec<_> = vast
            .disk
            .take_asked()
            .into_iter()
            .map(|asked| match (kind, asked) {
                (CommandKind::Trim, Asked::Trim(part, Durability::Volatile))
                | (CommandKind::WriteZeroes, Asked::Zero(part, Durability::Volatile))
                | (CommandKind::Cache, Asked::Prefetch(part)) => part,
                (_, asked) => panic!("{asked:?} for {kind:?}"),
            })
            .collect();
        assert_eq!(joined(&parts), whole);
        assert!(parts.iter().all(|part| part.len() <= 4 * GIB), "{kind:?}: {parts:?}");
    }
    vast.end();
}

#[test]
fn a_long_trim_with_fua_is_flushed_when_all_of_it_is_done() {
    let vast = Vast::serve(VastDisk::new(SIZE));
    let mut client = vast.client(ReplyStyle::Extended);
    for kind in [CommandKind::Trim, CommandKind::WriteZeroes] {
        assert_eq!(client.call(kind, CommandFlags::FUA, 0, SIZE, &[]).result, Ok(()));
        let asked = vast.disk.take_asked();
        assert!(asked.len() > 2 && asked[asked.len() - 1] == Asked::Flush);
        assert_eq!(asked.iter().filter(|asked| **asked == Asked::Flush).count(), 1);
    }
    let short = ByteRange::from_bounds(0, 4096);
    assert_eq!(client.call(CommandKind::Trim, CommandFlags::FUA, 0, 4096, &[]).result, Ok(()));
    assert_eq!(vast.disk.take_asked(), [Asked::Trim(short, Durability::Stable)]);
    vast.end();
}

#[test]
fn a_long_trim_holds_up_nobody_and_ends_with_its_connection() {
    let vast = Vast::serve(VastDisk::new(SIZE));
    vast.disk.close_gate();
    let mut client = vast.client(ReplyStyle::Extended);
    client.send(CommandKind::Trim, CommandFlags::NONE, 0, SIZE, &[]);
    vast.disk.wait_for_waiting();
    assert_eq!(client.read(0, 4096).result, Ok(()), "it is served beside the trim");
    assert_eq!(vast.client(ReplyStyle::Simple).read(0, 4096).result, Ok(()));
    // A client that leaves its replies unread is known to be gone when one is sent to it.
    client.send(CommandKind::Read, CommandFlags::NONE, 0, 4096, &[]);
    client.send(CommandKind::Read, CommandFlags::NONE, 0, 4096, &[]);
    drop(client);
    // One step after another goes through: it ends long before the thousands that the whole would take.
    while vast.handle.stats().operations > 0 {
        vast.disk.let_through(1);
        std::thread::yield_now();
    }
    let steps = vast.disk.take_asked().len();
    assert!(steps < 100, "{steps} steps after the client was gone");
    vast.end();
}

#[test]
fn block_status_tells_of_terabytes_in_one_extent_and_of_4_gib_without_extended_headers() {
    let middle = SIZE / 2;
    for at_once in [u64::MAX, 64 * GIB, 50 * GIB + 4096] {
        let vast = Vast::serve(VastDisk::with(SIZE, ByteRange::from_bounds(0, 0), at_once));
        let mut client = vast.client(ReplyStyle::Extended);
        let told = client.status(&MetaContext::Allocation, CommandFlags::NONE, 0, SIZE);
        let whole = [Descriptor { len: middle, flags: 3 }, Descriptor { len: SIZE - middle, flags: 0 }];
        assert_eq!(told, whole, "{at_once} bytes at once");
        let one = client.status(&MetaContext::Allocation, CommandFlags::REQ_ONE, 4096, SIZE - 4096);
        assert_eq!(one, [Descriptor { len: middle - 4096, flags: 3 }]);

        let mut narrow = vast.client(ReplyStyle::Structured);
        let len = u64::from(u32::MAX);
        for told in [
            narrow.status(&MetaContext::Allocation, CommandFlags::NONE, 0, len),
            narrow.status(&MetaContext::Allocation, CommandFlags::REQ_ONE, 0, len),
        ] {
            assert!(told[0].len < 1 << 32 && told[0].len.is_multiple_of(64 << 20), "{told:?}");
            assert!(told.iter().map(|descriptor| descriptor.len).sum::<u64>() <= len);
        }
        vast.end();
    }
}

#[test]
fn a_filtered_block_status_tells_of_the_contexts_that_it_names() {
    let vast = Vast::serve(VastDisk::new(SIZE));
    let mut client = vast.client(ReplyStyle::Extended);
    assert!(client.connected.info.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
    let ids: Vec<ContextId> = client.connected.contexts.iter().map(|selected| selected.id).collect();
    assert_eq!(ids.len(), 3);
    for contexts in [vec![ids[1]], vec![ids[2], ids[0]], ids.clone()] {
        let filter = ContextFilter { len: SIZE - 4096, contexts };
        let reply = client.filtered_status(4096, &filter);
        assert_eq!(reply.result, Ok(()));
        assert_eq!(reply.status.len(), filter.contexts.len());
        assert!(filter.contexts.iter().all(|id| reply.status.contains_key(id)));
    }
    for (len, contexts) in [
        (4096, vec![]),
        (4096, vec![ids[0], ids[0]]),
        (4096, vec![ContextId(99)]),
        (4096, (0..100).map(ContextId).collect()),
        (0, vec![ids[0]]),
        (SIZE, vec![ids[0]]),
        (u64::MAX, vec![ids[0]]),
    ] {
        let reply = client.filtered_status(4096, &ContextFilter { len, contexts });
        assert_eq!(reply.result, Err(Errno::Invalid));
    }
    assert_eq!(client.read(0, 512).result, Ok(()), "the conversation goes on");
    let structured = vast.client(ReplyStyle::Structured);
    assert!(!structured.connected.info.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
    vast.end();
}

/// A header that our client would not make, which nobody waits for.
fn raw(
    client: &mut Client,
    kind: CommandKind,
    flags: CommandFlags,
    len: u64,
    payload: &[u8],
) -> RequestHeader {
    let header = client.header(kind, flags, 0, len);
    let header = RequestHeader { flags, ..header };
    let message = [&header.encode(ReplyStyle::Extended)[..], payload].concat();
    std::io::Write::write_all(&mut client.socket, &message).unwrap();
    header
}

#[test]
fn payloads_that_should_not_be_there_are_skipped_and_a_write_without_its_flag_is_a_write() {
    let served = Served::new(MemoryDisk::new(1 << 20), ServerOptions::default());
    let mut client = served.client_with(ReplyStyle::Extended);
    raw(&mut client, CommandKind::Write, CommandFlags::NONE, 512, &[0x21; 512]);
    assert_eq!(client.receive().unwrap().result, Ok(()), "as QEMU sends it");
    assert_eq!(client.read(0, 513).data, [&[0x21; 512][..], &[0]].concat());
    for kind in [CommandKind::Read, CommandKind::Trim, CommandKind::Flush, CommandKind::Unknown(99)] {
        raw(&mut client, kind, CommandFlags::PAYLOAD_LEN, 70_000, &[0x21; 70_000]);
        assert_eq!(client.receive().unwrap().result, Err(Errno::Invalid), "{kind:?}");
    }
    assert_eq!(client.write(0, &[5; 4096]).result, Ok(()));
    assert_eq!(client.read(0, 4096).data, [5; 4096]);
    assert_eq!(served.disk.bytes()[4096..], vec![0; (1 << 20) - 4096]);
    drop(client);

    let most = u64::from(MAX_PAYLOAD_BYTES);
    for kind in [CommandKind::Write, CommandKind::BlockStatus, CommandKind::Trim] {
        for len in [most + 1, 1 << 32, (1 << 32) + 512, u64::MAX] {
            let mut client = served.client_with(ReplyStyle::Extended);
            raw(&mut client, kind, CommandFlags::PAYLOAD_LEN, len, &[]);
            client.assert_closed();
        }
    }
    served.check_health();
    served.end();
}

#[test]
fn what_does_not_fit_is_refused_whatever_wraps() {
    let vast = Vast::serve(VastDisk::new(SIZE));
    let mut client = vast.client(ReplyStyle::Extended);
    for (offset, len) in [(0, SIZE + 1), (SIZE, 1), (512, u64::MAX), (u64::MAX, u64::MAX), (u64::MAX, 1)] {
        for kind in [CommandKind::Trim, CommandKind::Cache, CommandKind::BlockStatus, CommandKind::Read] {
            let reply = client.call(kind, CommandFlags::NONE, offset, len, &[]);
            assert_eq!(reply.result, Err(Errno::Invalid), "{kind:?} {offset} {len}");
        }
        let zeroes = client.call(CommandKind::WriteZeroes, CommandFlags::NONE, offset, len, &[]);
        assert_eq!(zeroes.result, Err(Errno::NoSpace));
    }
    for len in [u64::from(MAX_PAYLOAD_BYTES) + 1, 4 * GIB, 4 * GIB + 512, SIZE] {
        let header = RequestHeader {
            flags: CommandFlags::NONE,
            kind: CommandKind::Read,
            cookie: Cookie(1),
            offset: 0,
            len,
        };
        client.announce(header);
        std::io::Write::write_all(&mut client.socket, &header.encode(ReplyStyle::Extended)).unwrap();
        assert_eq!(client.receive().unwrap().result, Err(Errno::Overflow), "{len}");
    }
    assert!(vast.disk.take_asked().is_empty(), "nothing of that reached the device");
    vast.end();
}

#[test]
fn zeroes_that_the_device_knows_of_are_holes_however_small_unless_the_client_wants_one_chunk() {
    let vast = Vast::serve(VastDisk::new(SIZE));
    for style in STYLES {
        let mut client = vast.client(style);
        for len in [1, 512, 4096, 32 << 10, 128 << 10, 1 << 20] {
            let reply = client.read(SIZE / 4, len);
            assert_eq!((reply.result, reply.holes), (Ok(()), usize::from(style.has_chunks())), "{len}");
            assert!(reply.data.iter().all(|byte| *byte == 0), "{style:?} {len}");
            if style.has_chunks() {
                let whole = client.call(CommandKind::Read, CommandFlags::DF, SIZE / 4, len, &[]);
                assert_eq!((whole.result, whole.holes, whole.chunks), (Ok(()), 0, 1), "{len}");
                assert!(whole.data.iter().all(|byte| *byte == 0), "{style:?} {len}");
            }
        }
    }
    vast.end();
}

#[test]
fn damage_is_told_with_its_place_and_in_words() {
    let damaged = ByteRange::from_bounds(SIZE - GIB, SIZE - GIB + 65_536);
    let vast = Vast::serve(VastDisk::with(SIZE, damaged, u64::MAX));
    for style in STYLES {
        let mut client = vast.client(style);
        for (offset, len, at) in [
            (damaged.start(), 4096, damaged.start()),
            (damaged.start() - 1000, 4096, damaged.start()),
            (damaged.end() - 10, 4096, damaged.end() - 10),
            (damaged.start() - 65_536, 1 << 20, damaged.start()),
        ] {
            let reply = client.read(offset, len);
            assert_eq!(reply.result, Err(Errno::Io));
            let told = reply.failure.map(|(at, why)| (at.expect("it has a place"), why));
            let why = format!("vast: chunk 7 ({damaged}) is damaged: its hash is wrong");
            let expected = style.has_chunks().then_some((at, why));
            assert_eq!(told, expected, "{style:?} {offset}");
        }
        assert_eq!(client.read(damaged.end(), 4096).result, Ok(()));
    }
    vast.end();
}
