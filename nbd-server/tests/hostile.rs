//! Clients that send what no client should: each ends its own connection at most.

mod common;

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use common::{MemoryDisk, Served, assert_closed, begin_hand_made, option};
use nbd_server::ServerOptions;
use proto::wire::{CommandFlags, CommandKind, Errno};

fn served() -> Served {
    Served::new(MemoryDisk::new(1 << 20), ServerOptions::default())
}

#[test]
fn garbage_at_any_stage_ends_the_connection_alone() {
    let served = served();
    let mut seed = 1_u64;
    let mut garbage = |len: usize| -> Vec<u8> {
        let mut byte = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as u8
        };
        (0..len).map(|_| byte()).collect()
    };
    for round in 0..100 {
        let mut socket = UnixStream::connect(&served.path).unwrap();
        // Where the server closes first, the rest cannot be written.
        let _ = socket.write_all(&garbage(1 + round * 13));
        let _ = socket.shutdown(Shutdown::Write);
        assert_closed(&mut socket);

        let mut socket = begin_hand_made(&served.path, 3).unwrap();
        let _ = socket.write_all(&option(round as u32 % 13, &garbage(round)));
        let _ = socket.write_all(&garbage(500));
        let _ = socket.shutdown(Shutdown::Write);
        assert_closed(&mut socket);

        let mut client = served.client();
        let _ = client.socket.write_all(&garbage(28 + round * 7));
        let _ = client.socket.shutdown(Shutdown::Write);
        client.assert_closed();
    }
    served.check_health();
    served.end();
}

#[test]
fn unknown_commands_and_flags_are_invalid_and_the_conversation_goes_on() {
    let served = served();
    let mut client = served.client();
    for kind in [9, 77, u16::MAX] {
        let kind = CommandKind::Unknown(kind);
        assert_eq!(client.call(kind, CommandFlags::NONE, 0, 1 << 30, &[]).result, Err(Errno::Invalid));
    }
    for bit in 5..16 {
        let flags = CommandFlags::from_bits(1 << bit);
        assert_eq!(client.call(CommandKind::Read, flags, 0, 512, &[]).result, Err(Errno::Invalid));
        assert_eq!(client.call(CommandKind::Write, flags, 0, 512, &[1; 512]).result, Err(Errno::Invalid));
    }
    assert_eq!(client.read(0, 512).data, [0; 512]);
    served.end();
}

#[test]
fn a_client_that_goes_away_with_requests_in_flight_costs_nothing() {
    let served = Served::new(MemoryDisk::new(1 << 20).slow(), ServerOptions::default());
    served.disk.close_gate();
    let mut client = served.client();
    for number in 0..20 {
        client.send(CommandKind::Read, CommandFlags::NONE, number * 4096, 100_000, &[]);
        client.send(CommandKind::Write, CommandFlags::NONE, number * 4096, 4096, &[1; 4096]);
    }
    served.disk.wait_for_waiting(40);
    drop(client);
    // Its operations are not dropped: they end when the device ends them.
    assert_eq!(served.handle.stats().operations, 40);
    served.disk.open_gate();
    served.check_health();
    served.end();
}

#[test]
fn a_client_that_closes_one_direction_still_gets_its_replies() {
    let served = Served::new(MemoryDisk::new(1 << 20).slow(), ServerOptions::default());
    let mut client = served.client();
    for _ in 0..10 {
        client.send(CommandKind::Read, CommandFlags::NONE, 0, 100_000, &[]);
    }
    client.socket.shutdown(Shutdown::Write).unwrap();
    for _ in 0..10 {
        assert_eq!(client.receive().unwrap().result, Ok(()));
    }
    client.assert_closed();
    served.end();
}

#[test]
fn the_same_number_twice_is_the_clients_own_affair() {
    let served = served();
    let mut client = served.client();
    let header = client.header(CommandKind::Read, CommandFlags::NONE, 0, 16);
    client.socket.write_all(&client.encode(&header)).unwrap();
    assert_eq!(client.receive().unwrap().result, Ok(()));
    client.socket.write_all(&client.encode(&header)).unwrap();
    assert!(client.receive().is_err(), "our client does not take an answer that it did not expect");
    drop(client);
    served.check_health();
    served.end();
}
