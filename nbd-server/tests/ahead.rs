//! Large writes of a client with one request in flight: written while the rest of them is still sent.

mod common;

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use block::ErrorKind;
use common::{Client, MemoryDisk, Served};
use nbd_server::ServerOptions;
use proto::wire::{CommandFlags, CommandKind, Errno};

const SIZE: usize = 4 << 20;
/// Neither begins nor ends at a block's edge.
const OFFSET: usize = 4096 * 3 + 100;
const LEN: usize = (1 << 20) + 77;
/// What is sent at first.
const BEGUN: usize = 300_000;
/// A byte that is among the first to be written.
const EARLY: usize = OFFSET + (100 << 10);

fn payload() -> Vec<u8> {
    (0..LEN).map(|at| (at % 251) as u8 | 1).collect()
}

/// So often it is tried to be found waiting: a request that comes before the server has gone to sleep is one of several to it.
const ATTEMPTS: usize = 100;

/// A client that has sent the first part of a WRITE, of which whole blocks are on the disk.
fn begin(served: &Served) -> Option<(Client, Vec<u8>)> {
    if thread::available_parallelism().map_or(1, usize::from) < 2 {
        // Nothing is written ahead where there is no processor to spare.
        return None;
    }
    let mut client = served.client();
    let payload = payload();
    for _ in 0..ATTEMPTS {
        thread::sleep(Duration::from_millis(5));
        let header = client.header(CommandKind::Write, CommandFlags::NONE, OFFSET as u64, LEN as u64);
        client.socket.write_all(&client.encode(&header)).expect("the server goes on");
        client.socket.write_all(&payload[..BEGUN]).expect("the server goes on");
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(200) {
            if served.disk.bytes()[EARLY] != 0 {
                return Some((client, payload));
            }
            thread::yield_now();
        }
        client.socket.write_all(&payload[BEGUN..]).expect("the server goes on");
        assert_eq!(client.receive().expect("the server goes on").result, Ok(()));
        served.disk.bytes().fill(0);
    }
    panic!("nothing was written ahead in {ATTEMPTS} attempts");
}

/// How much of the payload is on the disk; nothing else is.
fn written(served: &Served, payload: &[u8]) -> usize {
    let disk = served.disk.bytes();
    let written = disk[OFFSET..].iter().take_while(|byte| **byte != 0).count();
    assert!(disk[..OFFSET].iter().all(|byte| *byte == 0));
    assert!(disk[OFFSET..OFFSET + written] == payload[..written]);
    assert!(disk[OFFSET + written..].iter().all(|byte| *byte == 0));
    written
}

/// Whether that is less than was sent, and whole blocks to its end.
fn is_ahead(written: usize) -> bool {
    written <= BEGUN && (OFFSET + written).is_multiple_of(4096)
}

#[test]
fn what_is_written_ahead_becomes_the_whole() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    if let Some((mut client, payload)) = begin(&served) {
        assert!(is_ahead(written(&served, &payload)));
        client.socket.write_all(&payload[BEGUN..]).expect("the server goes on");
        assert_eq!(client.receive().expect("the server goes on").result, Ok(()));
        assert_eq!(written(&served, &payload), LEN);
        client.disconnect();
    }
    served.check_health();
    served.end();
}

#[test]
fn a_client_that_dies_half_way_leaves_whole_blocks_and_nothing_beyond() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    if let Some((client, payload)) = begin(&served) {
        drop(client);
        served.wait_for(|stats| stats.connections == 0);
        assert!(is_ahead(written(&served, &payload)));
    }
    served.check_health();
    served.end();
}

#[test]
fn a_device_that_fails_half_way_is_told_at_the_end() {
    let served = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    if let Some((mut client, payload)) = begin(&served) {
        served.disk.fail(ErrorKind::NoSpace);
        client.socket.write_all(&payload[BEGUN..]).expect("the server goes on");
        assert_eq!(client.receive().expect("the server goes on").result, Err(Errno::NoSpace));
        client.disconnect();
    }
    served.wait_for(|stats| stats.connections == 0 && stats.memory_bytes == 0);
    served.end();
}
