//! The source goes away under programs that go on: fio writes and verifies what is home all the while, somebody reads what is absent.
//!
//! An outage lasts as long as it takes to see what is to be seen; `LIFEBOOT_OUTAGE_SECONDS=60` makes it last at least that long.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::{LiveRestore, status};
use e2e::nbd::Export;
use e2e::process::{PATIENCE, run};

const DISK_BYTES: u64 = 96 << 20;
const MIB: u64 = 1 << 20;
/// What fio writes, at the start of the disk.
const HOME_MIB: u64 = 16;
/// Slow enough that most of the disk is absent when the source goes.
const LIMIT: [&str; 2] = ["--limit", "1MiB"];
/// Runs of fio that must begin and end within an outage.
const RUNS: u64 = 2;

/// A repository that is away.
struct Away {
    repository: PathBuf,
    whole: PathBuf,
    since: Instant,
}

impl Away {
    /// Takes the repository away as a server that goes does: what was open cannot be read any more either.
    fn take(captured: &Captured) -> Self {
        let repository = captured.repository.path().to_owned();
        let (whole, gone) = (captured.work.file("whole"), captured.work.file("gone"));
        run(Command::new("cp").arg("-a").arg(&repository).arg(&whole)).unwrap();
        fs::rename(&repository, &gone).unwrap();
        for pack in fs::read_dir(gone.join("packs")).unwrap() {
            fs::OpenOptions::new().write(true).open(pack.unwrap().path()).unwrap().set_len(0).unwrap();
        }
        Self { repository, whole, since: Instant::now() }
    }

    /// Puts it back, once the outage has lasted as long as it was to.
    fn put_back(self) {
        let seconds = std::env::var("LIFEBOOT_OUTAGE_SECONDS").map_or(0, |text| text.parse().unwrap());
        thread::sleep(Duration::from_secs(seconds).saturating_sub(self.since.elapsed()));
        println!("the source was away for {} ms", self.since.elapsed().as_millis());
        fs::rename(&self.whole, &self.repository).unwrap();
    }
}

/// fio on what is home, run after run, until it is told to end.
struct Writer {
    runs: AtomicU64,
    is_over: AtomicBool,
}

impl Writer {
    fn new() -> Self {
        Self { runs: AtomicU64::new(0), is_over: AtomicBool::new(false) }
    }

    /// Returns when it was told to end; fio has verified every run, the last one once more.
    fn write(&self, socket: &Path, directory: &Path) {
        // However this ends, nobody waits for further runs.
        let ended = OnDrop(&self.is_over);
        let mut seed = 0;
        while seed == 0 || !self.is_over.load(Ordering::Relaxed) {
            seed += 1;
            let mut fio = fio(&Export::first(socket), seed, directory);
            run(fio.args(["--verify_backlog=64", "--fsync=64"])).unwrap();
            self.runs.fetch_add(1, Ordering::Relaxed);
        }
        run(fio(&Export::first(socket), seed, directory).arg("--verify_only=1")).unwrap();
        drop(ended);
    }

    /// Waits for whole runs from now on.
    fn wait_runs(&self) {
        // The one that has begun, and then the others.
        let wanted = self.runs.load(Ordering::Relaxed) + 1 + RUNS;
        wait("fio ran", || {
            assert!(!self.is_over.load(Ordering::Relaxed), "fio has failed");
            self.runs.load(Ordering::Relaxed) >= wanted
        });
    }
}

struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn fio(export: &Export, seed: u64, directory: &Path) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=home", "--ioengine=nbd", &format!("--uri={}", export.uri())])
        .args(["--rw=randwrite", "--bs=16k", "--iodepth=8", &format!("--size={HOME_MIB}M")])
        .args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"])
        .arg(format!("--randseed={seed}"))
        .current_dir(directory);
    fio
}

fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn wait_waiting(captured: &Captured) {
    wait("the agent says that it waits", || !status(&captured.target).unwrap()["waiting"].is_null());
}

/// All is home, and only what fio wrote is not the snapshot's.
fn finish(captured: &Captured, mut live: LiveRestore) {
    run(e2e::lifeboot::lifeboot(["limit"]).unwrap().arg(&captured.target).arg("0")).unwrap();
    live.wait_complete().unwrap();
    let said = status(&captured.target).unwrap();
    assert!(said["waiting"].is_null() && said["damaged_bytes"] == 0, "{said}");
    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "{parked}");
    let differing = disk::differing_blocks(&captured.disk, &captured.target).unwrap();
    let wrong = differing.iter().find(|block| **block >= HOME_MIB * MIB / disk::BLOCK_BYTES);
    assert_eq!(wrong, None, "this block differs, and nobody wrote it");
}

/// Some places of the disk's second half that are still in the backup alone.
fn absent(export: &Export) -> Vec<u64> {
    let map = export.map("qemu:allocation-depth").unwrap();
    let absent = map.iter().filter(|extent| extent.flags == 2 && extent.offset > DISK_BYTES / 2);
    let absent: Vec<u64> = absent.map(|extent| extent.offset).take(4).collect();
    assert!(absent.len() > 1, "{map:?}");
    absent
}

/// A restore under fio on what is home: `during` runs beside it, and at the end all is home and whole.
fn under_fio(name: &str, seed: u64, timeout: &str, during: impl FnOnce(&Captured, &LiveRestore, &Writer)) {
    let captured = Captured::new(name, DISK_BYTES, seed).unwrap();
    let live = captured.start(&[&LIMIT[..], &["--source-timeout", timeout]].concat()).unwrap();
    live.export().qemu_io(&[&format!("read 0 {HOME_MIB}M")]).unwrap();
    let (writer, socket) = (Writer::new(), &captured.socket);
    thread::scope(|scope| {
        let writing = scope.spawn(|| writer.write(socket, captured.work.path()));
        let _told = OnDrop(&writer.is_over);
        writer.wait_runs();
        during(&captured, &live, &writer);
        writer.is_over.store(true, Ordering::Relaxed);
        writing.join().unwrap();
    });
    finish(&captured, live);
}

/// What was read of all of the disk differs from it at most where fio writes.
fn ensure_whole(captured: &Captured, copy: &Path) {
    let differing = disk::differing_blocks(&captured.disk, copy).unwrap();
    assert!(differing.iter().all(|block| *block < HOME_MIB * MIB / disk::BLOCK_BYTES), "{differing:?}");
}

#[test]
fn a_short_outage_is_waited_for_while_fio_goes_on_with_what_is_home() {
    under_fio("outage-short", 51, "1h", |captured, _, writer| {
        // It reads all of the disk, and finds it whole, however long that takes.
        let copy = captured.work.file("copy.raw");
        let away = Away::take(captured);
        thread::scope(|scope| {
            let reader = scope.spawn(|| Export::first(&captured.socket).convert_to(&copy));
            wait_waiting(captured);
            writer.wait_runs();
            assert!(!reader.is_finished(), "it read what was not there");
            let before = status(&captured.target).unwrap();
            away.put_back();
            reader.join().unwrap().unwrap();
            // The background goes on by itself.
            wait("the background went on", || {
                status(&captured.target).unwrap()["home_bytes"].as_u64() > before["home_bytes"].as_u64()
            });
        });
        ensure_whole(captured, &copy);
    });
}

#[test]
fn a_long_outage_fails_reads_of_what_is_absent_alone_and_everything_goes_on_after_it() {
    under_fio("outage-long", 52, "500ms", |captured, live, writer| {
        let away = Away::take(captured);
        let absent = absent(&live.export());
        // A write of whole blocks needs no source, one of part of a block does.
        let script = format!(
            "import errno\n\
             def fails(what):\n\
             \x20   try:\n        what()\n        assert False, 'it did not fail'\n\
             \x20   except nbd.Error as error:\n        assert error.errnum == errno.EIO, error\n\
             for at in {absent:?}:\n\
             \x20   fails(lambda: h.pread(4096, at))\n\
             fails(lambda: h.pwrite(b'x' * 512, {first}))\n\
             h.pread(65536, 0)\n\
             h.flush()\n",
            first = absent[0],
        );
        live.export().nbdsh("", &script).unwrap();
        wait_waiting(captured);
        writer.wait_runs();
        away.put_back();
        // A guest that asks again is served, at the latest when the agent has looked again.
        let copy = captured.work.file("copy.raw");
        wait("what was refused can be read", || Export::first(&captured.socket).convert_to(&copy).is_ok());
        ensure_whole(captured, &copy);
    });
}
