//! TLS between our server and our client, and against clients that break it: each breaks its own connection alone.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use common::{Authority, Dir, Flaw, MemoryDisk, Served, assert_closed, begin_hand_made, option};
use nbd_server::client::{ClientTls, Connection, NbdUri};
use nbd_server::{Credentials, ErrorKind, Limits, ListenAddress, ServerOptions, TlsServer};
use proto::wire::MetaContext;

const SIZE: usize = 8 << 20;
/// So that a test that fails ends: no test waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(60);

const STARTTLS: u32 = 5;
const INFO: u32 = 6;
const GO: u32 = 7;

fn certificates(dir: &Dir, verify_peer: bool, allowed: &[&str]) -> Credentials {
    let allowed = allowed.iter().map(|name| (*name).to_owned()).collect();
    Credentials::Certificates { dir: dir.path().to_owned(), verify_peer, allowed }
}

fn serve_with(tls: &TlsServer, limits: Limits) -> Served {
    let disk = MemoryDisk::new(SIZE);
    Served::new(disk, ServerOptions { limits, tls: Some(tls.clone()), ..ServerOptions::default() })
}

fn serve(credentials: Credentials, required: bool) -> (Served, TlsServer) {
    let tls = TlsServer::load(credentials, required).unwrap();
    (serve_with(&tls, Limits::default()), tls)
}

fn uri(path: &Path, tls: ClientTls) -> NbdUri {
    NbdUri { address: ListenAddress::Unix(path.to_owned()), export: "disk0".to_owned(), tls: Some(tls) }
}

fn with_certificates(dir: &Dir) -> ClientTls {
    ClientTls { certificates: Some(dir.path().to_owned()), ..ClientTls::default() }
}

fn connect(path: &Path, tls: ClientTls) -> nbd_server::Result<Connection> {
    Connection::open(&uri(path, tls), vec![MetaContext::Allocation], PATIENCE)
}

/// Connects and reads: a server of TLS 1.3 may refuse after the client's handshake.
fn refusal(path: &Path, tls: ClientTls) -> String {
    let result = connect(path, tls).and_then(|mut connection| connection.read(0, &mut [0; 512]));
    result.expect_err("the client is refused").to_string()
}

fn pattern(disk: &MemoryDisk) -> Vec<u8> {
    let bytes: Vec<u8> = (0..SIZE).map(|place| (place / 512 * 7 + place) as u8).collect();
    disk.bytes().copy_from_slice(&bytes);
    bytes
}

#[test]
fn our_client_reads_from_our_server_what_is_there() {
    let dir = Dir::whole(&Authority::new("ca"));
    for required in [false, true] {
        let (served, _) = serve(certificates(&dir, true, &["client"]), required);
        let bytes = pattern(&served.disk);
        let mut connection = connect(&served.path, with_certificates(&dir)).unwrap();
        assert_eq!(connection.info().size, SIZE as u64);
        for (offset, len) in [(0, SIZE), (1, 1), (4095, 70_001), (SIZE - 300_000, 300_000)] {
            let mut read = vec![0; len];
            connection.read(offset as u64, &mut read).unwrap();
            assert!(read == bytes[offset..offset + len], "{len} bytes at {offset}");
        }
        assert!(!connection.block_status(0, 1 << 20).unwrap().is_empty());
        drop(connection);
        served.wait_for(|stats| stats.connections == 0);
        served.end();
    }
}

#[test]
fn who_may_not_come_in_hears_why() {
    let (ca, other) = (Authority::new("ca"), Authority::new("other"));
    let dir = Dir::whole(&ca);
    let (served, _) = serve(certificates(&dir, true, &["CN=nobody", "somebody"]), true);
    let listed = Dir::new().trusting(&ca).client(&ca, "somebody", 8);
    connect(&served.path, with_certificates(&listed)).unwrap().read(0, &mut [0; 512]).unwrap();
    for (what, tls, words) in [
        (
            "no certificate",
            with_certificates(&Dir::new().trusting(&ca)),
            ["CertificateRequired", "client-cert.pem"],
        ),
        ("not listed", with_certificates(&dir), ["AccessDenied", "does not let it in"]),
    ] {
        let said = refusal(&served.path, tls);
        assert!(words.iter().all(|word| said.contains(word)), "{what}: {said}");
    }
    let untrusted = Dir::new().trusting(&ca).client(&other, "somebody", 9);
    let said = refusal(&served.path, with_certificates(&untrusted));
    assert!(said.contains("does not trust"), "{said}");
    served.end();
}

#[test]
fn a_revoked_client_does_not_come_in() {
    let ca = Authority::new("ca");
    let dir = Dir::whole(&ca).revoking(&ca, 8);
    let (served, _) = serve(certificates(&dir, true, &[]), true);
    connect(&served.path, with_certificates(&dir)).unwrap().read(0, &mut [0; 512]).unwrap();
    let revoked = Dir::new().trusting(&ca).client(&ca, "client", 8);
    let said = refusal(&served.path, with_certificates(&revoked));
    assert!(said.contains("revoked"), "{said}");
    served.end();
}

#[test]
fn our_client_believes_only_its_own_server() {
    let (ca, other) = (Authority::new("ca"), Authority::new("other"));
    let dir = Dir::whole(&ca);
    let (served, _) = serve(certificates(&dir, false, &[]), true);
    let stranger = Dir::new().trusting(&other);
    let said = refusal(&served.path, with_certificates(&stranger));
    assert!(said.contains("not trusted") && said.contains("ca-cert.pem"), "{said}");
    let elsewhere = ClientTls { hostname: Some("elsewhere".into()), ..with_certificates(&dir) };
    let said = refusal(&served.path, elsewhere);
    assert!(said.contains("\"elsewhere\"") && said.contains("tls-hostname"), "{said}");
    let address = ClientTls { hostname: Some("127.0.0.1".into()), ..with_certificates(&dir) };
    assert!(connect(&served.path, address).is_ok());
    served.end();
    // A server without TLS is none for a client that wants it.
    let plain = Served::new(MemoryDisk::new(SIZE), ServerOptions::default());
    let said = refusal(&plain.path, with_certificates(&dir));
    assert!(said.contains("does not begin TLS"), "{said}");
    plain.end();
}

#[test]
fn a_client_without_tls_is_told_that_it_needs_it_and_nothing_is_opened_for_it() {
    let dir = Dir::whole(&Authority::new("ca"));
    let (served, _) = serve(certificates(&dir, false, &[]), true);
    let plain = NbdUri { tls: None, ..uri(&served.path, ClientTls::default()) };
    let said = Connection::open(&plain, Vec::new(), PATIENCE).unwrap_err().to_string();
    assert!(said.contains("the server requires TLS") && said.contains("nbds:"), "{said}");
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    for kind in [INFO, GO] {
        socket.write_all(&option(kind, &[0; 6])).unwrap();
        let mut head = [0; 20];
        socket.read_exact(&mut head).unwrap();
        assert_eq!(head[12..16], [0x80, 0, 0, 5], "{kind}");
        let mut text = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
        socket.read_exact(&mut text).unwrap();
        assert_eq!(served.disk.handles(), 0, "nothing is opened before TLS");
    }
    drop(socket);
    served.end();
}

#[test]
fn what_was_opened_without_tls_is_closed_when_it_begins() {
    let dir = Dir::whole(&Authority::new("ca"));
    let (served, _) = serve(certificates(&dir, false, &[]), false);
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    socket.write_all(&option(INFO, &[0; 6])).unwrap();
    let mut replies = [0; 20 + 12 + 20];
    socket.read_exact(&mut replies).unwrap();
    assert_eq!(served.disk.handles(), 1);
    socket.write_all(&option(STARTTLS, &[])).unwrap();
    socket.read_exact(&mut [0; 20]).unwrap();
    while served.disk.handles() > 0 {
        thread::yield_now();
    }
    drop(socket);
    served.check_health();
    served.end();
}

#[test]
fn plain_bytes_behind_starttls_end_the_connection_without_a_word() {
    let dir = Dir::whole(&Authority::new("ca"));
    let (served, _) = serve(certificates(&dir, false, &[]), false);
    let mut injected = option(STARTTLS, &[]);
    injected.extend_from_slice(&option(8, &[]));
    let mut socket = begin_hand_made(&served.path, 3).unwrap();
    socket.write_all(&injected).unwrap();
    let mut answer = Vec::new();
    // Bytes that the server did not read may reset the connection.
    let _ = socket.read_to_end(&mut answer);
    assert!(answer.is_empty(), "STARTTLS was granted");
    served.check_health();
    served.end();
}

/// A connection that was told to begin TLS.
fn begun(path: &Path) -> UnixStream {
    let mut socket = begin_hand_made(path, 3).unwrap();
    socket.write_all(&option(STARTTLS, &[])).unwrap();
    socket.read_exact(&mut [0; 20]).unwrap();
    socket
}

#[test]
fn garbage_for_tls_ends_the_connection_alone() {
    let dir = Dir::whole(&Authority::new("ca"));
    let (served, _) = serve(certificates(&dir, false, &[]), false);
    // The head of a record: a handshake of TLS 1.2 of the greatest length.
    let long = [&[0x16, 3, 3, 0x40, 0][..], &[1; 0x4000]].concat();
    let endless = [&[0x16, 3, 3, 0x40, 0, 1, 0xff, 0xff, 0xff][..], &[0; 0x3ffc]].concat();
    for bytes in
        [&[0; 1][..], &[0xff; 5000], b"GET / HTTP/1.1\r\n\r\n", &option(GO, &[0; 6]), &long, &endless]
    {
        for half in [false, true] {
            let mut socket = begun(&served.path);
            let _ = socket.write_all(bytes);
            if half {
                let _ = socket.shutdown(Shutdown::Write);
                assert_closed(&mut socket);
            }
        }
    }
    served.check_health();
    served.end();
}

#[test]
fn a_client_that_dawdles_in_tls_is_closed_when_its_time_is_over() {
    let dir = Dir::whole(&Authority::new("ca"));
    let tls = TlsServer::load(certificates(&dir, false, &[]), true).unwrap();
    let limits = Limits { handshake_timeout: Duration::from_millis(100), ..Limits::default() };
    let served = serve_with(&tls, limits);
    assert_closed(&mut begun(&served.path));
    let mut half = begun(&served.path);
    half.write_all(&[0x16, 3, 1, 2, 0]).unwrap();
    assert_closed(&mut half);
    served.wait_for(|stats| stats.connections == 0);
    served.end();
}

/// Passes on what a client sends until so many bytes went through, and all that the server answers; then closes
/// both ways. How many bytes the client sent.
fn relay(listener: &UnixListener, server: &Path, allowed: usize) -> usize {
    let (mut client, _) = listener.accept().unwrap();
    let mut server = UnixStream::connect(server).unwrap();
    let (mut from_server, mut to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let back = thread::spawn(move || {
        let _ = std::io::copy(&mut from_server, &mut to_client);
        let _ = to_client.shutdown(Shutdown::Both);
    });
    let mut passed = 0;
    let mut buf = [0; 4096];
    while passed < allowed {
        let wanted = buf.len().min(allowed - passed);
        match client.read(&mut buf[..wanted]) {
            Ok(len) if len > 0 && server.write_all(&buf[..len]).is_ok() => passed += len,
            _ => break,
        }
    }
    let _ = server.shutdown(Shutdown::Both);
    let _ = client.shutdown(Shutdown::Both);
    back.join().unwrap();
    passed
}

#[test]
fn a_tls_conversation_cut_after_any_byte_costs_nothing_but_itself() {
    let dir = Dir::whole(&Authority::new("ca"));
    let (served, _) = serve(certificates(&dir, true, &[]), false);
    let relay_dir = tempfile::tempdir().unwrap();
    let path = relay_dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let talk = |allowed: usize| {
        thread::scope(|scope| {
            let relay = scope.spawn(|| relay(&listener, &served.path, allowed));
            let talked = connect(&path, with_certificates(&dir)).and_then(|mut connection| {
                connection.read(0, &mut vec![0; 100_000])?;
                connection.block_status(0, 4096).map(|_| ())
            });
            (relay.join().unwrap(), talked)
        })
    };
    let (whole, talked) = talk(usize::MAX);
    talked.unwrap();
    assert!(whole > 1000, "{whole} bytes are no TLS conversation");
    for allowed in (0..whole).step_by(7) {
        let (passed, _) = talk(allowed);
        assert!(passed <= allowed);
    }
    served.check_health();
    served.end();
}

#[test]
fn credentials_that_cannot_be_used_are_named_with_the_reason() {
    let (ca, other) = (Authority::new("ca"), Authority::new("other"));
    let load = |dir: &Dir| {
        let error = TlsServer::load(certificates(dir, true, &[]), true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidCredentials);
        error.to_string()
    };
    let says = |dir: &Dir, words: &[&str]| {
        let said = load(dir);
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        assert!(said.contains(&dir.path().display().to_string()), "{said}");
    };
    says(&Dir::new(), &["server-cert.pem", "No such file", "make it"]);
    says(
        &Dir::new().trusting(&ca).serving(&ca, Flaw::Expired),
        &["server-cert.pem", "expired on 2001-02-03", "renew"],
    );
    says(
        &Dir::new().trusting(&ca).serving(&ca, Flaw::NotYetValid),
        &["not valid before 4001-02-03", "clock"],
    );
    says(&Dir::new().serving(&ca, Flaw::None), &["ca-cert.pem", "No such file"]);
    let mixed = Dir::whole(&ca);
    let stranger = Dir::whole(&other);
    std::fs::copy(stranger.file("server-key.pem"), mixed.file("server-key.pem")).unwrap();
    says(&mixed, &["server-key.pem", "does not match", "server-cert.pem"]);
    for (file, text) in
        [("server-cert.pem", "no PEM"), ("server-key.pem", "no PEM"), ("ca-cert.pem", ""), ("ca-crl.pem", "")]
    {
        let dir = Dir::whole(&ca);
        std::fs::write(dir.file(file), text).unwrap();
        says(&dir, &[file, "PEM"]);
    }
    let overdue = Dir::whole(&ca).revoking_until(&ca, 8, 2025);
    says(&overdue, &["ca-crl.pem", "expired on 2025-01-01", "next one"]);
    // Nobody writes to it: whoever waits for that waits for ever.
    let fifo = Dir::whole(&ca);
    std::fs::remove_file(fifo.file("server-cert.pem")).unwrap();
    let made = std::process::Command::new("mkfifo").arg(fifo.file("server-cert.pem")).status();
    assert!(made.unwrap().success());
    says(&fifo, &["server-cert.pem", "no regular file"]);
}

#[test]
fn new_connections_use_what_was_read_anew_and_a_reading_that_fails_changes_nothing() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let dir = Dir::whole(&old);
    let (served, tls) = serve(certificates(&dir, false, &[]), true);
    let (of_old, of_new) = (Dir::new().trusting(&old), Dir::new().trusting(&new));
    let mut early = connect(&served.path, with_certificates(&of_old)).unwrap();

    std::fs::write(dir.file("server-cert.pem"), "broken").unwrap();
    let error = tls.reload().unwrap_err();
    assert!(error.to_string().contains("server-cert.pem"), "{error}");
    connect(&served.path, with_certificates(&of_old)).unwrap().read(0, &mut [0; 512]).unwrap();

    let dir = dir.serving(&new, Flaw::None);
    tls.reload().unwrap();
    assert!(refusal(&served.path, with_certificates(&of_old)).contains("not trusted"));
    connect(&served.path, with_certificates(&of_new)).unwrap().read(0, &mut [0; 512]).unwrap();
    early.read(0, &mut [0; 512]).expect("a connection keeps what it began with");
    drop((early, dir));
    served.end();
}

#[cfg(feature = "psk")]
mod psk {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use super::*;

    const KEY: &str = "00112233445566778899aabbccddeeff";

    fn keys(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    fn with_key(file: PathBuf, name: &str) -> ClientTls {
        ClientTls { psk_file: Some(file), username: Some(name.into()), ..ClientTls::default() }
    }

    #[test]
    fn who_has_a_key_comes_in_and_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = keys(&dir, "keys.psk", &format!("alice:{KEY}\nbob:{KEY}{KEY}\n"));
        let (served, _) = serve(Credentials::PreShared { file: file.clone() }, true);
        let bytes = pattern(&served.disk);
        for name in ["alice", "bob"] {
            let mut connection = connect(&served.path, with_key(file.clone(), name)).unwrap();
            let mut read = vec![0; SIZE];
            connection.read(0, &mut read).unwrap();
            assert!(read == bytes);
        }
        let wrong = keys(&dir, "wrong", &format!("alice:{}\nmallory:{KEY}\n", KEY.replace('0', "1")));
        for name in ["alice", "mallory"] {
            let said = refusal(&served.path, with_key(wrong.clone(), name));
            assert!(said.contains("TLS"), "{said}");
        }
        let said = refusal(&served.path, with_key(wrong, "nobody"));
        assert!(said.contains("no key"), "{said}");
        served.end();
    }

    #[test]
    fn a_client_with_certificates_does_not_come_in() {
        let dir = tempfile::tempdir().unwrap();
        let file = keys(&dir, "keys.psk", &format!("alice:{KEY}\n"));
        let (served, _) = serve(Credentials::PreShared { file }, true);
        let certificates = Dir::whole(&Authority::new("ca"));
        assert!(refusal(&served.path, with_certificates(&certificates)).contains("TLS"));
        served.end();
    }

    #[test]
    fn garbage_and_cuts_end_the_connection_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = keys(&dir, "keys.psk", &format!("alice:{KEY}\n"));
        let (served, _) = serve(Credentials::PreShared { file }, false);
        let bytes: [&[u8]; 3] = [&[0xff; 5000], &[0x16, 3, 3, 0x40, 0], b"GET / HTTP/1.1\r\n\r\n"];
        for bytes in bytes {
            let mut socket = begun(&served.path);
            let _ = socket.write_all(bytes);
            let _ = socket.shutdown(Shutdown::Write);
            assert_closed(&mut socket);
        }
        served.check_health();
        served.end();
    }
}
