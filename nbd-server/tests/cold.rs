//! A file that is not in memory: what is read of it is brought into the page cache and sent from there.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::Path;

use block::{AlignedBuf, DirectIo, Durability, ErrorKind, FileDisk, FileOptions};
use common::{Client, MemoryDisk, STYLES, Served, engine, wish};
use nbd_server::{Export, ListenAddress, Server, ServerOptions};
use proto::wire::{CommandFlags, CommandKind, Errno};

const SIZE: u64 = 8 << 20;

#[test]
fn a_cold_file_is_read_as_it_is_at_any_size() {
    // Beside the build, which is on a real file system: what is in memory alone is never cold.
    let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    let options = FileOptions::new(engine()).direct(DirectIo::Off);
    let disk = FileDisk::create(dir.path().join("disk"), SIZE, options).unwrap();
    let pattern: Vec<u8> = (0..SIZE).map(|at| (at / 64 % 251) as u8).collect();
    disk.write_blocking(0, AlignedBuf::from_slice(&pattern), Durability::Stable).0.unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let path = sockets.path().join("s");
    let exports = vec![Export::new("disk0", std::sync::Arc::new(disk.clone()))];
    let server =
        Server::bind(&[ListenAddress::Unix(path.clone())], exports, ServerOptions::default()).unwrap();
    let handle = server.run(1, engine()).unwrap();
    for style in STYLES {
        let mut client = Client::connect(&path, wish("disk0", style)).unwrap();
        let pieces = [(0, 65_536), (65_536, 65_536), (1 << 20, 1 << 20), (5_000_001, 99_999), (4096, 4096)];
        for (offset, len) in pieces.into_iter().chain([(3 << 20, 4 << 20), (SIZE - 40_000, 40_000)]) {
            disk.forget_clean_pages().unwrap();
            let reply = client.read(offset, len);
            assert_eq!(reply.result, Ok(()));
            assert!(reply.data == pattern[offset as usize..][..len as usize], "{style:?}: {len} at {offset}");
        }
        client.disconnect();
    }
    handle.shutdown();
    handle.join().unwrap();
}

/// As where a sector of the disk is bad: its page is in the cache, and was never read.
#[test]
fn what_is_in_memory_and_cannot_be_sent_costs_one_connection_and_is_an_error_from_then_on() {
    let dir = tempfile::tempdir().unwrap();
    let unreadable = OpenOptions::new().write(true).create_new(true).open(dir.path().join("file")).unwrap();
    let served = Served::new(MemoryDisk::new(1 << 20), ServerOptions::default());
    served.disk.claim_resident(unreadable);
    served.disk.fail(ErrorKind::Io);
    let mut first = served.client();
    let header = first.header(CommandKind::Read, CommandFlags::NONE, 0, 65_536);
    let request = first.encode(&header);
    first.socket.write_all(&request).unwrap();
    let mut reply = Vec::new();
    // How it is closed does not matter.
    let _ = first.socket.read_to_end(&mut reply);
    assert!(reply.len() < 65_536, "there was nothing to send");
    let mut second = served.client();
    for _ in 0..2 {
        assert_eq!(second.read(0, 65_536).result, Err(Errno::Io));
    }
    second.disconnect();
    served.end();
}
