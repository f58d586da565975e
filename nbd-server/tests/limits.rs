//! Each limit, exceeded: the one who exceeds it pays, and the server goes on.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{Client, MemoryDisk, Served, assert_closed, begin_hand_made, engine, option, wish};
use nbd_server::{Export, Limits, ListenAddress, Server, ServerOptions};
use proto::wire::{CommandFlags, CommandKind, Errno, MAX_PAYLOAD_BYTES, ReplyStyle};

const SIZE: usize = 64 << 20;

fn served(limits: Limits) -> Served {
    Served::new(MemoryDisk::new(SIZE), ServerOptions { limits, ..ServerOptions::default() })
}

#[test]
fn a_silent_client_is_closed_when_its_time_is_over() {
    let limits = Limits { handshake_timeout: Duration::from_millis(50), ..Limits::default() };
    let served = served(limits);
    let mut silent = UnixStream::connect(&served.path).unwrap();
    assert_closed(&mut silent);
    let mut half = begin_hand_made(&served.path, 3).unwrap();
    half.write_all(&option(7, &[0; 6])[..10]).unwrap();
    assert_closed(&mut half);
    served.check_health();
    served.end();
}

#[test]
fn a_client_that_keeps_talking_does_not_prolong_its_handshake() {
    let limits = Limits { handshake_timeout: Duration::from_millis(100), ..Limits::default() };
    let served = served(limits);
    let mut talker = begin_hand_made(&served.path, 3).unwrap();
    // One byte of an endless option at a time: it ends by the server's closing, not by ours.
    let endless = option(9999, &vec![0; 65536]);
    let mut bytes = endless.iter();
    while let Some(byte) = bytes.next()
        && talker.write_all(&[*byte]).is_ok()
    {
        thread::yield_now();
    }
    assert_closed(&mut talker);
    served.check_health();
    served.end();
}

#[test]
fn who_says_nothing_keeps_nobody_out() {
    // Nothing but a newcomer makes them go.
    let limits = Limits { half_open: 3, handshake_timeout: Duration::from_secs(3600), ..Limits::default() };
    let served = served(limits);
    let mut established = served.client();
    // It is told that the handshake is over before it counts as over.
    assert_eq!(established.read(0, 4096).result, Ok(()));
    let mut silent: Vec<_> = (0..3).map(|_| UnixStream::connect(&served.path).unwrap()).collect();
    served.wait_for(|stats| stats.half_open == 3);
    // Refused while they are young, then let in.
    let newcomer = loop {
        assert!(served.handle.stats().half_open <= 3);
        if let Ok(client) = Client::connect(&served.path, wish("disk0", ReplyStyle::Structured)) {
            break client;
        }
    };
    assert_closed(&mut silent[0]);
    assert_eq!(established.read(0, 4096).result, Ok(()));
    newcomer.disconnect();
    drop((silent, established));
    served.check_health();
    served.end();
}

/// A server with memory for one request, and little patience with who holds it.
fn served_one_at_a_time() -> Served {
    let limits = Limits {
        memory_bytes: 16 << 20,
        request_bytes: 16 << 20,
        patience_when_wanted: Duration::from_millis(50),
        ..Limits::default()
    };
    Served::new(MemoryDisk::new(16 << 20).slow(), ServerOptions { limits, ..ServerOptions::default() })
}

#[test]
fn who_sends_no_payload_loses_its_memory_to_those_who_wait() {
    let served = served_one_at_a_time();
    let mut stalled = served.simple_client();
    stalled.send(CommandKind::Write, CommandFlags::NONE, 0, 16 << 20, &[7; 1000]);
    served.wait_for(|stats| stats.memory_bytes == 16 << 20);
    let mut other = served.simple_client();
    assert_eq!(other.read(0, 16 << 20).result, Ok(()));
    stalled.assert_closed();
    assert!(served.disk.bytes().iter().all(|byte| *byte == 0), "half of a payload was written");
    drop((stalled, other));
    served.check_health();
    served.end();
}

#[test]
fn who_takes_or_sends_nothing_for_long_is_closed_though_nobody_waits() {
    let limits = Limits { stall_timeout: Duration::from_millis(50), ..Limits::default() };
    let served = served(limits);
    let mut idle = served.client();
    let mut deaf = served.simple_client();
    deaf.send(CommandKind::Read, CommandFlags::NONE, 0, 32 << 20, &[]);
    let mut mute = served.simple_client();
    mute.send(CommandKind::Write, CommandFlags::NONE, 0, 1 << 20, &[]);
    let mut brief = served.simple_client();
    brief.send(CommandKind::Write, CommandFlags::NONE, 0, 60_000, &[7; 100]);
    let mut refused = served.simple_client();
    refused.send(CommandKind::Write, CommandFlags::NONE, SIZE as u64, 1 << 20, &[7; 100]);
    let mut half = served.simple_client();
    half.socket.write_all(&[0x25]).unwrap();
    served.wait_for(|stats| stats.connections == 1);
    for client in [&mut deaf, &mut mute, &mut brief, &mut refused, &mut half] {
        client.assert_closed();
    }
    assert_eq!(idle.read(0, 4096).result, Ok(()), "who asks for nothing may be silent");
    drop(idle);
    served.check_health();
    served.end();
}

/// 4 MiB for all requests, and nothing of it for each connection.
fn without_shares() -> Limits {
    // So many that their shares are less than a page.
    Limits { memory_bytes: 4 << 20, request_bytes: 1 << 20, connections: 10_000, ..Limits::default() }
}

#[test]
fn a_client_of_small_requests_is_served_beside_greedy_ones() {
    let limits = without_shares();
    let served =
        Served::new(MemoryDisk::new(8 << 20).slow(), ServerOptions { limits, ..ServerOptions::default() });
    let mut small = served.simple_client();
    let mut greedy: Vec<Client> = (0..6).map(|_| served.simple_client()).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for client in &mut greedy {
            let over = &over;
            scope.spawn(move || {
                let send = |client: &mut Client| {
                    client.send(CommandKind::Read, CommandFlags::NONE, 0, 1 << 20, &[]);
                };
                (0..64).for_each(|_| send(client));
                // There are always 64 of each: without turns they would hold all memory for ever.
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(client.receive().unwrap().result, Ok(()));
                    send(client);
                }
            });
        }
        served.wait_for(|stats| stats.memory_bytes == 4 << 20);
        for _ in 0..200 {
            assert_eq!(small.read(0, 16 << 10).result, Ok(()));
        }
        over.store(true, Ordering::Relaxed);
    });
    drop((small, greedy));
    served.check_health();
    served.end();
}

#[test]
fn one_connection_too_many_is_closed_and_the_others_go_on() {
    let served = served(Limits { connections: 4, ..Limits::default() });
    let mut clients: Vec<Client> = (0..4).map(|_| served.client()).collect();
    assert!(Client::connect(&served.path, wish("disk0", ReplyStyle::Structured)).is_err());
    for client in &mut clients {
        assert_eq!(client.read(0, 4096).result, Ok(()));
    }
    clients.pop().unwrap().disconnect();
    served.wait_for(|stats| stats.connections == 3);
    served.client().disconnect();
    served.end();
}

#[test]
fn requests_longer_than_allowed_are_refused_and_their_payload_skipped() {
    let served = served(Limits { request_bytes: 1 << 20, ..Limits::default() });
    let mut client = served.client();
    assert_eq!(client.connected.info.block_sizes.maximum, 1 << 20);
    assert_eq!(client.read(0, (1 << 20) + 1).result, Err(Errno::Overflow));
    assert_eq!(client.write(0, &vec![1; (1 << 20) + 1]).result, Err(Errno::Invalid));
    assert_eq!(client.write(0, &vec![1; MAX_PAYLOAD_BYTES as usize]).result, Err(Errno::Invalid));
    assert_eq!(client.read(0, 1 << 20).result, Ok(()));
    assert!(served.disk.bytes().iter().all(|byte| *byte == 0));
    served.end();
}

#[test]
fn the_largest_requests_are_served() {
    let served = served(Limits::default());
    let mut client = served.client();
    let data: Vec<u8> = (0..MAX_PAYLOAD_BYTES).map(|at| at as u8 | 1).collect();
    assert_eq!(client.write(4096, &data).result, Ok(()));
    let most = u64::from(MAX_PAYLOAD_BYTES);
    assert!(client.read(4096, most).data == data);
    assert_eq!(client.read(0, most + 1).result, Err(Errno::Overflow));
    assert_eq!(served.simple_client().read(0, most + 1).result, Err(Errno::Invalid));
    served.end();
}

#[test]
fn a_payload_that_nobody_would_drain_ends_the_connection_at_once() {
    let served = served(Limits::default());
    let mut client = served.client();
    client.send(CommandKind::Write, CommandFlags::NONE, 0, u64::from(MAX_PAYLOAD_BYTES) + 1, &[]);
    client.assert_closed();
    served.check_health();
    served.end();
}

#[test]
fn a_connection_has_no_more_requests_in_flight_than_allowed() {
    let limits = Limits { requests_in_flight: 3, ..Limits::default() };
    let served =
        Served::new(MemoryDisk::new(1 << 20).slow(), ServerOptions { limits, ..ServerOptions::default() });
    served.disk.close_gate();
    let mut client = served.client();
    for _ in 0..10 {
        client.send(CommandKind::Read, CommandFlags::NONE, 0, 4096, &[]);
    }
    served.disk.wait_for_waiting(3);
    // A connection of its own is not held up, and shows that the first one takes no more meanwhile.
    let mut other = served.client();
    other.send(CommandKind::Read, CommandFlags::NONE, 0, 4096, &[]);
    served.disk.wait_for_waiting(4);
    assert_eq!(served.handle.stats().operations, 4);
    served.disk.open_gate();
    for _ in 0..10 {
        assert_eq!(client.receive().unwrap().result, Ok(()));
    }
    served.end();
}

#[test]
fn memory_in_flight_never_exceeds_the_budget_and_everybody_is_served_in_turn() {
    let limits = without_shares();
    let served =
        Served::new(MemoryDisk::new(8 << 20).slow(), ServerOptions { limits, ..ServerOptions::default() });
    served.disk.close_gate();
    let mut clients: Vec<Client> = (0..6).map(|_| served.simple_client()).collect();
    for client in &mut clients {
        for number in 0..4 {
            client.send(CommandKind::Read, CommandFlags::NONE, number << 20, 1 << 20, &[]);
        }
    }
    // Four connections have a quarter each; two wait.
    served.disk.wait_for_waiting(4);
    assert_eq!(served.handle.stats().memory_bytes, 4 << 20);
    assert_eq!(served.disk.waiting(), 4);
    served.disk.open_gate();
    // All of them read at once: who takes no replies while others wait is cut off.
    let monitor = served.handle.monitor();
    thread::scope(|scope| {
        for client in &mut clients {
            scope.spawn(|| {
                for _ in 0..4 {
                    assert_eq!(client.receive().unwrap().result, Ok(()));
                    assert!(monitor.stats().memory_bytes <= 4 << 20);
                }
            });
        }
    });
    drop(clients);
    served.check_health();
    served.end();
}

/// A server with 32 MiB of common memory, and 4 for each connection.
fn served_with_shares(patience_when_wanted: Duration) -> Served {
    let limits = Limits {
        memory_bytes: 64 << 20,
        request_bytes: 8 << 20,
        connections: 8,
        patience_when_wanted,
        ..Limits::default()
    };
    Served::new(MemoryDisk::new(8 << 20).slow(), ServerOptions { limits, ..ServerOptions::default() })
}

/// Announces a write of 8 MiB, and sends nothing of it.
fn announcing(served: &Served) -> Client {
    let mut mute = served.simple_client();
    mute.send(CommandKind::Write, CommandFlags::NONE, 0, 8 << 20, &[]);
    mute
}

#[test]
fn whoever_asks_for_no_more_than_its_share_goes_on_though_others_hold_the_rest_for_ever() {
    let served = served_with_shares(Duration::from_secs(3600));
    let mute: Vec<Client> = (0..5).map(|_| announcing(&served)).collect();
    served.wait_for(|stats| stats.memory_bytes == 32 << 20);
    let mut client = served.client();
    assert_eq!(client.read(0, 4 << 20).result, Ok(()));
    assert_eq!(client.write(0, &vec![7; 4 << 20]).result, Ok(()));
    // Together they are more than the share: some wait for others of the same connection.
    for number in 0..16 {
        client.send(CommandKind::Read, CommandFlags::NONE, number << 18, 1 << 20, &[]);
    }
    for _ in 0..16 {
        assert_eq!(client.receive().unwrap().result, Ok(()));
    }
    drop((mute, client));
    served.check_health();
    served.end();
}

#[test]
fn who_holds_no_more_than_its_share_is_left_alone_though_others_wait() {
    let served = served_with_shares(Duration::from_millis(50));
    let mut lazy = served.simple_client();
    // More than its socket takes.
    lazy.send(CommandKind::Read, CommandFlags::NONE, 0, 4 << 20, &[]);
    for _ in 0..5 {
        served.wait_for(|stats| stats.memory_bytes == 4 << 20 && stats.operations == 0);
        let mute: Vec<Client> = (0..4).map(|_| announcing(&served)).collect();
        served.wait_for(|stats| stats.memory_bytes == 36 << 20);
        let mut waiting = served.simple_client();
        let connections = served.handle.stats().connections;
        while served.handle.stats().connections == connections {
            assert_eq!(waiting.read(0, 8 << 20).result, Ok(()));
        }
        drop(mute);
    }
    assert_eq!(lazy.receive().unwrap().result, Ok(()));
    served.end();
}

#[test]
fn who_takes_no_replies_loses_its_memory_to_those_who_wait() {
    let served = served_one_at_a_time();
    let mut stalled = served.simple_client();
    stalled.send(CommandKind::Read, CommandFlags::NONE, 0, 16 << 20, &[]);
    served.wait_for(|stats| stats.memory_bytes == 16 << 20 && stats.operations == 0);
    let mut other = served.simple_client();
    assert_eq!(other.read(0, 16 << 20).result, Ok(()));
    stalled.assert_closed();
    drop((stalled, other));
    served.check_health();
    served.end();
}

#[test]
fn who_takes_no_replies_and_sends_all_the_while_loses_its_memory_too() {
    let limits = Limits {
        memory_bytes: 4 << 20,
        request_bytes: 4 << 20,
        patience_when_wanted: Duration::from_millis(50),
        ..Limits::default()
    };
    let served =
        Served::new(MemoryDisk::new(4 << 20).slow(), ServerOptions { limits, ..ServerOptions::default() });
    let (mut deaf, mut other) = (served.simple_client(), served.simple_client());
    // Until the kernel takes no more of its replies, and one of them is kept.
    while served.handle.stats().memory_bytes == 0 {
        deaf.send(CommandKind::Read, CommandFlags::NONE, 0, 1 << 20, &[]);
        // Once another is answered after it, it has begun, and later been sent as far as it can be.
        assert_eq!(other.flush().result, Ok(()));
        served.wait_for(|stats| stats.operations == 0);
        assert_eq!(other.flush().result, Ok(()));
    }
    let refused = deaf.header(CommandKind::Write, CommandFlags::NONE, 4 << 20, 64 << 10);
    let message = [&deaf.encode(&refused)[..], &[7; 64 << 10]].concat();
    thread::scope(|scope| {
        // Each is refused and skipped, until the connection is closed: at such a pace that their replies do not fill what is kept of them.
        scope.spawn(|| {
            while deaf.socket.write_all(&message).is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        assert_eq!(other.read(0, 4 << 20).result, Ok(()));
    });
    drop(other);
    drop(deaf);
    served.check_health();
    served.end();
}

#[test]
fn who_takes_no_replies_keeps_its_connection_while_nobody_waits() {
    let limits = Limits { patience_when_wanted: Duration::from_millis(1), ..Limits::default() };
    let served = served(limits);
    let mut lazy = served.simple_client();
    lazy.send(CommandKind::Read, CommandFlags::NONE, 0, 32 << 20, &[]);
    served.wait_for(|stats| stats.memory_bytes == 32 << 20 && stats.operations == 0);
    // Long enough for the timer to have run out many times.
    let mut other = served.simple_client();
    for _ in 0..1000 {
        assert_eq!(other.read(0, 4096).result, Ok(()));
    }
    assert_eq!(lazy.receive().unwrap().result, Ok(()));
    served.end();
}

#[test]
fn options_without_end_are_cut_off() {
    let served = served(Limits::default());
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    let mut message = Vec::new();
    for _ in 0..40 {
        message.extend_from_slice(&option(3, &[]));
    }
    socket.write_all(&message).unwrap();
    assert_closed(&mut socket);
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    let mut long = option(3, &[]);
    long[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    socket.write_all(&long).unwrap();
    assert_closed(&mut socket);
    served.check_health();
    served.end();
}

#[test]
fn a_listing_is_answered_and_the_next_option_too() {
    let served = served(Limits::default());
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    socket.write_all(&option(3, &[])).unwrap();
    // Two exports and the end of the list.
    socket.read_exact(&mut [0; 20 + 4 + 5 + 20 + 4 + 6 + 20]).unwrap();
    socket.write_all(&option(2, &[])).unwrap();
    socket.read_exact(&mut [0; 20]).unwrap();
    assert_closed(&mut socket);
    served.end();
}

#[test]
fn two_hundred_exports_can_be_listed_and_asked_about_and_not_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let disk = Arc::new(MemoryDisk::new(1 << 20));
    let exports = (0..200).map(|number| Export::new(format!("disk{number}"), disk.clone()));
    let address = ListenAddress::Unix(path.clone());
    let server = Server::bind(&[address], exports.collect(), ServerOptions::default()).unwrap();
    let handle = server.run(1, engine()).unwrap();
    let uri = format!("nbd+unix://?socket={}", path.display());
    for (program, arguments) in
        [("nbdinfo", vec!["--list", &uri]), ("qemu-nbd", vec!["--list", "-k", path.to_str().unwrap()])]
    {
        let listed = std::process::Command::new(program).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&listed.stdout);
        assert!(listed.status.success() && text.contains("disk199"), "{program}: {listed:?}");
    }
    // Structured replies, again and again, and no end of it.
    let mut socket = begin_hand_made(&path, 3).unwrap();
    let most = proto::wire::max_options(200);
    let (mut answers, mut sent) = ([0; 20], 0);
    socket.write_all(&option(8, &[])).unwrap();
    while socket.read_exact(&mut answers).is_ok() && sent < 2 * most {
        sent += 1;
        if socket.write_all(&option(8, &[])).is_err() {
            break;
        }
    }
    assert_eq!(sent, most + 1);
    handle.shutdown();
    handle.join().unwrap();
}
