//! Block devices as sources and as targets: loop devices, so only as root.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{MIB, Scratch, is_root, live_restore_to, noise, park};

/// A loop device on a file, detached when dropped.
pub(crate) struct Loop(PathBuf);

impl Loop {
    pub(crate) fn on(file: &Path) -> Self {
        let output = Command::new("losetup").args(["-f", "--show"]).arg(file).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(String::from_utf8(output.stdout).unwrap().trim().into())
    }

    pub(crate) fn name(&self) -> &str {
        self.0.to_str().unwrap()
    }

    fn read(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(&self.0).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_is_captured() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 8 * MIB, &[(0, 100_000, 1), (5 << 20, 3 << 20, 2)]);
    let device = Loop::on(&disk);
    let report = scratch.json(&["capture", "g", device.name()]);
    assert_eq!(report["consistency"], "crash");
    scratch.run(&["restore", "g@latest", "out.raw"]).ends_with(0);
    crate::support::assert_same(&disk, &scratch.path("out.raw"));
}

#[test]
fn a_block_device_is_overwritten_by_force_and_zeroed_where_the_disk_is_zero() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 8 * MIB, &[(0, 100_000, 1), (5 << 20, 1 << 20, 2)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    for (engine, direct) in [("uring", "on"), ("threads", "off")] {
        let device = Loop::on(&scratch.disk("t.raw", 9 * MIB, &[(0, 9 << 20, 7)]));
        let target = device.name();
        scratch.run(&["restore", "g@latest", target]).fails(&[target, "not empty", "--force"]);
        assert_eq!(device.read(9 << 20), noise(9 << 20, 7));
        let args = ["restore", "g@latest", target, "--force", "--io-engine", engine, "--direct", direct];
        scratch.run(&args).ends_with(0);
        let mut wanted = std::fs::read(&disk).unwrap();
        // What lies beyond the disk is not ours.
        wanted.extend_from_slice(&noise(9 << 20, 7)[8 << 20..]);
        assert!(device.read(9 << 20) == wanted);
    }
}

#[test]
fn an_empty_block_device_needs_no_force_and_what_is_on_another_is_named() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 4 * MIB, &[(0, 100_000, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    let device = Loop::on(&scratch.disk("t.raw", 4 * MIB, &[]));
    scratch.run(&["restore", "g@latest", device.name()]).ends_with(0);
    assert!(device.read(4 << 20) == std::fs::read(&disk).unwrap());

    let file = scratch.disk("x.raw", 4 * MIB, &[]);
    File::options().write(true).open(&file).unwrap().write_all_at(b"XFSB", 0).unwrap();
    let device = Loop::on(&file);
    scratch.run(&["restore", "g@latest", device.name()]).fails(&["not empty", "an XFS file system"]);
}

#[test]
fn a_block_device_that_is_too_small_or_in_use_is_refused() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 100_000, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    let small = Loop::on(&scratch.disk("s.raw", 2 * MIB, &[]));
    scratch.run(&["restore", "g@latest", small.name(), "--force"]).fails(&[
        "too small",
        "2097152",
        "4194304",
    ]);

    let device = Loop::on(&scratch.disk("t.raw", 4 * MIB, &[]));
    // As a mounted file system holds it.
    let holder = File::options().read(true).custom_flags(libc::O_EXCL).open(&device.0).unwrap();
    scratch.run(&["restore", "g@latest", device.name(), "--force"]).fails(&[
        device.name(),
        "in use",
        "mounted",
    ]);
    let live =
        ["live-restore", "g@latest", device.name(), "--force", "--state", "state", "--listen", "unix:s"];
    scratch.run(&live).fails(&[device.name(), "in use", "mounted"]);
    assert!(!scratch.path("state").exists(), "nothing was begun");
    drop(holder);
    let holder = File::options().read(true).open(&device.0).unwrap();
    holder.lock().unwrap();
    scratch.run(&["restore", "g@latest", device.name(), "--force"]).fails(&[
        device.name(),
        "in use",
        "locked",
    ]);
    assert!(device.read(4 << 20).iter().all(|byte| *byte == 0));
}

#[test]
fn a_damaged_chunk_leaves_zeroes_on_a_device_and_not_what_was_there() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    let pack = File::options().read(true).write(true).open(scratch.pack()).unwrap();
    let mut byte = [0];
    pack.read_exact_at(&mut byte, MIB).unwrap();
    pack.write_all_at(&[!byte[0]], MIB).unwrap();
    let device = Loop::on(&scratch.disk("t.raw", 4 * MIB, &[(0, 4 << 20, 7)]));
    let args = ["restore", "g@latest", device.name(), "--force", "--keep-going", "--json"];
    let report = scratch.run(&args).ends_with(3).json();
    let offset = report["damaged"][0]["offset"].as_u64().unwrap() as usize;
    let mut wanted = noise(2 << 20, 1);
    wanted.resize(4 << 20, 0);
    wanted[offset..offset + (128 << 10)].fill(0);
    assert!(device.read(4 << 20) == wanted);
}

#[test]
fn a_block_device_that_was_copied_goes_on_with_its_copied_session() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let original = Loop::on(&scratch.disk("a.raw", 4 * MIB, &[]));
    let state = ["--state", "st"];
    let mut live = live_restore_to(&scratch, original.name(), &[&state[..], &["--limit", "20"]].concat());
    park(&mut live);
    std::fs::copy(scratch.path("a.raw"), scratch.path("b.raw")).unwrap();
    let copy = Loop::on(&scratch.path("b.raw"));
    let go_on = |device: &Loop, further: &[&str]| {
        let args = ["live-restore", "web01@latest", device.name(), "--listen", "unix:s", "--exit-when-done"];
        scratch.run(&[&args[..], further].concat())
    };
    go_on(&copy, &["--state", "st", "--moved"]).fails(&["which is still there", "cp -a"]);
    scratch.copy("st", "st2");
    go_on(&copy, &["--state", "st2", "--moved"]).ends_with(0);
    go_on(&copy, &["--state", "st2"]).ends_with(0);
    go_on(&original, &state).ends_with(0);
    for device in [&copy, &original] {
        assert_eq!(device.read(4 << 20), std::fs::read(&disk).unwrap());
    }
}

#[test]
fn a_copied_session_does_not_go_on_with_the_block_device_of_its_original() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let device = Loop::on(&scratch.disk("a.raw", 4 * MIB, &[]));
    let live = || live_restore_to(&scratch, device.name(), &["--state", "st", "--limit", "20"]);
    park(&mut live());
    scratch.copy("st", "st2");
    let go_on = |state: &str| {
        let args = ["live-restore", "web01@latest", device.name(), "--listen", "unix:s2", "--exit-when-done"];
        scratch.run(&[&args[..], &["--state", state]].concat())
    };
    let session = scratch.path("st").canonicalize().unwrap().join(&scratch.names("st")[0]);
    let said = ["is a copy of the one in", &format!("`--state {}`", session.display())];
    go_on("st2").fails(&said);
    let mut live = live();
    go_on("st2").fails(&said);
    park(&mut live);
    go_on(session.to_str().unwrap()).ends_with(0);
    assert_eq!(device.read(4 << 20), std::fs::read(&disk).unwrap());
}

#[test]
fn a_session_of_another_disk_is_given_up_only_by_its_own_directory() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let device = Loop::on(&scratch.disk("a.raw", 4 * MIB, &[]));
    let mut live = live_restore_to(&scratch, device.name(), &["--state", "st", "--limit", "20"]);
    park(&mut live);
    let session = scratch.path("st").canonicalize().unwrap().join(&scratch.names("st")[0]);
    // The path leads to another disk now, as the record tells it.
    let record = session.join("session.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace("/a.raw", "/b.raw")).unwrap();
    let before = device.read(4 << 20);
    let command = format!("lifeboot discard {} --state {}", device.name(), session.display());
    let discard = ["discard", device.name(), "--yes", "--state"];
    scratch.run(&[&discard[..], &["st"]].concat()).fails(&[
        "is another target now",
        &command,
        "is not changed",
    ]);
    let args = ["live-restore", "web01@latest", device.name(), "--state", "st", "--listen", "unix:s"];
    let said = format!("the session in {} restores to", session.display());
    scratch.run(&args).fails(&[&said, "is another target now", &command]);
    let ran = scratch.run(&[&discard[..], &[session.to_str().unwrap()]].concat()).ends_with(0);
    assert!(ran.stdout.contains("/b.raw (4194304 bytes)"), "{ran:?}");
    assert!(ran.stdout.contains("stays untouched: it is not this session's target"), "{ran:?}");
    assert!(!session.exists() && device.read(4 << 20) == before);
}
