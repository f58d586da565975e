//! A process is killed with direct writes in flight on its ring. Its lock must hold until the last of them has
//! ended, so that a successor that has the lock never sees one land after a write of its own.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]

#[allow(dead_code, reason = "only the loop device is wanted here")]
#[path = "contract/disks.rs"]
mod disks;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;

use block::{
    AlignedBuf, ByteRange, DirectIo, Durability, Engine, FileDisk, FileOptions, IoEngine, OpenDevice,
    ZeroMode,
};
use rustix::fs::FlockOperation;

const PIECE: usize = 256 << 10;
const PIECES: u64 = 1024;
const ROUNDS: u8 = 3;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [verb, path] = arguments.as_slice()
        && verb == "write-until-killed"
    {
        return write_until_killed(Path::new(path));
    }
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    if has("--list") {
        // What a test runner asks of a test without the standard harness.
        if !has("--ignored") {
            println!("a_successor_of_a_killed_agent_sees_no_late_write: test");
        }
        return;
    }
    if let Err(error) = Engine::choose(IoEngine::Uring) {
        println!("killed: not tested here: {error}");
        return;
    }
    let size = PIECES * PIECE as u64;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = FileDisk::create(directory.path().join("disk"), size, options()).unwrap();
    let looped = disks::LoopDevice::attach(size);
    let device = looped.as_ref().map(|looped| FileDisk::open(looped.path(), options()).unwrap());
    for disk in device.iter().chain([&file]) {
        let path = disk.path().to_owned();
        let cut_off: u64 = (1..=ROUNDS).map(|round| successor_sees_no_late_write(&path, round)).sum();
        println!(
            "killed: {}: {cut_off} of {} writes were cut off",
            path.display(),
            u64::from(ROUNDS) * PIECES
        );
        assert!(cut_off > 0, "no kill came while writes were in flight: the test shows nothing");
    }
    println!("killed: ok");
}

fn options() -> FileOptions {
    FileOptions::new(Engine::choose(IoEngine::Uring).unwrap()).direct(DirectIo::On)
}

/// The child: takes the lock, says so, and writes its mark everywhere, all at once.
fn write_until_killed(path: &Path) {
    let options = options();
    let disk = FileDisk::open(path, options).unwrap();
    assert!(disk.try_lock().unwrap());
    options.engine.run(async {
        let device = disk.open().unwrap();
        let mut mark = AlignedBuf::zeroed(PIECE);
        mark.fill(0xff);
        let writers: Vec<_> = (0..PIECES)
            .map(|number| {
                let (device, buf) = (Rc::clone(&device), AlignedBuf::from_slice(&mark));
                tokio::task::spawn_local(async move {
                    device.write(number * PIECE as u64, buf, Durability::Volatile).await.0.unwrap();
                    // From here on writes end, and most are in flight.
                    println!("{number}");
                })
            })
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
        std::future::pending::<()>().await;
    });
}

/// Kills a child in the midst of its writes and takes its place. Returns how many of them never happened.
fn successor_sees_no_late_write(path: &Path, round: u8) -> u64 {
    let disk = FileDisk::open(path, options()).unwrap();
    let all = ByteRange::from_bounds(0, disk.size());
    disk.write_zeroes_blocking(all, ZeroMode::ALLOCATE, Durability::Stable).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg("write-until-killed")
        .arg(disk.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_first_write(&mut child);
    assert!(!disk.try_lock().unwrap(), "the child has the lock");
    child.kill().unwrap();
    // Not waited for: the lock alone says when it is over.
    let killed = std::time::Instant::now();
    rustix::fs::flock(&disk, FlockOperation::LockExclusive).unwrap();
    println!("killed: the lock came {:?} after the kill", killed.elapsed());
    if disk.is_block_device() {
        let name = path.file_name().unwrap().to_str().unwrap();
        let in_flight = std::fs::read_to_string(format!("/sys/block/{name}/inflight")).unwrap();
        let writes = in_flight.split_whitespace().nth(1);
        assert_eq!(writes, Some("0"), "writes of the killed process are still in flight");
    }
    let mut cut_off = 0;
    for number in 0..PIECES {
        let at = number * PIECE as u64;
        let (result, mut buf) = disk.read_blocking(at, AlignedBuf::zeroed(PIECE));
        result.unwrap();
        cut_off += u64::from(buf.iter().any(|&byte| byte != 0xff));
        buf.fill(round);
        disk.write_blocking(at, buf, Durability::Volatile).0.unwrap();
    }
    child.wait().unwrap();
    disk.flush_blocking().unwrap();
    for number in 0..PIECES {
        let (result, buf) = disk.read_blocking(number * PIECE as u64, AlignedBuf::zeroed(PIECE));
        result.unwrap();
        assert!(
            buf.iter().all(|&byte| byte == round),
            "a write of the killed process landed in piece {number}"
        );
    }
    cut_off
}

fn wait_for_first_write(child: &mut Child) {
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    assert!(output.read_line(&mut line).unwrap() > 0, "the child ended early");
    // Kept open, so that the child never dies of anything but the kill.
    std::mem::forget(output);
}
