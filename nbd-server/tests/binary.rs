//! `lifeboot-nbd` as somebody runs it: what it prints, how it ends, and how it fails.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use common::{Client, wish};
use proto::wire::{Errno, ReplyStyle};
use rustix::process::{Pid, Signal, kill_process};

const BINARY: &str = env!("CARGO_BIN_EXE_lifeboot-nbd");

struct Running {
    child: Child,
    uris: Vec<String>,
}

impl Running {
    fn start(file: &Path, addresses: &[&str], arguments: &[&str]) -> Self {
        let mut command = Command::new(BINARY);
        command.arg(file).args(arguments).stdout(Stdio::piped());
        for address in addresses {
            command.args(["--listen", address]);
        }
        let mut child = command.spawn().expect("the binary is there");
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let uris = addresses.iter().map(|_| lines.next().expect("a URI").expect("text")).collect();
        Self { child, uris }
    }

    fn end(mut self, signal: Signal) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
        self.child.wait().expect("it was not waited for").code()
    }
}

/// A test that fails leaves nobody behind.
impl Drop for Running {
    fn drop(&mut self) {
        // Both fail where it has ended, which is as it should be.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn fails(arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } =
        Command::new(BINARY).args(arguments).output().expect("the binary is there");
    (status.code(), String::from_utf8(stderr).expect("text"))
}

#[test]
fn it_serves_a_file_prints_where_and_ends_on_either_signal() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    let socket = dir.path().join("s");
    let address = format!("unix:{}", socket.display());
    for (signal, engine) in [(Signal::TERM, "auto"), (Signal::INT, "threads")] {
        std::fs::write(&file, vec![7; 1 << 20]).unwrap();
        let arguments = ["--io-engine", engine, "--name", "my disk", "--shards", "2"];
        let running = Running::start(&file, &[&address, "tcp:127.0.0.1:0"], &arguments);
        assert_eq!(running.uris[0], format!("nbd+unix:///my%20disk?socket={}", socket.display()));
        assert!(running.uris[1].starts_with("nbd://127.0.0.1:") && running.uris[1].ends_with("/my%20disk"));
        let mut client = Client::connect(&socket, wish("my disk", ReplyStyle::Structured)).unwrap();
        assert_eq!(client.connected.info.size, 1 << 20);
        assert!(client.read(100, 5000).data == [7; 5000]);
        assert_eq!(client.write(4096, &[9; 100_000]).result, Ok(()));
        assert_eq!(client.flush().result, Ok(()));
        assert!(client.read(4096, 100_000).data == [9; 100_000]);

        let port = running.uris[1].trim_start_matches("nbd://127.0.0.1:").split('/').next().unwrap();
        let mut tcp = std::net::TcpStream::connect(("127.0.0.1", port.parse().unwrap())).unwrap();
        let mut greeting = [0; 18];
        tcp.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");

        assert_eq!(running.end(signal), Some(0));
        client.assert_closed();
        assert!(!socket.exists());
    }
    assert!(std::fs::read(&file).unwrap()[4096..104_096] == [9; 100_000]);
}

#[test]
fn a_read_only_file_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    std::fs::write(&file, vec![7; 1 << 20]).unwrap();
    let socket = dir.path().join("s");
    let running = Running::start(&file, &[&format!("unix:{}", socket.display())], &["--read-only"]);
    let mut client = Client::connect(&socket, wish("", ReplyStyle::Simple)).unwrap();
    assert_eq!(client.write(0, &[1; 4096]).result, Err(Errno::NotPermitted));
    assert!(client.read(0, 100_000).data == [7; 100_000]);
    assert_eq!(running.end(Signal::TERM), Some(0));
}

#[test]
fn what_cannot_be_done_is_said_clearly() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let missing = missing.to_str().unwrap();
    let socket = format!("unix:{}", dir.path().join("s").display());
    let (code, text) = fails(&[missing, "--listen", &socket]);
    assert_eq!(code, Some(1));
    assert!(text.contains(missing) && text.contains("No such file"), "{text}");

    let file = dir.path().join("disk");
    std::fs::write(&file, vec![7; 4096]).unwrap();
    let running = Running::start(&file, &[&socket], &[]);
    let (code, text) = fails(&[file.to_str().unwrap(), "--listen", &socket]);
    assert_eq!(code, Some(1));
    assert!(text.contains("a live server listens there"), "{text}");
    assert_eq!(running.end(Signal::TERM), Some(0));

    for arguments in [
        &[missing][..],
        &[missing, "--listen", "nowhere"],
        &[],
        &[missing, "--listen", &socket, "--io-engine", "x"],
    ] {
        let (code, text) = fails(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {text}");
    }
}

#[test]
fn the_socket_of_a_killed_server_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    std::fs::write(&file, vec![7; 4096]).unwrap();
    let socket = dir.path().join("s");
    let address = format!("unix:{}", socket.display());
    let running = Running::start(&file, &[&address], &[]);
    assert_eq!(running.end(Signal::KILL), None);
    assert!(socket.exists());
    let running = Running::start(&file, &[&address], &[]);
    assert!(
        Client::connect(&socket, wish("", ReplyStyle::Structured)).unwrap().read(0, 4096).data == [7; 4096]
    );
    assert_eq!(running.end(Signal::TERM), Some(0));
}
