//! What clients of `lifeboot serve` may cost: its memory, and its log.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::os::unix::fs::FileExt;

use e2e::captured::Captured;
use e2e::lifeboot::Repository;
use e2e::nbd::Export;
use e2e::process::Process;

const MIB: u64 = 1 << 20;

/// Changes a byte in the middle of the largest pack.
fn spoil(repository: &Repository) {
    let packs = fs::read_dir(repository.path().join("packs")).unwrap().map(|pack| pack.unwrap().path());
    let pack = packs.max_by_key(|pack| pack.metadata().unwrap().len()).unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(&pack).unwrap();
    let at = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// The memory that is the process's alone, in bytes.
fn own_memory(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn a_client_that_reads_what_is_damaged_again_and_again_does_not_fill_the_log() {
    let captured = Captured::new("serve-damaged", 16 * MIB, 71).unwrap();
    spoil(&captured.repository);
    let mut server = captured.repository.serve(&["vm@latest"], &captured.socket).unwrap();
    // The first that fails is read 500 times, by many requests at a time.
    let script = "failed = 0
for at in range(0, h.get_size(), 65536):
    try:
        h.pread(4096, at)
    except nbd.Error:
        failed = 1
        break
assert failed == 1
for _ in range(10):
    reads = [h.aio_pread(nbd.Buffer(4096), at) for _ in range(50)]
    while reads:
        h.poll(-1)
        left = []
        for read in reads:
            try:
                assert not h.aio_command_completed(read)
                left.append(read)
            except nbd.Error:
                failed += 1
        reads = left
print(failed)";
    let said = Export::first(&captured.socket).nbdsh("", script).unwrap();
    assert_eq!(said.trim(), "501");
    server.terminate().unwrap();
    let lines = server.lines();
    let told: Vec<_> = lines.iter().filter(|line| line.contains("WARN")).collect();
    // One in ten seconds; a machine that is busy may take some more.
    assert!((1..20).contains(&told.len()), "{} lines: {:#?}", told.len(), &told[..told.len().min(5)]);
    let first = told[0];
    assert!(
        ["a request failed", "kind=Read", "len=4096", "error=chunk ", " of the disk: ", " of pack "]
            .iter()
            .all(|word| first.contains(word)),
        "{first}"
    );
}

#[test]
fn large_reads_leave_no_more_memory_behind_than_caches_and_buffers() {
    let captured = Captured::new("serve-memory", 160 * MIB, 72).unwrap();
    let server = captured.repository.serve(&["vm@latest"], &captured.socket).unwrap();
    let script = "import random
places = random.Random(1)
for _ in range(150):
    h.pread(32 << 20, places.randrange((h.get_size() - (32 << 20)) // 4096) * 4096)";
    Export::first(&captured.socket).nbdsh("h.set_request_structured_replies(False)", script).unwrap();
    let memory = own_memory(&server) / MIB;
    assert!(memory < 192, "{memory} MiB");
}
