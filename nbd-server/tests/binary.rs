//! `lifeboot-nbd` as somebody runs it: what it prints, how it ends, and how it fails.

mod common;

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
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
        Self::start_as(Command::new(BINARY), file, addresses, arguments)
    }

    fn start_as(mut command: Command, file: &Path, addresses: &[&str], arguments: &[&str]) -> Self {
        command.arg(file).args(arguments).stdout(Stdio::piped());
        for address in addresses {
            command.args(["--listen", address]);
        }
        let mut child = command.spawn().expect("the binary is there");
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let uris = addresses.iter().map(|_| lines.next().expect("a URI").expect("text")).collect();
        Self { child, uris }
    }

    /// Without anybody who reads what it prints; waited for until clients can connect.
    fn start_unread(file: &Path, socket: &Path, stdout: Stdio, stderr: Stdio, arguments: &[&str]) -> Self {
        let mut command = Command::new(BINARY);
        command.arg(file).args(["--listen", &format!("unix:{}", socket.display())]).args(arguments);
        let child = command.stdout(stdout).stderr(stderr).spawn().expect("the binary is there");
        let mut running = Self { child, uris: Vec::new() };
        while UnixStream::connect(socket).is_err() {
            assert_eq!(running.child.try_wait().expect("it is ours"), None, "it ended by itself");
            std::thread::yield_now();
        }
        running
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

/// What the successor that was refused leaves behind is nothing; the one that comes in lets in whom it was told to.
#[test]
fn a_successor_that_is_refused_changes_nothing_and_the_next_one_has_its_own_permissions() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let [file, log, meeting, socket, other] =
        ["disk", "log", "meeting", "s", "other"].map(|name| dir.path().join(name));
    std::fs::write(&file, vec![7; 1 << 20]).unwrap();
    let [address, other] = [&socket, &other].map(|path| format!("unix:{}", path.display()));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let handover = ["--handover", meeting.to_str().unwrap()];
    let mut command = Command::new(BINARY);
    command.stderr(std::fs::File::create(&log).unwrap());
    let open = [&handover[..], &["--socket-mode", "666"]].concat();
    let mut old = Running::start_as(command, &file, &[&address], &open);
    assert_eq!(mode(&socket), 0o666);
    let (code, said) = fails(&[&[file.to_str().unwrap(), "--listen", &other], &handover[..]].concat());
    assert!(code == Some(1) && said.contains("listens at"), "{said}");
    let new = Running::start(&file, &[&address], &handover);
    assert_eq!(old.child.wait().unwrap().code(), Some(0));
    assert_eq!((mode(&socket), mode(&meeting)), (0o600, 0o600));
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(!said.contains("nothing came of it"), "{said}");
    assert_eq!(new.end(Signal::TERM), Some(0));
    assert!(!socket.exists());
}

#[test]
fn who_may_have_too_few_files_open_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    std::fs::write(&file, vec![7; 1 << 20]).unwrap();
    for files in [10, 16, 24] {
        let line = format!("ulimit -n {files}; exec {BINARY} disk --listen unix:s");
        let mut command = Command::new("sh");
        let output = command.args(["-c", &line]).current_dir(dir.path()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("no more than {files} files open")), "{said}");
    }
}

#[test]
fn sighup_ends_it_as_sigterm_does_unless_it_was_started_to_outlive_its_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    std::fs::write(&file, vec![7; 1 << 20]).unwrap();
    let socket = dir.path().join("s");
    let address = format!("unix:{}", socket.display());
    let start = |how: &str| {
        let mut command = Command::new("env");
        command.args([how, BINARY]);
        Running::start_as(command, &file, &[&address], &[])
    };
    assert_eq!(start("--default-signal=HUP").end(Signal::HUP), Some(0));
    assert!(!socket.exists());

    let running = start("--ignore-signal=HUP");
    kill_process(Pid::from_child(&running.child), Signal::HUP).unwrap();
    for _ in 0..100 {
        let mut client = Client::connect(&socket, wish("", ReplyStyle::Simple)).unwrap();
        assert!(client.read(0, 4096).data == [7; 4096]);
    }
    assert_eq!(running.end(Signal::TERM), Some(0));
}

#[test]
fn who_listens_beyond_this_machine_without_tls_is_told_what_that_means() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    std::fs::write(&file, vec![7; 4096]).unwrap();
    let log = dir.path().join("log");
    for (address, is_open) in [("tcp:0.0.0.0:0", true), ("tcp:127.0.0.1:0", false)] {
        let mut command = Command::new(BINARY);
        command.stderr(std::fs::File::create(&log).unwrap());
        let running = Running::start_as(command, &file, &[address], &["--insecure"]);
        assert_eq!(running.end(Signal::TERM), Some(0));
        let said = std::fs::read_to_string(&log).unwrap();
        assert_eq!(said.contains("without TLS"), is_open, "{said}");
    }
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

/// A pipe whose reader is gone.
fn broken() -> Stdio {
    io::pipe().expect("a pipe").1.into()
}

/// A pipe that is full, and its reader.
fn full() -> (io::PipeReader, Stdio) {
    let (reader, mut writer) = io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("it is a pipe");
    let error = std::iter::repeat_with(|| writer.write(&[b'.'; 4096])).find_map(Result::err);
    assert_eq!(error.map(|error| error.kind()), Some(ErrorKind::WouldBlock));
    rustix::io::ioctl_fionbio(&writer, false).expect("it is a pipe");
    (reader, writer.into())
}

/// What has a line in the log.
fn ask_in_vain(socket: &Path) {
    Client::connect(socket, wish("nothing", ReplyStyle::Simple)).err().expect("there is no such export");
}

#[test]
fn it_serves_on_where_nobody_reads_what_it_prints() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    std::fs::write(&file, vec![7; 1 << 20]).unwrap();
    let socket = dir.path().join("s");
    let full_device = || std::fs::File::options().write(true).open("/dev/full").unwrap().into();
    let (reader, full) = full();
    let (mut readers, mut endings) = (Vec::new(), Vec::new());
    readers.push(reader);
    for (stdout, stderr) in [
        (broken(), broken()),
        (full_device(), full_device()),
        (Stdio::null(), full),
        (broken(), Stdio::null()),
    ] {
        let arguments = ["--shards", "1", "--name", "disk"];
        let running = Running::start_unread(&file, &socket, stdout, stderr, &arguments);
        for _ in 0..3 {
            ask_in_vain(&socket);
        }
        let mut client = Client::connect(&socket, wish("disk", ReplyStyle::Structured)).unwrap();
        assert!(client.read(100, 5000).data == [7; 5000]);
        client.disconnect();
        endings.push(running.end(Signal::TERM));
        assert!(!socket.exists());
    }
    assert_eq!(endings, [Some(0); 4]);
}

#[test]
fn its_log_has_no_colours_in_a_pipe() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    std::fs::write(&file, vec![7; 4096]).unwrap();
    let socket = dir.path().join("s");
    let (mut reader, writer) = io::pipe().unwrap();
    let running = Running::start_unread(&file, &socket, Stdio::null(), writer.into(), &["--name", "disk"]);
    ask_in_vain(&socket);
    assert_eq!(running.end(Signal::TERM), Some(0));
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert!(text.contains("a client asked for an export that is not here"), "{text}");
    assert!(!text.contains('\x1b'), "{text:?}");
}
