//! The conversation of `cut.rs` under TLS, cut after every byte that its client sends: of the request for TLS, of TLS's own
//! handshake, and of the records. Alone in its process, so that its descriptors can be counted.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use common::{
    Authority, Dir, MemoryDisk, STYLES, Served, begin_hand_made, conversation, descriptors, leave, option,
};
use nbd_server::{Credentials, ServerOptions, TlsServer};
use proto::wire::ReplyStyle;
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

const STARTTLS: u32 = 5;

fn client_config(dir: &Dir) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(dir.file("ca-cert.pem")).unwrap()).unwrap();
    // A short first message: there is nothing to learn from the bytes of a long key.
    let provider =
        rustls::crypto::CryptoProvider { kx_groups: vec![kx_group::X25519], ..aws_lc_rs::default_provider() };
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(config)
}

/// A client that sends so many bytes and no more.
struct Limited {
    socket: UnixStream,
    left: usize,
    sent: usize,
}

impl Limited {
    /// Whether all of it went out.
    fn send(&mut self, bytes: &[u8]) -> bool {
        let len = bytes.len().min(self.left);
        self.socket.write_all(&bytes[..len]).expect("the server reads");
        self.left -= len;
        self.sent += len;
        len == bytes.len()
    }

    fn send_tls(&mut self, tls: &mut ClientConnection) -> bool {
        let mut records = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut records).unwrap();
        }
        self.send(&records)
    }

    fn shake_hands(&mut self, config: &Arc<ClientConfig>) -> Option<ClientConnection> {
        if !self.send(&option(STARTTLS, &[])) {
            return None;
        }
        self.socket.read_exact(&mut [0; 20]).expect("TLS is granted");
        let name = ServerName::try_from("localhost").unwrap();
        let mut tls = ClientConnection::new(Arc::clone(config), name).unwrap();
        while self.send_tls(&mut tls) {
            if !tls.is_handshaking() {
                return Some(tls);
            }
            let received = loop {
                match tls.read_tls(&mut self.socket) {
                    // A ring of this process may interrupt any thread of it.
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    received => break received.unwrap(),
                }
            };
            assert_ne!(received, 0, "the server closed");
            tls.process_new_packets().unwrap();
        }
        None
    }
}

/// How many bytes were sent, at most `allowed` after the flags, and of them how many before the first of `conversation`.
fn talk(
    path: &Path,
    config: &Arc<ClientConfig>,
    conversation: &[u8],
    allowed: usize,
    how: usize,
) -> (usize, usize) {
    let mut client = Limited { socket: begin_hand_made(path, 3).unwrap(), left: allowed, sent: 0 };
    let shaken = client.shake_hands(config);
    let before = client.sent;
    if let Some(mut tls) = shaken {
        // Records of no more than this, so that most cuts are between some that are whole and one that is not.
        for piece in conversation.chunks(200) {
            tls.writer().write_all(piece).unwrap();
            if !client.send_tls(&mut tls) {
                break;
            }
        }
    }
    let sent = client.sent;
    // The greeting was read already.
    leave(client.socket, how % 2);
    (sent, before)
}

#[test]
fn a_connection_under_tls_that_dies_after_any_byte_costs_nothing_but_itself() {
    let dir = Dir::whole(&Authority::new("ca"));
    let config = client_config(&dir);
    let credentials =
        Credentials::Certificates { dir: dir.path().to_owned(), verify_peer: false, allowed: Vec::new() };
    let tls = TlsServer::load(credentials, false).unwrap();
    for style in STYLES {
        let options = ServerOptions { tls: Some(tls.clone()), ..ServerOptions::default() };
        let served = Served::new(MemoryDisk::new(1 << 20), options);
        served.check_health();
        let before = descriptors();
        let conversation = &conversation(style)[4..];
        let (whole, handshake) = talk(&served.path, &config, conversation, usize::MAX, 1);
        assert!(handshake > 200 && whole > handshake + conversation.len(), "{handshake} of {whole}");
        // The handshake is the same for all of them.
        let first = if style == ReplyStyle::Simple { 0 } else { handshake };
        for cut in first..=whole {
            let (sent, _) = talk(&served.path, &config, conversation, cut, cut);
            assert_eq!(sent, cut);
        }
        served.check_health();
        assert_eq!(descriptors(), before);
        served.end();
    }
}
