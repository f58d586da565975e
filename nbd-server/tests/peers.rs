//! One conversation of our client with servers that others wrote: list, info, go, then every command that they offer. Each takes the
//! best replies that the server has.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Client, wish};
use proto::client::{Connected, Goal, Handshake, Listed, Progress, Wish};
use proto::wire::{CommandFlags, CommandKind, Errno, MetaContext, ReplyStyle, TransmissionFlags};
use rustix::process::{Pid, Signal, kill_process};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
/// The disk has data here and nowhere else.
const DATA: std::ops::Range<usize> = 8 << 20..12 << 20;
/// Where a server that goes into the background says which process it is.
const PID_FILE: &str = "pid";
/// So that a test that fails ends: no test waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(60);

/// Somebody's server of a disk. It ends with the test.
struct Peer {
    child: Child,
    path: PathBuf,
    disk: PathBuf,
    dir: tempfile::TempDir,
}

impl Peer {
    /// Of a server that goes into the background: the process that listens.
    fn background(&self) -> Option<Pid> {
        Pid::from_raw(fs::read_to_string(self.dir.path().join(PID_FILE)).ok()?.trim().parse().ok()?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(pid) = self.background() {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

fn content() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    for (place, byte) in bytes[DATA].iter_mut().enumerate() {
        *byte = (place / 512 * 7 + place) as u8 | 1;
    }
    bytes
}

impl Peer {
    /// The server `program`, with the arguments that `arguments` makes of the directory, the disk and the socket.
    fn start(program: &str, arguments: impl FnOnce(&Path, &str, &str) -> Vec<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (disk, path) = (dir.path().join("disk.raw"), dir.path().join("s"));
        let mut file = fs::File::create(&disk).unwrap();
        file.set_len(SIZE).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &content()[DATA], DATA.start as u64).unwrap();
        file.flush().unwrap();
        let words = arguments(dir.path(), disk.to_str().unwrap(), path.to_str().unwrap());
        let mut command = Command::new(program);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().unwrap_or_else(|error| {
            panic!("cannot start {program} ({error}); run scripts/setup.sh as root, which installs it")
        });
        let mut peer = Self { child, path, disk, dir };
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&peer.path).is_err() {
            assert!(Instant::now() < deadline, "{program} does not listen");
            let ended = peer.child.try_wait().unwrap();
            assert!(ended.is_none_or(|status| status.success()), "{program} ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        peer
    }

    /// What a handshake ends with that does not lead to transmission.
    fn ask(&self, goal: Goal) -> Progress {
        let mut socket = UnixStream::connect(&self.path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut handshake = Handshake::new(Wish {
            goal,
            replies: ReplyStyle::Extended,
            contexts: vec![MetaContext::Allocation],
        });
        let mut buf = [0; 4096];
        loop {
            let len = socket.read(&mut buf).unwrap();
            assert!(len > 0, "the server hung up");
            let progress = handshake.receive(&buf[..len]).unwrap();
            socket.write_all(&handshake.take_output()).unwrap();
            if progress != Progress::Waiting {
                return progress;
            }
        }
    }

    fn list(&self) -> Vec<Listed> {
        match self.ask(Goal::List) {
            Progress::Listed(listed) => listed,
            other => panic!("{other:?}"),
        }
    }

    fn info(&self, name: &str) -> Connected {
        match self.ask(Goal::Info(name.to_owned())) {
            Progress::Told(told) => *told,
            other => panic!("{other:?}"),
        }
    }

    /// The whole conversation, with the replies that the server is known to have.
    fn converse(&self, name: &str, replies: ReplyStyle) {
        assert_eq!(self.list().iter().map(|listed| listed.name.as_str()).collect::<Vec<_>>(), [name]);
        let told = self.info(name);
        let mut client = Client::connect(&self.path, wish(name, ReplyStyle::Extended)).unwrap();
        let info = client.connected.info.clone();
        assert_eq!(told.info.flags, info.flags);
        // nbd-server opens its disks at GO: to INFO it says that they have 0 bytes.
        assert_eq!(told.info.size, if replies == ReplyStyle::Simple { 0 } else { SIZE });
        assert_eq!((info.size, client.style()), (SIZE, replies));
        let has = |flag| info.flags.contains(flag);

        let mut expected = content();
        let check = |client: &mut Client, expected: &[u8]| {
            for (at, piece) in (0..).step_by(4 << 20).zip(expected.chunks(4 << 20)) {
                let reply = client.read(at, piece.len() as u64);
                assert_eq!(reply.result, Ok(()));
                assert!(reply.data == piece, "the 4 MiB at {at} are not what they should be");
            }
        };
        check(&mut client, &expected);

        let done = |client: &mut Client, kind, flags, offset: u64, len: u64, data: &[u8]| {
            let reply = client.call(kind, flags, offset, len, data);
            assert_eq!(reply.result, Ok(()), "{kind:?} of {len} bytes at {offset}: {:?}", reply.failure);
        };
        let (none, fua) = (CommandFlags::NONE, CommandFlags::FUA);
        for (at, len, byte, flags) in [
            (0, MIB, 0xa1, none),
            (9 * MIB + 512, 512, 0xa2, none),
            (20 * MIB, 4096, 0xa3, none.with_if(has(TransmissionFlags::SEND_FUA), fua)),
            (SIZE - 65536, 65536, 0xa4, none),
        ] {
            let data = vec![byte; len as usize];
            done(&mut client, CommandKind::Write, flags, at, len, &data);
            expected[at as usize..][..data.len()].copy_from_slice(&data);
        }
        assert!(has(TransmissionFlags::SEND_FLUSH));
        done(&mut client, CommandKind::Flush, none, 0, 0, &[]);
        if has(TransmissionFlags::SEND_WRITE_ZEROES) {
            for (at, flags) in [(10 * MIB, none), (11 * MIB, CommandFlags::NO_HOLE)] {
                done(&mut client, CommandKind::WriteZeroes, flags, at, MIB / 2, &[]);
                expected[at as usize..][..MIB as usize / 2].fill(0);
            }
        }
        if has(TransmissionFlags::SEND_CACHE) {
            done(&mut client, CommandKind::Cache, none, 8 * MIB, MIB, &[]);
        }
        // What a trim leaves behind is the server's affair: here they are holes of the file, which are zeroes.
        if has(TransmissionFlags::SEND_TRIM) {
            done(&mut client, CommandKind::Trim, none, 8 * MIB, MIB / 2, &[]);
            expected[8 << 20..][..MIB as usize / 2].fill(0);
        }
        check(&mut client, &expected);

        // Several at once, answered in any order.
        let mut awaited: Vec<_> = (0..16)
            .map(|number| client.send(CommandKind::Read, none, number * 4 * MIB, 64 << 10, &[]))
            .collect();
        while !awaited.is_empty() {
            let reply = client.receive().unwrap();
            assert_eq!(reply.result, Ok(()));
            let start = reply.header.offset as usize;
            assert!(reply.data == expected[start..][..64 << 10], "the read at {start}");
            awaited.retain(|cookie| *cookie != reply.header.cookie);
        }

        if replies == ReplyStyle::Simple {
            assert!(client.connected.contexts.is_empty());
        } else {
            let mut at = 0;
            let mut holes = 0;
            while at < SIZE {
                for extent in client.status(&MetaContext::Allocation, none, at, SIZE - at) {
                    let end = (at + extent.len).min(SIZE);
                    let zeroes = extent.flags & 2 != 0;
                    let is_zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
                    assert!(!zeroes || is_zero(&expected[at as usize..end as usize]), "data at {at}..{end}");
                    holes += if zeroes { end - at } else { 0 };
                    at = end;
                }
            }
            assert!(holes >= 40 * MIB, "holes of {holes} bytes were found");
        }

        // What it refuses, it refuses alone.
        let past = client.call(CommandKind::Read, none, SIZE, 512, &[]);
        assert!(matches!(past.result, Err(Errno::Invalid | Errno::NoSpace)), "{:?}", past.result);
        check(&mut client, &expected);
        done(&mut client, CommandKind::Flush, none, 0, 0, &[]);
        client.disconnect();
        assert!(fs::read(&self.disk).unwrap() == expected, "the file has what was written");
    }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn our_client_converses_with_nbdkit() {
    let peer =
        Peer::start("nbdkit", |_, disk, socket| owned(&["--foreground", "--unix", socket, "file", disk]));
    peer.converse("", ReplyStyle::Structured);
}

#[test]
fn our_client_converses_with_qemu_nbd() {
    let said = Command::new("qemu-nbd").arg("--version").output().expect("qemu-nbd is installed").stdout;
    let said = String::from_utf8_lossy(&said).into_owned();
    let digits = |word: &&str| word.starts_with(|first: char| first.is_ascii_digit());
    let version = said.split_whitespace().find(digits).unwrap();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap());
    // Since 8.2 it has extended headers.
    let is_new = (numbers.next().unwrap(), numbers.next().unwrap()) >= (8, 2);
    let peer = Peer::start("qemu-nbd", |_, disk, socket| {
        owned(&["--persistent", "--shared=4", "--discard=unmap", "--format=raw", "--socket", socket, disk])
    });
    peer.converse("", if is_new { ReplyStyle::Extended } else { ReplyStyle::Structured });
}

#[test]
fn our_client_converses_with_nbd_server() {
    let peer = Peer::start("nbd-server", |dir, disk, socket| {
        let config = dir.join("config");
        let text = format!(
            "[generic]\nunixsock = {socket}\nallowlist = true\n\
             [disk]\nexportname = {disk}\nflush = true\nfua = true\ntrim = true\n"
        );
        fs::write(&config, text).unwrap();
        let pid_file = dir.join(PID_FILE);
        owned(&["-C", config.to_str().unwrap(), "-p", pid_file.to_str().unwrap()])
    });
    peer.converse("disk", ReplyStyle::Simple);
}
