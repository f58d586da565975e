//! Captures from exports over TLS: of our server, which wants certificates of its clients, of qemu-nbd and of nbdkit.

use std::path::Path;
use std::process::Command;

use super::credentials::Credentials;
use super::lifeboot::{free_port, served_by_others};
use super::{DISK_BYTES, Served, certificates, fails};
use e2e::disk;
use e2e::lifeboot::Repository;
use e2e::process::run;
use e2e::work_dir::WorkDir;

/// Captures the export at `uri`, and demands that what is restored is `disk`.
pub(super) fn captures(repository: &Repository, uri: &str, disk: &Path, work: &WorkDir) {
    run(&mut repository.verb("capture", &["-q", "vm", uri]).unwrap()).unwrap();
    let restored = work.file("restored.raw");
    repository.restore("vm@latest", &restored).unwrap();
    disk::ensure_same(disk, &restored).unwrap();
    std::fs::remove_file(restored).unwrap();
}

/// What a capture says that must fail.
fn refused(repository: &Repository, uri: &str) -> String {
    fails(&mut repository.verb("capture", &["-q", "refused", uri]).unwrap())
}

#[test]
fn who_has_a_certificate_captures_and_nobody_else() {
    let (served, credentials) = Served::with_certificates("tls-capture", &["--tls-verify-peer"]);
    let repository = Repository::init(served.work.file("repository")).unwrap();
    for uri in served.uris(&certificates(credentials.dir())) {
        captures(&repository, &uri, &served.disk, &served.work);
    }

    let stranger = Credentials::make(&served.work.file("stranger"), "stranger", "client");
    let [_, uri] = served.uris(&certificates(stranger.dir()));
    let said = refused(&repository, &uri);
    assert!(said.contains("server's certificate is not trusted"), "{said}");
    // It trusts our server, and is not trusted.
    stranger.trust(&credentials);
    let [_, uri] = served.uris(&certificates(stranger.dir()));
    let said = refused(&repository, &uri);
    assert!(said.contains("does not trust this client's certificate"), "{said}");
    let bare = credentials.without_client(&served.work.file("bare"));
    let [_, uri] = served.uris(&certificates(&bare));
    let said = refused(&repository, &uri);
    assert!(said.contains("it wants a certificate"), "{said}");
    let said = refused(&repository, &format!("nbd://localhost:{}", served.port));
    assert!(said.contains("TLS"), "{said}");
}

#[test]
fn other_servers_exports_are_captured_over_tls() {
    let work = WorkDir::new("tls-sources").unwrap();
    let credentials = Credentials::make(&work.file("tls"), "ca", "client");
    let disk = work.file("disk.raw");
    disk::make(&disk, DISK_BYTES, 6).unwrap();
    let repository = Repository::init(work.file("repository")).unwrap();
    let uri = |port| format!("nbds://localhost:{port}/?{}", certificates(credentials.dir()));

    let port = free_port();
    let object = format!("tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir={}", credentials.dir());
    let mut qemu_nbd = Command::new("qemu-nbd");
    qemu_nbd.args(["--object", &object, "--tls-creds=t", "-t", "-r", "-e", "8", "-f", "raw"]);
    let _serving =
        served_by_others(qemu_nbd.args(["-b", "127.0.0.1", "-p", &port.to_string()]).arg(&disk), port);
    captures(&repository, &uri(port), &disk, &work);

    let port = free_port();
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["-f", "-r", "--tls=require", "--tls-verify-peer", "--tls-certificates", credentials.dir()]);
    nbdkit.args(["-i", "127.0.0.1", "-p", &port.to_string(), "file"]);
    let _serving = served_by_others(nbdkit.arg(&disk), port);
    captures(&repository, &uri(port), &disk, &work);
}
