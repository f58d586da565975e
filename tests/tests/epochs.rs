//! A guest that outlives the host of its target: its client connects again by itself, and is refused where writes may be lost.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use e2e::captured::Captured;
use e2e::nbd::Export;
use e2e::process::{Process, run, run_any};

const DISK_BYTES: u64 = 16 << 20;

/// Serves the export `name` at `port` on at `socket`, and waits a moment for its server where that is gone.
fn reconnecting_bridge(port: u16, name: &str, socket: &Path) -> Process {
    let mut daemon = Command::new("qemu-storage-daemon");
    daemon
        .arg("--blockdev")
        .arg(format!(
            "driver=nbd,node-name=disk,server.type=inet,server.host=127.0.0.1,server.port={port},export={name},\
             reconnect-delay=3"
        ))
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={}", socket.display()))
        .args(["--export", "type=nbd,id=disk,node-name=disk,name=,writable=on"])
        .args(["--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"]);
    let mut daemon = Process::spawn(&daemon).unwrap();
    // The monitor comes last: its greeting says that the rest is there.
    daemon.wait_for_text("QMP").unwrap();
    daemon
}

/// A port that is free at the moment, for a server that is started again at the same one.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What QEMU says where it is refused. (libnbd 1.14 keeps the server's words to itself.)
fn refusal(uri: &str) -> String {
    assert!(!run_any(Command::new("nbdinfo").arg(uri)).unwrap().status.success(), "{uri} was not refused");
    let output = run_any(Command::new("qemu-img").args(["info", uri])).unwrap();
    assert!(!output.status.success(), "{uri} was not refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_guest_that_lived_on_while_its_targets_host_went_down_is_refused_with_the_reason() {
    let captured = Captured::new("epoch", DISK_BYTES, 31).unwrap();
    let port = free_port();
    let listen = format!("tcp:127.0.0.1:{port}");
    let live = captured.start(&["--no-background", "--listen", &listen]).unwrap();
    let uris = live.ready()["uris"].to_string();
    assert!(uris.contains(&format!("nbd://127.0.0.1:{port}/disk0@1")), "{uris}");
    let qemu = live.qemu_arguments().unwrap().join(" ");
    assert!(qemu.contains("export=disk0@1,"), "{qemu}");

    let bridge = captured.work.socket("bridge");
    let _daemon = reconnecting_bridge(port, "disk0@1", &bridge);
    let guest = Export::first(&bridge);
    guest.qemu_io(&["write -P 0xa1 0 64k", "flush", "write -P 0xa2 0 64k"]).unwrap();

    // The agent alone dies: the guest goes on, and finds what it wrote.
    let live = live.kill_and_restart().unwrap();
    guest.qemu_io(&["read -P 0xa2 0 64k"]).unwrap();

    // The host dies: what the guest did not flush may be gone.
    let mut live = live.kill().unwrap().after_power_cut().unwrap().start_again().unwrap();
    let uris = live.ready()["uris"].to_string();
    assert!(uris.contains("/disk0@2"), "{uris}");
    let read =
        run_any(Command::new("qemu-io").args(["-f", "raw", "-c", "read 0 64k"]).arg(guest.uri())).unwrap();
    let said = String::from_utf8_lossy(&read.stdout);
    assert!(said.contains("read failed") || !read.status.success(), "the guest went on: {said}");
    let logged = live.process().wait_for_text("disk0@1 is over").unwrap();
    assert!(logged.contains("disk0@2"), "{logged}");

    // Everybody else is told what to do, or served.
    let said = refusal(&format!("nbd://127.0.0.1:{port}/disk0@1"));
    for word in ["disk0@1 is over", "start the guest anew on disk0@2"] {
        assert!(said.contains(word), "{said}");
    }
    assert!(refusal(&format!("nbd://127.0.0.1:{port}/disk0@3")).contains("served as disk0@2"));
    assert!(refusal(&format!("nbd://127.0.0.1:{port}/disk1@1")).contains("no such export"));
    for name in ["disk0@2", "disk0", ""] {
        Export::new(&captured.socket, name).qemu_io(&["read 4k 4k"]).unwrap();
    }
    let listed = run(Command::new("nbdinfo").args(["--list", &format!("nbd://127.0.0.1:{port}")])).unwrap();
    for name in ["disk0", "disk0@2"] {
        assert_eq!(listed.matches(&format!("export=\"{name}\":\n")).count(), 1, "{name}: {listed}");
        assert!(listed.contains(&format!("/{name}\n")), "{name}: {listed}");
    }

    // It stays, and nothing is lost by parking.
    let (stopped, _) = live.park().unwrap();
    let live = stopped.start_again().unwrap();
    assert!(live.ready()["uris"].to_string().contains("/disk0@2"));
}

#[test]
fn every_client_takes_the_name_with_the_epoch_in_a_uri() {
    let captured = Captured::new("epoch-uri", DISK_BYTES, 33).unwrap();
    let mut live = captured.start(&["--listen", "tcp:127.0.0.1:0"]).unwrap();
    live.wait_complete().unwrap();
    let mut uris: Vec<String> =
        live.ready()["uris"].as_array().unwrap().iter().map(|uri| uri.as_str().unwrap().to_owned()).collect();
    assert_eq!(uris.len(), 2, "{uris:?}");
    // As those write it who escape all that they can.
    uris.push(uris[1].replace('@', "%40"));
    for uri in &uris {
        let info = run(Command::new("nbdinfo").args(["--size", uri])).unwrap();
        assert_eq!(info.trim(), DISK_BYTES.to_string(), "{uri}");
        run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw", uri]).arg(&captured.disk))
            .unwrap();
        let copy = captured.work.file("copy.raw");
        run(Command::new("nbdcopy").arg(uri).arg(&copy)).unwrap();
        e2e::disk::ensure_same(&captured.disk, &copy).unwrap();
        std::fs::remove_file(&copy).unwrap();
        run(Command::new("fio")
            .args(["--name=uri", "--ioengine=nbd", "--rw=randread", "--bs=4k", "--size=4m", "--io_size=1m"])
            .arg(format!("--uri={uri}"))
            .current_dir(captured.work.path()))
        .unwrap();
    }
}
