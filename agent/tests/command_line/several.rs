//! Several disks in one live-restore.

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{MIB, Scratch, assert_same};

const SLOW: &[&str] = &["--limit", "40"];

/// A repository with a snapshot of two disks, `root` and `data`.
fn two_disks() -> Scratch {
    let scratch = Scratch::new();
    scratch.disk("root.raw", 8 * MIB, &[(0, 3 << 20, 1)]);
    scratch.disk("data.raw", 16 * MIB, &[(MIB, 5 << 20, 2)]);
    scratch.run(&["capture", "db", "root=root.raw", "data=data.raw"]).ends_with(0);
    scratch
}

/// A live-restore that runs, and its events.
struct Live {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    ready: Value,
}

impl Live {
    fn start(scratch: &Scratch, args: &[&str]) -> Self {
        let args = [&["live-restore", "db@latest"], args, &["--listen", "unix:s", "--json"]].concat();
        let mut child = scratch.command(&args).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = next(&mut lines, "ready");
        Self { child, lines, ready }
    }

    fn next(&mut self, event: &str) -> Value {
        next(&mut self.lines, event)
    }

    fn end(mut self) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        self.child.wait().unwrap().code()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn next(lines: &mut Lines<BufReader<ChildStdout>>, event: &str) -> Value {
    let mut events = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    events.find(|value| value["event"] == event).unwrap_or_else(|| panic!("it ended without {event}"))
}

fn names(disks: &Value) -> Vec<&str> {
    disks.as_array().unwrap().iter().map(|disk| disk["disk"].as_str().unwrap()).collect()
}

#[test]
fn all_disks_come_home_by_one_command_each_to_its_target() {
    let scratch = two_disks();
    let listen = ["--listen", "unix:s", "--exit-when-done", "--json"];
    // By their names, in whatever order.
    let args = [&["live-restore", "db@latest", "data=d.raw", "root=r.raw"], &listen[..]].concat();
    let ran = scratch.run(&args).ends_with(0);
    assert_same(&scratch.path("root.raw"), &scratch.path("r.raw"));
    assert_same(&scratch.path("data.raw"), &scratch.path("d.raw"));
    let events: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ready = &events[0];
    assert_eq!(ready["event"], "ready");
    assert_eq!(names(&ready["disks"]), ["root", "data"], "the snapshot's order");
    let qemu: Vec<&str> = ready["qemu"].as_array().unwrap().iter().map(|one| one.as_str().unwrap()).collect();
    for (index, disk) in ["root", "data"].iter().enumerate() {
        assert!(ready["disks"][index]["uris"][0].as_str().unwrap().contains(disk), "{ready}");
        assert!(qemu.iter().any(|one| one.contains(&format!("export={disk}@1,"))), "{qemu:?}");
        assert!(qemu.contains(&format!("virtio-blk-pci,drive=lifeboot{index}").as_str()), "{qemu:?}");
    }
    let of = |name: &str| events.iter().filter(|event| event["event"] == name).collect::<Vec<_>>();
    assert_eq!(of("disk_complete").len(), 2);
    let complete = of("complete");
    assert_eq!(complete.len(), 1);
    for disk in complete[0]["disks"].as_array().unwrap() {
        assert_eq!(disk["phase"], "complete");
        assert_eq!(disk["home_bytes"], disk["size"]);
        assert!(disk["report"]["fetched_bytes"].as_u64().unwrap() >= 3 << 20, "each has its own: {disk}");
    }
    assert_eq!(scratch.json(&["status", "d.raw"])["phase"], "complete");
    // By their order, and once more without the repository.
    std::fs::rename(scratch.path("repo"), scratch.path("gone")).unwrap();
    let args = [&["live-restore", "db@latest", "r.raw", "d.raw"], &listen[..]].concat();
    scratch.run(&args).ends_with(0);
}

#[test]
fn each_disk_has_its_session_and_any_of_them_answers_for_all() {
    let scratch = two_disks();
    let mut live = Live::start(&scratch, &[&["r.raw", "d.raw"], SLOW].concat());
    assert_eq!(live.ready["disks"][0]["resumed"], false);
    let progress = live.next("progress");
    assert_eq!(names(&progress["disks"]), ["root", "data"]);
    for (target, disk) in [("r.raw", "root"), ("d.raw", "data")] {
        let status = scratch.json(&["status", target]);
        assert_eq!((status["disk"].as_str(), status["phase"].as_str()), (Some(disk), Some("running")));
        assert_eq!(status["pid"], live.child.id());
        assert_eq!(status["limit"], 40);
    }
    // One limit for both, by whichever.
    let changed = scratch.json(&["limit", "d.raw", "64GiB"]);
    assert_eq!((changed["old"].as_u64(), changed["new"].as_u64()), (Some(40), Some(64 << 30)));
    let complete = live.next("complete");
    assert_eq!(names(&complete["disks"]), ["root", "data"]);
    assert_eq!(live.end(), Some(0));
    assert_same(&scratch.path("root.raw"), &scratch.path("r.raw"));
    assert_same(&scratch.path("data.raw"), &scratch.path("d.raw"));
    for target in ["r.raw", "d.raw"] {
        assert_eq!(scratch.json(&["status", target])["phase"], "complete");
    }
}

#[test]
fn a_set_goes_on_after_a_kill_with_the_snapshot_that_it_was_begun_with() {
    let scratch = two_disks();
    let first = scratch.json(&["snapshots"])[0]["snapshot"].as_str().unwrap().to_owned();
    let args = [&["r.raw", "d.raw"], SLOW].concat();
    Live::start(&scratch, &args).kill();
    scratch.disk("root.raw", 8 * MIB, &[(0, 3 << 20, 7)]);
    scratch.run(&["capture", "db", "root=root.raw", "data=data.raw"]).ends_with(0);
    // As a start leaves it that was killed between the two.
    std::fs::remove_dir_all(scratch.path("d.raw.lifeboot")).unwrap();
    std::fs::remove_file(scratch.path("d.raw")).unwrap();
    let mut live = Live::start(&scratch, &args);
    let disks = live.ready["disks"].clone();
    assert_eq!((&disks[0]["resumed"], &disks[1]["resumed"]), (&Value::Bool(true), &Value::Bool(false)));
    assert_eq!(disks[1]["snapshot"].as_str(), Some(first.as_str()), "not the newest");
    kill_process(Pid::from_child(&live.child), Signal::TERM).unwrap();
    let parked = live.next("parked");
    assert_eq!(parked["disks"][0]["report"]["restarts"], 1, "{parked}");
    assert_eq!(parked["disks"][1]["report"]["restarts"], 0);
    assert_eq!(live.child.wait().unwrap().code(), Some(0));
    // Both were parked.
    let live = Live::start(&scratch, &args);
    assert_eq!(live.ready["disks"][1]["resumed"], true);
    live.kill();
    // A session of another snapshot does not go with them.
    let newest = scratch.json(&["snapshots"]).as_array().unwrap().len();
    assert_eq!(newest, 2);
    std::fs::remove_dir_all(scratch.path("d.raw.lifeboot")).unwrap();
    std::fs::remove_file(scratch.path("d.raw")).unwrap();
    let one = ["live-restore", "db@latest/data", "d.raw", "--listen", "unix:s", "--exit-when-done"];
    scratch.run(&one).ends_with(0);
    let set = ["live-restore", "db@latest", "r.raw", "d.raw", "--listen", "unix:s"];
    scratch.run(&set).fails(&["r.raw", "d.raw", &first, "by a command of its own"]);
}

#[test]
fn a_start_that_fails_for_one_disk_makes_nothing_for_any() {
    let scratch = two_disks();
    let before = scratch.names(".");
    let refused = |targets: &[&str], words: &[&str]| {
        let args = [&["live-restore", "db@latest"], targets, &["--listen", "unix:s"]].concat();
        scratch.run(&args).fails(words);
        assert_eq!(scratch.names("."), before);
    };
    // The second one holds data: the first one was made by then.
    refused(&["r.raw", "data.raw"], &["data.raw", "holds data already"]);
    refused(&["r.raw"], &["has 2 disks: root, data", "name a TARGET for each"]);
    refused(&["a", "b", "c"], &["has 2 disks: root, data; 3 targets were named", "DISK=TARGET"]);
    refused(&["root=a", "swap=b"], &["has no disk swap", "root, data"]);
    let misused = |targets: &[&str], word: &str| {
        let args = [&["live-restore", "db@latest"], targets, &["--listen", "unix:s"]].concat();
        scratch.run(&args).ends_with(2).tells(&[word]);
        assert_eq!(scratch.names("."), before);
    };
    misused(&["root=a", "b"], "name all of them, or none");
    misused(&["root=a", "root=b"], "two targets were named for the disk root");
    misused(&["a", "./a"], "named twice");
    misused(&["root=", "data=b"], "DISK=TARGET");
    let args = ["live-restore", "db@latest/root", "a", "b", "--listen", "unix:s"];
    scratch.run(&args).ends_with(2).tells(&["is one disk"]);
    // A name that has a slash before the = is a path.
    let args = ["live-restore", "db@latest", "./root=a", "./b", "--listen", "unix:s", "--exit-when-done"];
    scratch.run(&args).ends_with(0);
    assert_same(&scratch.path("root.raw"), &scratch.path("root=a"));
}

#[test]
fn sessions_that_were_resumed_for_a_start_that_fails_are_parked_again() {
    let scratch = two_disks();
    let args = [&["r.raw", "d.raw"], SLOW].concat();
    assert_eq!(Live::start(&scratch, &args).end(), Some(0));
    let journal = scratch.path("d.raw.lifeboot/journal");
    let whole = std::fs::read(&journal).unwrap();
    std::fs::write(&journal, vec![0; whole.len()]).unwrap();
    let set = ["live-restore", "db@latest", "r.raw", "d.raw", "--listen", "unix:s"];
    scratch.run(&set).fails(&["d.raw.lifeboot", "does not begin as one does"]);
    std::fs::write(&journal, &whole).unwrap();
    let args = ["live-restore", "db@latest", "r.raw", "d.raw", "--listen", "unix:s", "--exit-when-done"];
    let ran = scratch.run(&args).ends_with(0);
    assert_eq!(ran.stdout.matches("going on where it was parked").count(), 2, "{ran:?}");
    assert!(ran.stdout.contains("complete: all 2 disks are home"), "{ran:?}");
    assert!(ran.stdout.contains("/root was served for") && ran.stdout.contains("next: "), "{ran:?}");
}

#[test]
fn damage_of_one_disk_settles_the_set_and_is_named() {
    let scratch = two_disks();
    let pack = scratch.pack();
    // What both disks have lies in one pack: its end is the second disk's.
    let mut bytes = std::fs::read(&pack).unwrap();
    let at = bytes.len() * 3 / 4;
    bytes[at] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let args =
        ["live-restore", "db@latest", "r.raw", "d.raw", "--listen", "unix:s", "--exit-when-done", "--json"];
    let ran = scratch.run(&args).ends_with(3);
    let last: Value = serde_json::from_str(ran.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "settled", "{last}");
    assert_eq!(last["disks"][0]["damaged_bytes"], 0);
    assert!(last["disks"][1]["damaged_bytes"].as_u64().unwrap() > 0, "{last}");
    assert!(last["disks"][1]["report"]["next"].as_str().unwrap().contains("damaged"), "{last}");
    assert!(ran.stderr.contains("/data"), "{ran:?}");
    assert_same(&scratch.path("root.raw"), &scratch.path("r.raw"));
}

#[test]
fn a_disk_is_named_before_its_target_where_there_is_one_disk_too() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    scratch.run(&["capture", "db", "root=d.raw", "data=d.raw"]).ends_with(0);
    let listen = ["--listen", "unix:s", "--exit-when-done"];
    let verbs = [&["restore"][..], &["live-restore"]];
    for verb in verbs {
        let further = if verb == ["restore"] { &[][..] } else { &listen };
        let bring =
            |snapshot: &str, target: &str| scratch.run(&[verb, &[snapshot, target], further].concat());
        let named = format!("{}.raw", verb[0]);
        for (snapshot, target) in [
            ("web01@latest", format!("disk0={named}")),
            ("web01@latest/disk0", format!("disk0={named}")),
            ("db@latest/data", format!("data={named}")),
            ("web01@latest", format!("./diks0={named}")),
            ("web01@latest", scratch.path(&format!("diks0={named}")).display().to_string()),
        ] {
            bring(snapshot, &target).ends_with(0);
            let path = scratch
                .path(target.strip_prefix("disk0=").or(target.strip_prefix("data=")).unwrap_or(&target));
            assert_same(&path, &disk);
            std::fs::remove_file(&path).unwrap();
            let _ = std::fs::remove_dir_all(format!("{}.lifeboot", path.display()));
        }
        let before = scratch.names(".");
        for (snapshot, target, disks) in [
            ("web01@latest", "diks0=o.raw", "it has disk0"),
            ("web01@latest/disk0", "diks0=o.raw", "it has disk0"),
            ("db@latest/data", "root=o.raw", "it has data"),
        ] {
            bring(snapshot, target).fails(&["has no disk", disks, "before the =; or write ./NAME"]);
        }
        bring("web01@latest", "=o.raw").ends_with(2);
        assert_eq!(scratch.names("."), before);
    }
    scratch.run(&["restore", "db@latest", "data=o.raw"]).ends_with(0);
    // Whoever names one of two may have forgotten the other.
    let live = [&["live-restore", "db@latest", "data=l.raw"][..], &listen].concat();
    scratch.run(&live).fails(&["has 2 disks: root, data", "as in SNAPSHOT/DISK"]);
}

#[test]
fn no_request_is_to_take_no_time() {
    let scratch = Scratch::empty();
    let live = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--guest-p99"];
    for zero in ["0", "0s", "0ms"] {
        scratch.run(&[&live[..], &[zero]].concat()).ends_with(2).tells_of("leave it out");
    }
}
