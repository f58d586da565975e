//! What a guest reads while it starts is kept with the group, and fetched first by the next restore.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use e2e::captured::Captured;
use e2e::lifeboot::lifeboot;
use e2e::process::{run, run_any, run_json};
use serde_json::Value;

const DISK_BYTES: u64 = 64 << 20;
const CHUNK: u64 = 128 << 10;

/// `lifeboot trace show` as JSON; `-r` follows the verb that it belongs to.
fn show(captured: &Captured, further: &[&str]) -> Value {
    let mut command = lifeboot(["trace", "show", "--json", "-r"]).unwrap();
    run_json(command.arg(captured.repository.path()).args(further)).unwrap()
}

/// The numbers of chunks that hold data, spread over the disk.
fn data_chunks(captured: &Captured, count: usize) -> Vec<u64> {
    use std::os::unix::fs::FileExt;
    let disk = std::fs::File::open(&captured.disk).unwrap();
    let mut chunks: Vec<u64> = (0..DISK_BYTES / CHUNK)
        .filter(|chunk| {
            let mut bytes = vec![0; CHUNK as usize];
            disk.read_exact_at(&mut bytes, chunk * CHUNK).unwrap();
            bytes.iter().any(|byte| *byte != 0)
        })
        .collect();
    let step = (chunks.len() / count).max(1);
    chunks = chunks.into_iter().step_by(step).take(count).collect();
    // In no order of the disk's.
    chunks.sort_unstable_by_key(|chunk| chunk.wrapping_mul(0x9e37_79b9) % 1009);
    chunks
}

fn reads(chunks: &[u64]) -> Vec<String> {
    chunks.iter().map(|chunk| format!("read {} 4k", chunk * CHUNK)).collect()
}

#[test]
fn a_trace_that_is_taken_by_hand_is_what_the_next_restore_brings_home_first() {
    let captured = Captured::new("trace", DISK_BYTES, 41).unwrap();
    let live = captured.start(&["--no-background"]).unwrap();
    let target = captured.target.to_str().unwrap();
    let none = run_any(lifeboot(["trace", "take"]).unwrap().arg(target)).unwrap();
    assert_eq!(none.status.code(), Some(1), "nothing was read yet: {none:?}");
    let chunks = data_chunks(&captured, 12);
    let commands = reads(&chunks);
    live.export().qemu_io(&["read 0 4k"]).unwrap();
    run(lifeboot(["trace", "begin"]).unwrap().arg(target)).unwrap();
    live.export().qemu_io(&commands.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    let kept = run_json(lifeboot(["trace", "take", "--json"]).unwrap().arg(target)).unwrap();
    assert_eq!(kept["group"], "vm", "{kept}");
    live.park().unwrap();

    let show = show(&captured, &["vm", "--places"]);
    let places: Vec<u64> = show[0]["places"]
        .as_array()
        .unwrap()
        .iter()
        .map(|place| place["offset"].as_u64().unwrap() / CHUNK)
        .collect();
    let mut expected = chunks.clone();
    // Whoever opens a disk looks at its beginning.
    expected.retain(|chunk| places.contains(chunk));
    assert_eq!(expected, chunks, "all of them are in the trace: {show}");

    // A source so slow that little more than the trace can have come when it has.
    std::fs::remove_file(&captured.target).unwrap();
    std::fs::remove_dir_all(format!("{target}.lifeboot")).unwrap();
    let live = captured.start(&["--source-rate=2MB"]).unwrap();
    let is_home = |map: &[e2e::nbd::Extent], chunk: u64| {
        map.iter().any(|extent| {
            extent.offset <= chunk * CHUNK
                && extent.offset + extent.len_bytes >= (chunk + 1) * CHUNK
                && extent.flags == 1
        })
    };
    loop {
        let map = live.export().map("qemu:allocation-depth").unwrap();
        if chunks.iter().all(|chunk| is_home(&map, *chunk)) {
            break;
        }
        let status = e2e::lifeboot::status(&captured.target).unwrap();
        assert!(
            status["home_bytes"].as_u64() < Some(DISK_BYTES),
            "the whole disk came before the trace: {status}"
        );
    }
    live.park().unwrap();
}

#[test]
fn a_scratch_export_records_too_and_a_damaged_trace_stops_nothing() {
    let captured = Captured::new("trace-scratch", DISK_BYTES, 43).unwrap();
    let chunks = data_chunks(&captured, 20);
    let scratch = captured.work.path().to_str().unwrap().to_owned();
    let mut served =
        captured.repository.serve(&["vm@latest", "--scratch", &scratch], &captured.socket).unwrap();
    let export = e2e::nbd::Export::first(&captured.socket);
    let commands = reads(&chunks);
    export.qemu_io(&commands.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    served.terminate().unwrap();
    let show = show(&captured, &["vm/disk0"]);
    assert_eq!(show[0]["disk"], "disk0", "{show}");

    let traces = captured.repository.path().join("traces/vm");
    let file = std::fs::read_dir(&traces).unwrap().next().unwrap().unwrap().path();
    std::fs::write(&file, "no trace").unwrap();
    let mut live = captured.start(&["--exit-when-done"]).unwrap();
    live.wait_complete().unwrap();

    let mut remove = lifeboot(["trace", "remove", "-r"]).unwrap();
    run(remove.arg(captured.repository.path()).arg("vm")).unwrap();
    assert!(std::fs::read_dir(&traces).unwrap().next().is_none());
    let mut unknown = lifeboot(["trace", "show", "-r"]).unwrap();
    let unknown = run_any(unknown.arg(captured.repository.path()).arg("vn")).unwrap();
    assert_eq!(unknown.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no group vn"), "{unknown:?}");
}
