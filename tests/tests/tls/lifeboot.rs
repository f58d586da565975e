//! TLS of `lifeboot serve` and `lifeboot live-restore`; and our client (`lifeboot status --listen`) against servers that others wrote.

use std::path::Path;
use std::process::Command;

use super::credentials::Credentials;
use super::{DISK_BYTES, certificates, fails, x509};
use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::lifeboot;
use e2e::process::{Process, run, run_json};
use e2e::work_dir::WorkDir;
use rustix::process::Signal;

/// `lifeboot status --listen` of a URI.
pub(super) fn status(uri: &str) -> Command {
    lifeboot(["status", "--json", "--listen", uri]).unwrap()
}

/// A server of others on a free port, which it names in its options.
pub(super) fn served_by_others(command: &mut Command, port: u16) -> Process {
    let process = Process::spawn(command).unwrap();
    // It says nothing when it listens.
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        std::thread::yield_now();
    }
    process
}

pub(super) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[test]
fn a_live_restore_over_tls_is_asked_by_status_and_moved_by_qemus_tools() {
    let captured = Captured::new("tls-live", DISK_BYTES, 3).unwrap();
    let credentials = Credentials::make(&captured.work.file("tls"), "ca", "client");
    let arguments = ["--tls-creds", credentials.dir(), "--tls-allow", "client"];
    let mut live = captured.start(&arguments).unwrap();
    let uri = live.ready()["uri"].as_str().unwrap().to_owned();
    assert!(uri.starts_with("nbds+unix:///"), "{uri}");
    let qemu = live.qemu_arguments().unwrap().join(" ");
    assert!(
        qemu.contains(&format!("tls-creds-x509,id=lifeboot-tls,endpoint=client,dir={}", credentials.dir())),
        "{qemu}"
    );
    assert!(qemu.contains("tls-creds=lifeboot-tls"), "{qemu}");
    live.wait_complete().unwrap();

    let with_tls = format!("{uri}&{}", certificates(credentials.dir()));
    let said = run_json(&mut status(&with_tls)).unwrap();
    assert_eq!((&said["size"], &said["absent_bytes"]), (&DISK_BYTES.into(), &0.into()));
    let said = fails(&mut status(&uri.replacen("nbds", "nbd", 1)));
    assert!(said.contains("requires TLS"), "{said}");

    let copy = captured.work.file("copy.raw");
    std::fs::File::create(&copy).unwrap().set_len(DISK_BYTES).unwrap();
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},tls-creds=t,tls-hostname=localhost",
        captured.socket.display()
    );
    let mut convert = Command::new("qemu-img");
    convert.args([
        "convert",
        "-n",
        "-O",
        "raw",
        "--object",
        &x509(credentials.dir()),
        "--image-opts",
        &image,
    ]);
    run(convert.arg(&copy)).unwrap();
    disk::ensure_same(&captured.disk, &copy).unwrap();

    // SIGHUP reads the certificates anew, and does not end the restore.
    live.process().signal(Signal::HUP).unwrap();
    std::fs::write(Path::new(credentials.dir()).join("server-key.pem"), "broken").unwrap();
    live.process().signal(Signal::HUP).unwrap();
    live.process().wait_for_text("stay as they were").unwrap();
    assert!(run_json(&mut status(&with_tls)).is_ok());
}

#[test]
fn snapshots_are_served_over_tls() {
    let captured = Captured::new("tls-serve", DISK_BYTES, 4).unwrap();
    let credentials = Credentials::make(&captured.work.file("tls"), "ca", "client");
    let arguments = ["vm@latest", "--tls-creds", credentials.dir()];
    let serving = captured.repository.serve(&arguments, &captured.socket).unwrap();
    assert!(serving.lines().iter().any(|line| line.contains("nbds+unix:///")), "{:?}", serving.lines());
    let copy = captured.work.file("copy.raw");
    let socket = captured.socket.display();
    let uri = format!("nbds+unix:///?socket={socket}&{}", certificates(credentials.dir()));
    run(Command::new("nbdcopy").arg(uri).arg(&copy)).unwrap();
    disk::ensure_same(&captured.disk, &copy).unwrap();
    let bad = captured.repository.verb("serve", &["--tls", "on", "--listen", "unix:/nowhere/s"]);
    assert!(fails(&mut bad.unwrap()).contains("--tls-creds"));
}

#[test]
fn our_client_talks_tls_to_qemu_nbd_and_to_nbdkit() {
    let work = WorkDir::new("tls-client").unwrap();
    let credentials = Credentials::make(&work.file("tls"), "ca", "client");
    let stranger = Credentials::make(&work.file("stranger"), "stranger", "client");
    let disk = work.file("disk.raw");
    disk::make(&disk, DISK_BYTES, 5).unwrap();
    let uri = |port, of: &Credentials| format!("nbds://localhost:{port}/?{}", certificates(of.dir()));

    let port = free_port();
    let object = format!("tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir={}", credentials.dir());
    let mut qemu_nbd = Command::new("qemu-nbd");
    qemu_nbd.args(["--object", &object, "--tls-creds=t", "-A", "-t", "-r", "-e", "8", "-f", "raw"]);
    let _serving =
        served_by_others(qemu_nbd.args(["-b", "127.0.0.1", "-p", &port.to_string()]).arg(&disk), port);
    let said = run_json(&mut status(&uri(port, &credentials))).unwrap();
    assert_eq!(said["size"], DISK_BYTES);
    let said = fails(&mut status(&uri(port, &stranger)));
    assert!(said.contains("not trusted"), "{said}");
    let said = fails(&mut status(&format!("{}&tls-hostname=elsewhere", uri(port, &credentials))));
    assert!(said.contains("elsewhere") && said.contains("tls-hostname"), "{said}");
    let said = fails(&mut status(&format!("nbd://localhost:{port}/")));
    assert!(said.contains("TLS"), "{said}");

    for (mode, peer) in [("require", "--tls-verify-peer"), ("on", "-r")] {
        let port = free_port();
        let mut nbdkit = Command::new("nbdkit");
        nbdkit.args([
            "-f",
            "--tls",
            mode,
            peer,
            "--tls-certificates",
            credentials.dir(),
            "-i",
            "127.0.0.1",
            "-p",
        ]);
        let _serving = served_by_others(nbdkit.args([&port.to_string(), "file"]).arg(&disk), port);
        // It has no such context, which it says through TLS.
        let said = fails(&mut status(&uri(port, &credentials)));
        assert!(said.contains("qemu:allocation-depth"), "{said}");
        let said = fails(&mut status(&uri(port, &stranger)));
        assert!(said.contains("not trusted"), "{said}");
    }

    let port = free_port();
    let mut plain = Command::new("nbdkit");
    plain.args(["-f", "-r", "-i", "127.0.0.1", "-p", &port.to_string(), "file"]);
    let _serving = served_by_others(plain.arg(&disk), port);
    let said = fails(&mut status(&uri(port, &credentials)));
    assert!(said.contains("does not begin TLS"), "a client that wants TLS has it or nothing: {said}");
}
