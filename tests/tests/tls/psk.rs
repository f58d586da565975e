//! Pre-shared keys, in files as GnuTLS's psktool makes them.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use super::capture::captures;
use super::lifeboot::{free_port, served_by_others, status};
use super::{DISK_BYTES, Served, fails};
use e2e::disk;
use e2e::lifeboot::Repository;
use e2e::process::{run, run_json};
use e2e::programs::ours;
use e2e::work_dir::WorkDir;

/// A directory with a file `keys.psk` that psktool made for these names.
fn keys(work: &WorkDir, dir: &str, names: &[&str]) -> String {
    let dir = work.file(dir);
    std::fs::create_dir(&dir).unwrap();
    let file = dir.join("keys.psk");
    for name in names {
        run(Command::new("psktool").args(["-u", name, "-p"]).arg(&file)).unwrap();
    }
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    dir.to_str().unwrap().to_owned()
}

fn served(name: &str) -> (Served, String) {
    let mut dir = String::new();
    let served = Served::new(name, |work| {
        dir = keys(work, "psk", &["alice", "bob"]);
        vec!["--tls-psk".to_owned(), format!("{dir}/keys.psk")]
    });
    (served, dir)
}

fn object(dir: &str, endpoint: &str) -> String {
    let username = if endpoint == "client" { ",username=bob" } else { "" };
    format!("tls-creds-psk,id=t,endpoint={endpoint},dir={dir}{username}")
}

#[test]
fn who_has_a_key_reads_and_writes() {
    let (served, dir) = served("psk");
    for uri in served.uris(&format!("tls-psk-file={dir}/keys.psk&tls-username=alice")) {
        // libnbd takes the name from before the host.
        let uri = uri.replace("://localhost", "://alice@localhost").replace("+unix://", "+unix://alice@");
        let uri = uri.replace("&tls-username=alice", "");
        let info = run_json(Command::new("nbdinfo").args(["--json", &uri])).unwrap();
        assert_eq!(info["TLS"], true);
        let copy = served.copy();
        run(Command::new("nbdcopy").args(["--connections=2", &uri]).arg(&copy)).unwrap();
        disk::ensure_same(&served.disk, &copy).unwrap();
    }
    let copy = served.copy();
    let mut convert = Command::new("qemu-img");
    convert.args([
        "convert",
        "-n",
        "-O",
        "raw",
        "--object",
        &object(&dir, "client"),
        "--image-opts",
        &served.qemu(),
    ]);
    run(convert.arg(&copy)).unwrap();
    disk::ensure_same(&served.disk, &copy).unwrap();
    let mut io = Command::new("qemu-io");
    io.args(["--object", &object(&dir, "client"), "--image-opts", &served.qemu()]);
    io.args(["-c", "write -P 0xa1 1M 3M", "-c", "flush", "-c", "read -P 0xa1 1M 3M"]);
    let said = run(&mut io).unwrap();
    assert!(!said.contains("Pattern verification failed"), "{said}");
    let bytes = std::fs::read(&served.disk).unwrap();
    assert!(bytes[1 << 20..][..3 << 20].iter().all(|&byte| byte == 0xa1));
}

#[test]
fn who_has_none_or_another_does_not_come_in_and_the_log_says_who() {
    let (mut served, _) = served("psk-refused");
    let other = keys(&served.work, "other", &["alice", "mallory"]);
    for (name, said) in [("mallory", "\"mallory\" has no key"), ("alice", "the client's key is not the one")]
    {
        let uri = format!("nbds://{name}@localhost:{}/?tls-psk-file={other}/keys.psk", served.port);
        fails(Command::new("nbdinfo").arg(uri));
        let line = served.process.wait_for_text(said).unwrap();
        assert!(line.contains("keys.psk"), "{line}");
    }
}

#[test]
fn keys_that_others_may_read_are_refused() {
    let work = WorkDir::new("psk-open").unwrap();
    let disk = work.file("disk.raw");
    disk::make(&disk, DISK_BYTES, 1).unwrap();
    let file = format!("{}/keys.psk", keys(&work, "psk", &["alice"]));
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut server = ours("lifeboot-nbd").unwrap();
    server.arg(&disk).arg("--listen").arg(format!("unix:{}", work.socket("s").display()));
    let said = fails(server.args(["--tls-psk", &file]));
    assert!(said.contains(&file) && said.contains("0644") && said.contains("chmod 600"), "{said}");
}

#[test]
fn our_client_has_keys_too() {
    let work = WorkDir::new("psk-client").unwrap();
    let disk = work.file("disk.raw");
    disk::make(&disk, DISK_BYTES, 1).unwrap();
    let dir = keys(&work, "psk", &["bob"]);
    let uri = |port| format!("nbds://bob@localhost:{port}/?tls-psk-file={dir}/keys.psk");

    let port = free_port();
    let mut qemu_nbd = Command::new("qemu-nbd");
    qemu_nbd.args([
        "--object",
        &object(&dir, "server"),
        "--tls-creds=t",
        "-A",
        "-t",
        "-r",
        "-e",
        "8",
        "-f",
        "raw",
    ]);
    let _serving =
        served_by_others(qemu_nbd.args(["-b", "127.0.0.1", "-p", &port.to_string()]).arg(&disk), port);
    let said = run_json(&mut status(&uri(port))).unwrap();
    assert_eq!(said["size"], DISK_BYTES);
    let repository = Repository::init(work.file("repository")).unwrap();
    captures(&repository, &uri(port), &disk, &work);

    let port = free_port();
    let mut nbdkit = Command::new("nbdkit");
    let file = format!("--tls-psk={dir}/keys.psk");
    nbdkit.args(["-f", "-r", "--tls=require", &file, "-i", "127.0.0.1", "-p", &port.to_string(), "file"]);
    let _serving = served_by_others(nbdkit.arg(&disk), port);
    let said = fails(&mut status(&uri(port)));
    assert!(said.contains("qemu:allocation-depth"), "{said}");
    captures(&repository, &uri(port), &disk, &work);
}
