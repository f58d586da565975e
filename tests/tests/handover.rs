//! One process takes the place of another, under clients that connect again by themselves: they notice a pause, and no error.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use e2e::captured::Captured;
use e2e::disk;
use e2e::guest::GuestImage;
use e2e::lifeboot::serve_raw;
use e2e::machine::Machine;
use e2e::nbd::Export;
use e2e::process::{PATIENCE, Process, run_any};
use e2e::programs::ours;
use e2e::small_guest::make_initrd;
use e2e::work_dir::WorkDir;

const MIB: u64 = 1 << 20;
const ROUNDS: u64 = 4;

#[test]
fn a_guest_notices_nothing_when_one_agent_after_another_takes_its_place() {
    let image = GuestImage::prepare().unwrap();
    let captured = Captured::new("take-over", 64 * MIB, 81).unwrap();
    let initrd = captured.work.file("initrd");
    make_initrd(&image, &initrd).unwrap();
    // Slow enough that the background copies in every round.
    let mut live = captured.start(&["--limit", "4MiB"]).unwrap();
    let mut machine =
        Machine::start_small(&image, &initrd, &live.qemu_arguments().unwrap(), captured.work.path()).unwrap();
    machine.wait_ready().unwrap();
    // No end but the last round's: it goes over its part again and again, and verifies what it reads.
    let fio = |further: &str| {
        format!(
            "fio --name=take-over --direct=1 --ioengine=psync --rw=randwrite --bs=16k --size=32M --verify=crc32c \
             --verify_fatal=1 --verify_state_save=0 --randseed=1 --fsync=64 --output-format=terse --filename=/dev/vda {further}"
        )
    };
    let running = machine.begin(&fio("--rate_iops=200 --verify_backlog=64")).unwrap();
    let mut slowest = Duration::ZERO;
    for round in 0..ROUNDS {
        let wanted = machine.requests().unwrap() + 100;
        let deadline = Instant::now() + PATIENCE;
        while machine.requests().unwrap() < wanted {
            assert!(Instant::now() < deadline, "the guest is stuck in round {round}");
            assert!(!machine.has_ended(&running), "fio was done by round {round}");
            thread::sleep(Duration::from_millis(2));
        }
        live = live.take_over().unwrap();
        slowest = slowest.max(live.start_time());
        assert_eq!(live.ready()["resumed"], true);
    }
    machine.finish(running).unwrap();
    println!("{ROUNDS} take-overs, the slowest {} ms from its start to ready", slowest.as_millis());
    machine.run(&fio("--verify_only=1")).unwrap();
    assert_eq!(machine.run("dmesg | grep -ci 'i/o error' || true").unwrap().trim(), "0");
    machine.process().write_line("0 echo o > /proc/sysrq-trigger").unwrap();
    machine.process().wait_success().unwrap();
    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "parking ended with {parked}");
}

#[test]
fn who_cannot_take_over_leaves_the_agent_as_it_was() {
    let captured = Captured::new("refused-heir", 16 * MIB, 82).unwrap();
    let live = captured.start(&["--no-background"]).unwrap();
    // First of all: what is wholly home needs no repository.
    let (repository, away) = (captured.repository.path(), captured.work.file("away"));
    std::fs::rename(repository, &away).unwrap();
    let output = run_any(&mut live.command_with(&["--take-over"]).unwrap()).unwrap();
    std::fs::rename(&away, repository).unwrap();
    assert!(!output.status.success(), "without the repository");
    let fails = |further: &[&str], word: &str| {
        let output = run_any(&mut live.command_with(further).unwrap()).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(word), "{further:?}: {said}");
        live.export().ensure_same(&captured.disk).unwrap();
    };
    fails(&["--take-over", "--listen", "tcp:127.0.0.1:0"], "listens at");
    fails(&[], "in use");
    // One that leaves when it has the sockets already.
    let state = format!("{}.lifeboot", captured.target.display());
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(Path::new(&state).join("session.json")).unwrap()).unwrap();
    let ask = |sessions: serde_json::Value| {
        let request = serde_json::json!({"request": "take_over", "sessions": sessions});
        let mut line = String::new();
        // Whoever hears nothing asks again: the conversation before has not ended yet.
        while line.is_empty() {
            let mut stream = UnixStream::connect(Path::new(&state).join("control.sock")).unwrap();
            writeln!(stream, "{request}").unwrap();
            BufReader::new(stream).read_line(&mut line).unwrap();
        }
        line
    };
    assert!(ask(serde_json::json!([])).contains("other disks"));
    assert!(ask(serde_json::json!([record["session"]])).contains(r#""reply":"done""#));
    live.export().ensure_same(&captured.disk).unwrap();
    let live = live.take_over().unwrap();
    live.export().ensure_same(&captured.disk).unwrap();
    let (_, parked) = live.park().unwrap();
    assert!(parked.success());
}

#[test]
fn an_agent_that_parks_already_is_waited_for() {
    let captured = Captured::new("parking", 16 * MIB, 85).unwrap();
    // A miss is in flight, so that it takes a while to end.
    let mut live = captured.start(&["--no-background", "--source-delay", "700ms"]).unwrap();
    live.export().qemu_io(&["write -P 0x66 1M 64k"]).unwrap();
    for _ in 0..3 {
        let mut reader = Process::spawn(
            Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read 8M 64k"]).arg(live.export().uri()),
        )
        .unwrap();
        live = live.take_over_while_it_parks().unwrap();
        reader.kill().unwrap();
    }
    live.export().qemu_io(&["read -P 0x66 1M 64k"]).unwrap();
    let (_, parked) = live.park().unwrap();
    assert!(parked.success());
}

#[test]
fn of_two_that_take_over_at_once_the_last_one_serves_and_all_end_well() {
    let captured = Captured::new("two-heirs", 16 * MIB, 86).unwrap();
    let mut live = captured.start(&["--no-background"]).unwrap();
    live.export().qemu_io(&["write -P 0x67 1M 64k"]).unwrap();
    let mut heirs = [(), ()].map(|()| Process::spawn(&live.command_with(&["--take-over"]).unwrap()).unwrap());
    live.process().wait_success().unwrap();
    let begun = Instant::now();
    let first = loop {
        if let Some(ended) = heirs.iter_mut().position(|heir| !heir.is_running()) {
            break ended;
        }
        assert!(begun.elapsed() < PATIENCE, "both go on");
        thread::sleep(Duration::from_millis(10));
    };
    heirs[first].wait_success().unwrap();
    let said = heirs[first].lines();
    assert!(said.iter().any(|line| line.contains(r#""event":"taken_over""#)), "{said:?}");
    let last = &mut heirs[1 - first];
    last.wait_for_text(r#""event":"ready""#).unwrap();
    live.export().qemu_io(&["read -P 0x67 1M 64k"]).unwrap();
    assert!(last.terminate().unwrap().success());
}

#[test]
fn without_an_agent_there_is_nothing_to_take_over() {
    let captured = Captured::new("no-agent", 16 * MIB, 83).unwrap();
    let live = captured.start(&["--take-over"]).unwrap();
    let live = live.kill().unwrap().start_again().unwrap();
    live.export().ensure_same(&captured.disk).unwrap();
    let (_, parked) = live.park().unwrap();
    assert!(parked.success());
}

/// Has others end when it is dropped, also where a test fails.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn qemu_notices_nothing_when_one_server_of_a_file_after_another_takes_its_place() {
    let work = WorkDir::new("handover").unwrap();
    let (disk, socket, meeting) = (work.file("disk.raw"), work.socket("nbd"), work.socket("meet"));
    disk::make(&disk, 32 * MIB, 84).unwrap();
    let meet = format!("--handover={}", meeting.display());
    let mut server = serve_raw(&disk, &socket, &[&meet]).unwrap();
    let mut qemu_io = Command::new("qemu-io");
    let image = format!("driver=nbd,server.type=unix,server.path={},reconnect-delay=60", socket.display());
    let mut client = Process::spawn(qemu_io.args(["--image-opts", &image])).unwrap();
    // Who is still shaking hands at a hand-over is cut off, and qemu-io does not try again.
    client.write_line("write -P 0 0 64k").unwrap();
    client.wait_for_text("wrote 65536/65536 bytes").unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let ending = Ending(&over);
        let connecting = scope.spawn(|| {
            let mut count = 0;
            while !over.load(Ordering::Relaxed) {
                UnixStream::connect(&socket).expect("nobody is refused");
                count += 1;
                thread::sleep(Duration::from_millis(1));
            }
            count
        });
        for round in 1..=8_u64 {
            // In the midst of these.
            for at in 0..64 {
                client.write_line(&format!("write -P {round} {} 64k", at * 128 * 1024)).unwrap();
            }
            let mut heir = serve_raw(&disk, &socket, &[&meet]).unwrap();
            server.wait_success().unwrap();
            heir.skip_output();
            server = heir;
            for at in 0..64 {
                client.write_line(&format!("read -P {round} {} 64k", at * 128 * 1024)).unwrap();
            }
        }
        client.write_line("quit").unwrap();
        client.wait_success().unwrap();
        drop(ending);
        assert!(connecting.join().unwrap() > 0);
    });
    let said = client.lines().join("\n").to_lowercase();
    assert!(!said.contains("failed") && !said.contains("error"), "qemu-io: {said}");
    assert_eq!(said.matches("read 65536/65536 bytes").count(), 8 * 64, "{said}");

    // Another file, and another name of the export, are no successors; this one goes on.
    let other = work.file("other.raw");
    disk::make(&other, 32 * MIB, 85).unwrap();
    let listen = format!("--listen=unix:{}", socket.display());
    for (disk, further, word) in [
        (&other, "--verbose", "it serves"),
        (&disk, "--name=other", "it serves"),
        (&disk, "--read-only", "it serves"),
        (&disk, "--listen=tcp:127.0.0.1:0", "listens at"),
    ] {
        let mut command = ours("lifeboot-nbd").unwrap();
        let output = run_any(command.arg(disk).args([&meet, &listen, further])).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(word), "{further}: {said}");
    }
    Export::first(&socket).ensure_same(&disk).unwrap();
    assert!(server.terminate().unwrap().success());
    assert!(!socket.exists() && !meeting.exists(), "the last one takes the files away");
}
