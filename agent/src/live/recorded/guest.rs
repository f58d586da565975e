//! A guest: an NBD client that keeps a log of what it asked for and was told.
//!
//! Each guest writes blocks of its own, so that the last value of each is known. The messages are built by hand:
//! a second opinion on the wire, and only simple replies.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use block::BLOCK_SIZE;
use block::sim::Rng;

use super::recorder::{Event, Log};
use super::replay::stamp;
use super::{DISK, GUESTS};

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const EXPORT_NAME: u32 = 1;
/// Fixed newstyle, no zeroes.
const CLIENT_FLAGS: u32 = 3;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FUA: u16 = 1;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;

pub(super) struct Guest {
    socket: UnixStream,
    number: u64,
    log: Log,
    rng: Rng,
    /// What each of its blocks was told to hold last.
    wrote: std::collections::HashMap<u64, u64>,
}

impl Guest {
    pub(super) fn connect(path: &Path, number: u64, log: Log) -> Self {
        let socket = UnixStream::connect(path).expect("the server listens");
        let mut guest =
            Self { socket, number, log, rng: Rng::new(number), wrote: std::collections::HashMap::new() };
        assert_eq!(u64::from_be_bytes(guest.receive()), NBD_MAGIC);
        assert_eq!(u64::from_be_bytes(guest.receive()), OPTION_MAGIC);
        let _flags: [u8; 2] = guest.receive();
        let name = b"disk";
        let mut message = CLIENT_FLAGS.to_be_bytes().to_vec();
        message.extend(OPTION_MAGIC.to_be_bytes());
        message.extend(EXPORT_NAME.to_be_bytes());
        message.extend((name.len() as u32).to_be_bytes());
        message.extend(name);
        guest.socket.write_all(&message).expect("the server reads");
        assert_eq!(u64::from_be_bytes(guest.receive()), DISK.size);
        let _flags: [u8; 2] = guest.receive();
        guest
    }

    /// Writes, zeroes, flushes and reads, `requests` times.
    pub(super) fn work(mut self, requests: u64) {
        for request in 1..=requests {
            let value = (self.number + 1) << 40 | request;
            match self.rng.below(20) {
                0..9 => self.write(value, false),
                9..11 => self.write(value, true),
                11..13 => self.zero(),
                13..15 => self.flush(),
                _ => self.read(),
            }
        }
        self.flush();
    }

    /// Some blocks of its own, of a few neighbouring chunks, so that fills and others' writes are near.
    fn block(&mut self) -> u64 {
        let blocks = DISK.size / BLOCK_SIZE;
        let near = if self.rng.chance(500) { 60 } else { blocks };
        self.rng.below(near / GUESTS) * GUESTS + self.number
    }

    fn write(&mut self, value: u64, fua: bool) {
        let block = self.block();
        self.log.push(Event::GuestWrites { block, value });
        let data = stamp(value, BLOCK_SIZE as usize);
        // A flush of its own, for this block alone: it is not told as one.
        self.request(WRITE, if fua { FUA } else { 0 }, block, &data);
        self.wrote.insert(block, value);
        self.log.push(Event::GuestWrote { block, value });
    }

    fn zero(&mut self) {
        let block = self.block();
        self.log.push(Event::GuestWrites { block, value: 0 });
        self.request(WRITE_ZEROES, 0, block, &[]);
        self.wrote.insert(block, 0);
        self.log.push(Event::GuestWrote { block, value: 0 });
    }

    fn flush(&mut self) {
        self.log.push(Event::GuestFlushes { guest: self.number });
        self.request(FLUSH, 0, 0, &[]);
        self.log.push(Event::GuestFlushed { guest: self.number });
    }

    fn read(&mut self) {
        let block = self.block();
        self.request(READ, 0, block, &[]);
        let bytes: [u8; BLOCK_SIZE as usize] = self.receive();
        if let Some(&value) = self.wrote.get(&block) {
            assert!(
                bytes[..] == stamp(value, BLOCK_SIZE as usize)[..],
                "block {block} does not hold {value:#x}"
            );
        }
    }

    fn request(&mut self, kind: u16, flags: u16, block: u64, data: &[u8]) {
        let len = if kind == FLUSH { 0 } else { BLOCK_SIZE as u32 };
        let mut message = REQUEST_MAGIC.to_be_bytes().to_vec();
        message.extend(flags.to_be_bytes());
        message.extend(kind.to_be_bytes());
        message.extend(7_u64.to_be_bytes());
        message.extend((block * BLOCK_SIZE).to_be_bytes());
        message.extend(len.to_be_bytes());
        message.extend(data);
        self.socket.write_all(&message).expect("the server reads");
        assert_eq!(u32::from_be_bytes(self.receive()), REPLY_MAGIC);
        assert_eq!(u32::from_be_bytes(self.receive()), 0, "request {kind} of block {block} failed");
        assert_eq!(u64::from_be_bytes(self.receive()), 7);
    }

    fn receive<const LEN: usize>(&mut self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        self.socket.read_exact(&mut bytes).expect("the server answers");
        bytes
    }
}
