//! Moving a running machine home: fio writes and verifies inside a guest while its drive is moved from our export onto the
//! target, and what is on the target afterwards is what fio wrote.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::path::Path;
use std::process::Command;

use e2e::captured::Captured;
use e2e::guest::GuestImage;
use e2e::lifeboot::{LiveRestore, lifeboot, status, status_with};
use e2e::machine::{Machine, Running};
use e2e::process::{run, run_any};
use e2e::small_guest::make_initrd;
use e2e::work_dir::LoopDevice;
use serde_json::Value;

const DISK_BYTES: u64 = 96 << 20;
/// Each block once, in random order, some at a time; slowly enough to go on for a while, then all of it read and verified.
const FIO: &str = "fio --name=verify --direct=1 --ioengine=psync --numjobs=1 --rw=randwrite --bs=16k --size=96M \
                   --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed=7 --rate_iops=700 --fsync=64 --output-format=terse";

fn captured(name: &str) -> (Captured, GuestImage, std::path::PathBuf) {
    let image = GuestImage::prepare().unwrap();
    let captured = Captured::new(name, DISK_BYTES, 3).unwrap();
    let initrd = captured.work.file("initrd");
    make_initrd(&image, &initrd).unwrap();
    (captured, image, initrd)
}

fn monitor(socket: &Path) -> Vec<String> {
    vec!["-qmp".to_owned(), format!("unix:{},server=on,wait=off", socket.display())]
}

/// Has the guest write, and returns when it does.
fn begin_fio(machine: &mut Machine, captured: &Captured, in_state: &[&str]) -> Running {
    let running = machine.begin(&format!("{FIO} --filename=/dev/vda")).unwrap();
    while status_with(&captured.target, in_state).unwrap()["guest_bytes"] == 0 {
        assert!(machine.process().is_running(), "{:?}", machine.process().lines());
    }
    running
}

/// fio has written and verified everything, QEMU has ended, and the target holds it.
fn finish(mut machine: Machine, running: Running, captured: &Captured) {
    machine.finish(running).unwrap();
    assert_eq!(machine.run("dmesg | grep -ci 'i/o error' || true").unwrap().trim(), "0");
    let by_export = machine.written_blocks().unwrap().len();
    assert!(by_export > 0, "nothing was written before the move");
    assert!(by_export < (DISK_BYTES / 4096) as usize, "nothing was written after the move");
    machine.process().write_line("0 echo o > /proc/sysrq-trigger").unwrap();
    machine.process().wait_success().unwrap();
    let mut fio = Command::new("sh");
    fio.arg("-c").arg(format!("{FIO} --rate_iops=0 --verify_only --filename=\"$0\"")).arg(&captured.target);
    run(&mut fio).unwrap();
}

fn pivot(captured: &Captured, socket: &Path, further: &[&str]) -> Command {
    let mut command = lifeboot(["pivot", "--json"]).unwrap();
    command.arg(&captured.target).arg("--qmp").arg(socket).args(further);
    command
}

fn handed_over(live: &mut LiveRestore) -> Value {
    live.process()
        .wait_for("its event `handed_over`", |line| {
            let value: Value = serde_json::from_str(line).ok()?;
            (value["event"] == "handed_over").then_some(value)
        })
        .unwrap()
}

#[test]
fn fio_in_a_guest_verifies_across_the_move_by_reopening() {
    let (captured, image, initrd) = captured("pivot-reopen");
    let qmp = captured.work.socket("qmp");
    // As one would use it: with --qmp from the start. Held back, so that the guest is up before all is home.
    let mut live = captured.start(&["--limit", "256KiB", "--qmp", qmp.to_str().unwrap()]).unwrap();
    let further = [live.qemu_arguments().unwrap(), monitor(&qmp)].concat();
    let mut machine = Machine::start_small(&image, &initrd, &further, captured.work.path()).unwrap();
    machine.wait_ready().unwrap();
    let running = begin_fio(&mut machine, &captured, &[]);
    run(lifeboot(["limit"]).unwrap().arg(&captured.target).arg("0")).unwrap();
    live.wait_complete().unwrap();
    let told = handed_over(&mut live);
    assert_eq!(told["node"], "lifeboot", "{told}");
    live.process().wait_success().unwrap();
    let said = refused(&captured, &[]);
    assert!(said.contains("a machine runs from") && !said.contains("start the machine"), "{said}");
    finish(machine, running, &captured);

    // The session is over, and says so.
    let said = refused(&captured, &[]);
    assert!(said.contains("a disk of its own"), "{said}");
    assert_eq!(status(&captured.target).unwrap()["handed_over"], true);
    let said = run(lifeboot(["status"]).unwrap().arg(&captured.target)).unwrap();
    assert!(said.contains("handed over: a running machine was moved onto the target"), "{said}");
}

#[test]
fn fio_in_a_guest_verifies_across_the_move_onto_a_block_device() {
    let (mut captured, image, initrd) = captured("pivot-device");
    let (file, state) = (captured.work.file("device.img"), captured.work.file("state"));
    std::fs::File::create(&file).unwrap().set_len(DISK_BYTES).unwrap();
    let device = LoopDevice::attach(&file).unwrap();
    captured.target = device.path().to_owned();
    let qmp = captured.work.socket("qmp");
    let in_state = ["--state", state.to_str().unwrap()];
    let with_qmp = ["--limit", "256KiB", "--qmp", qmp.to_str().unwrap()];
    let mut live = captured.start(&[&in_state[..], &with_qmp].concat()).unwrap();
    let further = [live.qemu_arguments().unwrap(), monitor(&qmp)].concat();
    let mut machine = Machine::start_small(&image, &initrd, &further, captured.work.path()).unwrap();
    machine.wait_ready().unwrap();
    let running = begin_fio(&mut machine, &captured, &in_state);
    run(lifeboot(["limit"]).unwrap().args(in_state).arg(&captured.target).arg("0")).unwrap();
    live.wait_complete().unwrap();
    handed_over(&mut live);
    live.process().wait_success().unwrap();
    finish(machine, running, &captured);
}

#[test]
fn fio_in_a_guest_verifies_across_the_move_of_a_drive_that_qemu_named_by_itself() {
    let (captured, image, initrd) = captured("pivot-replace");
    let qmp = captured.work.socket("qmp");
    let mut live = captured.start(&[]).unwrap();
    live.wait_complete().unwrap();
    let drive = format!("file={},format=raw,if=none,id=d0", live.export().uri());
    let further = [
        vec!["-drive".to_owned(), drive],
        monitor(&qmp),
        vec!["-device".into(), "virtio-blk-pci,drive=d0".into()],
    ];
    let mut machine = Machine::start_small(&image, &initrd, &further.concat(), captured.work.path()).unwrap();
    machine.wait_ready().unwrap();

    // What cannot be done changes nothing.
    for (socket, device, words) in [
        (captured.work.socket("none"), "d0", "cannot connect to QEMU's monitor"),
        (captured.socket.clone(), "d0", "is not QEMU's monitor"),
        (qmp.clone(), "d1", "no drive, device or node called"),
    ] {
        let output = run_any(&mut pivot(&captured, &socket, &["--device", device])).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(words), "{said}");
    }
    // A monitor talks to one at a time.
    let taken = std::os::unix::net::UnixStream::connect(&qmp).unwrap();
    let output = run_any(&mut pivot(&captured, &qmp, &[])).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not answer"), "{output:?}");
    drop(taken);

    let running = begin_fio(&mut machine, &captured, &[]);
    let told = run(&mut pivot(&captured, &qmp, &["--device", "d0"])).unwrap();
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["target"], captured.target.to_str().unwrap(), "{told}");
    live.process().wait_success().unwrap();
    finish(machine, running, &captured);
}

#[test]
fn an_agent_killed_around_the_move_leaves_a_guest_that_fio_finds_whole() {
    let (captured, image, initrd) = captured("pivot-kill");
    let qmp = captured.work.socket("qmp");
    let with_qmp = ["--qmp", qmp.to_str().unwrap()];
    let mut live = captured.start(&["--limit", "256KiB"]).unwrap();
    let further = [live.qemu_arguments().unwrap(), monitor(&qmp)].concat();
    let mut machine = Machine::start_small(&image, &initrd, &further, captured.work.path()).unwrap();
    machine.wait_ready().unwrap();
    let running = begin_fio(&mut machine, &captured, &[]);
    live = live.kill().unwrap().start_with(&with_qmp).unwrap();
    live.wait_complete().unwrap();
    // Somewhere in the move, or before, or after it: whichever it is, the same command ends well.
    let stopped = live.kill().unwrap();
    // As when it died between its mark and the move, if it did not die later.
    let record = captured.work.file("target.raw.lifeboot/session.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace("\"handed_over\": false", "\"handed_over\": true")).unwrap();
    let said = refused(&captured, &[]);
    assert!(said.contains("--qmp SOCKET"), "it says how to go on: {said}");
    let output = run_any(&mut stopped.command().unwrap()).unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(said.contains("\"handed_over\""), "{said}");
    finish(machine, running, &captured);
}

/// Starts a live-restore that must fail; returns what it said.
fn refused(captured: &Captured, further: &[&str]) -> String {
    let mut command = captured.repository.verb("live-restore", &["vm@latest"]).unwrap();
    command
        .arg(&captured.target)
        .arg("--listen")
        .arg(format!("unix:{}", captured.socket.display()))
        .args(further);
    let output = run_any(&mut command).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}
