//! The disks that one agent serves are saved together, at one moment.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::path::Path;
use std::process::Command;

use e2e::captured::Captured;
use e2e::disk;
use e2e::nbd::Export;
use e2e::process::{Process, run, run_any, run_json};
use serde_json::Value;

const DISK_BYTES: u64 = 8 << 20;

fn first_number(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    assert!(bytes[..4096].chunks(8).all(|part| part == &bytes[..8]), "a write is whole or not there");
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

#[test]
fn the_disks_of_one_agent_are_saved_as_one_moment_and_at_rest_with_each_other() {
    let captured = Captured::new("save-disks", DISK_BYTES, 21).unwrap();
    let data = captured.work.file("data.raw");
    disk::make(&data, DISK_BYTES, 22).unwrap();
    let sources = [format!("root={}", captured.disk.display()), format!("data={}", data.display())];
    run(captured.repository.verb("capture", &["-q", "two"]).unwrap().args(&sources)).unwrap();
    let (a, b) = (captured.work.file("a.raw"), captured.work.file("b.raw"));
    let mut live = captured.repository.verb("live-restore", &["two@latest", "--limit", "100KiB"]).unwrap();
    live.arg(format!("root={}", a.display())).arg(format!("data={}", b.display()));
    live.arg("--listen").arg(format!("unix:{}", captured.socket.display()));
    let mut live = Process::spawn(&live).unwrap();
    live.wait_for_text("QEMU: ").unwrap();

    // A guest that writes a number to one disk, and then to the other.
    let uri = |name: &str| Export::new(&captured.socket, name).uri();
    let program = format!(
        "import nbd, struct\nr = nbd.NBD()\nr.connect_uri('{}')\nd = nbd.NBD()\nd.connect_uri('{}')\nn = 1\nwhile True:\n    \
         b = struct.pack('<Q', n) * 512\n    r.pwrite(b, 0)\n    d.pwrite(b, 0)\n    n += 1\n    \
         if n == 2: print('begun', flush=True)\n",
        uri("root"),
        uri("data")
    );
    let mut guest = Command::new("/usr/bin/python3");
    guest.args(["-c", &program]);
    let mut guest = Process::spawn(&guest).unwrap();
    guest.wait_for_text("begun").unwrap();
    let save = |further: &[&Path]| -> Value {
        let mut command = captured.repository.verb("save", &["--json"]).unwrap();
        run_json(command.arg(&a).args(further)).unwrap()
    };
    let restored = |report: &Value, name: &str| {
        let out = captured.work.file("restored.raw");
        let _ = fs::remove_file(&out);
        captured
            .repository
            .restore(&format!("{}/{name}", report["snapshot"].as_str().unwrap()), &out)
            .unwrap();
        out
    };
    for _ in 0..5 {
        let saved = save(&[]);
        assert_eq!(saved["disks"].as_array().unwrap().len(), 2);
        let root = first_number(&restored(&saved, "root"));
        let data = first_number(&restored(&saved, "data"));
        assert!(root == data || root == data + 1, "{root} on the first disk, {data} on the second");
    }
    guest.kill().unwrap();
    assert!(live.terminate().unwrap().success());

    let saved = save(&[Path::new("--with"), &b]);
    assert_eq!(saved["disks"].as_array().unwrap().len(), 2);
    assert_eq!(first_number(&restored(&saved, "data")), first_number(&b));
    let out = restored(&saved, "root");
    let differing = disk::differing_blocks(&out, &captured.disk).unwrap();
    assert_eq!(differing, [0]);
    assert_eq!(save(&[])["disks"].as_array().unwrap().len(), 1);
    let mut twice = captured.repository.verb("save", &["--with"]).unwrap();
    let output = run_any(twice.arg(&a).arg(&a)).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("two of the disks are called root"), "it did not wait for its own lock: {said}");
    captured.repository.verify().unwrap();
}
