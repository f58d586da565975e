//! What somebody may get wrong with `lifeboot-nbd`: each has a clear line of its own, on the server, and for the client where there is one.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Authority, Dir, Flaw};
use nbd_server::ListenAddress;
use nbd_server::client::{Connection, NbdUri};

/// So that a test that fails ends: no test waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is shown of a name that a client made up.
const SHOWN_CHARS: usize = 80;

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("disk"), [7; 4096]).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lifeboot-nbd"));
        command.arg(self.path("disk")).args(arguments);
        command
    }

    fn socket_argument(&self) -> String {
        format!("--listen=unix:{}", self.path("s").display())
    }

    /// What it says when it does not begin to serve.
    fn refusal(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        // Before it there may be warnings: that the test's keys can be read by others.
        let said = said.lines().last().unwrap_or_default().to_owned();
        assert!(said.starts_with("lifeboot-nbd: "), "{said}");
        said
    }

    fn serve(&self, arguments: &[&str]) -> Running {
        let log = self.path("log");
        let mut command = self.command(arguments);
        command.arg(self.socket_argument()).stdout(Stdio::piped()).stderr(File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let running = Running { child, log };
        assert_ne!(
            BufReader::new(stdout).read_line(&mut String::new()).unwrap(),
            0,
            "it says where it serves"
        );
        running
    }

    /// What our client says when it is refused.
    fn client_refusal(&self, export: &str) -> String {
        let uri =
            NbdUri { address: ListenAddress::Unix(self.path("s")), export: export.to_owned(), tls: None };
        Connection::open(&uri, Vec::new(), PATIENCE).unwrap_err().to_string()
    }
}

struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// The one line of the log with these words. It is there when the client has heard, or soon after.
    fn line(&self, words: &str) -> String {
        loop {
            let log = std::fs::read_to_string(&self.log).unwrap();
            let mut lines = log.lines().filter(|line| line.contains(words));
            if let Some(line) = lines.next() {
                assert_eq!(lines.next(), None, "{log}");
                return line.to_owned();
            }
            std::thread::yield_now();
        }
    }
}

/// A test that fails leaves nobody behind.
impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn says(said: &str, words: &[&str]) {
    assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
}

#[test]
fn an_address_that_cannot_be_had_is_named_with_what_to_do() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let said = place.refusal(&["--listen", &format!("tcp:127.0.0.1:{port}")]);
    says(&said, &["127.0.0.1", &port, "another program listens there", "choose another port"]);
    let said = place.refusal(&["--listen", "tcp:192.0.2.1:10809", "--insecure"]);
    says(&said, &["192.0.2.1", "10809"]);
    let nowhere = place.path("nowhere/s");
    let said = place.refusal(&["--listen", &format!("unix:{}", nowhere.display())]);
    says(&said, &[nowhere.to_str().unwrap(), "its directory does not exist"]);
    let disk = place.path("disk");
    let said = place.refusal(&["--listen", &format!("unix:{}", disk.display())]);
    says(&said, &[disk.to_str().unwrap(), "not a socket"]);
    assert_eq!(std::fs::read(&disk).unwrap(), [7; 4096], "a file in the way is left alone");
}

#[test]
fn an_unknown_export_is_said_to_both_and_cut_in_the_log() {
    let place = Place::new();
    let running = place.serve(&["--name", "disk0"]);
    // A name that would draw on somebody's terminal, and is far too long for a line.
    let name = format!("\x1b[31m{}", "ü".repeat(500));
    let said = place.client_refusal(&name);
    says(&said, &["no such export"]);
    let line = running.line("a client asked for an export that is not here");
    assert!(!line.contains("\x1b[31m"), "{line}");
    let shown = line.chars().filter(|character| *character == 'ü').count();
    assert!((1..SHOWN_CHARS).contains(&shown) && line.contains('…'), "{shown}: {line}");
}

#[test]
fn a_client_without_tls_is_told_so_and_so_is_the_log() {
    let place = Place::new();
    let dir = Dir::whole(&Authority::new("ca"));
    let running = place.serve(&["--tls", "required", "--tls-creds", dir.path().to_str().unwrap()]);
    let said = place.client_refusal("");
    says(&said, &["requires TLS"]);
    says(&running.line("a client without TLS was refused"), &["--tls required"]);
}

fn with_credentials(place: &Place, dir: &Path) -> String {
    place.refusal(&["--tls-creds", dir.to_str().unwrap(), &place.socket_argument()])
}

#[test]
fn certificates_that_cannot_be_used_keep_it_from_serving() {
    let place = Place::new();
    let (ca, other) = (Authority::new("ca"), Authority::new("other"));
    let said = with_credentials(&place, &place.path("nowhere"));
    says(&said, &["nowhere", "server-cert.pem", "No such file"]);

    let expired = Dir::new().trusting(&ca).serving(&ca, Flaw::Expired);
    says(&with_credentials(&place, expired.path()), &["server-cert.pem", "expired on 2001-02-03", "renew"]);

    let mixed = Dir::whole(&ca);
    std::fs::copy(Dir::whole(&other).file("server-key.pem"), mixed.file("server-key.pem")).unwrap();
    says(&with_credentials(&place, mixed.path()), &["server-key.pem", "does not match", "server-cert.pem"]);

    // A directory in the place of a file cannot be read, whoever asks.
    let unreadable = Dir::whole(&ca);
    std::fs::remove_file(unreadable.file("server-key.pem")).unwrap();
    std::fs::create_dir(unreadable.file("server-key.pem")).unwrap();
    says(&with_credentials(&place, unreadable.path()), &["server-key.pem", "directory"]);
    assert!(!place.path("s").exists(), "nothing was bound");
}

#[cfg(feature = "psk")]
#[test]
fn keys_that_others_may_read_keep_it_from_serving() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new();
    let keys = place.path("keys.psk");
    std::fs::write(&keys, "alice:00112233445566778899aabbccddeeff\n").unwrap();
    std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(0o644)).unwrap();
    let said = place.refusal(&["--tls-psk", keys.to_str().unwrap(), &place.socket_argument()]);
    says(&said, &["keys.psk", "can be read by others", "chmod 600"]);
}

#[cfg(not(feature = "psk"))]
#[test]
fn pre_shared_keys_are_asked_of_a_build_that_has_them() {
    let place = Place::new();
    let said = place.refusal(&["--tls-psk", "keys.psk", &place.socket_argument()]);
    says(&said, &["without pre-shared keys", "certificates"]);
}
