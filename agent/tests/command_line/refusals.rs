//! What bad input gets: a clear word, an exit code, and nothing lost.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};

use crate::support::{MIB, Ran, Scratch, is_root, write};

fn with_snapshot() -> Scratch {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 2 * MIB, &[(0, 100_000, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    scratch
}

#[test]
fn wrong_usage_ends_with_2() {
    let scratch = Scratch::new();
    let mut without = scratch.command(&["snapshots"]);
    let output = without.env_remove("LIFEBOOT_REPO").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--repo"));
    for args in [
        &["frobnicate"][..],
        &["capture", "web01"],
        &["capture", "web 01", "d.raw"],
        &["capture", "web01", "a=x", "a=y"],
        &["capture", "web01", "d.raw", "--chunk-size", "100KiB"],
        &["capture", "web01", "d.raw", "--chunk-size", "8MiB"],
        &["capture", "web01", "s3://bucket/disk"],
        &["capture", "web01", "nbd+unix:///disk"],
        &["capture", "web01", "nbd://host/disk?socket=s"],
        &["capture", "web01", "d.raw", "--io-engine", "magic"],
        &["capture", "web01", "d.raw", "--level", "99"],
        &["capture", "web01", "d.raw", "--attach", "vm.xml", "--attach", "old/vm.xml"],
        &["capture", "web01", "d.raw", "--attach", "v m.xml"],
        &["capture", "web01", "d.raw", "--note", &"x".repeat(5000)],
        &["restore", "web01", "out.raw"],
        &["restore", "web01@garbage", "out.raw"],
        &["restore", "web01@latest/a b", "out.raw"],
        &["show", "web01@lates"],
        &["show", "web01@latest", "--attachment", "vm.xml", "--json"],
        &["serve", "web01", "--listen", "unix:s"],
        &["live-restore", "web01@lates", "out.raw", "--listen", "unix:s"],
        &["live-restore", "web01@latest", "out.raw", "--listen", &format!("unix:/{}", "x".repeat(107))],
        &["init", "--chunk-size", "1"],
        &["snapshots", "-r", "s3://bucket/prefix"],
        &["snapshots", "-q", "-v"],
    ] {
        scratch.run(args).ends_with(2);
    }
    scratch.run(&["capture", "web01", "d.raw", "--level", "99"]).tells(&["levels go from -", " to 22"]);
    assert_eq!(scratch.names("."), ["repo"]);
}

#[test]
fn a_repository_that_is_none_is_refused() {
    let scratch = Scratch::empty();
    scratch.disk("d.raw", MIB, &[]);
    std::fs::create_dir(scratch.path("dir")).unwrap();
    for args in [&["snapshots"][..], &["verify"], &["capture", "g", "d.raw"], &["restore", "g@latest", "out"]]
    {
        scratch.run(args).fails(&["no such repository"]);
        let elsewhere = |path| [args, &["-r", path]].concat();
        scratch.run(&elsewhere("dir")).fails(&["dir", "not a repository"]);
        scratch.run(&elsewhere("d.raw")).fails(&["d.raw", "not a repository"]);
    }
    assert_eq!(scratch.names("."), ["d.raw", "dir"]);
}

#[test]
fn a_new_repository_is_offered_to_those_who_write_to_one_and_to_nobody_who_reads() {
    let scratch = Scratch::empty();
    scratch.disk("d.raw", MIB, &[]);
    std::fs::create_dir(scratch.path("mountpoint")).unwrap();
    for place in ["mountpoint", "gone"] {
        scratch.run(&["capture", "g", "d.raw", "-r", place]).fails(&[
            place,
            "whether its file system is mounted",
            "`lifeboot init` makes a new one",
        ]);
        let live = ["live-restore", "g@latest", "t.raw", "--listen", "unix:s"];
        for reads in [&["restore", "g@latest", "out"][..], &["show", "g@latest"], &["snapshots"], &live] {
            let ran = scratch.run(&[reads, &["-r", place]].concat()).fails(&[place, "is mounted"]);
            assert!(!ran.stderr.contains("init"), "{ran:?}");
        }
    }
    scratch.run(&["init"]).ends_with(0);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    let args = ["restore", "g@latest", "out", "--fallback", "gone"];
    let ran = scratch.run(&args).ends_with(0).tells(&["the copy gone", "is mounted"]);
    assert!(!ran.stderr.contains("init"), "{ran:?}");
}

#[test]
fn init_spares_what_is_there() {
    let scratch = Scratch::new();
    scratch.run(&["init"]).fails(&["repository already"]);
    std::fs::create_dir(scratch.path("full")).unwrap();
    write(&scratch.path("full/precious"), b"x");
    scratch.run(&["init", "-r", "full"]).fails(&["precious"]);
    assert_eq!(scratch.names("full"), ["precious"]);
    scratch.run(&["init", "-r", "no/parent"]).fails(&["no/parent", "the directory no does not exist"]);
}

#[test]
fn names_that_do_not_exist_are_answered_with_the_nearest() {
    let scratch = with_snapshot();
    scratch.run(&["snapshots", "web1"]).fails(&["web1", "did you mean web01?"]);
    scratch.run(&["show", "wep01@latest"]).fails(&["did you mean web01?"]);
    scratch
        .run(&["restore", "web01@2001-01-01T00:00:00Z", "o"])
        .fails(&["2001-01-01T00:00:00Z", "did you mean web01@2"]);
    scratch.run(&["restore", "web01@latest/disk1", "o"]).fails(&["disk1", "disk0"]);
    assert_eq!(scratch.names("."), ["d.raw", "repo"]);
}

#[test]
fn what_is_no_snapshots_name_is_answered_with_those_that_may_be_meant() {
    let scratch = with_snapshot();
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    scratch.run(&["capture", "db", "d.raw"]).ends_with(0);
    let listed = scratch.json(&["snapshots", "web01"]);
    let [older, newest] = [0, 1].map(|index: usize| listed[index]["snapshot"].as_str().unwrap().to_owned());
    let offered = format!("did you mean one of web01@latest, {newest}, {older}?");
    for args in [&["show", "web01"][..], &["show", "web01@lates"], &["restore", "web01@garbage", "o"]] {
        let ran = scratch.run(args).ends_with(2).tells(&[&offered]);
        assert!(!ran.stderr.contains("parse"), "{ran:?}");
    }
    scratch.run(&["restore", "web01@newest/disk0", "o"]).ends_with(2).tells(&["web01@latest/disk0"]);
    for name in ["web02", "web02@lates"] {
        let ran = scratch.run(&["show", name]).ends_with(2);
        ran.tells(&["there is no group \"web02\"", "did you mean web01@latest?"]);
    }
    let ran = scratch.run(&["show", "nothing-like-it"]).ends_with(2).tells(&["there is no group"]);
    assert!(!ran.stderr.contains("did you mean"), "{ran:?}");
}

#[test]
fn sources_that_are_no_disks_are_refused() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.path("dir")).unwrap();
    write(&scratch.path("empty.raw"), b"");
    scratch.run(&["capture", "g", "gone.raw"]).fails(&["gone.raw", "No such file"]);
    scratch.run(&["capture", "g", "dir"]).fails(&["dir", "a directory"]);
    scratch.run(&["capture", "g", "/dev/null"]).fails(&["/dev/null", "neither"]);
    scratch.run(&["capture", "g", "empty.raw"]).fails(&["empty.raw", "0 bytes"]);
    scratch.disk("d.raw", MIB, &[]);
    scratch.run(&["capture", "g", "d.raw", "gone.raw"]).fails(&["gone.raw"]);
    scratch.run(&["capture", "g", "d.raw", "--attach", "gone.xml"]).fails(&["gone.xml"]);
    scratch.run(&["capture", "g", "d.raw", "--attach", "dir"]).fails(&["dir", "cannot be attached"]);
    assert_eq!(scratch.json(&["snapshots"]), serde_json::json!([]));
    assert!(scratch.names("repo/tmp").is_empty());
}

#[test]
fn targets_that_cannot_hold_a_disk_are_refused() {
    let scratch = with_snapshot();
    std::fs::create_dir(scratch.path("dir")).unwrap();
    scratch.run(&["restore", "web01@latest", "dir", "--force"]).fails(&["dir", "a directory"]);
    scratch.run(&["restore", "web01@latest", "/dev/null", "--force"]).fails(&["/dev/null", "neither"]);
    let ran = scratch.run(&["restore", "web01@latest", "no/parent.raw"]);
    ran.fails(&["no/parent.raw", "the directory no does not exist"]);
    std::fs::create_dir(scratch.path("live.raw.lifeboot")).unwrap();
    scratch.run(&["restore", "web01@latest", "live.raw"]).fails(&["live.raw", "live-restore"]);
}

#[test]
fn a_scratch_directory_that_is_none_is_refused() {
    let scratch = with_snapshot();
    let serve = |dir| scratch.run(&["serve", "web01@latest", "--listen", "unix:s", "--scratch", dir]);
    serve("gone").fails(&["the scratch directory gone does not exist", "make it"]);
    serve("d.raw").fails(&["d.raw", "not a directory"]);
}

#[test]
fn a_target_in_use_is_refused_even_by_force() {
    let scratch = with_snapshot();
    let path = scratch.disk("out.raw", 2 * MIB, &[(0, 1000, 9)]);
    let before = std::fs::read(&path).unwrap();
    let holder = File::options().read(true).write(true).open(&path).unwrap();
    holder.lock().unwrap();
    scratch.run(&["restore", "web01@latest", "out.raw", "--force"]).fails(&["out.raw", "in use"]);
    holder.unlock().unwrap();
    // A lock of the other kind, as QEMU takes on its images.
    rustix::fs::fcntl_lock(&holder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    scratch.run(&["restore", "web01@latest", "out.raw", "--force"]).fails(&[
        "out.raw",
        "in use",
        "holds a lock",
    ]);
    let live = ["live-restore", "web01@latest", "out.raw", "--force", "--listen", "unix:s"];
    scratch.run(&live).fails(&["out.raw", "in use", "holds a lock"]);
    assert!(!scratch.path("out.raw.lifeboot").exists(), "nothing was begun");
    drop(holder);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    scratch.run(&["restore", "web01@latest", "out.raw", "--force"]).ends_with(0);
}

/// A program of this name that has made and locked `t.raw`, and ends with its stdin.
fn locker(scratch: &Scratch, name: &str) -> Child {
    std::os::unix::fs::symlink("/usr/bin/flock", scratch.path(name)).unwrap();
    let mut child = Command::new(scratch.path(name))
        .args(["t.raw", "sh", "-c", "echo locked; exec cat"])
        .current_dir(scratch.path("."))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "locked\n");
    child
}

#[test]
fn a_target_that_another_lifeboot_has_and_does_not_serve_yet_is_told_as_that() {
    let scratch = with_snapshot();
    let begin = |address: &str| {
        let args = ["live-restore", "web01@latest", "t.raw", "--exit-when-done", "--listen", address];
        scratch.run(&args)
    };
    let end = |mut locker: Child| {
        drop(locker.stdin.take());
        assert!(locker.wait().unwrap().success());
    };
    let locker_of_ours = locker(&scratch, "lifeboot");
    let who = format!("in use by another lifeboot, the process {}", locker_of_ours.id());
    let words = ["t.raw", &who, "lifeboot status"];
    begin("unix:s").fails(&words);
    // The same command twice wants the same address too.
    let _listener = UnixListener::bind(scratch.path("busy")).unwrap();
    begin("unix:busy").fails(&words);
    end(locker_of_ours);
    begin("unix:busy").fails(&["busy", "listens there"]);
    let stranger = locker(&scratch, "stranger");
    begin("unix:s").fails(&["t.raw", "another program has locked it"]);
    end(stranger);
    assert!(!scratch.path("t.raw.lifeboot").exists(), "nothing was begun");
    begin("unix:s").ends_with(0);
}

#[test]
fn a_restore_that_is_at_work_keeps_another_away() {
    let scratch = with_snapshot();
    let partial = File::create(scratch.path("out.raw.lifeboot-partial")).unwrap();
    partial.lock().unwrap();
    scratch.run(&["restore", "web01@latest", "out.raw"]).fails(&["in use", "another restore"]);
    assert!(scratch.path("out.raw.lifeboot-partial").exists());
}

/// A small file system of its own, unmounted when dropped.
pub(crate) struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    pub(crate) fn mount(path: std::path::PathBuf, size: &str) -> Self {
        std::fs::create_dir(&path).unwrap();
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(&path).status();
        assert!(mounted.unwrap().success());
        Self(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing_half_made() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    scratch.disk("d.raw", 20 * MIB, &[(0, 16 << 20, 1)]);
    let small = SmallDisk::mount(scratch.path("small"), "6m");
    scratch.run(&["init", "-r", "small/repo"]).ends_with(0);
    scratch.run(&["capture", "-r", "small/repo", "g", "d.raw"]).fails(&[
        "small/repo",
        "No space left",
        "free some space",
    ]);
    assert_eq!(
        scratch.run(&["snapshots", "-r", "small/repo", "--json"]).ends_with(0).json(),
        serde_json::json!([])
    );
    assert!(scratch.names("small/repo/tmp").is_empty());

    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    let ran = scratch.run(&["restore", "g@latest", "small/out.raw"]);
    ran.fails(&["small/out.raw", "No space left", "free some space"]);
    assert_eq!(scratch.names("small"), ["repo"]);
    drop(small);
}

#[test]
fn without_permission_it_says_so() {
    if !is_root() {
        return;
    }
    let scratch = with_snapshot();
    let open_to_all = |path: &str, mode| {
        std::fs::set_permissions(scratch.path(path), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open_to_all(".", 0o755);
    std::fs::copy(env!("CARGO_BIN_EXE_lifeboot"), scratch.path("lifeboot")).unwrap();
    std::fs::create_dir(scratch.path("mine")).unwrap();
    open_to_all("mine", 0o777);
    let as_nobody = |args: &[&str]| {
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "./lifeboot"])
            .args(args)
            .current_dir(scratch.path("."))
            .env("LIFEBOOT_REPO", "repo")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    };
    // A repository that may be read is enough to restore, and too little to capture.
    as_nobody(&["snapshots"]).ends_with(0);
    as_nobody(&["restore", "web01@latest", "mine/out.raw"]).ends_with(0);
    as_nobody(&["capture", "web01", "d.raw"]).fails(&["repo", "ermission"]);
    as_nobody(&["restore", "web01@latest", "out.raw"]).fails(&["out.raw", "ermission"]);
    open_to_all("d.raw", 0o600);
    as_nobody(&["capture", "web01", "d.raw"]).fails(&["d.raw", "ermission"]);
    open_to_all("repo", 0o700);
    as_nobody(&["snapshots"]).fails(&["repo", "ermission"]);
    assert_eq!(scratch.json(&["snapshots"]).as_array().unwrap().len(), 1);
}

#[test]
fn a_limit_of_file_sizes_is_an_error_and_no_death() {
    let scratch = with_snapshot();
    let limited = |words: &str| {
        let mut command = Command::new("bash");
        command
            .args(["-c", &format!("ulimit -f 512; exec \"$0\" {words}")])
            .arg(scratch.command(&[]).get_program());
        Ran::of(command.current_dir(scratch.path("")).output().unwrap())
    };
    limited("restore -r repo web01@latest out.raw").fails(&["out.raw", "File too large"]);
    let live = "live-restore -r repo web01@latest live.raw --listen unix:s --exit-when-done";
    let said = ["live.raw", "no file of more than 524288 bytes", "ulimit -f"];
    limited(live).fails(&said);
    assert!(!scratch.path("live.raw").exists() && !scratch.path("live.raw.lifeboot").exists());
    // Nor is a session that is there gone on with, to find its target full later.
    scratch.run(&live.split(' ').collect::<Vec<_>>()).ends_with(0);
    limited(live).fails(&said);
}
