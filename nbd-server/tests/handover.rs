//! One server takes the place of another: what they say to each other, and what becomes of the sockets.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;

use common::{Client, MemoryDisk, engine, wish};
use nbd_server::handover::{Arrival, Departure, MeetingPoint, Successor, receive_line, send_line};
use nbd_server::{Access, Export, LateRequests, ListenAddress, Server, ServerHandle, ServerOptions};
use proto::wire::ReplyStyle;

const IDENTITY: &str = "a disk";

struct Old {
    handle: ServerHandle,
    point: MeetingPoint,
    departed: mpsc::Receiver<Departure>,
}

struct Place {
    dir: tempfile::TempDir,
    addresses: Vec<ListenAddress>,
    disk: Arc<MemoryDisk>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // What a line of words could trip over.
        let path = dir.path().join("a socket%20, mine");
        let addresses =
            vec![ListenAddress::Unix(path), ListenAddress::Tcp { host: "localhost".to_owned(), port: 0 }];
        Self { dir, addresses, disk: Arc::new(MemoryDisk::new(1 << 20)) }
    }

    fn meeting(&self) -> PathBuf {
        self.dir.path().join("meeting")
    }

    fn socket(&self) -> &Path {
        let ListenAddress::Unix(path) = &self.addresses[0] else { panic!("the first is unix") };
        path
    }

    fn exports(&self) -> Vec<Export> {
        vec![Export::new("disk0", self.disk.clone())]
    }

    fn arrive(&self, identity: &str) -> nbd_server::Result<Arrival> {
        MeetingPoint::arrive(&self.meeting(), identity, &self.addresses, &Access::default())
    }

    fn successor(&self) -> Successor {
        match self.arrive(IDENTITY).unwrap() {
            Arrival::Successor(successor) => successor,
            Arrival::First(_) => panic!("somebody is there"),
        }
    }

    fn serve(&self, server: Server, point: MeetingPoint) -> Old {
        let handle = server.run(1, engine()).unwrap();
        let (departs, departed) = mpsc::channel();
        point
            .wait(IDENTITY.to_owned(), &handle.listeners(), move |departure| departs.send(departure).unwrap())
            .unwrap();
        Old { handle, point, departed }
    }

    fn first(&self) -> Old {
        let Arrival::First(point) = self.arrive(IDENTITY).unwrap() else { panic!("nobody is there yet") };
        let server = Server::bind(&self.addresses, self.exports(), options()).unwrap();
        self.serve(server, point)
    }

    fn check(&self) {
        let mut client = Client::connect(self.socket(), wish("disk0", ReplyStyle::Structured)).unwrap();
        assert_eq!(client.write(4096, &[7; 4096]).result, Ok(()));
        assert!(client.read(4096, 4096).data == [7; 4096]);
        client.disconnect();
    }
}

fn options() -> ServerOptions {
    ServerOptions { late_requests: LateRequests::Leave, ..ServerOptions::default() }
}

#[test]
fn a_successor_that_leaves_is_forgotten_and_the_next_one_takes_over() {
    let place = Place::new();
    let old = place.first();
    drop(place.successor());
    let error = place.arrive("another disk").unwrap_err();
    assert!(
        error.to_string().contains("it serves a disk") && error.to_string().contains("goes on"),
        "{error}"
    );
    place.check();
    let bound = old.handle.addresses().to_vec();
    let successor = place.successor();
    place.check();
    let taking = thread::spawn(move || successor.take_over().unwrap());
    let departure = old.departed.recv().unwrap();
    old.handle.shutdown();
    old.handle.join().unwrap();
    // In the queue of a socket that nobody accepts from just now.
    let waiting = UnixStream::connect(place.socket()).unwrap();
    assert!(!taking.is_finished(), "the old one has not ended");
    drop((departure, old.point));
    let succession = taking.join().unwrap();
    let server = Server::listening(succession.listeners, place.exports(), options()).unwrap();
    assert_eq!(server.addresses(), bound, "and the name of the host is as it was given");
    let new = place.serve(server, succession.point);
    Client::over(waiting, wish("disk0", ReplyStyle::Structured)).unwrap().disconnect();
    place.check();
    new.handle.shutdown();
    new.handle.join().unwrap();
    drop(new.point);
    assert!(!place.socket().exists() && !place.meeting().exists(), "the last one takes the files away");
}

#[test]
fn a_server_that_ends_by_itself_takes_its_files_away_and_is_nobodys_predecessor() {
    let place = Place::new();
    let old = place.first();
    old.handle.shutdown();
    old.handle.join().unwrap();
    assert!(!place.socket().exists());
    let error = place.arrive(IDENTITY).unwrap_err();
    assert!(error.to_string().contains("it is ending"), "{error}");
    drop(old.point);
    assert!(!place.meeting().exists());
}

#[test]
fn other_addresses_are_no_succession() {
    let place = Place::new();
    let old = place.first();
    let others = [ListenAddress::Unix(place.socket().to_owned())];
    let error = MeetingPoint::arrive(&place.meeting(), IDENTITY, &others, &Access::default()).unwrap_err();
    assert!(error.to_string().contains("listens at"), "{error}");
    place.check();
    old.handle.shutdown();
    old.handle.join().unwrap();
}

#[test]
fn who_says_nonsense_at_the_meeting_point_costs_itself() {
    let place = Place::new();
    let old = place.first();
    for words in [&b"\n"[..], b"lifeboot-handover 2 a disk\n", b"\xff\xfe\n", &[b'x'; 70_000], b""] {
        let mut stream = UnixStream::connect(place.meeting()).unwrap();
        // Where it is cut off in the middle of a long line, that is the answer.
        let _ = stream.write_all(words);
        stream.shutdown(std::net::Shutdown::Write).unwrap_or_default();
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
        assert!(answer.is_empty() || answer.starts_with(b"refused "), "{answer:?}");
    }
    drop(place.successor());
    place.check();
    old.handle.shutdown();
    old.handle.join().unwrap();
}

#[test]
fn lines_come_whole_and_no_longer_than_they_may() {
    for (len, is_taken) in [(60_000, true), (1 << 20, false)] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // Where it is too long the other end stops to listen in the middle of it.
        let sender = thread::spawn(move || send_line(&ours, &"x".repeat(len), &[]));
        match receive_line(&theirs) {
            Ok((line, sockets)) => assert!(is_taken && line.len() == len && sockets.is_empty()),
            Err(error) => assert!(!is_taken && error.to_string().contains("too much"), "{error}"),
        }
        drop(theirs);
        assert_eq!(sender.join().unwrap().is_ok(), is_taken);
    }
}

#[test]
fn a_server_that_does_not_answer_is_said_to_go_on_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("meeting");
    let _stopped = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let error = MeetingPoint::arrive(&path, "a disk", &[], &options().access).unwrap_err().to_string();
    let pid = format!("process {}", std::process::id());
    for words in ["which goes on", "did not answer", &pid, path.to_str().unwrap()] {
        assert!(error.contains(words), "{words}: {error}");
    }
}
