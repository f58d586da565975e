//! The main job, on a real guest: boot from the backup, write, lose the agent, come home whole.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::collections::BTreeSet;

use e2e::disk;
use e2e::guest::{self, GuestImage};
use e2e::lifeboot::{LiveRestore, Repository};
use e2e::machine::Machine;
use e2e::nbd::Extent;
use e2e::work_dir::WorkDir;

/// What the background may copy a second at first: the guest comes up long before everything is home.
const LIMIT: &str = "1MiB";

/// Writes files, says so after each, and then sums them up.
const BUSY: &str = "for n in 1 2 3 4; do dd if=/dev/urandom of=/root/busy.$n bs=64k count=64 conv=fsync status=none \
                    || exit 1; echo wrote $n; done; sha256sum /root/busy.*";

#[test]
fn a_guest_boots_from_its_backup_survives_a_killed_agent_and_comes_home_whole() {
    let image = GuestImage::prepare().unwrap();
    let work = WorkDir::new("guest").unwrap();
    let repository = Repository::init(work.file("repository")).unwrap();
    repository.capture("guest", &image.disk()).unwrap();
    let (target, socket) = (work.file("target.raw"), work.socket("live"));
    let mut live =
        LiveRestore::start(&repository, "guest@latest", &target, &socket, &["--limit", LIMIT]).unwrap();

    let mut machine = Machine::start(&image, &live.qemu_arguments().unwrap(), work.path()).unwrap();
    machine.wait_ready().unwrap();
    let before = machine
        .run("dd if=/dev/urandom of=/root/before bs=1M count=8 status=none; sync; sha256sum /root/before")
        .unwrap();

    // The agent dies while the guest writes, twice; the guest notices nothing but the wait.
    let mut sums = String::new();
    for limit in [LIMIT, "0"] {
        let running = machine.begin(BUSY).unwrap();
        machine.wait_output(&running, "wrote 1").unwrap();
        live = live.kill().unwrap().start_with(&["--limit", limit]).unwrap();
        let printed = machine.finish(running).unwrap();
        sums =
            printed.lines().filter(|line| line.contains("/root/")).map(|line| format!("{line}\n")).collect();
    }
    assert_eq!(machine.run("sha256sum /root/before").unwrap(), before, "what was synced before is there");
    // From the disk, not from the guest's memory.
    machine.run("echo 3 > /proc/sys/vm/drop_caches").unwrap();
    assert_eq!(machine.run("sha256sum /root/before").unwrap(), before);
    assert_eq!(machine.run("sha256sum /root/busy.*").unwrap(), sums);
    assert_eq!(
        machine.run("dmesg | grep -ciE 'i/o error|ext4-fs error|corrupt' || true").unwrap().trim(),
        "0"
    );
    machine.power_off().unwrap();

    live.wait_complete().unwrap();
    let info = live.export().info().unwrap();
    let contexts = info["exports"][0]["contexts"].as_array().unwrap().clone();
    let bitmap =
        contexts.iter().filter_map(|context| context.as_str()).find(|name| name.contains("dirty")).unwrap();
    let map = live.export().map(bitmap).unwrap();
    let dirty: BTreeSet<u64> =
        map.iter().filter(|extent| extent.flags & 1 == 1).flat_map(Extent::blocks).collect();
    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "parking ended with {parked}");

    guest::ensure_sound(&target).unwrap();
    assert_eq!(sha256(&guest::read_file(&target, "/root/before").unwrap(), &work), word(&before, 0));
    for line in sums.lines() {
        let content = guest::read_file(&target, &word(line, 1)).unwrap();
        assert_eq!(sha256(&content, &work), word(line, 0), "{line}");
    }

    // By QEMU's own record of what it sent, not by ours.
    let written: BTreeSet<u64> = machine.written_blocks().unwrap().into_iter().collect();
    let differing = disk::differing_blocks(&image.disk(), &target).unwrap();
    assert!(!differing.is_empty() && written.len() < 40_000, "{} written", written.len());
    let wrong = differing.iter().find(|block| !written.contains(block));
    assert_eq!(wrong, None, "this block differs from the source, and the guest never wrote it");
    let forgotten = written.iter().find(|block| !dirty.contains(block));
    assert_eq!(forgotten, None, "the guest wrote this block, and the dirty bitmap does not have it");
    assert!(dirty.len() < written.len() + 1000, "{} are dirty, {} were written", dirty.len(), written.len());
}

#[test]
fn a_guest_on_a_scratch_export_boots_and_leaves_no_trace() {
    let image = GuestImage::prepare().unwrap();
    let work = WorkDir::new("guest-scratch").unwrap();
    let repository = Repository::init(work.file("repository")).unwrap();
    repository.capture("guest", &image.disk()).unwrap();
    let socket = work.socket("serve");
    let scratch = work.file("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let mut server =
        repository.serve(&["guest@latest", "--scratch", scratch.to_str().unwrap()], &socket).unwrap();
    let export = e2e::nbd::Export::first(&socket);
    let mut machine = Machine::start(&image, &e2e::machine::nbd_drive(&export), work.path()).unwrap();
    machine.wait_ready().unwrap();
    machine.run("echo hello > /root/hello && sync && echo 3 > /proc/sys/vm/drop_caches && grep -q hello /root/hello").unwrap();
    machine.power_off().unwrap();
    assert!(server.terminate().unwrap().success());
    let restored = work.file("restored.raw");
    repository.restore("guest@latest", &restored).unwrap();
    disk::ensure_same(&image.disk(), &restored).unwrap();
}

/// The `index`th word of a line of sha256sum.
fn word(line: &str, index: usize) -> String {
    line.split_whitespace().nth(index).unwrap().to_owned()
}

/// As sha256sum has it.
fn sha256(bytes: &[u8], work: &WorkDir) -> String {
    let file = work.file("to-sum");
    std::fs::write(&file, bytes).unwrap();
    word(&e2e::process::run(std::process::Command::new("sha256sum").arg(&file)).unwrap(), 0)
}
