//! Several disks in one live-restore, under clients that others wrote.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::path::PathBuf;
use std::process::Command;

use e2e::disk;
use e2e::lifeboot::{Repository, lifeboot, status};
use e2e::nbd::Export;
use e2e::process::{Process, run};
use e2e::work_dir::WorkDir;
use serde_json::Value;

const DISK_BYTES: u64 = 32 << 20;

/// Two disks, captured as the group `vm`, and places for their targets.
struct TwoDisks {
    work: WorkDir,
    repository: Repository,
    socket: PathBuf,
}

impl TwoDisks {
    fn new(name: &str) -> Self {
        let work = WorkDir::new(name).unwrap();
        let repository = Repository::init(work.file("repository")).unwrap();
        let mut capture = repository.verb("capture", &["-q", "vm"]).unwrap();
        for (seed, disk) in ["root", "data"].into_iter().enumerate() {
            let path = work.file(&format!("{disk}.raw"));
            disk::make(&path, DISK_BYTES, 31 + seed as u64).unwrap();
            capture.arg(format!("{disk}={}", path.display()));
        }
        run(&mut capture).unwrap();
        let socket = work.socket("live");
        Self { work, repository, socket }
    }

    fn target(&self, disk: &str) -> PathBuf {
        self.work.file(&format!("target-{disk}.raw"))
    }

    fn start(&self, further: &[&str]) -> Process {
        let mut command = self.repository.verb("live-restore", &["--json", "vm@latest"]).unwrap();
        command.arg(self.target("root")).arg(self.target("data"));
        command.arg("--listen").arg(format!("unix:{}", self.socket.display())).args(further);
        let mut process = Process::spawn(&command).unwrap();
        process.wait_for("its event `ready`", |line| event(line, "ready")).unwrap();
        process
    }

    fn export(&self, name: &str) -> Export {
        Export::new(&self.socket, name)
    }
}

fn event(line: &str, name: &str) -> Option<Value> {
    let value: Value = serde_json::from_str(line).ok()?;
    (value["event"] == name).then_some(value)
}

#[test]
fn what_guests_wrote_to_each_of_several_disks_is_there_after_a_kill_and_comes_home_with_the_rest() {
    let disks = TwoDisks::new("several");
    let mut agent = disks.start(&["--limit", "4KiB"]);
    let names = run(Command::new("nbdinfo").arg("--list").arg(disks.export("").uri())).unwrap();
    assert!(names.contains("root") && names.contains("data"), "{names}");
    // The empty name is the first one.
    disks.export("").qemu_io(&["write -P 0xb1 1M 2M"]).unwrap();
    disks.export("data").qemu_io(&["write -P 0xb2 5M 2M", "flush", "write -P 0xb3 0 64k"]).unwrap();
    disks.export("root").qemu_io(&["read -P 0xb1 1M 2M"]).unwrap();
    for (disk, written) in [("root", 2 << 20), ("data", (2 << 20) + (64 << 10))] {
        assert_eq!(status(&disks.target(disk)).unwrap()["guest_bytes"], written, "{disk}");
    }
    // What the guest wrote is seen on the strip of its disk: cells of 512 KiB.
    let watched = watch_once(&disks.target("root"));
    assert_eq!(watched["disks"][0]["strip"].as_str().unwrap()[2..6], *"wwww", "{watched}");
    assert_eq!(watched["disks"][1]["strip"].as_str().unwrap()[10..14], *"wwww", "{watched}");
    agent.kill().unwrap();

    let mut agent = disks.start(&[]);
    disks.export("root").qemu_io(&["read -P 0xb1 1M 2M"]).unwrap();
    disks.export("data").qemu_io(&["read -P 0xb2 5M 2M", "read -P 0xb3 0 64k"]).unwrap();
    agent.wait_for("its event `complete`", |line| event(line, "complete")).unwrap();
    assert!(agent.terminate().unwrap().success());
    for (disk, blocks) in [("root", 512), ("data", 512 + 16)] {
        let (was, is) = (disks.work.file(&format!("{disk}.raw")), disks.target(disk));
        let differing = disk::differing_blocks(&was, &is).unwrap();
        assert!(differing.len() <= blocks, "{disk}: {}", differing.len());
        let written = |block: u64| match disk {
            "root" => (256..768).contains(&block),
            _ => block < 16 || (1280..1792).contains(&block),
        };
        assert!(differing.iter().all(|block| written(*block)), "{disk}: {differing:?}");
    }
}

/// The first document of `status --watch`.
fn watch_once(target: &std::path::Path) -> Value {
    let mut watch = lifeboot(["status", "--watch", "--json"]).unwrap();
    let mut process = Process::spawn(watch.arg(target)).unwrap();
    let seen = process.wait_for("a document", |line| serde_json::from_str(line).ok()).unwrap();
    process.kill().unwrap();
    seen
}
