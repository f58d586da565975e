//! The memory of a whole `lifeboot-nbd` under all that hostile clients do, at once: as the limits say, whatever is asked.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Authority, Client, Dir, begin_hand_made, connect_patiently, more_descriptors, option, wish};
use nbd_server::Limits;
use proto::wire::{CommandFlags, CommandKind, MAX_PAYLOAD_BYTES, ReplyStyle};

const SIZE: u64 = 64 << 20;
const CONNECTIONS: usize = 64;
const DEAF: usize = 16;
const MUTE: usize = 16;
const HURRIED: usize = 8;
const READS_OF_THE_DEAF: u64 = 16;
/// What the program has before anybody connects, with room for an allocator's habits and a build without optimisation.
const BASE_BYTES: u64 = 64 << 20;
/// What a connection may have beside the budget: what it receives into, replies that wait in batches, TLS's two directions.
const CONNECTION_BYTES: u64 = 1 << 20;

struct Running(Child);

/// A test that fails leaves nobody behind.
impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(file: &Path, socket: &Path, options: &[&str]) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lifeboot-nbd"));
    command.arg(file).arg(format!("--listen=unix:{}", socket.display())).args(options);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let stdout = child.stdout.take().unwrap();
    let running = Running(child);
    let mut uri = String::new();
    assert_ne!(BufReader::new(stdout).read_line(&mut uri).unwrap(), 0, "it says where it serves");
    running
}

/// The memory that the process has by this `measure`, in bytes: `VmHWM` is the most that it ever had, `VmRSS` what it has now.
fn memory_bytes(process: &Running, measure: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.0.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(measure)?.strip_prefix(':')).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

fn insist(path: &Path) -> Client {
    loop {
        if let Ok(client) = Client::connect(path, wish("", ReplyStyle::Simple)) {
            return client;
        }
    }
}

/// Sends as much as there is room for.
fn send_what_goes(socket: &mut UnixStream, bytes: &[u8]) {
    socket.set_nonblocking(true).unwrap();
    // It is full, or the server has closed it: both are what is wanted.
    while socket.write_all(bytes).is_ok() {}
}

/// Clients that have a place and take all that it can give.
fn greedy(path: &Path) -> Vec<Client> {
    let longest = u64::from(MAX_PAYLOAD_BYTES);
    let mut clients: Vec<Client> = (0..DEAF + MUTE + HURRIED).map(|_| insist(path)).collect();
    let (deaf, others) = clients.split_at_mut(DEAF);
    let (mute, hurried) = others.split_at_mut(MUTE);
    for client in deaf {
        for number in 0..READS_OF_THE_DEAF {
            client.send(CommandKind::Read, CommandFlags::NONE, number, longest, &[]);
        }
    }
    for client in mute {
        let header = client.header(CommandKind::Write, CommandFlags::NONE, 0, longest);
        let message = [&client.encode(&header)[..], &[7; 1000]].concat();
        client.socket.write_all(&message).unwrap();
    }
    for client in hurried {
        hurry(client, 4096);
    }
    clients
}

/// Asks for as many reads of `len` bytes as there is room for, and takes none.
fn hurry(client: &mut Client, len: u64) {
    let header = client.header(CommandKind::Read, CommandFlags::NONE, 0, len);
    let reads = client.encode(&header).repeat(64);
    send_what_goes(&mut client.socket, &reads);
}

/// Handshakes that are never over, with as much as one can say in them.
fn half_open(path: &Path) -> Vec<UnixStream> {
    let mut held = Vec::new();
    let long = option(7, &[0; 65_536]);
    for number in 0..200 {
        let mut socket = connect_patiently(path);
        // Refused ones are closed: then nothing can be written.
        let flags = 3_u32.to_be_bytes();
        let _ = match number % 4 {
            0 => socket.write_all(&[&flags[..], &long[..60_000]].concat()),
            // Listings without end, their answers unread.
            1 => socket.write_all(&[&flags[..], &option(3, &[]).repeat(31)].concat()),
            2 => socket.write_all(&[&flags[..], &option(5, &[])].concat()),
            _ => Ok(()),
        };
        held.push(socket);
    }
    held
}

/// Those that ask for TLS and say what is none, or half of it. Where there is no place for them they try no more.
fn no_tls(path: &Path) -> Vec<UnixStream> {
    let hello = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[5; 200]].concat();
    let endless = [&[0x16, 3, 3, 0x40, 0, 1, 0xff, 0xff, 0xff][..], &[0; 0x3ffc]].concat();
    let sayings = [&hello[..], &endless, &[0xff; 70_000], b"GET / HTTP/1.1\r\n\r\n"];
    let mut held = Vec::new();
    for saying in sayings.repeat(10) {
        let Ok(mut socket) = begin_hand_made(path, 3) else { continue };
        let begun = socket.write_all(&option(5, &[])).and_then(|()| socket.read_exact(&mut [0; 20]));
        if begun.is_ok() {
            let _ = socket.write_all(saying);
            held.push(socket);
        }
    }
    held
}

#[test]
fn peak_memory_is_as_the_limits_say_whatever_is_asked() {
    let limits = Limits { connections: CONNECTIONS, ..Limits::default() };
    let bound = BASE_BYTES + limits.memory_bytes + CONNECTIONS as u64 * CONNECTION_BYTES;
    let asked = u64::from(MAX_PAYLOAD_BYTES) * (DEAF as u64 * READS_OF_THE_DEAF + MUTE as u64);
    assert!(asked > 10 * bound, "what is asked for is no more than what may be had");
    let dir = tempfile::tempdir().unwrap();
    let (file, path) = (dir.path().join("disk"), dir.path().join("s"));
    std::fs::write(&file, vec![7; SIZE as usize]).unwrap();
    let credentials = Dir::whole(&Authority::new("ca"));
    let descriptors = more_descriptors();
    let places = format!("--max-connections={CONNECTIONS}");
    let credentials = credentials.path().to_str().unwrap();
    let options = [&places, "--handshake-timeout=1h", "--tls=on", "--tls-creds", credentials];
    let server = serve(&file, &path, &options);

    let mut first = insist(&path);
    let secured = no_tls(&path);
    let clients = greedy(&path);
    let half_open = half_open(&path);
    // One that waits for no payload of 4 GiB, and many that say nothing.
    let mut boaster = insist(&path);
    let header = boaster.header(CommandKind::Write, CommandFlags::NONE, 0, u64::from(u32::MAX));
    boaster.socket.write_all(&boaster.encode(&header)).unwrap();
    boaster.assert_closed();
    let flood = 5000_usize.min(descriptors - 1000);
    let flood: Vec<UnixStream> = (0..flood).map(|_| connect_patiently(&path)).collect();

    // Whoever was there, and whoever comes, is served beside all of them.
    let mut last = insist(&path);
    for number in 0..100 {
        assert!(first.read(number * 4096, 4096).data == [7; 4096]);
        assert!(last.read(number * 4096, 4096).data == [7; 4096]);
    }
    let peak = memory_bytes(&server, "VmHWM");
    assert!(peak < bound, "{} MiB, where the limits allow {}", peak >> 20, bound >> 20);
    eprintln!("peak: {} MiB of {} MiB", peak >> 20, bound >> 20);
    drop((secured, clients, half_open, flood));
    assert!(insist(&path).read(0, 4096).data == [7; 4096]);
}

#[test]
fn what_clients_had_at_their_worst_is_given_back_when_they_are_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (file, path) = (dir.path().join("disk"), dir.path().join("s"));
    std::fs::write(&file, vec![7; 1 << 20]).unwrap();
    let server = serve(&file, &path, &[]);
    let mut clients: Vec<Client> = (0..200).map(|_| insist(&path)).collect();
    let at_first = memory_bytes(&server, "VmRSS");
    for (client, len) in clients.iter_mut().zip([4096, 16 << 10, 31 << 10].into_iter().cycle()) {
        hurry(client, len);
    }
    // Each is answered as far as it is, before one who asks now.
    assert!(insist(&path).read(0, 4096).data == [7; 4096]);
    let peak = memory_bytes(&server, "VmHWM");
    eprintln!("{} MiB at first, {} at the peak", at_first >> 20, peak >> 20);
    assert!(peak < BASE_BYTES + clients.len() as u64 * CONNECTION_BYTES);
    drop(clients);
    while memory_bytes(&server, "VmRSS") > at_first + (16 << 20) {
        std::thread::sleep(Duration::from_millis(10));
    }
}
