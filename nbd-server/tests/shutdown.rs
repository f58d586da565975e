//! The end of a server: what is in flight is finished, what comes after is not begun, and every thread is joined.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::{Client, MemoryDisk, Served, assert_closed, begin_hand_made, engine, engines, wish};
use nbd_server::{
    ErrorKind, Export, LateRequests, Limits, ListenAddress, Server, ServerOptions, ShardContext,
};
use proto::wire::{CommandFlags, CommandKind, Errno, ReplyStyle};

fn slow_disk() -> MemoryDisk {
    MemoryDisk::new(1 << 20).slow()
}

#[test]
fn what_is_in_flight_is_finished_and_what_comes_after_is_refused() {
    for engine in engines() {
        let served = Served::with(slow_disk(), ServerOptions::default(), 2, engine, |server| server);
        served.disk.close_gate();
        let mut client = served.client();
        let early = client.send(CommandKind::Write, CommandFlags::NONE, 0, 4096, &[7; 4096]);
        served.disk.wait_for_waiting(1);
        served.handle.shutdown();
        // Refused as soon as the shard has heard of it; until then it is begun, and waits at the gate.
        let mut begun = 1;
        loop {
            client.send(CommandKind::Write, CommandFlags::NONE, 8192, 4096, &[8; 4096]);
            let waiting = loop {
                let waiting = served.disk.waiting();
                if waiting > begun || has_input(&client) {
                    break waiting;
                }
                std::thread::yield_now();
            };
            if waiting == begun {
                break;
            }
            begun = waiting;
        }
        assert_eq!(client.receive().unwrap().result, Err(Errno::Shutdown));
        served.disk.open_gate();
        for _ in 0..begun {
            let reply = client.receive().unwrap();
            assert_eq!(
                reply.result,
                Ok(()),
                "begun before the end: {:?} (the first was {early:?})",
                reply.header
            );
        }
        client.assert_closed();
        assert_eq!(served.disk.bytes()[..4096], [7; 4096]);
        served.end();
    }
}

fn has_input(client: &Client) -> bool {
    client.socket.set_nonblocking(true).expect("the socket is open");
    let mut buf = [0; 1];
    // Looks without taking.
    let peeked = rustix::net::recv(&client.socket, &mut buf, rustix::net::RecvFlags::PEEK);
    client.socket.set_nonblocking(false).expect("the socket is open");
    peeked.is_ok_and(|(len, _)| len > 0)
}

#[test]
fn late_requests_can_be_left_to_a_client_that_reconnects() {
    let options = ServerOptions { late_requests: LateRequests::Leave, ..ServerOptions::default() };
    let served = Served::new(slow_disk(), options);
    served.disk.close_gate();
    let mut client = served.client();
    client.send(CommandKind::Read, CommandFlags::NONE, 0, 4096, &[]);
    served.disk.wait_for_waiting(1);
    served.handle.shutdown();
    served.disk.open_gate();
    assert_eq!(client.receive().unwrap().result, Ok(()));
    client.assert_closed();
    served.end();
}

#[test]
fn what_the_device_gave_up_is_left_unanswered_for_a_client_that_reconnects() {
    let options = ServerOptions { late_requests: LateRequests::Leave, ..ServerOptions::default() };
    let served = Served::new(slow_disk(), options);
    let mut client = served.client();
    served.disk.fail(block::ErrorKind::Shutdown);
    client.send(CommandKind::Read, CommandFlags::NONE, 0, 4096, &[]);
    assert!(client.receive().is_err(), "no error reaches the client; the connection closes");
    served.end();
}

#[test]
fn a_peer_that_takes_nothing_does_not_hold_up_the_end() {
    let limits = Limits { shutdown_grace: Duration::from_millis(50), ..Limits::default() };
    let served = Served::new(MemoryDisk::new(32 << 20), ServerOptions { limits, ..ServerOptions::default() });
    let mut stuck = served.simple_client();
    stuck.send(CommandKind::Read, CommandFlags::NONE, 0, 32 << 20, &[]);
    served.wait_for(|stats| stats.memory_bytes == 32 << 20 && stats.operations == 0);
    served.end();
    stuck.assert_closed();
}

#[test]
fn connections_close_at_the_end_of_the_grace_and_operations_are_still_waited_for() {
    let limits = Limits { shutdown_grace: Duration::from_millis(20), ..Limits::default() };
    let served = Served::new(slow_disk(), ServerOptions { limits, ..ServerOptions::default() });
    served.disk.close_gate();
    let mut client = served.client();
    client.send(CommandKind::Write, CommandFlags::NONE, 0, 4096, &[7; 4096]);
    served.disk.wait_for_waiting(1);
    served.handle.shutdown();
    client.assert_closed();
    assert_eq!(served.handle.stats().operations, 1, "nobody drops an operation of a device");
    served.disk.open_gate();
    let disk = Arc::clone(&served.disk);
    served.end();
    assert_eq!(disk.bytes()[..4096], [7; 4096]);
}

#[test]
fn a_handshake_is_cut_short() {
    let served = Served::new(slow_disk(), ServerOptions::default());
    let mut half = begin_hand_made(&served.path, 3).unwrap();
    served.handle.shutdown();
    assert_closed(&mut half);
    let path = served.path.clone();
    served.end();
    assert!(!path.exists(), "the socket's file is gone");
}

#[test]
fn every_shard_runs_its_task_until_the_last_connection_is_gone() {
    for engine in engines() {
        let begun = Arc::new(AtomicUsize::new(0));
        let ended = Arc::new(AtomicUsize::new(0));
        let ended_early = Arc::new(AtomicBool::new(false));
        let disk = slow_disk();
        disk.close_gate();
        let task = {
            let (begun, ended) = (Arc::clone(&begun), Arc::clone(&ended));
            move |context: ShardContext| -> std::pin::Pin<Box<dyn Future<Output = ()>>> {
                let (begun, ended) = (Arc::clone(&begun), Arc::clone(&ended));
                Box::pin(async move {
                    begun.fetch_or(1 << context.index(), Ordering::SeqCst);
                    context.stopping().await;
                    context.drained().await;
                    ended.fetch_add(1, Ordering::SeqCst);
                })
            }
        };
        let adapt = |server: Server| server.on_shard_start(Arc::new(task));
        let served = Served::with(disk, ServerOptions::default(), 3, engine, adapt);
        let mut client = served.client();
        client.send(CommandKind::Read, CommandFlags::NONE, 0, 4096, &[]);
        served.disk.wait_for_waiting(1);
        served.handle.shutdown();
        ended_early.store(ended.load(Ordering::SeqCst) > 0, Ordering::SeqCst);
        served.disk.open_gate();
        assert_eq!(client.receive().unwrap().result, Ok(()));
        served.end();
        assert!(!ended_early.load(Ordering::SeqCst), "a request was in flight");
        assert_eq!(begun.load(Ordering::SeqCst), 0b111);
        assert_eq!(ended.load(Ordering::SeqCst), 3);
    }
}

#[test]
fn a_server_serves_again_at_the_same_socket() {
    let dir = tempfile::tempdir().unwrap();
    let address = ListenAddress::Unix(dir.path().join("s"));
    let disk = Arc::new(MemoryDisk::new(1 << 20));
    for round in 0..5_u8 {
        let exports = vec![Export::new("disk0", disk.clone())];
        let server = Server::bind(std::slice::from_ref(&address), exports, ServerOptions::default()).unwrap();
        let second = Server::bind(
            std::slice::from_ref(&address),
            vec![Export::new("", disk.clone())],
            ServerOptions::default(),
        );
        assert_eq!(second.unwrap_err().kind(), ErrorKind::AddressInUse);
        let handle = server.run(2, engine()).unwrap();
        let mut client = Client::connect(&dir.path().join("s"), wish("", ReplyStyle::Structured)).unwrap();
        assert_eq!(client.write(u64::from(round), &[round]).result, Ok(()));
        handle.shutdown();
        client.assert_closed();
        handle.join().unwrap();
    }
    assert_eq!(disk.bytes()[..5], [0, 1, 2, 3, 4]);
}

#[test]
fn exports_that_cannot_be_named_are_refused() {
    let address = [];
    let disk = Arc::new(MemoryDisk::new(4096));
    for names in [vec![], vec!["a", "a"], vec!["a", ""], vec!["a\0b"]] {
        let exports = names.iter().map(|name| Export::new(*name, disk.clone())).collect();
        let error = Server::bind(&address, exports, ServerOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidExport, "{names:?}");
    }
}

#[test]
fn a_server_that_lost_a_shard_to_a_panic_ends_and_says_so() {
    let loses_one = |context: ShardContext| -> std::pin::Pin<Box<dyn Future<Output = ()>>> {
        assert_ne!(context.index(), 1, "on purpose");
        Box::pin(async {})
    };
    let served = Served::with(MemoryDisk::new(1 << 20), ServerOptions::default(), 2, engine(), |server| {
        server.on_shard_start(Arc::new(loses_one))
    });
    while !served.handle.is_ending() {
        std::thread::yield_now();
    }
    assert!(served.handle.monitor().is_ending());
    let error = served.handle.join().unwrap_err();
    assert!(error.kind() == ErrorKind::Panicked && error.to_string().contains("nbd-shard-1"), "{error}");
}
