//! `lifeboot boot`: a machine of two disks from its backup, onto its own disks, as its operator sees it.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use e2e::disk;
use e2e::guest::{self, GuestImage};
use e2e::lifeboot::{Repository, lifeboot, status};
use e2e::machine::{Machine, arguments};
use e2e::process::run_any;
use e2e::small_guest::make_initrd;
use e2e::work_dir::WorkDir;
use serde_json::Value;

const DATA_BYTES: u64 = 48 << 20;

struct Backup {
    work: WorkDir,
    repository: Repository,
    image: GuestImage,
    data: PathBuf,
}

impl Backup {
    /// Of a machine with these disks.
    fn new(name: &str, has_root: bool) -> Self {
        let image = GuestImage::prepare().unwrap();
        let work = WorkDir::new(name).unwrap();
        let data = work.file("data.raw");
        disk::make(&data, DATA_BYTES, 21).unwrap();
        let repository = Repository::init(work.file("repository")).unwrap();
        let mut capture = repository.verb("capture", &["-q", "vm"]).unwrap();
        if has_root {
            capture.arg(format!("root={}", image.disk().display()));
        }
        e2e::process::run(capture.arg(format!("data={}", data.display()))).unwrap();
        Self { work, repository, image, data }
    }

    fn boot(&self, targets: &[String], further: &[&str], qemu: &[std::ffi::OsString]) -> Command {
        let mut boot = self.repository.verb("boot", &["--json", "vm@latest"]).unwrap();
        // Nobody else's sockets.
        boot.env("XDG_RUNTIME_DIR", self.work.socket("any").parent().unwrap());
        // A test that fails leaves no machine behind.
        let tied = self.work.file("tied-qemu");
        std::fs::write(&tied, "#!/bin/sh\nexec setpriv --pdeathsig KILL qemu-system-x86_64 \"$@\"\n")
            .unwrap();
        std::fs::set_permissions(&tied, std::fs::Permissions::from_mode(0o755)).unwrap();
        if !further.contains(&"--qemu") {
            boot.arg("--qemu").arg(tied);
        }
        boot.args(targets).args(further).arg("--").args(qemu);
        boot
    }

    fn target(&self, name: &str) -> (PathBuf, String) {
        let path = self.work.file(&format!("{name}-target.raw"));
        let argument = format!("{name}={}", path.display());
        (path, argument)
    }
}

fn event(line: &str, name: &str) -> Option<Value> {
    let value: Value = serde_json::from_str(line).ok()?;
    (value["event"] == name).then_some(value)
}

fn wait_event(machine: &mut Machine, name: &str) -> Value {
    machine.process().wait_for(name, |line| event(line, name)).unwrap()
}

#[test]
fn a_machine_of_two_disks_boots_from_its_backup_and_runs_from_its_own_disks_at_last() {
    let backup = Backup::new("boot-two", true);
    let (root, root_argument) = backup.target("root");
    let (data, data_argument) = backup.target("data");
    let append = "root=/dev/vda ro console=ttyS0 net.ifnames=0 panic=-1";
    let qemu = arguments(&backup.image, &backup.image.initrd(), append, &[], backup.work.path());
    let boot = backup.boot(&[root_argument, data_argument], &[], &qemu);
    let mut machine = Machine::run_qemu(&boot, backup.work.path()).unwrap();
    machine.wait_ready().unwrap();
    // Both in the snapshot's order, and the guest writes to both, all through the moves.
    assert_eq!(machine.run("blockdev --getsize64 /dev/vdb").unwrap().trim(), DATA_BYTES.to_string());
    machine
        .run("dd if=/dev/urandom of=/root/kept bs=1M count=16 status=none; dd if=/root/kept of=/dev/vdb bs=1M oflag=direct status=none; sync")
        .unwrap();
    let sums = machine.run("sha256sum < /root/kept").unwrap();
    // Events may have come before or meanwhile.
    while machine.process().lines().iter().filter(|line| event(line, "handed_over").is_some()).count() < 2 {
        machine.run("echo waiting").unwrap();
    }
    machine.run("echo 3 > /proc/sys/vm/drop_caches; echo after > /root/after; sync").unwrap();
    assert_eq!(machine.run("sha256sum < /root/kept").unwrap(), sums);
    assert_eq!(
        machine.run("dd if=/dev/vdb bs=1M count=16 iflag=direct status=none | sha256sum").unwrap(),
        sums
    );
    assert_eq!(
        machine.run("dmesg | grep -ciE 'i/o error|ext4-fs error|corrupt' || true").unwrap().trim(),
        "0"
    );
    machine.power_off().unwrap();
    guest::ensure_sound(&root).unwrap();
    assert_eq!(guest::read_file(&root, "/root/after").unwrap(), b"after\n");
    let kept = guest::read_file(&root, "/root/kept").unwrap();
    assert_eq!(kept.len(), 16 << 20);
    let bytes = std::fs::read(&data).unwrap();
    assert!(bytes[..16 << 20] == kept[..], "what was written to the second disk");
    assert!(bytes[16 << 20..] == std::fs::read(&backup.data).unwrap()[16 << 20..], "what was not");
}

#[test]
fn a_machine_that_powers_off_early_leaves_a_session_that_the_same_command_goes_on_with() {
    let backup = Backup::new("boot-early", false);
    let data = backup.work.file("data-target.raw");
    let argument = [data.display().to_string()];
    let initrd = backup.work.file("initrd");
    make_initrd(&backup.image, &initrd).unwrap();
    let qemu =
        arguments(&backup.image, &initrd, "rdinit=/init console=ttyS0 panic=-1", &[], backup.work.path());

    // What cannot be started leaves nothing behind.
    let output = run_any(&mut backup.boot(&argument, &["--qemu", "/no/such/qemu"], &qemu)).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot start QEMU"), "{output:?}");
    assert!(!data.exists());
    let output = run_any(&mut backup.boot(&argument, &[], &["-daemonize".into()])).unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");

    let slow = backup.boot(&argument, &["--limit", "4KiB"], &qemu);
    let mut machine = Machine::run_qemu(&slow, backup.work.path()).unwrap();
    machine.wait_ready().unwrap();
    machine.run("echo hello > /dev/vda; sync").unwrap();
    assert_eq!(status(&data).unwrap()["phase"], "running");
    machine.process().write_line("0 echo o > /proc/sysrq-trigger").unwrap();
    let ended = wait_event(&mut machine, "ended");
    machine.process().wait_success().unwrap();
    assert_eq!(ended["code"], 0, "{ended}");
    assert_eq!(status(&data).unwrap()["phase"], "stopped");

    let again = backup.boot(&argument, &["--shutdown-timeout", "1s"], &qemu);
    let mut machine = Machine::run_qemu(&again, backup.work.path()).unwrap();
    wait_event(&mut machine, "handed_over");
    // Nothing of ours keeps the disk any more: its session is given up while the machine runs from it.
    let said = loop {
        let output = run_any(lifeboot(["discard", "--yes"]).unwrap().arg(&data)).unwrap();
        if output.status.success() {
            break String::from_utf8_lossy(&output.stdout).into_owned();
        }
        let refused = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(refused.contains("is served by the agent"), "only until it has let go: {refused}");
    };
    assert!(said.contains("nothing is lost"), "{said}");
    // The guest has no ACPI button's listener: it is told to quit.
    machine.process().signal(rustix::process::Signal::TERM).unwrap();
    machine.process().wait_success().unwrap();
    ensure_hello(&data, &backup.data);
}

/// The disk is as it was captured, but for a greeting.
fn ensure_hello(target: &Path, captured: &Path) {
    let (bytes, expected) = (std::fs::read(target).unwrap(), std::fs::read(captured).unwrap());
    assert_eq!(&bytes[..6], b"hello\n");
    assert!(bytes[6..] == expected[6..]);
}

#[test]
fn a_ctrl_c_at_the_terminal_is_ours_and_asking_again_ends_the_machine_sooner() {
    let backup = Backup::new("boot-ctrl-c", false);
    let data = backup.work.file("data-target.raw");
    // A guest that would power down only when it is asked by one who is not here.
    let qemu = ["-m", "64", "-display", "none", "-serial", "stdio", "-S"].map(std::ffi::OsString::from);
    let boot = backup.boot(&[data.display().to_string()], &["--limit", "4KiB"], &qemu);
    // In front of a terminal of its own, as it were.
    let mut command = Command::new("setsid");
    command.arg(boot.get_program()).args(boot.get_args());
    command.envs(boot.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut machine = Machine::run_qemu(&command, backup.work.path()).unwrap();
    let started = wait_event(&mut machine, "started");
    let group = i32::try_from(machine.process().id()).unwrap();
    let group_of = |pid: &Value| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(2).unwrap().to_owned()
    };
    assert_ne!(group_of(&started["pid"]), group.to_string(), "what reaches our group does not reach QEMU");
    let ctrl_c = || {
        let group = rustix::process::Pid::from_raw(group).unwrap();
        rustix::process::kill_process_group(group, rustix::process::Signal::INT).unwrap();
    };
    ctrl_c();
    // Signals close to each other are one wish.
    let told = |line: &str| line.contains("asked once more: QEMU is told to quit").then_some(());
    let mut said = None;
    while said.is_none() {
        ctrl_c();
        said = machine.process().wait_for_within(Duration::from_millis(300), "it was told", told).unwrap();
    }
    let ended = wait_event(&mut machine, "ended");
    assert_eq!(ended["code"], 0, "{ended}");
    machine.process().wait_success().unwrap();
    assert_eq!(status(&data).unwrap()["phase"], "stopped");
}

/// QEMU as it runs for nobody: without a guest, and not tied to whoever started it.
const BARE: [&str; 8] = ["-m", "64", "-display", "none", "-serial", "null", "-S", "-nodefaults"];

/// Ends a QEMU that has lost its parent.
struct Orphan(rustix::process::Pid);

impl Drop for Orphan {
    fn drop(&mut self) {
        // It may have ended.
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::KILL);
    }
}

#[test]
fn the_command_that_a_second_boot_prints_goes_on_with_the_machine_of_one_that_was_killed() {
    let backup = Backup::new("boot-killed", false);
    let (data, state) = (backup.work.file("data target.raw"), backup.work.file("a state"));
    let boot = |further: &[&str]| {
        let further =
            [&["--qemu", "qemu-system-x86_64", "--state", state.to_str().unwrap()], further].concat();
        backup.boot(&[data.display().to_string()], &further, &BARE.map(std::ffi::OsString::from))
    };
    let mut machine = Machine::run_qemu(&boot(&["--limit", "4KiB"]), backup.work.path()).unwrap();
    let started = wait_event(&mut machine, "started");
    let pid = rustix::process::Pid::from_raw(i32::try_from(started["pid"].as_u64().unwrap()).unwrap());
    let _orphan = Orphan(pid.unwrap());
    // QEMU listens before it has opened its disks, and greets once it has: killed in between, it would end.
    let machines = backup.work.socket("any").parent().unwrap().join("lifeboot");
    let monitors = || std::fs::read_dir(&machines).unwrap().map(|dir| dir.unwrap().path().join("end.sock"));
    let greets = |monitor: PathBuf| {
        let greeted = UnixStream::connect(monitor).and_then(|mut qmp| qmp.read(&mut [0; 1]));
        greeted.is_ok_and(|len| len == 1)
    };
    while !monitors().any(greets) {
        assert!(machine.process().is_running(), "{:?}", machine.process().lines());
    }
    machine.process().kill().unwrap();

    let again = run_any(&mut boot(&[])).unwrap();
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    let line = said.split('`').find(|part| part.starts_with("lifeboot live-restore ")).unwrap();
    let program = lifeboot::<&str>([]).unwrap().get_program().to_owned();
    let line = line.replacen("lifeboot", program.to_str().unwrap(), 1);
    let told = e2e::process::run(Command::new("sh").args(["-c", &line]).current_dir("/")).unwrap();
    assert!(told.contains("handed over: the machine runs from"), "{told}");
    assert!(std::fs::read(&data).unwrap() == std::fs::read(&backup.data).unwrap());
}

#[test]
fn a_machine_whose_disk_is_home_already_is_moved_as_soon_as_its_qemu_can_be_asked() {
    let backup = Backup::new("boot-home", false);
    let data = backup.work.file("data-target.raw");
    let mut live = backup.repository.verb("live-restore", &["vm@latest"]).unwrap();
    live.arg(&data).arg("--listen").arg(format!("unix:{}", backup.work.socket("s").display()));
    e2e::process::run(live.arg("--exit-when-done")).unwrap();
    // A machine on which everything takes its time.
    let slow = backup.work.file("slow-qemu");
    let tied = "exec setpriv --pdeathsig KILL qemu-system-x86_64";
    let script = format!("#!/bin/sh\ncase $* in *lifeboot-move*) sleep 1;; esac\n{tied} \"$@\"\n");
    std::fs::write(&slow, script).unwrap();
    std::fs::set_permissions(&slow, std::fs::Permissions::from_mode(0o755)).unwrap();
    let further = ["--qemu", slow.to_str().unwrap()];
    let boot = backup.boot(&[data.display().to_string()], &further, &BARE.map(std::ffi::OsString::from));
    let mut machine = Machine::run_qemu(&boot, backup.work.path()).unwrap();
    wait_event(&mut machine, "handed_over");
    let lines = machine.process().lines();
    assert!(!lines.iter().any(|line| line.contains("was not moved")), "{lines:?}");
}
