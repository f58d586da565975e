//! Every command, with simple and structured replies, on a device that answers at once and on one that waits.

mod common;

use block::ErrorKind;
use common::{Client, MemoryDisk, STYLES, Served, engines, wish};
use nbd_server::{Limits, ServerOptions};
use proto::wire::{CommandFlags, CommandKind, Descriptor, Errno, MetaContext, ReplyStyle, TransmissionFlags};

const SIZE: usize = 4 << 20;

fn every_kind(test: impl Fn(&Served, ReplyStyle)) {
    for engine in engines() {
        for slow in [false, true] {
            let disk = MemoryDisk::new(SIZE);
            let disk = if slow { disk.slow() } else { disk };
            let served = Served::with(disk, ServerOptions::default(), 2, engine, |server| server);
            for style in STYLES {
                test(&served, style);
            }
            served.end();
        }
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed) | 1).collect()
}

#[test]
fn what_was_written_is_read_back_at_any_size_and_offset() {
    every_kind(|served, style| {
        let mut client = Client::connect(&served.path, wish("disk0", style)).unwrap();
        let sizes = [1, 511, 4096, 4097, 32 << 10, (64 << 10) - 1, 65 << 10, 128 << 10, 300_000, 1 << 20];
        for (number, len) in sizes.into_iter().enumerate() {
            let offset = number as u64 * 12_345;
            let data = pattern(len, number as u8);
            assert_eq!(client.write(offset, &data).result, Ok(()));
            let reply = client.read(offset, len as u64);
            assert_eq!(reply.result, Ok(()));
            assert!(reply.data == data, "{len} bytes at {offset}, {style:?}");
        }
    });
}

#[test]
fn many_requests_in_one_send_are_all_answered_right() {
    every_kind(|served, style| {
        let mut client = Client::connect(&served.path, wish("", style)).unwrap();
        served.disk.bytes().copy_from_slice(&pattern(SIZE, 7));
        let mut message = Vec::new();
        for number in 0..300_u64 {
            let len = [4096, 100, 40_000][number as usize % 3];
            let header = client.header(CommandKind::Read, CommandFlags::NONE, number * 4000, len);
            message.extend_from_slice(&client.encode(&header));
            let write = client.header(CommandKind::Write, CommandFlags::NONE, 3 << 20, 3);
            message.extend_from_slice(&client.encode(&write));
            message.extend_from_slice(b"abc");
        }
        let mut socket = client.socket.try_clone().unwrap();
        let sender = std::thread::spawn(move || std::io::Write::write_all(&mut socket, &message).unwrap());
        let expected = pattern(SIZE, 7);
        for _ in 0..600 {
            let reply = client.receive().unwrap();
            assert_eq!(reply.result, Ok(()));
            if reply.header.kind == CommandKind::Read {
                let start = reply.header.offset as usize;
                assert!(reply.data == expected[start..start + reply.data.len()]);
            }
        }
        sender.join().unwrap();
    });
}

#[test]
fn holes_are_sent_as_holes_unless_the_client_wants_one_chunk() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    served.disk.bytes()[65536..65536 + 8192].copy_from_slice(&pattern(8192, 1));
    let expected = served.disk.bytes()[..262_144].to_vec();
    let mut client = served.client();
    let reply = client.read(0, 262_144);
    assert!(reply.data == expected);
    assert_eq!((reply.holes, reply.chunks), (2, 3));
    let reply = client.call(CommandKind::Read, CommandFlags::DF, 0, 262_144, &[]);
    assert!(reply.data == expected);
    assert_eq!((reply.holes, reply.chunks), (0, 1));
    let reply = client.read(1 << 20, 1 << 20);
    assert_eq!((reply.holes, reply.chunks), (1, 1));
    served.end();
}

#[test]
fn of_many_reads_at_once_one_asks_for_holes_until_one_is_found() {
    let served = Served::new(MemoryDisk::new(SIZE).slow(), ServerOptions::default());
    served.disk.bytes().copy_from_slice(&pattern(SIZE, 3));
    let mut client = served.client();
    let read_many = |client: &mut Client| {
        for number in 0..8 {
            client.send(CommandKind::Read, CommandFlags::NONE, number << 16, 1 << 16, &[]);
        }
    };
    served.disk.close_gate();
    read_many(&mut client);
    served.disk.wait_for_waiting(8);
    assert_eq!(served.disk.asked_for_extents(), 1);
    served.disk.open_gate();
    let expected = pattern(SIZE, 3);
    for _ in 0..8 {
        let reply = client.receive().unwrap();
        let start = reply.header.offset as usize;
        assert!(reply.data == expected[start..start + (1 << 16)]);
    }
    // A client that has met a hole is sent all of them.
    served.disk.bytes().fill(0);
    let mut client = served.client();
    assert_eq!(client.read(1 << 20, 1 << 16).holes, 1);
    read_many(&mut client);
    assert!((0..8).all(|_| client.receive().unwrap().holes == 1));
    served.end();
}

#[test]
fn a_hole_that_was_written_since_is_read_as_data() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    let mut client = served.client();
    assert_eq!(client.read(0, 1 << 20).holes, 1);
    let data = pattern(1 << 20, 9);
    client.write(0, &data);
    assert!(client.read(0, 1 << 20).data == data);
    let zeroes = client.call(CommandKind::WriteZeroes, CommandFlags::NONE, 0, 1 << 20, &[]);
    assert_eq!(zeroes.result, Ok(()));
    assert!(client.read(0, 1 << 20).data.iter().all(|byte| *byte == 0));
    served.end();
}

#[test]
fn fua_and_flush_reach_the_device() {
    every_kind(|served, style| {
        let mut client = Client::connect(&served.path, wish("disk0", style)).unwrap();
        let before = (served.disk.stable_writes(), served.disk.flushes());
        let reply = client.call(CommandKind::Write, CommandFlags::FUA, 0, 4096, &[1; 4096]);
        assert_eq!(reply.result, Ok(()));
        let reply = client.call(CommandKind::WriteZeroes, CommandFlags::FUA, 8192, 4096, &[]);
        assert_eq!(reply.result, Ok(()));
        let reply = client.call(CommandKind::Trim, CommandFlags::FUA, 8192, 4096, &[]);
        assert_eq!(reply.result, Ok(()));
        assert_eq!(client.write(4096, &[2; 4096]).result, Ok(()));
        assert_eq!(client.flush().result, Ok(()));
        let after = (served.disk.stable_writes(), served.disk.flushes());
        assert_eq!((after.0 - before.0, after.1 - before.1), (3, 1));
    });
}

#[test]
fn cache_asks_the_device_to_prefetch() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    let reply = served.client().call(CommandKind::Cache, CommandFlags::NONE, 4096, 65536, &[]);
    assert_eq!(reply.result, Ok(()));
    assert_eq!(served.disk.prefetched_bytes(), 65536);
    served.end();
}

#[test]
fn fast_zeroes_that_are_not_fast_are_not_supported() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    let mut client = served.client();
    let fast = client.call(CommandKind::WriteZeroes, CommandFlags::FAST_ZERO, 0, 4096, &[]);
    assert_eq!(fast.result, Err(Errno::NotSupported));
    let keep = client.call(CommandKind::WriteZeroes, CommandFlags::NO_HOLE, 0, 4096, &[]);
    assert_eq!(keep.result, Ok(()));
    served.end();
}

#[test]
fn block_status_tells_of_every_selected_context() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    served.disk.bytes()[0..4096].fill(3);
    let mut client = served.client();
    client.write(8192, &[5; 4096]);
    let none = CommandFlags::NONE;
    let descriptor = |len, flags| Descriptor { len, flags };
    let tail = 16384 - 12288;
    assert_eq!(
        client.status(&MetaContext::Allocation, none, 0, 16384),
        [descriptor(4096, 0), descriptor(4096, 3), descriptor(4096, 0), descriptor(tail, 3)]
    );
    assert_eq!(
        client.status(&MetaContext::Depth, none, 0, 16384),
        [descriptor(4096, 1), descriptor(4096, 0), descriptor(4096, 1), descriptor(tail, 0)]
    );
    assert_eq!(
        client.status(&MetaContext::DirtyBitmap("restore".to_owned()), none, 0, 16384),
        [descriptor(8192, 0), descriptor(4096, 1), descriptor(tail, 0)]
    );
    assert_eq!(
        client.status(&MetaContext::Allocation, CommandFlags::REQ_ONE, 100, 16000),
        [descriptor(3996, 0)]
    );
    served.end();
}

#[test]
fn block_status_of_a_fragmented_disk_comes_in_bounded_pieces() {
    let blocks = 5000;
    let served = Served::new(MemoryDisk::new(blocks * 4096), ServerOptions::default());
    for block in (0..blocks).step_by(2) {
        served.disk.bytes()[block * 4096] = 1;
    }
    let mut client = served.client();
    let size = (blocks * 4096) as u64;
    let (mut at, mut pieces) = (0, 0);
    while at < size {
        let len = size - at;
        let descriptors = client.status(&MetaContext::Allocation, CommandFlags::NONE, at, len);
        assert!(!descriptors.is_empty() && descriptors.len() <= 2048);
        for descriptor in descriptors {
            let zero = !(at / 4096).is_multiple_of(2);
            assert_eq!((descriptor.len, descriptor.flags), (4096, if zero { 3 } else { 0 }));
            at += 4096;
        }
        pieces += 1;
    }
    assert_eq!(pieces, 3);
    drop(client);
    served.check_health();
    served.end();
}

#[test]
fn block_status_without_contexts_is_invalid() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    let reply = served.simple_client().call(CommandKind::BlockStatus, CommandFlags::NONE, 0, 4096, &[]);
    assert_eq!(reply.result, Err(Errno::Invalid));
    served.end();
}

#[test]
fn outside_the_disk_writes_have_no_room_and_reads_are_invalid() {
    every_kind(|served, style| {
        let mut client = Client::connect(&served.path, wish("disk0", style)).unwrap();
        let size = SIZE as u64;
        for offset in [size, size - 4095, u64::MAX, u64::MAX - 4095, 1 << 63] {
            assert_eq!(client.write(offset, &[0; 4096]).result, Err(Errno::NoSpace));
            assert_eq!(client.read(offset, 4096).result, Err(Errno::Invalid));
        }
        assert_eq!(client.write(size - 4096, &[7; 4096]).result, Ok(()));
        assert_eq!(client.read(size, 0).result, Ok(()));
    });
}

#[test]
fn a_read_only_export_takes_no_change_and_says_so() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    let mut client = Client::connect(&served.path, wish("frozen", ReplyStyle::Structured)).unwrap();
    assert!(client.connected.info.flags.contains(TransmissionFlags::READ_ONLY));
    assert_eq!(client.write(0, &[1; 70_000]).result, Err(Errno::NotPermitted));
    assert_eq!(
        client.call(CommandKind::Trim, CommandFlags::NONE, 0, 4096, &[]).result,
        Err(Errno::NotPermitted)
    );
    assert_eq!(client.read(0, 4096).result, Ok(()));
    assert!(served.disk.bytes().iter().all(|byte| *byte == 0));
    served.end();
}

#[test]
fn a_devices_failure_is_the_clients_error_and_never_zeroes() {
    for (kind, errno) in [
        (ErrorKind::Damaged, Errno::Io),
        (ErrorKind::Io, Errno::Io),
        (ErrorKind::Poisoned, Errno::Io),
        (ErrorKind::NoSpace, Errno::NoSpace),
        (ErrorKind::NotPermitted, Errno::NotPermitted),
        (ErrorKind::Shutdown, Errno::Shutdown),
    ] {
        every_kind(|served, style| {
            let mut client = Client::connect(&served.path, wish("disk0", style)).unwrap();
            served.disk.fail(kind);
            assert_eq!(client.read(0, 4096).result, Err(errno), "{kind:?}");
            assert_eq!(client.read(0, 1 << 20).result, Err(errno), "{kind:?}");
            assert_eq!(client.write(0, &[1; 4096]).result, Err(errno), "{kind:?}");
            assert_eq!(client.write(0, &[1; 100_000]).result, Err(errno), "{kind:?}");
            assert_eq!(client.flush().result, Err(errno), "{kind:?}");
        });
    }
}

#[test]
fn a_slow_request_does_not_hold_up_those_behind_it() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    served.disk.close_gate();
    let mut client = served.client();
    let slow = client.send(CommandKind::Flush, CommandFlags::NONE, 0, 0, &[]);
    served.disk.wait_for_waiting(1);
    assert_eq!(client.read(0, 4096).result, Ok(()));
    assert_eq!(client.write(0, &[1; 4096]).result, Ok(()));
    served.disk.open_gate();
    assert_eq!(client.receive().unwrap().header.cookie, slow);
    served.end();
}

#[test]
fn a_client_that_sends_byte_by_byte_is_served() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    let mut client = served.client();
    let write = client.header(CommandKind::Write, CommandFlags::NONE, 10, 300);
    let read = client.header(CommandKind::Read, CommandFlags::NONE, 10, 300);
    let mut message = client.encode(&write).to_vec();
    message.extend_from_slice(&[9; 300]);
    message.extend_from_slice(&client.encode(&read));
    for byte in message {
        std::io::Write::write_all(&mut client.socket, &[byte]).unwrap();
    }
    assert_eq!(client.receive().unwrap().result, Ok(()));
    assert!(client.receive().unwrap().data == [9; 300]);
    served.end();
}

#[test]
fn random_work_on_several_connections_leaves_what_a_model_says() {
    for engine in engines() {
        let disk = MemoryDisk::new(SIZE);
        let limits = Limits { memory_bytes: 1 << 20, ..Limits::default() };
        let options = ServerOptions { limits, ..ServerOptions::default() };
        let served = Served::with(disk, options, 2, engine, |server| server);
        let workers: Vec<_> = (0..4_u64)
            .map(|worker| {
                let path = served.path.clone();
                std::thread::spawn(move || work_on_a_quarter(&path, worker))
            })
            .collect();
        for (worker, thread) in workers.into_iter().enumerate() {
            let model = thread.join().unwrap();
            let start = worker * model.len();
            assert!(served.disk.bytes()[start..start + model.len()] == model[..]);
        }
        served.end();
    }
}

/// Does seeded random work within one quarter of the disk, and returns what must be there.
fn work_on_a_quarter(path: &std::path::Path, worker: u64) -> Vec<u8> {
    let quarter = SIZE / 4;
    let mut model = vec![0; quarter];
    let mut seed = 0x9e37_79b9_7f4a_7c15 ^ worker;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    let mut client =
        Client::connect(path, wish("disk0", STYLES[worker as usize % 3])).expect("the server takes us");
    for step in 0..300 {
        let most = [100, 5000, 200_000][random(3)];
        let len = 1 + random(most);
        let start = random(quarter - len);
        let offset = (worker as usize * quarter + start) as u64;
        match random(4) {
            0 => {
                let zeroes =
                    client.call(CommandKind::WriteZeroes, CommandFlags::NONE, offset, len as u64, &[]);
                assert_eq!(zeroes.result, Ok(()));
                model[start..start + len].fill(0);
            }
            1 | 2 => {
                let data = pattern(len, step as u8);
                assert_eq!(client.write(offset, &data).result, Ok(()));
                model[start..start + len].copy_from_slice(&data);
            }
            _ => {
                let reply = client.read(offset, len as u64);
                assert_eq!(reply.result, Ok(()));
                assert!(reply.data == model[start..start + len], "step {step} of worker {worker}");
            }
        }
    }
    model
}
