//! Captures whose source is an NBD export, of our servers and of those that others wrote.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::{Repository, serve_raw};
use e2e::nbd::Export;
use e2e::process::{Process, run, run_any, run_json};
use e2e::work_dir::WorkDir;
use rustix::process::Signal;
use serde_json::Value;

/// So much that several connections are worth it.
const DISK_BYTES: u64 = 192 << 20;
const SMALL_BYTES: u64 = 24 << 20;

struct Setting {
    work: WorkDir,
    repository: Repository,
    disk: PathBuf,
    servers: Cell<u32>,
}

fn setting(name: &str, disk_bytes: u64) -> Setting {
    let work = WorkDir::new(name).unwrap();
    let disk = work.file("disk.raw");
    disk::make(&disk, disk_bytes, 77).unwrap();
    let repository = Repository::init(work.file("repository")).unwrap();
    Setting { work, repository, disk, servers: Cell::new(0) }
}

impl Setting {
    fn capture(&self, uri: &str) -> Value {
        run_json(self.repository.verb("capture", &["--json", "vm", uri]).as_mut().unwrap()).unwrap()
    }

    /// Captures the export at this URI, and demands that the snapshot holds the disk.
    fn captures(&self, uri: &str) -> Value {
        let report = self.capture(uri);
        assert_eq!(report["disks"][0]["source"], uri);
        let restored = self.work.file("restored.raw");
        self.repository.restore("vm@latest", &restored).unwrap();
        disk::ensure_same(&self.disk, &restored).unwrap();
        fs::remove_file(restored).unwrap();
        report
    }

    /// What a capture says that must fail and leave nothing behind.
    fn fails(&self, arguments: &[&str]) -> String {
        let output =
            run_any(self.repository.verb("capture", &["-q", "vm"]).unwrap().args(arguments)).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        self.has_no_snapshot();
        said
    }

    fn has_no_snapshot(&self) {
        let list = run_json(&mut self.repository.verb("snapshots", &["--json"]).unwrap()).unwrap();
        assert_eq!(list.as_array().map(Vec::len), Some(0), "{list}");
        self.repository.verify().unwrap();
    }

    /// A server of others that listens at a unix socket, and its URI. `arguments` are those of the program, given the socket.
    fn serve(&self, program: &str, arguments: impl FnOnce(&str) -> Vec<String>) -> (Process, String) {
        let number = self.servers.replace(self.servers.get() + 1);
        let socket = self.work.socket(&format!("s{number}"));
        let mut command = Command::new(program);
        command.args(arguments(socket.to_str().unwrap()));
        let mut process = Process::spawn(&command).unwrap();
        while !listens(&socket) {
            assert!(process.is_running(), "{command:?}: {:?}", process.lines());
            std::thread::yield_now();
        }
        (process, Export::first(&socket).uri())
    }

    fn nbdkit(&self, words: &[&str]) -> (Process, String) {
        self.serve("nbdkit", |socket| {
            ["-f", "-U", socket].iter().chain(words).map(|&word| word.to_owned()).collect()
        })
    }

    /// nbdkit with a disk whose `pread` is this script, called with the count as `$3` and the offset as `$4`.
    fn scripted(&self, pread: &str, further: &[&str]) -> (Process, String) {
        let size = format!("get_size=echo {}", fs::metadata(&self.disk).unwrap().len());
        let pread = format!("pread={pread}");
        self.nbdkit(&[&["eval", &size, &pread], further].concat())
    }

    /// The shell's way to what is asked for.
    fn dd(&self) -> String {
        format!("dd if={} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none", self.disk.display())
    }
}

/// Whether somebody listens at the unix socket; without a connection, which some servers end with.
fn listens(socket: &Path) -> bool {
    let path = socket.to_str().unwrap();
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    // The fourth field has the flag of a listening socket.
    sockets.lines().any(|line| line.ends_with(path) && line.split(' ').nth(3) == Some("00010000"))
}

fn bytes_read(log: &Path) -> u64 {
    let log = fs::read_to_string(log).unwrap();
    let counts = log.lines().filter(|line| line.contains(" Read id=")).filter_map(|line| {
        let count = line.split_once("count=0x")?.1.split(' ').next()?;
        u64::from_str_radix(count, 16).ok()
    });
    counts.sum()
}

#[test]
fn our_servers_export_is_captured_over_a_socket_and_tcp() {
    let setting = setting("source-ours", DISK_BYTES);
    let socket = setting.work.socket("s");
    let mut server = serve_raw(&setting.disk, &socket, &["--listen", "tcp:127.0.0.1:0"]).unwrap();
    let report = setting.captures(&Export::first(&socket).uri());
    assert_eq!(report["consistency"], "crash");
    assert_eq!(report["disks"][0]["size_bytes"], DISK_BYTES);
    let tcp = server.wait_for("its TCP address", |line| {
        line.split(' ').find(|word| word.starts_with("nbd://")).map(str::to_owned)
    });
    // Everything is there already.
    let report = setting.captures(&tcp.unwrap());
    assert_eq!(report["disks"][0]["new_bytes"], 0);
}

#[test]
fn an_export_and_a_file_become_one_snapshot_under_their_names() {
    let setting = setting("source-named", SMALL_BYTES);
    let (_server, uri) = setting.nbdkit(&["file", setting.disk.to_str().unwrap()]);
    let (root, data) = (format!("root={uri}"), format!("data={}", setting.disk.display()));
    run(&mut setting.repository.verb("capture", &["-q", "vm", &root, &data]).unwrap()).unwrap();
    for name in ["root", "data"] {
        let restored = setting.work.file(name);
        setting.repository.restore(&format!("vm@latest/{name}"), &restored).unwrap();
        disk::ensure_same(&setting.disk, &restored).unwrap();
    }
}

#[test]
fn qemu_nbds_exports_are_captured_and_it_may_end_with_its_only_client() {
    let setting = setting("source-qemu", DISK_BYTES);
    let image = setting.work.file("disk.qcow2");
    run(Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(&setting.disk)
        .arg(&image))
    .unwrap();
    for (format, file) in [("raw", &setting.disk), ("qcow2", &image)] {
        // As people call it: one client, and then it ends.
        let (mut server, uri) = setting.serve("qemu-nbd", |socket| {
            ["-r", "-f", format, "-k", socket, file.to_str().unwrap()].map(str::to_owned).to_vec()
        });
        setting.captures(&uri);
        server.wait_success().unwrap();
    }
    let (_server, uri) = setting.serve("qemu-nbd", |socket| {
        ["-t", "-e", "8", "-f", "qcow2", "-k", socket, image.to_str().unwrap()].map(str::to_owned).to_vec()
    });
    setting.captures(&uri);
}

#[test]
fn an_image_file_behind_an_export_is_no_disk_unless_it_is_meant() {
    let setting = setting("source-image", SMALL_BYTES);
    let image = setting.work.file("disk.qcow2");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64M")).unwrap();
    let (_server, uri) = setting.nbdkit(&["file", image.to_str().unwrap()]);
    let said = setting.fails(&[&uri]);
    assert!(said.contains("qcow2 data") && said.contains("qemu-nbd --read-only --format=qcow2"), "{said}");
    run(&mut setting.repository.verb("capture", &["-q", "--as-raw", "vm", &uri]).unwrap()).unwrap();
}

#[test]
fn other_servers_exports_are_captured_whatever_they_can() {
    let setting = setting("source-others", SMALL_BYTES);
    let disk = setting.disk.to_str().unwrap();
    for words in [
        &["file", disk][..],
        // Of one client and one request at a time; without block status; without structured replies.
        &["--filter=noparallel", "--filter=noextents", "file", disk, "serialize=connections"],
        &["--no-sr", "file", disk],
        // In blocks of 64 KiB and no other, as large as that and no larger.
        &[
            "--filter=blocksize-policy",
            "file",
            disk,
            "blocksize-minimum=64K",
            "blocksize-preferred=64K",
            "blocksize-maximum=64K",
            "blocksize-error-policy=error",
        ],
    ] {
        let (_server, uri) = setting.nbdkit(words);
        setting.captures(&uri);
    }
    let (_server, uri) = setting.serve("nbd-server", |socket| {
        let config = setting.work.file("nbd-server.conf");
        let text = format!(
            "[generic]\nunixsock = {socket}\nallowlist = true\n[disk]\nexportname = {disk}\nreadonly = true\n"
        );
        fs::write(&config, text).unwrap();
        ["-d", "-C", config.to_str().unwrap()].map(str::to_owned).to_vec()
    });
    setting.captures(&uri.replace("///?", "///disk?"));
}

#[test]
fn holes_are_not_read_and_what_only_has_no_room_is() {
    let setting = setting("source-holes", SMALL_BYTES);
    let log = setting.work.file("log");
    let log_file = format!("logfile={}", log.display());
    // Half a MiB in a terabyte.
    let data = ["--filter=log", "data", "@0x8000000000 ( 0x5a 0xa5 )*262144", "size=1T", &log_file];
    let (_server, uri) = setting.nbdkit(&data);
    let report = setting.capture(&uri);
    assert_eq!(report["disks"][0]["size_bytes"], 1_u64 << 40);
    let read = bytes_read(&log);
    assert!(((512 << 10)..(4 << 20)).contains(&read), "{read} bytes were read");
    let socket = setting.work.socket("served");
    let _serving = setting.repository.serve(&["vm@latest"], &socket).unwrap();
    let export = Export::first(&socket);
    let around = "assert h.pread(1 << 20, (1 << 39) - (1 << 19)) == bytes(1 << 19) + b'\\x5a\\xa5' * (1 << 18)\n\
                  assert h.pread(1 << 19, (1 << 39) + (1 << 19)) == bytes(1 << 19)";
    export.nbdsh("", around).unwrap();

    // Nothing is told without structured replies.
    let (_server, uri) = setting.nbdkit(&["--no-sr", "memory", "1M"]);
    let said = run(&mut setting.repository.verb("capture", &["zeroes", &uri]).unwrap()).unwrap();
    assert!(said.contains(&format!("all of {uri} is read")) && said.contains("does not tell"), "{said}");

    // A thin volume that says "nothing is allocated" and reads as something all the same.
    let extents = format!("extents=echo 0 {SMALL_BYTES} hole");
    let (_server, uri) = setting.scripted(&setting.dd(), &["can_extents=exit 0", &extents]);
    setting.captures(&uri);
}

#[test]
fn a_size_that_is_no_whole_number_of_blocks_is_captured_or_refused_at_once() {
    let setting = setting("source-odd", SMALL_BYTES);
    let odd = setting.work.file("odd.raw");
    fs::copy(&setting.disk, &odd).unwrap();
    fs::File::options().write(true).open(&odd).unwrap().set_len(SMALL_BYTES - 1000).unwrap();
    let serve = |policy: &str| {
        setting.nbdkit(&[
            "--filter=blocksize-policy",
            "file",
            odd.to_str().unwrap(),
            "blocksize-minimum=4096",
            &format!("blocksize-error-policy={policy}"),
        ])
    };
    let (server, uri) = serve("error");
    let said = setting.fails(&[&uri]);
    assert!(said.contains("25164824 bytes") && said.contains("blocks of 4096"), "{said}");
    drop(server);
    let (_server, uri) = serve("allow");
    setting.capture(&uri);
    let restored = setting.work.file("restored.raw");
    setting.repository.restore("vm@latest", &restored).unwrap();
    assert!(fs::read(&odd).unwrap() == fs::read(&restored).unwrap());
}

#[test]
fn a_live_restores_export_is_captured_while_most_is_still_to_come() {
    let captured = Captured::new("source-live", SMALL_BYTES, 7).unwrap();
    let live = captured.start(&["--limit", "1MiB"]).unwrap();
    let export = live.export();
    export.qemu_io(&["write -P 0x61 5M 1M", "write -z 9M 64k"]).unwrap();
    let uri = export.uri();
    run(&mut captured.repository.verb("capture", &["-q", "copy", &uri]).unwrap()).unwrap();
    let restored = captured.work.file("restored.raw");
    captured.repository.restore("copy@latest", &restored).unwrap();
    assert!(!disk::differing_blocks(&captured.disk, &restored).unwrap().is_empty());
    export.ensure_same(&restored).unwrap();
}

#[test]
fn what_is_not_there_is_said_before_anything_is_read() {
    let setting = setting("source-absent", SMALL_BYTES);
    let nowhere = format!("nbd+unix:///?socket={}", setting.work.socket("nobody").display());
    let said = setting.fails(&[&nowhere]);
    assert!(said.contains("cannot connect to unix:") && said.contains("nobody"), "{said}");

    let (_server, uri) = setting.serve("qemu-nbd", |socket| {
        ["-t", "-r", "-f", "raw", "-x", "disk", "-k", socket, setting.disk.to_str().unwrap()]
            .map(str::to_owned)
            .to_vec()
    });
    let said = setting.fails(&[&uri.replace("///?", "///dusk?")]);
    assert!(said.contains("///dusk?") && said.contains("does not have this export"), "{said}");
    setting.captures(&uri.replace("///?", "///disk?"));

    let (_server, uri) = setting.nbdkit(&["memory", "0"]);
    let output = run_any(&mut setting.repository.verb("capture", &["vm", &uri]).unwrap()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("is empty") && output.status.code() == Some(1), "{said}");

    let output = run_any(&mut setting.repository.verb("capture", &["vm", "nbd+unix:///x"]).unwrap()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("socket is missing") && output.status.code() == Some(2), "{said}");
}

#[test]
fn a_failure_in_the_middle_is_named_with_its_place_and_leaves_nothing() {
    let setting = setting("source-failing", SMALL_BYTES);
    let dd = setting.dd();
    let at = 16 << 20;
    let worn = format!("if [ $(($4 + $3)) -gt {at} ]; then echo EIO worn out >&2; exit 1; fi; {dd}");
    let (_server, uri) = setting.scripted(&worn, &[]);
    let said = setting.fails(&[&uri]);
    assert!(said.contains("cannot read bytes 16777216..18874368 of disk0"), "{said}");
    assert!(said.contains(&uri) && said.contains("at byte 16777216: input/output error"), "{said}");

    let dies = format!("if [ $(($4 + $3)) -gt {at} ]; then kill -9 $PPID; fi; {dd}");
    let (_server, uri) = setting.scripted(&dies, &[]);
    let said = setting.fails(&[&uri]);
    assert!(said.contains("cannot read bytes ") && said.contains(&uri), "{said}");
    assert!(said.contains("hung up") || said.contains("connection failed"), "{said}");
}

#[test]
fn ctrl_c_ends_a_capture_whose_server_says_nothing() {
    let setting = setting("source-mute", SMALL_BYTES);
    let asked = setting.work.file("asked");
    let (dd, mark) = (setting.dd(), asked.display());
    let mute = format!(
        "if [ $4 -ge {} ]; then touch {mark}; while kill -0 $PPID; do sleep 0.1; done; fi; {dd}",
        16 << 20
    );
    let (_server, uri) = setting.scripted(&mute, &[]);
    let mut capture = Process::spawn(&setting.repository.verb("capture", &["vm", &uri]).unwrap()).unwrap();
    while !asked.exists() {
        assert!(capture.is_running(), "{:?}", capture.lines());
        std::thread::yield_now();
    }
    capture.signal(Signal::INT).unwrap();
    assert_eq!(capture.wait().unwrap().code(), Some(130), "{:?}", capture.lines());
    setting.has_no_snapshot();
}
