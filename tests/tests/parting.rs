//! An agent that is told to end while its source gives nothing ends all the same, and everything that was acknowledged is there.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::{LiveRestore, Stopped, status};
use e2e::process::{PATIENCE, Process, run};

const DISK_BYTES: u64 = 12 << 20;
const WRITTEN_BYTES: u64 = 1 << 20;

fn write_something(live: &LiveRestore) {
    live.export().qemu_io(&[&format!("write -P 0x41 0 {WRITTEN_BYTES}")]).unwrap();
}

/// A guest's read that waits for the source.
fn begin_read(captured: &Captured, live: &LiveRestore) -> Process {
    let mut read = Command::new("qemu-io");
    read.args(["-r", "-f", "raw", "-c", "read 8M 2M", &live.export().uri()]);
    let reader = Process::spawn(&read).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while status(&captured.target).unwrap()["misses"]["waiting"] == 0 {
        assert!(Instant::now() < deadline, "the read does not wait");
        thread::sleep(Duration::from_millis(20));
    }
    reader
}

/// Whole at the end, but for what was written.
fn finish(captured: &Captured, stopped: Stopped) {
    assert_eq!(status(&captured.target).unwrap()["guest_bytes"], WRITTEN_BYTES);
    let mut live = stopped.start_with(&[]).unwrap();
    live.wait_complete().unwrap();
    live.export().qemu_io(&[&format!("read -P 0x41 0 {WRITTEN_BYTES}")]).unwrap();
    assert!(live.park().unwrap().1.success());
    let differing = disk::differing_blocks(&captured.disk, &captured.target).unwrap();
    let wrong = differing.iter().find(|block| **block >= WRITTEN_BYTES / disk::BLOCK_BYTES);
    assert_eq!(wrong, None, "this block differs, and nobody wrote it");
}

#[test]
fn a_source_that_was_made_slow_does_not_hold_up_parking() {
    let captured = Captured::new("parting-slow", DISK_BYTES, 61).unwrap();
    // What is in flight would take hours.
    let live = captured.start(&["--source-rate", "50"]).unwrap();
    write_something(&live);
    let _reader = begin_read(&captured, &live);
    let (stopped, status) = live.park().unwrap();
    assert!(status.success(), "{status}");
    finish(&captured, stopped);
}

/// A repository whose packs answer nothing: whoever opens one waits.
struct Dead {
    packs: Vec<(PathBuf, PathBuf)>,
}

impl Dead {
    fn make(captured: &Captured) -> Self {
        let aside = captured.work.file("aside");
        fs::create_dir(&aside).unwrap();
        let packs = fs::read_dir(captured.repository.path().join("packs")).unwrap();
        let packs = packs.map(|pack| pack.unwrap().path()).map(|pack| {
            let whole = aside.join(pack.file_name().unwrap());
            fs::copy(&pack, &whole).unwrap();
            // What is open already gives nothing any more either.
            fs::File::options().write(true).open(&pack).unwrap().set_len(0).unwrap();
            fs::remove_file(&pack).unwrap();
            run(Command::new("mkfifo").arg(&pack)).unwrap();
            (pack, whole)
        });
        Self { packs: packs.collect() }
    }

    fn put_back(self) {
        for (pack, whole) in self.packs {
            fs::rename(whole, pack).unwrap();
        }
    }
}

#[test]
fn a_source_that_is_dead_does_not_hold_up_parking_nor_a_save_that_waits_for_it() {
    let captured = Captured::new("parting-dead", DISK_BYTES, 62).unwrap();
    let live = captured.start(&["--no-background"]).unwrap();
    write_something(&live);
    let dead = Dead::make(&captured);
    let _reader = begin_read(&captured, &live);
    let mut save = captured.repository.verb("save", &["--json"]).unwrap();
    let mut saving = Process::spawn(save.arg(&captured.target)).unwrap();
    saving.wait_for("its progress", |line| line.contains("\"bytes_done\"").then_some(())).unwrap();
    let (stopped, status) = live.park().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(saving.wait().unwrap().code(), Some(1));
    dead.put_back();
    finish(&captured, stopped);
}
