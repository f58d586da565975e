//! How clients reach `lifeboot-nbd`, and who may not.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use common::{Client, MemoryDisk, Served, wish};
use nbd_server::{Access, ErrorKind, Export, ListenAddress, Server, ServerOptions};
use proto::wire::ReplyStyle;
use rustix::process::{Pid, Signal, kill_process};

const BINARY: &str = env!("CARGO_BIN_EXE_lifeboot-nbd");
const DISK_BYTES: usize = 1 << 20;

struct Work {
    dir: tempfile::TempDir,
    disk: PathBuf,
}

impl Work {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::write(&disk, [7; DISK_BYTES]).unwrap();
        Self { dir, disk }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// A program that is killed at the end of a test, however that ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail where it has ended, which is as it should be.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn end(mut self) -> Option<i32> {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        self.0.wait().unwrap().code()
    }

    fn ready(mut self) -> Self {
        let mut line = String::new();
        BufReader::new(self.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("nbd"), "{line}");
        self
    }
}

fn check(stream: UnixStream) {
    let mut client = Client::over(stream, wish("", ReplyStyle::Structured)).unwrap();
    assert_eq!(client.connected.info.size, DISK_BYTES as u64);
    assert!(client.read(0, 100_000).data == [7; 100_000]);
    client.disconnect();
}

/// What a client does with a stream it does with any.
fn as_unix(stream: impl Into<OwnedFd>) -> UnixStream {
    stream.into().into()
}

fn says(output: std::process::Output, code: i32, words: &[&str]) {
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn a_unix_socket_is_for_its_owner_unless_told_otherwise() {
    let work = Work::new();
    for (further, mode) in [(&[][..], 0o600), (&["--socket-mode", "666"], 0o666)] {
        let path = work.path(&format!("{mode:o}"));
        let mut command = Command::new(BINARY);
        command.arg(&work.disk).arg(format!("--listen=unix:{}", path.display())).args(further);
        let running = Running(command.stdout(Stdio::piped()).spawn().unwrap()).ready();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode);
        check(UnixStream::connect(&path).unwrap());
        assert_eq!(running.end(), Some(0));
        assert!(!path.exists());
    }
}

/// As systemd starts it: sockets from descriptor 3 on, and whom they are for.
fn activated(sockets: [OwnedFd; 2], work: &Work, further: &[&str]) -> Command {
    let [first, second] = sockets;
    let mut command = Command::new("sh");
    command.args(["-c", r#"LISTEN_PID=$$ exec "$0" "$@" 3<&0 4<&1 0</dev/null 1>&2"#, BINARY]);
    command.arg(&work.disk).args(further).env("LISTEN_FDS", "2").stdin(first).stdout(second);
    command
}

#[test]
fn sockets_of_systemd_are_served_all_of_them_and_their_files_stay() {
    let work = Work::new();
    for further in [&[][..], &["--listen", "systemd"]] {
        let path = work.path("systemd");
        let unix = UnixListener::bind(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let running = Running(activated([unix.into(), tcp.into()], &work, further).spawn().unwrap());
        check(UnixStream::connect(&path).unwrap());
        check(as_unix(TcpStream::connect(address).unwrap()));
        assert_eq!(running.end(), Some(0));
        assert!(path.exists(), "it is systemd's");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn sockets_of_systemd_are_not_left_alone_nor_missed_in_silence() {
    let work = Work::new();
    let sockets = || {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        [tcp.try_clone().unwrap().into(), tcp.into()]
    };
    let output = activated(sockets(), &work, &["--listen", "tcp:127.0.0.1:0"]).output().unwrap();
    says(output, 2, &["systemd has given sockets", "--listen systemd"]);
    let output = activated(sockets(), &work, &["--stdio"]).output().unwrap();
    says(output, 1, &["one socket"]);
    let output = Command::new(BINARY).arg(&work.disk).args(["--listen", "systemd"]).output().unwrap();
    says(output, 1, &["systemd has given no sockets"]);
    let output = Command::new(BINARY).arg(&work.disk).output().unwrap();
    says(output, 2, &["--listen ADDRESS"]);
    let open = TcpListener::bind("0.0.0.0:0").unwrap();
    let output = activated([open.try_clone().unwrap().into(), open.into()], &work, &[]).output().unwrap();
    says(output, 1, &["--insecure"]);
}

#[test]
fn one_connection_on_a_socket_ends_the_server_with_it() {
    let work = Work::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(BINARY);
    command.arg(&work.disk).arg("--stdio").stdin(OwnedFd::from(theirs.try_clone().unwrap()));
    let mut running = Running(command.stdout(OwnedFd::from(theirs)).spawn().unwrap());
    drop(command);
    check(ours);
    assert_eq!(running.0.wait().unwrap().code(), Some(0));
}

#[test]
fn one_connection_on_a_pair_of_pipes_ends_the_server_with_it() {
    let work = Work::new();
    let mut command = Command::new(BINARY);
    command.arg(&work.disk).arg("--stdio").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut running = Running(command.spawn().unwrap());
    let (mut input, mut output) = (running.0.stdin.take().unwrap(), running.0.stdout.take().unwrap());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut to, mut from) = (theirs.try_clone().unwrap(), theirs);
    // As a client does: splice, which the library takes for these very types, would lock the pipes.
    let copy = |from: &mut dyn Read, to: &mut dyn Write| io::copy(from, to);
    let sender = thread::spawn(move || copy(&mut from, &mut input));
    let receiver = thread::spawn(move || {
        let copied = copy(&mut output, &mut to);
        // It fails where the client is done already.
        let _ = to.shutdown(std::net::Shutdown::Both);
        copied
    });
    check(ours);
    assert_eq!(running.0.wait().unwrap().code(), Some(0));
    assert!(receiver.join().unwrap().unwrap() > 100_000);
    // The server may be gone before the last of it is taken.
    let _ = sender.join().unwrap();
}

#[test]
fn a_client_on_pipes_that_goes_away_ends_the_server() {
    let work = Work::new();
    let mut command = Command::new(BINARY);
    command.arg(&work.disk).arg("--stdio").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut running = Running(command.spawn().unwrap());
    let mut greeting = [0; 18];
    running.0.stdout.as_mut().unwrap().read_exact(&mut greeting).unwrap();
    assert_eq!(greeting[..8], *b"NBDMAGIC");
    drop((running.0.stdin.take(), running.0.stdout.take()));
    assert_eq!(running.0.wait().unwrap().code(), Some(0));
}

#[test]
fn nothing_that_a_client_could_be_at_the_other_end_of_is_said_so() {
    let work = Work::new();
    let mut command = Command::new(BINARY);
    let output = command.arg(&work.disk).arg("--stdio").stdin(Stdio::null()).output().unwrap();
    says(output, 1, &["neither a socket nor pipes"]);
}

#[test]
fn addresses_that_cannot_be_had_are_said_in_a_line_each() {
    let work = Work::new();
    let fails =
        |address: &str| Command::new(BINARY).arg(&work.disk).args(["--listen", address]).output().unwrap();
    says(fails("tcp:0.0.0.0:0"), 1, &["can be reached from other machines", "--insecure"]);
    says(fails("tcp:192.0.2.1:0"), 1, &["can be reached from other machines"]);
    says(fails("unix:/nonexistent/s"), 1, &["/nonexistent/s", "directory does not exist"]);
    says(fails("vsock:x:1"), 2, &["the CID"]);
    let mut command = Command::new(BINARY);
    command.arg(&work.disk).args(["--listen", "tcp:192.0.2.1:0", "--insecure"]);
    says(command.output().unwrap(), 1, &["does not have that address"]);
}

fn tcp_client(server: &ListenAddress) -> io::Result<Client> {
    let ListenAddress::Tcp { port, .. } = server else { panic!("{server} is not TCP") };
    Client::over(as_unix(TcpStream::connect(("127.0.0.1", *port))?), wish("disk0", ReplyStyle::Structured))
}

#[test]
fn networks_that_are_not_allowed_are_closed_before_a_byte_is_said() {
    for (host, network, is_allowed) in [
        ("127.0.0.1", "127.0.0.0/8", true),
        ("127.0.0.1", "::ffff:127.0.0.1", true),
        ("127.0.0.1", "192.0.2.0/24", false),
        ("127.0.0.1", "::/0", false),
        // It comes as ::ffff:127.0.0.1.
        ("::", "127.0.0.1", true),
        ("::", "::ffff:0:0/97", true),
        ("::", "::1", false),
    ] {
        let access = Access { networks: vec![network.parse().unwrap()], insecure: true, ..Access::default() };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let addresses =
            [ListenAddress::Tcp { host: host.to_owned(), port: 0 }, ListenAddress::Unix(path.clone())];
        let exports = vec![Export::new("disk0", std::sync::Arc::new(MemoryDisk::new(DISK_BYTES)))];
        let options = ServerOptions { access, ..ServerOptions::default() };
        let handle = Server::bind(&addresses, exports, options).unwrap().run(1, common::engine()).unwrap();
        let client = tcp_client(&handle.addresses()[0]);
        assert_eq!(client.is_ok(), is_allowed, "{network} at {host}");
        Client::connect(&path, wish("disk0", ReplyStyle::Structured))
            .expect("unix sockets are not affected")
            .disconnect();
        drop(client);
        handle.shutdown();
        handle.join().unwrap();
    }
}

#[test]
fn vsock_is_served_where_the_kernel_has_it() {
    const PORT: u32 = 10_809;
    let exports = vec![Export::new("disk0", std::sync::Arc::new(MemoryDisk::new(DISK_BYTES)))];
    let address = ListenAddress::Vsock { cid: None, port: PORT };
    let server = match Server::bind(&[address], exports, ServerOptions::default()) {
        Ok(server) => server,
        Err(error) => return assert!(error.to_string().contains("this kernel has no vsock"), "{error}"),
    };
    let handle = server.run(1, common::engine()).unwrap();
    let socket = socket2::Socket::new(socket2::Domain::VSOCK, socket2::Type::STREAM, None).unwrap();
    // 1 is this very machine, by the module vsock_loopback.
    if socket.connect(&socket2::SockAddr::vsock(1, PORT)).is_ok() {
        let mut client = Client::over(as_unix(socket), wish("disk0", ReplyStyle::Structured)).unwrap();
        assert_eq!(client.write(0, &[9; 300_000]).result, Ok(()));
        assert!(client.read(0, 300_000).data == [9; 300_000]);
        client.disconnect();
    }
    handle.shutdown();
    handle.join().unwrap();
}

#[test]
fn listening_ends_with_the_shutdown_though_requests_are_in_flight() {
    let served = Served::new(MemoryDisk::new(DISK_BYTES).slow(), ServerOptions::default());
    served.disk.close_gate();
    let mut client = served.client();
    client.send(proto::wire::CommandKind::Read, proto::wire::CommandFlags::NONE, 0, 4096, &[]);
    served.disk.wait_for_waiting(1);
    served.handle.shutdown();
    while is_listening(&served.path) {
        thread::yield_now();
    }
    served.disk.open_gate();
    assert_eq!(client.receive().unwrap().result, Ok(()));
    served.end();
}

fn is_listening(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

#[test]
fn an_insecure_address_is_told_from_one_that_is_in_use() {
    let exports = || vec![Export::new("disk0", std::sync::Arc::new(MemoryDisk::new(DISK_BYTES)))];
    let open: ListenAddress = "tcp:0.0.0.0:0".parse().unwrap();
    let error = Server::bind(&[open], exports(), ServerOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Insecure);
}

#[test]
fn an_unknown_export_is_named_in_the_log_cut_and_escaped_and_once_in_a_while() {
    let work = Work::new();
    let path = work.path("s");
    let mut command = Command::new(BINARY);
    command.arg(&work.disk).arg(format!("--listen=unix:{}", path.display()));
    let running = Running(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let mut running = running.ready();
    let name = format!("evil\u{1b}[2J\n{}", "x".repeat(4000));
    for _ in 0..100 {
        let refused = Client::connect(&path, wish(&name, ReplyStyle::Structured)).err().unwrap();
        assert!(refused.to_string().contains("no such export"), "{refused}");
    }
    check(UnixStream::connect(&path).unwrap());
    let mut log = running.0.stderr.take().unwrap();
    assert_eq!(running.end(), Some(0));
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("evil")).collect();
    assert!((1..=3).contains(&lines.len()), "{text}");
    assert!(lines[0].contains(r"evil\u{1b}[2J\n") && lines[0].contains("…"), "{text}");
    assert!(lines[0].len() < 500 && !lines[0].contains(&"x".repeat(80)), "{text}");
}

#[test]
fn a_flood_of_refusals_is_a_line_once_in_a_while() {
    let work = Work::new();
    let path = work.path("s");
    let mut command = Command::new(BINARY);
    command.arg(&work.disk).args(["--max-connections=1", "--allow=192.0.2.0/24", "--listen=tcp:127.0.0.1:0"]);
    command.arg(format!("--listen=unix:{}", path.display()));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = child.stderr.take().unwrap();
    let mut uris = BufReader::new(child.stdout.take().unwrap()).lines();
    let running = Running(child);
    let port: u16 = uris.next().unwrap().unwrap().split(['/', ':']).nth(4).unwrap().parse().unwrap();
    assert!(uris.next().unwrap().unwrap().starts_with("nbd+unix:"));
    let client = Client::connect(&path, wish("", ReplyStyle::Structured)).unwrap();
    for _ in 0..1000 {
        // The one is refused for its network, the other for its number.
        let refused = Client::over(
            as_unix(TcpStream::connect(("127.0.0.1", port)).unwrap()),
            wish("", ReplyStyle::Structured),
        );
        assert!(refused.is_err());
        assert!(Client::connect(&path, wish("", ReplyStyle::Structured)).is_err());
    }
    client.disconnect();
    assert_eq!(running.end(), Some(0));
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    for (line, word) in [("its network is not allowed", "127.0.0.1"), ("there are too many", "Connections")] {
        let said: Vec<&str> = text.lines().filter(|said| said.contains(line)).collect();
        assert!(!said.is_empty() && said.len() < 50 && said[0].contains(word), "{text}");
    }
}
