//! TLS against programs that others wrote: libnbd (nbdinfo, nbdcopy, nbdsh), QEMU (qemu-img, qemu-io, qemu-nbd), nbdkit, GnuTLS.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod capture;
mod credentials;
mod lifeboot;
#[cfg(feature = "psk")]
mod psk;
mod raw;

use std::path::{Path, PathBuf};
use std::process::Command;

use credentials::Credentials;
use e2e::disk;
use e2e::lifeboot::serve_raw;
use e2e::process::{Process, run, run_any, run_json};
use e2e::work_dir::WorkDir;
use rustix::process::Signal;

const DISK_BYTES: u64 = 24 << 20;

/// A disk served by `lifeboot-nbd` on a unix socket and a TCP port. Its directory goes last.
struct Served {
    process: Process,
    socket: PathBuf,
    port: u16,
    disk: PathBuf,
    work: WorkDir,
}

impl Served {
    fn new(name: &str, further: impl FnOnce(&WorkDir) -> Vec<String>) -> Self {
        let work = WorkDir::new(name).unwrap();
        let disk = work.file("disk.raw");
        disk::make(&disk, DISK_BYTES, 1).unwrap();
        let socket = work.socket("nbd");
        let mut arguments = further(&work);
        arguments.extend(["--listen".into(), "tcp:127.0.0.1:0".into()]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut process = serve_raw(&disk, &socket, &arguments).unwrap();
        let port = process.wait_for("its TCP port", port_of).unwrap();
        Self { process, socket, port, disk, work }
    }

    /// With certificates; every client that has one of the authority may come.
    fn with_certificates(name: &str, further: &[&str]) -> (Self, Credentials) {
        let mut made = None;
        let served = Self::new(name, |work| {
            let credentials = Credentials::make(&work.file("tls"), "ca", "client");
            let mut arguments = vec!["--tls-creds".to_owned(), credentials.dir().to_owned()];
            arguments.extend(further.iter().map(|&argument| argument.to_owned()));
            made = Some(credentials);
            arguments
        });
        (served, made.unwrap())
    }

    /// The export's URIs, over the socket and over TCP, with TLS and these parameters.
    fn uris(&self, parameters: &str) -> [String; 2] {
        [
            format!("nbds+unix:///?socket={}&{parameters}", self.socket.display()),
            format!("nbds://localhost:{}/?{parameters}", self.port),
        ]
    }

    /// QEMU's description of the export over TCP.
    fn qemu(&self) -> String {
        format!("driver=nbd,server.type=inet,server.host=localhost,server.port={},tls-creds=t", self.port)
    }

    fn copy(&self) -> PathBuf {
        let copy = self.work.file("copy.raw");
        std::fs::File::create(&copy).unwrap().set_len(DISK_BYTES).unwrap();
        copy
    }
}

fn port_of(line: &str) -> Option<u16> {
    let rest = line.split_once("://127.0.0.1:")?.1;
    rest.split('/').next()?.parse().ok()
}

fn certificates(dir: &str) -> String {
    format!("tls-certificates={dir}")
}

fn x509(dir: &str) -> String {
    format!("tls-creds-x509,id=t,endpoint=client,dir={dir}")
}

/// What a program says on stderr that must fail.
fn fails(command: &mut Command) -> String {
    let output = run_any(command).unwrap();
    assert!(!output.status.success(), "it succeeded: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_printed_uris_are_those_of_tls_and_nbdinfo_takes_them() {
    let (served, credentials) = Served::with_certificates("tls-info", &["--tls-verify-peer"]);
    let lines = served.process.lines();
    assert!(lines.iter().any(|line| line.starts_with("nbds+unix:///?socket=")), "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with("nbds://127.0.0.1:")), "{lines:?}");
    for uri in served.uris(&certificates(credentials.dir())) {
        let info = run_json(Command::new("nbdinfo").args(["--json", &uri])).unwrap();
        assert_eq!(info["TLS"], true, "{uri}");
        assert_eq!(info["structured"], true);
        assert_eq!(info["exports"][0]["export-size"], DISK_BYTES);
        let map = run_json(Command::new("nbdinfo").args(["--json", "--map", &uri])).unwrap();
        assert!(map.as_array().is_some_and(|extents| !extents.is_empty()));
    }
}

#[test]
fn of_the_ciphers_that_both_have_it_is_not_the_slowest_that_is_taken() {
    let (mut served, credentials) = Served::with_certificates("tls-cipher", &["-vv"]);
    let [_, uri] = served.uris(&certificates(credentials.dir()));
    // GnuTLS asks for AES with 256 bits first.
    run(Command::new("nbdinfo").args(["--size", &uri])).unwrap();
    let line = served.process.wait_for_text("TLS has begun").unwrap();
    assert!(line.contains("TLS13_AES_128_GCM") || line.contains("TLS13_CHACHA20"), "{line}");
}

#[test]
fn nbdcopy_copies_out_and_in_over_many_connections() {
    let (served, credentials) = Served::with_certificates("tls-copy", &[]);
    for uri in served.uris(&certificates(credentials.dir())) {
        let copy = served.copy();
        run(Command::new("nbdcopy").args(["--connections=4", "--requests=32", &uri]).arg(&copy)).unwrap();
        disk::ensure_same(&served.disk, &copy).unwrap();
        let other = served.work.file("other.raw");
        disk::make(&other, DISK_BYTES, uri.len() as u64).unwrap();
        run(Command::new("nbdcopy").args(["--connections=4", "--flush"]).arg(&other).arg(&uri)).unwrap();
        disk::ensure_same(&served.disk, &other).unwrap();
    }
}

#[test]
fn qemu_img_and_qemu_io_read_and_write_as_without_tls() {
    let (served, credentials) = Served::with_certificates("tls-qemu", &["--tls-verify-peer"]);
    let copy = served.copy();
    let mut convert = Command::new("qemu-img");
    convert.args([
        "convert",
        "-n",
        "-O",
        "raw",
        "--object",
        &x509(credentials.dir()),
        "--image-opts",
        &served.qemu(),
    ]);
    run(convert.arg(&copy)).unwrap();
    disk::ensure_same(&served.disk, &copy).unwrap();
    let mut io = Command::new("qemu-io");
    io.args(["--object", &x509(credentials.dir()), "--image-opts", &served.qemu()]);
    for command in [
        "write -P 0xa1 3584 1024",
        "write -P 0xa2 1M 2M",
        "write -f -P 0xa3 5M 4k",
        "write -z 6M 1M",
        "discard 8M 2M",
        "aio_write -P 0xb1 12M 1M",
        "aio_write -P 0xb2 13M 1M",
        "aio_flush",
        "flush",
        "read -P 0xa1 3584 1024",
        "read -P 0xa2 1M 2M",
        "read -P 0xa3 5M 4k",
        "read -P 0 6M 1M",
        "read -P 0xb1 12M 1M",
        "read -P 0xb2 13M 1M",
    ] {
        io.args(["-c", command]);
    }
    let said = run(&mut io).unwrap();
    assert!(!said.contains("Pattern verification failed"), "{said}");
    let bytes = std::fs::read(&served.disk).unwrap();
    assert!(bytes[1 << 20..][..2 << 20].iter().all(|&byte| byte == 0xa2), "the file has what was written");
}

/// Requests that overlap, of all lengths, in both directions at once; then what no client may send.
const SCRIPT: &str = "
import nbd, sys
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri(sys.argv[1])
assert h.get_tls_negotiated()
size = h.get_size()
buffers = []
for n in range(64):
    length = 1 + n * 4099 % 300000
    data = bytes([n + 1]) * length
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), n * 300000)
    out = nbd.Buffer(1 << 20)
    buffers.append((out, h.aio_pread(out, (n * 7 << 16) % (size - (1 << 20)))))
while h.aio_in_flight() > 0:
    h.poll(-1)
for n in range(64):
    length = 1 + n * 4099 % 300000
    assert h.pread(length, n * 300000) == bytes([n + 1]) * length, n
h.set_strict_mode(0)
try:
    h.pread(512, size)
    sys.exit('a read beyond the end succeeded')
except nbd.Error as error:
    assert error.errno == 'EINVAL', error
assert h.pread(1, 0) == bytes([1])
h.shutdown()
";

#[test]
fn nbdsh_keeps_many_requests_in_flight() {
    let (served, credentials) = Served::with_certificates("tls-nbdsh", &["--tls", "on"]);
    for uri in served.uris(&certificates(credentials.dir())) {
        run(Command::new("/usr/bin/python3").args(["-c", SCRIPT, &uri])).unwrap();
    }
}

#[test]
fn a_client_without_tls_hears_that_it_is_required_and_so_does_the_log() {
    let (mut served, _) = Served::with_certificates("tls-required", &["--tls", "required"]);
    let plain = format!("nbd://localhost:{}/", served.port);
    // libnbd does not show what servers say.
    fails(Command::new("nbdinfo").arg(&plain));
    served.process.wait_for_text("a client without TLS was refused").unwrap();
    let said = fails(Command::new("qemu-img").args(["info", "-f", "raw", &plain]));
    assert!(said.contains("requires TLS"), "{said}");
    served.process.wait_for_text("a client without TLS was refused").unwrap();
}

#[test]
fn with_tls_on_clients_choose_and_none_is_refused() {
    let (served, credentials) = Served::with_certificates("tls-on", &["--tls", "on"]);
    let lines = served.process.lines();
    assert!(lines.iter().any(|line| line.starts_with("nbd+unix://")), "{lines:?}");
    let plain = format!("nbd://localhost:{}/", served.port);
    let info = run_json(Command::new("nbdinfo").args(["--json", &plain])).unwrap();
    assert_eq!(info["TLS"], false);
    for uri in served.uris(&certificates(credentials.dir())) {
        let info = run_json(Command::new("nbdinfo").args(["--json", &uri])).unwrap();
        assert_eq!(info["TLS"], true);
    }
}

#[test]
fn a_client_that_may_not_come_is_refused_and_the_log_says_which_and_why() {
    let (mut served, credentials) =
        Served::with_certificates("tls-refused", &["--tls-allow", "somebody", "--tls-allow", "CN=other,O=x"]);
    let [_, uri] = served.uris(&certificates(credentials.dir()));
    fails(Command::new("nbdinfo").arg(uri));
    let line = served.process.wait_for_text("is on the list").unwrap();
    assert!(line.contains("CN=client") && line.contains("--tls-allow"), "{line}");

    let bare = credentials.without_client(&served.work.file("bare"));
    let [_, uri] = served.uris(&certificates(&bare));
    fails(Command::new("nbdinfo").arg(uri));
    let line = served.process.wait_for_text("showed no certificate").unwrap();
    assert!(line.contains("client-cert.pem"), "{line}");

    let stranger = Credentials::make(&served.work.file("stranger"), "stranger", "somebody");
    stranger.trust(&credentials);
    let [_, uri] = served.uris(&certificates(stranger.dir()));
    fails(Command::new("nbdinfo").arg(uri));
    // GnuTLS does not show a certificate of an authority that the server does not name.
    let line = served.process.wait_for_text("showed no certificate").unwrap();
    assert!(line.contains("ca-cert.pem"), "{line}");

    let other = Credentials::make(&served.work.file("other"), "other", "somebody");
    let [_, uri] = served.uris(&certificates(other.dir()));
    let said = fails(Command::new("nbdinfo").arg(uri));
    // libnbd goes away without an alert, so the server cannot know why.
    assert!(said.contains("certificate"), "{said}");
}

#[test]
fn sighup_reads_the_certificates_anew_and_keeps_the_old_where_it_cannot() {
    let (mut served, old) = Served::with_certificates("tls-reload", &["-v"]);
    let new = Credentials::make(&served.work.file("new"), "new", "client");
    let [of_old, of_new] = [&old, &new].map(|of| {
        let trusted = served.work.file(&format!("trust-{}", of.name()));
        certificates(&of.without_client(&trusted))
    });
    let connects = |served: &Served, parameters: &str| {
        let [_, uri] = served.uris(parameters);
        run_any(Command::new("nbdinfo").args(["--size", &uri])).unwrap().status.success()
    };
    assert!(connects(&served, &of_old) && !connects(&served, &of_new));

    std::fs::write(Path::new(old.dir()).join("server-cert.pem"), "broken").unwrap();
    served.process.signal(Signal::HUP).unwrap();
    let line = served.process.wait_for_text("stay as they were").unwrap();
    assert!(line.contains("server-cert.pem"), "{line}");
    assert!(connects(&served, &of_old));

    old.serve_as(&new);
    served.process.signal(Signal::HUP).unwrap();
    served.process.wait_for_text("read anew").unwrap();
    assert!(connects(&served, &of_new) && !connects(&served, &of_old));
    assert!(served.process.terminate().unwrap().success());
}
