//! A server in this process of whose memory others hold all that is common, for ever: what is longer than a connection's share
//! goes on in parts. Two clients send many requests at once.
//!
//! | bytes | |
//! |---|---|
//! | 1 | bit 0: the share of a connection, 8 or 32 KiB; bit 1: the first client goes in the middle of a WRITE; bits 2–3, 4–5: the kinds of replies |
//! | 1 | of each round: bits 0–2: how many requests but one; bit 3: the disk fails, bit 4: as one without room |
//! | 1 | after how many operations, where it fails |
//! | 9 | of each request: the kind and, in bit 7, the client; offset; length |
//! | 4 | at the end, of the WRITE in whose middle a client goes: offset, length |

use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use block::{Engine, ErrorKind};
use nbd_server::{Export, Limits, Listener, Server, ServerHandle, ServerOptions, Stats};
use proto::client::{Goal, Wish};
use proto::wire::{CommandFlags, CommandKind, Errno, ReplyStyle};

use crate::input::Input;
use client::Client;
use disk::MemoryDisk;

#[allow(dead_code, reason = "the tests of the server use more of it")]
#[path = "../../nbd-server/tests/common/client.rs"]
mod client;
#[allow(dead_code, reason = "the tests of the server use more of it")]
#[path = "../../nbd-server/tests/common/disk.rs"]
mod disk;

const DISK_BYTES: usize = 512 << 10;
const REQUEST_BYTES: usize = 256 << 10;
const COMMON_BYTES: u64 = 2 << 20;
/// So much is compared at a time: bytes by themselves only where that fails.
const PIECE_BYTES: usize = 512;
const FOR_EVER: Duration = Duration::from_secs(1 << 30);
/// How long something takes that has come to nothing.
const TOO_LONG: Duration = Duration::from_secs(60);
const STYLES: [ReplyStyle; 4] =
    [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended, ReplyStyle::Simple];

static SERVED: [LazyLock<Served>; 2] =
    [LazyLock::new(|| Served::new(256)), LazyLock::new(|| Served::new(64))];
/// What is written: no byte is zero, and no two parts are the same.
static PATTERN: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..REQUEST_BYTES + 256).map(|at| (at / 251 + at) as u8 | 1).collect());

struct Served {
    disk: Arc<MemoryDisk>,
    address: SocketAddr,
    handle: ServerHandle,
    /// Where nobody asks for anything but those who hold the memory.
    idle: Stats,
    /// They announced a WRITE each, and send nothing of it.
    holders: Vec<UnixStream>,
}

impl Served {
    /// Each of so many connections has a part of as much as is common.
    fn new(connections: usize) -> Self {
        let limits = Limits {
            memory_bytes: 2 * COMMON_BYTES,
            request_bytes: REQUEST_BYTES as u32,
            connections,
            patience_when_wanted: FOR_EVER,
            stall_timeout: FOR_EVER,
            ..Limits::default()
        };
        let options = ServerOptions { limits, ..ServerOptions::default() };
        let name = format!("lifeboot-fuzz-{}-{connections}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("it is short");
        let socket = UnixListener::bind_addr(&address).expect("the name is ours");
        let listener = Listener::adopt(socket.into(), &options.access, false).expect("it listens");
        listener.own(&options.access).expect("it is ours");
        let disk = Arc::new(MemoryDisk::new(DISK_BYTES).slow());
        let exports = vec![Export::new("", disk.clone())];
        let server = Server::listening(vec![listener], exports, options).expect("the name is good");
        let handle = server.run(1, Engine::THREADS).expect("threads can be had");
        let count = COMMON_BYTES as usize / REQUEST_BYTES;
        let idle = Stats { connections: count, half_open: 0, operations: count, memory_bytes: COMMON_BYTES };
        let mut served = Self { disk, address, handle, idle, holders: Vec::new() };
        for _ in 0..count {
            let mut holder = served.client(ReplyStyle::Simple);
            holder.send(CommandKind::Write, CommandFlags::NONE, 0, REQUEST_BYTES as u64, &[]);
            served.holders.push(holder.socket);
        }
        served.wait();
        served
    }

    fn client(&self, replies: ReplyStyle) -> Client {
        let socket = UnixStream::connect_addr(&self.address).expect("the server listens");
        let wish = Wish { goal: Goal::Go(String::new()), replies, contexts: Vec::new() };
        Client::over(socket, wish).expect("the server takes us")
    }

    /// Waits until everything was given back.
    fn wait(&self) {
        let begun = Instant::now();
        while self.handle.stats() != self.idle {
            assert!(begun.elapsed() < TOO_LONG, "something is left: {:?}", self.handle.stats());
            thread::yield_now();
        }
    }
}

/// What the disk holds, and what it may hold instead since some of a round was written.
struct Model {
    bytes: Vec<u8>,
    written: Vec<(usize, Vec<u8>)>,
}

impl Model {
    /// Bytes at `start` were there before, or were written.
    fn check(&self, start: usize, bytes: &[u8]) {
        for (at, piece) in (start..).step_by(PIECE_BYTES).zip(bytes.chunks(PIECE_BYTES)) {
            if self.may_hold(at, piece) {
                continue;
            }
            for (at, byte) in (at..).zip(piece) {
                assert!(self.may_hold(at, &[*byte]), "{byte} at {at} is from nowhere");
            }
        }
    }

    /// Whether all of a piece can be of one time.
    fn may_hold(&self, at: usize, piece: &[u8]) -> bool {
        let of = |offset: usize, bytes: &[u8]| {
            let at = at.checked_sub(offset)?;
            Some(bytes.get(at..at + piece.len())? == piece)
        };
        of(0, &self.bytes) == Some(true)
            || self.written.iter().any(|(offset, new)| of(*offset, new) == Some(true))
    }

    /// All that was asked for has been answered: with success, where nothing was made to fail.
    fn settle(&mut self, disk: &[u8], failing: bool) {
        self.check(0, disk);
        for (number, (start, new)) in self.written.iter().enumerate() {
            let overlaps = |&(other, (offset, bytes)): &(usize, &(usize, Vec<u8>))| {
                other != number && *offset < start + new.len() && *start < offset + bytes.len()
            };
            let is_alone = !self.written.iter().enumerate().any(|other| overlaps(&other));
            assert!(failing || !is_alone || disk[*start..start + new.len()] == new[..], "it is not there");
        }
        self.bytes.copy_from_slice(disk);
        self.written.clear();
    }
}

/// What a client sends in a round.
#[derive(Default)]
struct Sent {
    message: Vec<u8>,
    requests: usize,
    /// A READ that fails may end the connection.
    has_run: bool,
}

/// Adds a request to what its client sends.
fn request(input: &mut Input<'_>, clients: &mut [Client; 2], sent: &mut [Sent; 2], model: &mut Model) {
    let choice = input.u8();
    let (client, sent) = (&mut clients[usize::from(choice >> 7)], &mut sent[usize::from(choice >> 7)]);
    let offset = input.u32() as usize % DISK_BYTES;
    let len = 1 + input.u32() as usize % REQUEST_BYTES.min(DISK_BYTES - offset);
    let has_chunks = client.style() != ReplyStyle::Simple;
    let (kind, flags) = match choice & 7 {
        0 | 1 => (CommandKind::Read, CommandFlags::NONE),
        2 => (CommandKind::Read, CommandFlags::NONE.with_if(has_chunks, CommandFlags::DF)),
        3 | 4 => (CommandKind::Write, CommandFlags::NONE),
        5 => (CommandKind::Write, CommandFlags::FUA),
        6 => (CommandKind::WriteZeroes, CommandFlags::NONE),
        _ => (CommandKind::Flush, CommandFlags::NONE),
    };
    let (offset, len) = if kind == CommandKind::Flush { (0, 0) } else { (offset, len) };
    let header = client.header(kind, flags, offset as u64, len as u64);
    sent.message.extend_from_slice(&client.encode(&header));
    sent.requests += 1;
    sent.has_run |= kind == CommandKind::Read && (!has_chunks || flags.contains(CommandFlags::DF));
    if kind == CommandKind::Write {
        let salt = header.cookie.0 as usize % 256;
        let payload = &PATTERN[salt..salt + len];
        sent.message.extend_from_slice(payload);
        model.written.push((offset, payload.to_vec()));
    } else if kind == CommandKind::WriteZeroes {
        model.written.push((offset, vec![0; len]));
    }
}

/// Whether the connections go on.
fn round(input: &mut Input<'_>, served: &Served, clients: &mut [Client; 2], model: &mut Model) -> bool {
    let choice = input.u8();
    let failing = choice & 8 != 0;
    if failing {
        let kind = if choice & 16 == 0 { ErrorKind::Io } else { ErrorKind::NoSpace };
        served.disk.fail_after(usize::from(input.u8()), kind);
    }
    let mut sent = [Sent::default(), Sent::default()];
    for _ in 0..=choice & 7 {
        request(input, clients, &mut sent, model);
    }
    let writers: Vec<_> = clients
        .iter()
        .zip(&mut sent)
        .map(|(client, sent)| {
            let mut socket = client.socket.try_clone().expect("descriptors can be had");
            let message = std::mem::take(&mut sent.message);
            thread::spawn(move || std::io::Write::write_all(&mut socket, &message))
        })
        .collect();
    for (client, sent) in clients.iter_mut().zip(sent) {
        for _ in 0..sent.requests {
            let reply = match client.receive() {
                Ok(reply) => reply,
                Err(error) => {
                    assert!(failing && sent.has_run, "{error}");
                    return false;
                }
            };
            match reply.result {
                Ok(()) => model.check(reply.header.offset as usize, &reply.data),
                Err(errno) => assert!(failing && matches!(errno, Errno::Io | Errno::NoSpace), "{errno}"),
            }
        }
    }
    for writer in writers {
        writer.join().expect("it has no reason to panic").expect("the server took all of it");
    }
    served.disk.mend();
    model.settle(&served.disk.bytes(), failing);
    true
}

/// Sends a part of what would have been a READ and a WRITE.
fn cut(input: &mut Input<'_>, client: &mut Client, model: &mut Model) {
    let (offset, len) = (usize::from(input.u16()), usize::from(input.u16()) + 1);
    let payload = &PATTERN[..len];
    client.send(CommandKind::Read, CommandFlags::NONE, 0, len as u64, &[]);
    client.send(CommandKind::Write, CommandFlags::NONE, offset as u64, len as u64, &payload[..len / 2]);
    model.written.push((offset, payload.to_vec()));
}

/// What two clients read is what was there or was written at the same time; each request is answered, with success where the disk
/// does not fail; and in the end everything is given back.
pub fn memory(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    let served = &SERVED[usize::from(choice & 1)];
    served.disk.bytes().fill(0);
    let mut model = Model { bytes: vec![0; DISK_BYTES], written: Vec::new() };
    let mut clients = [choice >> 2, choice >> 4].map(|style| served.client(STYLES[usize::from(style & 3)]));
    let mut goes_on = true;
    for _ in 0..4 {
        goes_on = goes_on && !input.is_empty() && round(&mut input, served, &mut clients, &mut model);
    }
    if goes_on && choice & 2 != 0 {
        cut(&mut input, &mut clients[0], &mut model);
    }
    for client in &clients {
        // What is still sent for it has the socket, too.
        let _ = client.socket.shutdown(Shutdown::Both);
    }
    drop(clients);
    served.wait();
    served.disk.mend();
    model.check(0, &served.disk.bytes());
}

/// For [`memory`]: all that is asked for is longer than a share, with every kind of replies.
#[must_use]
pub fn memory_seeds() -> Vec<Vec<u8>> {
    let request = |choice: u8, offset: u32, len: u32| {
        [&[choice][..], &offset.to_be_bytes(), &(len - 1).to_be_bytes()].concat()
    };
    let seed = |choice: u8, failure: &[u8]| {
        let works = [request(0x83, 4097, 60_000), request(3, 100_000, 262_144)];
        let reads = [request(0, 1, 262_144), request(0x80, 100_000, 200_000), request(2, 90_000, 200_000)];
        let mixed =
            [request(5, 0, 50_000), request(0, 50_000, 150_000), request(7, 0, 1), request(6, 9, 70_000)];
        let rest = [request(4, 100, 262_144), request(0x80, 0, 200_000)];
        [
            &[choice, 1][..],
            &works.concat(),
            &[2],
            &reads.concat(),
            &[3],
            &mixed.concat(),
            failure,
            &rest.concat(),
        ]
        .concat()
    };
    vec![seed(0b01_00_10, &[1]), seed(0b10_01_11, &[9, 20]), seed(0b00_10_01, &[25, 3])]
}
