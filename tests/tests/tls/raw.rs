//! GnuTLS's own client on the TLS of a connection, after STARTTLS by hand.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::thread::{self, JoinHandle};

use super::{Served, certificates};
use e2e::process::{Process, run_json};

/// Listens for one client, asks the server for STARTTLS on its behalf, and passes bytes both ways.
struct Relay {
    port: u16,
    thread: JoinHandle<()>,
}

impl Relay {
    fn to(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let thread = thread::spawn(move || {
            let (client, _) = listener.accept().unwrap();
            let mut server = TcpStream::connect(("127.0.0.1", server)).unwrap();
            server.read_exact(&mut [0; 18]).unwrap();
            let starttls = [&[0, 0, 0, 3][..], b"IHAVEOPT", &[0, 0, 0, 5, 0, 0, 0, 0]].concat();
            server.write_all(&starttls).unwrap();
            let mut answer = [0; 20];
            server.read_exact(&mut answer).unwrap();
            assert_eq!(answer[12..16], [0, 0, 0, 1], "STARTTLS is granted");
            let (from_client, to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let there = thread::spawn(move || pass(from_client, to_server));
            pass(server, client);
            there.join().unwrap();
        });
        Self { port, thread }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

/// GnuTLS's client through a relay, with these priorities.
fn gnutls(served: &Served, ca: &str, arguments: &[&str]) -> (Process, Relay) {
    let relay = Relay::to(served.port);
    let mut command = Command::new("gnutls-cli");
    command.arg(format!("--x509cafile={ca}")).args(arguments);
    command.args(["--port", &relay.port.to_string(), "localhost"]);
    (Process::spawn(&command).unwrap(), relay)
}

#[test]
fn gnutls_shakes_hands_by_both_versions_and_by_no_older_one() {
    let (served, credentials) = Served::with_certificates("tls-gnutls", &[]);
    let ca = format!("{}/ca-cert.pem", credentials.dir());
    for version in ["1.2", "1.3"] {
        let priority = format!("--priority=NORMAL:-VERS-ALL:+VERS-TLS{version}");
        let (mut client, relay) = gnutls(&served, &ca, &[&priority]);
        client.wait_for_text(&format!("(TLS{version}-")).unwrap();
        client.wait_for_text("Handshake was completed").unwrap();
        // What follows is no option: the server ends the connection, with TLS's goodbye.
        client.write_line("this is no option of the protocol").unwrap();
        client.wait_for_text("Peer has closed the GnuTLS connection").unwrap();
        client.wait().unwrap();
        relay.thread.join().unwrap();
    }
    let (mut client, relay) = gnutls(&served, &ca, &["--priority=LEGACY:-VERS-ALL:+VERS-TLS1.1"]);
    assert!(!client.wait().unwrap().success());
    relay.thread.join().unwrap();
    still_serves(&served, &certificates(credentials.dir()));
}

#[test]
fn a_client_that_negotiates_tls_again_costs_its_own_connection() {
    let (served, credentials) = Served::with_certificates("tls-again", &[]);
    let ca = format!("{}/ca-cert.pem", credentials.dir());
    let priority = "--priority=NORMAL:-VERS-ALL:+VERS-TLS1.2";
    let (mut client, relay) = gnutls(&served, &ca, &[priority, "--rehandshake"]);
    client.wait_for_text("Handshake was completed").unwrap();
    client.wait().unwrap();
    relay.thread.join().unwrap();
    // It hears that there is none, and says so in one way or the other.
    let said = client.lines().join("\n");
    assert!(said.contains("ReHandshake has failed") || said.contains("TLS warning alert"), "{said}");
    still_serves(&served, &certificates(credentials.dir()));
}

fn still_serves(served: &Served, parameters: &str) {
    let [uri, _] = served.uris(parameters);
    let info = run_json(Command::new("nbdinfo").args(["--json", &uri])).unwrap();
    assert_eq!(info["TLS"], true);
}
