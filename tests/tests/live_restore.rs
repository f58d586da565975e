//! `lifeboot live-restore` as its clients and its operator see it.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::{LiveRestore, status};
use e2e::process::run_any;
use e2e::work_dir::{LoopDevice, SmallFileSystem};

const DISK_BYTES: u64 = 64 << 20;
/// Holds the background back, so that what a client asks for is still in the backup.
const SLOW: &[&str] = &["--limit", "4KiB"];

fn captured(name: &str) -> Captured {
    Captured::new(name, DISK_BYTES, 11).unwrap()
}

/// Starts it where that must fail; returns what it said on stderr.
fn start_refused(captured: &Captured, snapshot: &str, target: &Path, socket: &Path) -> String {
    let mut command = captured.repository.verb("live-restore", &[snapshot]).unwrap();
    let output =
        run_any(command.arg(target).arg("--listen").arg(format!("unix:{}", socket.display()))).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    said
}

#[test]
fn the_disk_comes_home_with_no_client_connected() {
    let captured = captured("no-client");
    let mut live = captured.start(&["--exit-when-done"]).unwrap();
    live.wait_complete().unwrap();
    live.process().wait_success().unwrap();
    disk::ensure_same(&captured.disk, &captured.target).unwrap();
    let (source, target) = (disk::allocated_bytes(&captured.disk), disk::allocated_bytes(&captured.target));
    // What the source has as written zeroes may be holes here, and never the other way round.
    assert!(target.unwrap() <= source.unwrap() + (1 << 20), "the target is as sparse as the source");
}

#[test]
fn a_client_reads_the_whole_disk_before_it_is_home() {
    let captured = captured("read-absent");
    let live = captured.start(SLOW).unwrap();
    live.export().ensure_same(&captured.disk).unwrap();
    let copy = captured.work.file("copy.raw");
    live.export().convert_to(&copy).unwrap();
    disk::ensure_same(&captured.disk, &copy).unwrap();
}

#[test]
fn writes_of_every_kind_to_absent_blocks_are_read_back_and_kept() {
    let captured = captured("write-absent");
    let live = captured.start(SLOW).unwrap();
    // The same commands on a copy of the disk say what must come out.
    let expected = captured.work.file("expected.raw");
    fs::copy(&captured.disk, &expected).unwrap();
    let commands = [
        "write -P 0xd1 1M 64k",
        "write -P 0xd2 3584 1024",
        "write -P 0xd3 5242879 2",
        "write -P 0xd4 7M 3M",
        "write -z 12M 100k",
        "write -z -u 20M 5M",
        "discard 30M 2M",
        "write -f -P 0xd5 40960000 512",
        "flush",
    ];
    live.export().qemu_io(&commands).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&expected).unwrap();
    for (byte, offset, len) in [
        (0xd1, 1 << 20, 64 << 10),
        (0xd2, 3584, 1024),
        (0xd3, 5_242_879, 2),
        (0xd4, 7 << 20, 3 << 20),
        (0, 12 << 20, 100 << 10),
        (0, 20 << 20, 5 << 20),
        (0, 30 << 20, 2 << 20),
        (0xd5, 40_960_000, 512),
    ] {
        file.write_all_at(&vec![byte; len], offset).unwrap();
    }
    live.export().ensure_same(&expected).unwrap();

    // The same command without the limit goes on, and finishes.
    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "parking ended with {parked}");
    let mut live = captured.start(&["--exit-when-done"]).unwrap();
    live.wait_complete().unwrap();
    live.process().wait_success().unwrap();
    disk::ensure_same(&expected, &captured.target).unwrap();
}

#[test]
fn maps_tell_what_is_home_and_what_the_guest_wrote() {
    let captured = captured("maps");
    let mut live = captured.start(SLOW).unwrap();
    live.export().qemu_io(&["write -P 0xe1 2M 12k", "write -P 0xe2 9439744 512", "write -z 33M 1M"]).unwrap();
    let dirty = dirty_context(&live);
    let written: BTreeSet<u64> = dirty_blocks(&live, &dirty);
    let expected: BTreeSet<u64> = (512..515).chain([9_439_744 / 4096]).chain(8448..8704).collect();
    assert_eq!(written, expected, "the dirty bitmap is what was written");

    let absent = |live: &LiveRestore| -> u64 {
        let map = live.export().map("qemu:allocation-depth").unwrap();
        map.iter().filter(|extent| extent.flags == 2).map(|extent| extent.len_bytes).sum()
    };
    assert!(absent(&live) > DISK_BYTES / 4, "most of the data is still in the backup");
    let said = status(&captured.target).unwrap();
    assert_eq!(
        said["home_bytes"].as_u64().unwrap() + absent(&live),
        DISK_BYTES,
        "status and map agree: {said}"
    );

    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "parking ended with {parked}");
    live = captured.start(&[]).unwrap();
    live.wait_complete().unwrap();
    let map = live.export().map("qemu:allocation-depth").unwrap();
    assert!(map.iter().all(|extent| extent.flags == 1), "everything is home: {map:?}");
    assert_eq!(dirty_blocks(&live, &dirty), expected, "the dirty bitmap outlives its agent");
    // It goes on serving the target.
    live.export().qemu_io(&["read -P 0xe1 2M 12k", "write -P 0xe3 0 4k", "read -P 0xe3 0 4k"]).unwrap();
    assert_eq!(status(&captured.target).unwrap()["phase"], "complete");
}

#[test]
fn what_a_killed_agent_acknowledged_is_there_flushed_or_not() {
    let captured = captured("kill");
    let mut live = captured.start(SLOW).unwrap();
    for round in 0..4 {
        let offset = round * 3;
        let byte = 0xa0 + round;
        live.export().qemu_io(&[&format!("write -P {byte} {offset}M 1100k")]).unwrap();
        live = live.kill_and_restart().unwrap();
        live.export().qemu_io(&[&format!("read -P {byte} {offset}M 1100k")]).unwrap();
    }
    let (stopped, parked) = live.park().unwrap();
    assert!(parked.success(), "parking ended with {parked}");
    let live = stopped.start_again().unwrap();
    live.export().qemu_io(&["read -P 0xa0 0M 1100k", "read -P 0xa3 9M 1100k"]).unwrap();
}

#[test]
fn what_was_flushed_outlives_the_loss_of_the_live_file() {
    let captured = captured("power-cut");
    let live = captured.start(SLOW).unwrap();
    live.export().qemu_io(&["write -P 0xb1 1M 2M", "write -P 0xb2 10240 1536", "flush"]).unwrap();
    live.export().qemu_io(&["write -f -P 0xb3 33M 64k"]).unwrap();
    let stopped = live.kill().unwrap();
    // As after a power cut: what is not in the journal is not known.
    let state = captured.work.file("target.raw.lifeboot");
    fs::remove_file(state.join("live")).unwrap();
    let live = stopped.start_again().unwrap();
    live.export()
        .qemu_io(&["read -P 0xb1 1M 2M", "read -P 0xb2 10240 1536", "read -P 0xb3 33M 64k"])
        .unwrap();
}

#[test]
fn a_second_agent_is_refused_and_the_first_goes_on() {
    let captured = captured("second");
    let live = captured.start(SLOW).unwrap();
    let said = start_refused(&captured, "vm@latest", &captured.target, &captured.work.socket("second"));
    assert!(said.contains("target.raw"), "it names the target: {said}");
    live.export().qemu_io(&["write -P 0xc1 0 4k", "read -P 0xc1 0 4k"]).unwrap();
    // Nor may another session take the socket of one that lives.
    let said = start_refused(&captured, "vm@latest", &captured.work.file("other.raw"), &captured.socket);
    assert!(said.contains("live"), "it names the address: {said}");
    live.export().qemu_io(&["read -P 0xc1 0 4k"]).unwrap();
}

#[test]
fn a_target_of_another_session_or_size_is_refused_untouched() {
    let captured = captured("refused");
    let live = captured.start(SLOW).unwrap();
    live.export().qemu_io(&["write -P 0xc2 0 64k"]).unwrap();
    live.park().unwrap();
    disk::make(&captured.disk, DISK_BYTES, 12).unwrap();
    captured.repository.capture("other", &captured.disk).unwrap();
    let said = start_refused(&captured, "other@latest", &captured.target, &captured.socket);
    assert!(said.contains("vm@"), "it names the snapshot that the target belongs to: {said}");

    let small = captured.work.file("small.raw");
    fs::write(&small, vec![7; 1 << 20]).unwrap();
    start_refused(&captured, "vm@latest", &small, &captured.socket);
    assert_eq!(fs::read(&small).unwrap(), vec![7; 1 << 20], "a target that is too small is left alone");

    // The session itself goes on.
    let live = captured.start(SLOW).unwrap();
    live.export().qemu_io(&["read -P 0xc2 0 64k"]).unwrap();
}

#[test]
fn a_block_device_comes_home_with_its_state_kept_elsewhere() {
    let captured = captured("device");
    // Full of what must not shine through, where the snapshot has zeroes least of all.
    fs::write(&captured.target, vec![0x5a; usize::try_from(DISK_BYTES).unwrap()]).unwrap();
    let device = LoopDevice::attach(&captured.target).unwrap();
    let state = captured.work.file("state");
    let arguments = ["--force", "--state", state.to_str().unwrap(), "--limit", "4KiB"];
    let start = |arguments: &[&str]| {
        let path = device.path();
        LiveRestore::start(&captured.repository, "vm@latest", path, &captured.socket, arguments).unwrap()
    };
    let live = start(&arguments);
    live.export().ensure_same(&captured.disk).unwrap();
    live.export().qemu_io(&["write -P 0xf1 3M 1M", "write -z 17M 1M"]).unwrap();
    let live = live.kill_and_restart().unwrap();
    live.export().qemu_io(&["read -P 0xf1 3M 1M", "read -P 0 17M 1M"]).unwrap();
    live.park().unwrap();
    // The session is there: nothing needs to be forced.
    let mut live = start(&arguments[1..3]);
    live.wait_complete().unwrap();
    live.export().qemu_io(&["read -P 0xf1 3M 1M", "read -P 0 17M 1M"]).unwrap();
    live.park().unwrap();
    drop(device);
    let differing = disk::differing_blocks(&captured.disk, &captured.target).unwrap();
    let written = |block: &u64| (768..1024).contains(block) || (4352..4608).contains(block);
    assert!(differing.iter().all(written), "a block that nobody wrote differs");
}

#[test]
fn the_thread_pool_engine_does_the_same_job_over_tcp() {
    let captured = captured("threads");
    let arguments = ["--io-engine", "threads", "--listen", "tcp:127.0.0.1:0", "--limit", "4KiB"];
    let live = captured.start(&arguments).unwrap();
    live.export().qemu_io(&["write -P 0xf2 3584 1M", "flush"]).unwrap();
    let live = live.kill_and_restart().unwrap();
    live.export().qemu_io(&["read -P 0xf2 3584 1M"]).unwrap();
    live.park().unwrap();
    let mut live = captured.start(&["--io-engine", "threads"]).unwrap();
    live.wait_complete().unwrap();
    let differing = disk::differing_blocks(&captured.disk, &captured.target).unwrap();
    assert!(differing.iter().all(|block| (0..258).contains(block)), "a block that nobody wrote differs");
}

#[test]
fn a_full_target_fails_that_write_alone_and_goes_on_when_there_is_room() {
    let captured = captured("full");
    let room = SmallFileSystem::mount(captured.work.file("room"), 24 << 20).unwrap();
    let target = room.path().join("target.raw");
    let mut live =
        LiveRestore::start(&captured.repository, "vm@latest", &target, &captured.socket, SLOW).unwrap();
    let script = r#"
import errno
block = b'\xd7' * (1 << 20)
acknowledged = 0
while True:
    try:
        h.pwrite(block, acknowledged << 20)
    except nbd.Error as error:
        assert error.errnum == errno.ENOSPC, error
        break
    acknowledged += 1
assert acknowledged >= 4, acknowledged
for n in range(acknowledged):
    assert h.pread(1 << 20, n << 20) == block, n
# What is absent is still read from the backup.
h.pread(1 << 20, (64 << 20) - (1 << 20))
print(acknowledged)
"#;
    let printed = live.export().nbdsh("", script).unwrap();
    let acknowledged: u64 = printed.trim().parse().unwrap();

    room.resize(512 << 20).unwrap();
    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "parking ended with {parked}");
    live = LiveRestore::start(&captured.repository, "vm@latest", &target, &captured.socket, &[]).unwrap();
    live.wait_complete().unwrap();
    live.export().qemu_io(&[&format!("read -P 0xd7 0 {acknowledged}M")]).unwrap();
    let differing = disk::differing_blocks(&captured.disk, &target).unwrap();
    // The block write that failed may have been done in part.
    let touched = (acknowledged + 1) * 256;
    assert!(differing.iter().all(|&block| block < touched), "a block that nobody wrote differs");
}

#[test]
fn a_damaged_chunk_fails_its_own_range_alone_and_is_reported() {
    let captured = captured("damage");
    let pack = largest_file(captured.repository.path());
    let file = fs::OpenOptions::new().read(true).write(true).open(&pack).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[!byte[0]], middle).unwrap();

    let mut live = captured.start(&["--exit-when-done"]).unwrap();
    let ended = live.process().wait().unwrap();
    assert_eq!(ended.code(), Some(3), "done, but something is damaged: {:#?}", live.process().lines());

    let live = captured.start(&[]).unwrap();
    let script = r#"
import errno
failed = 0
size = h.get_size()
for offset in range(0, size, 65536):
    try:
        h.pread(65536, offset)
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error
        failed += 1
assert 0 < failed * 65536 <= 8 << 20, failed
"#;
    live.export().nbdsh("", script).unwrap();
    let said = status(&captured.target).unwrap();
    assert!(!said["damaged"].as_array().unwrap().is_empty(), "{said}");
}

/// The only dirty bitmap's context.
fn dirty_context(live: &LiveRestore) -> String {
    let info = live.export().info().unwrap();
    let contexts = info["exports"][0]["contexts"].as_array().unwrap().clone();
    let mut names = contexts.iter().filter_map(|context| context.as_str());
    names.find(|name| name.starts_with("qemu:dirty-bitmap:")).unwrap().to_owned()
}

fn dirty_blocks(live: &LiveRestore, context: &str) -> BTreeSet<u64> {
    let map = live.export().map(context).unwrap();
    map.iter().filter(|extent| extent.flags & 1 == 1).flat_map(e2e::nbd::Extent::blocks).collect()
}

fn largest_file(directory: &Path) -> PathBuf {
    let mut largest = (0, PathBuf::new());
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                open.push(entry.path());
            } else {
                largest = largest.max((metadata.len(), entry.path()));
            }
        }
    }
    largest.1
}
