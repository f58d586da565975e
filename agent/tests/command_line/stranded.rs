//! Sessions in trouble: copied, renamed, cut off, lost, or on a file system that became read-only. What is said of them is true, and what
//! is advised works.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::refusals::SmallDisk;
use crate::support::{MIB, Ran, Scratch, assert_same, is_root, live_restore, live_restore_to};

const LISTEN: [&str; 3] = ["--listen", "unix:s", "--exit-when-done"];

fn with_snapshot() -> Scratch {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    scratch
}

/// The guest writes to the disk that is served, and to a copy of what it was before: `d.raw` then is what it sees.
fn write_as_guest(scratch: &Scratch) {
    for place in [format!("nbd+unix:///?socket={}", scratch.path("s").display()), "d.raw".to_owned()] {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", "-c", "write -P 7 1M 64k", &place]).current_dir(scratch.path("."));
        let ran = command.output().unwrap();
        assert!(ran.status.success(), "{ran:?}");
    }
}

fn end(mut live: Child, signal: Signal) {
    kill_process(Pid::from_child(&live), signal).unwrap();
    live.wait().unwrap();
}

/// A parked session of `t.raw`, whose guest has written.
fn parked(further: &[&str]) -> Scratch {
    let scratch = with_snapshot();
    let live = live_restore(&scratch, &[&["--no-background"], further].concat());
    write_as_guest(&scratch);
    end(live, Signal::TERM);
    scratch
}

fn copy_whole(scratch: &Scratch, from: &str, to: &str) {
    for suffix in ["", ".lifeboot"] {
        let mut command = Command::new("cp");
        command.arg("-a").arg(scratch.path(&format!("{from}{suffix}")));
        assert!(command.arg(scratch.path(&format!("{to}{suffix}"))).status().unwrap().success());
    }
}

/// Runs the command between backquotes that begins so, as a shell does.
#[track_caller]
fn follow(scratch: &Scratch, said: &Ran, begin: &str, further: &str) -> Ran {
    let command = said.stderr.split('`').find(|part| part.starts_with(begin));
    let command = command.unwrap_or_else(|| panic!("it advises no {begin}: {said:?}"));
    let line = format!(
        "{} {} {further}",
        env!("CARGO_BIN_EXE_lifeboot"),
        command.strip_prefix("lifeboot ").unwrap()
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &line]).current_dir("/").env("LIFEBOOT_REPO", scratch.path("repo"));
    Ran::of(shell.stdin(Stdio::null()).output().unwrap()).ends_with(0)
}

#[track_caller]
fn ensure_saved(scratch: &Scratch) {
    scratch.run(&["restore", "web01@latest", "saved.raw"]).ends_with(0);
    assert_same(&scratch.path("saved.raw"), &scratch.path("d.raw"));
    std::fs::remove_file(scratch.path("saved.raw")).unwrap();
}

#[test]
fn with_a_damaged_copy_nobody_is_sent_to_the_original() {
    let scratch = parked(&[]);
    copy_whole(&scratch, "t.raw", "copy.raw");
    let status = scratch.json(&["status", "copy.raw"]);
    let why = status["waiting"].as_str().unwrap_or_else(|| panic!("it says that it goes on: {status}"));
    assert!(why.contains("copy.raw is another target") && why.contains("--moved"), "{why}");
    std::fs::remove_file(scratch.path("copy.raw.lifeboot/journal")).unwrap();
    let original = scratch.path("t.raw").display().to_string();
    let live = ["live-restore", "web01@latest", "copy.raw", "--moved"];
    let failed = scratch.run(&[&live[..], &LISTEN].concat()).fails(&["journal is missing", "save"]);
    assert!(!failed.stderr.contains(&original), "{failed:?}");
    follow(&scratch, &failed, "lifeboot save", "");
    ensure_saved(&scratch);
    follow(&scratch, &failed, "lifeboot discard", "--yes");
    assert!(!scratch.path("copy.raw.lifeboot").exists());
    // The original was healthy, and is.
    scratch.run(&[&["live-restore", &base(&scratch), "t.raw"][..], &LISTEN].concat()).ends_with(0);
    assert_same(&scratch.path("t.raw"), &scratch.path("d.raw"));
}

/// The snapshot that the session of `t.raw` restores.
fn base(scratch: &Scratch) -> String {
    base_of(scratch, "t.raw")
}

fn base_of(scratch: &Scratch, target: &str) -> String {
    scratch.json(&["status", target])["snapshot"].as_str().unwrap().to_owned()
}

#[test]
fn a_renamed_target_is_named_as_it_is_called_now() {
    let scratch = parked(&[]);
    for suffix in ["", ".lifeboot"] {
        let name = |stem: &str| scratch.path(&format!("{stem}{suffix}"));
        std::fs::rename(name("t.raw"), name("renamed.raw")).unwrap();
    }
    let renamed = scratch.path("renamed.raw");
    assert_eq!(scratch.json(&["status", "renamed.raw"])["target"], renamed.to_str().unwrap());
    let failed = scratch.run(&["save", "-r", "d.raw", "renamed.raw"]).ends_with(1);
    assert!(!failed.stderr.contains("/t.raw"), "{failed:?}");
    scratch.run(&["init", "-r", "other"]).ends_with(0);
    let failed = scratch.run(&["save", "-r", "other", "renamed.raw"]).fails(&["does not have"]);
    assert!(!failed.stderr.contains("/t.raw"), "{failed:?}");
    std::fs::remove_file(scratch.path("renamed.raw.lifeboot/journal")).unwrap();
    let failed = scratch.run(&["status", "renamed.raw"]).fails(&["journal is missing"]);
    assert!(!failed.stderr.contains("--moved"), "it is the same file: {failed:?}");
    follow(&scratch, &failed, "lifeboot save", "");
    ensure_saved(&scratch);
    follow(&scratch, &failed, "lifeboot discard", "--yes");
}

#[test]
fn a_target_that_was_renamed_without_its_session_goes_on_with_it() {
    let scratch = parked(&[]);
    std::fs::rename(scratch.path("t.raw"), scratch.path("renamed.raw")).unwrap();
    assert_eq!(scratch.json(&["status", "renamed.raw"])["guest_bytes"], 65536);
    scratch.run(&["capture", "web02", "renamed.raw"]).ends_with(1);
    scratch.run(&["save", "renamed.raw"]).ends_with(0);
    ensure_saved(&scratch);
    let live = ["live-restore", &base_of(&scratch, "renamed.raw"), "renamed.raw"].map(str::to_owned);
    let live: Vec<&str> = live.iter().map(String::as_str).chain(LISTEN).collect();
    scratch.run(&live).ends_with(0);
    assert_same(&scratch.path("renamed.raw"), &scratch.path("d.raw"));
    // Whoever names the old path does not mean this session.
    let said = ["is that of", "renamed.raw, which is there"];
    scratch.run(&["discard", "t.raw", "--yes"]).fails(&said);
    let live: Vec<&str> =
        live.iter().map(|word| if *word == "renamed.raw" { "t.raw" } else { word }).collect();
    scratch.run(&live).fails(&said);
    std::fs::copy(scratch.path("d.raw"), scratch.path("t.raw")).unwrap();
    scratch.run(&["discard", "t.raw", "--yes"]).fails(&said);
    scratch.run(&["discard", "renamed.raw", "--yes"]).ends_with(0);
    assert!(!scratch.path("t.raw.lifeboot").exists() && !scratch.path("renamed.raw.lifeboot").exists());
}

#[test]
fn on_a_file_system_that_became_read_only_what_only_reads_works_and_discard_says_why_not() {
    if !is_root() {
        return;
    }
    let scratch = with_snapshot();
    let failing = SmallDisk::mount(scratch.path("failing"), "64m");
    let remount = |how: &str| {
        let options = format!("remount,{how}");
        let mut command = Command::new("mount");
        let done = command.args(["-o", &options]).arg(scratch.path("failing")).status();
        assert!(done.unwrap().success(), "{how}");
    };
    let live = live_restore_to(&scratch, "failing/t.raw", &["--no-background"]);
    write_as_guest(&scratch);
    end(live, Signal::KILL);
    remount("ro");
    let status = scratch.json(&["status", "failing/t.raw"]);
    assert_eq!(status["guest_bytes"], 65536, "{status}");
    let told = scratch.run(&["status", "failing/t.raw"]).ends_with(0).stdout;
    assert!(told.contains("goes on once this is mended") && told.contains("is read-only"), "{told}");
    assert!(status["waiting"].as_str().is_some_and(|why| why.contains("dmesg")), "{status}");
    for further in [&[][..], &["--remove-target"]] {
        let discard = [&["discard", "failing/t.raw", "--yes"], further].concat();
        let failed = scratch.run(&discard).fails(&["nothing was discarded", "read-only", "dmesg"]);
        assert!(!failed.stderr.contains("owner"), "{failed:?}");
    }
    let live = [&["live-restore", "web01@latest", "failing/t.raw"][..], &LISTEN].concat();
    scratch.run(&live).fails(&["Read-only", "dmesg", "lifeboot save"]);
    scratch.run(&["save", "failing/t.raw"]).ends_with(0);
    ensure_saved(&scratch);

    // One that was parked is captured, too.
    remount("rw");
    scratch.run(&["discard", "failing/t.raw", "--yes", "--remove-target"]).ends_with(0);
    end(live_restore_to(&scratch, "failing/t.raw", &["--no-background"]), Signal::TERM);
    remount("ro");
    scratch.run(&["capture", "web01", "failing/t.raw"]).ends_with(0);
    ensure_saved(&scratch);
    drop(failing);
}

/// Demands that the status of the session says all of this, for people and for programs.
#[track_caller]
fn status_tells(scratch: &Scratch, words: &[&str]) {
    let told = scratch.run(&["status", "t.raw"]).ends_with(0).stdout;
    assert!(words.iter().all(|word| told.contains(word)), "it lacks one of {words:?}: {told}");
    let status = scratch.json(&["status", "t.raw"]);
    let waiting = status["waiting"].as_str().unwrap_or_default();
    assert!(status["phase"] == "stopped" && waiting.contains(words[0]), "{status}");
}

#[test]
fn a_target_that_was_cut_off_is_called_that_and_its_session_given_up_as_advised() {
    let scratch = parked(&[]);
    let target = std::fs::File::options().write(true).open(scratch.path("t.raw")).unwrap();
    target.set_len(1 << 20).unwrap();
    for verb in [&["save", "t.raw"][..], &[&["live-restore", "web01@latest", "t.raw"][..], &LISTEN].concat()]
    {
        let failed = scratch.run(verb).fails(&["1048576 bytes", "cut off", "put a whole copy of it back"]);
        assert!(!failed.stderr.contains("tries again"), "{failed:?}");
    }
    let words = ["cut off", "put a whole copy of it back", "goes on once this is mended"];
    status_tells(&scratch, &words);
    let aside = scratch.path("aside.raw");
    std::fs::rename(scratch.path("t.raw"), &aside).unwrap();
    status_tells(&scratch, &["is gone", "put it back", "lifeboot discard", "goes on once this is mended"]);
    std::fs::rename(&aside, scratch.path("t.raw")).unwrap();
    let failed = scratch.run(&["save", "t.raw"]);
    follow(&scratch, &failed, "lifeboot discard", "--yes");
    let anew = [&["live-restore", "web01@latest", "t.raw", "--force"][..], &LISTEN].concat();
    scratch.run(&anew).ends_with(0);
}

fn pointer(scratch: &Scratch) -> PathBuf {
    scratch.path("t.raw.lifeboot")
}

fn wait_complete(scratch: &Scratch) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while scratch.json(&["status", "t.raw"])["phase"] != "complete" {
        assert!(std::time::Instant::now() < deadline, "it never came home");
    }
}

#[test]
fn a_session_that_is_kept_elsewhere_is_found_for_as_long_as_its_disk_is_served() {
    let scratch = with_snapshot();
    let state = ["--state", "state"];
    let live = live_restore(&scratch, &state);
    wait_complete(&scratch);
    scratch.run(&["discard", "t.raw", "--yes"]).fails(&["is served by the agent"]);
    // Its successor serves it on.
    let successor = live_restore(&scratch, &["--take-over", "--state", "state"]);
    assert!({ live }.wait().unwrap().success());
    assert_eq!(scratch.json(&["status", "t.raw"])["phase"], "complete");
    end(successor, Signal::TERM);
    assert!(!pointer(&scratch).exists(), "it is a disk");
    // One that is served again is found again, and after a kill until the next start has ended.
    end(live_restore(&scratch, &state), Signal::KILL);
    assert_eq!(scratch.json(&["status", "t.raw"])["phase"], "complete");
    scratch.run(&[&["live-restore", "web01@latest", "t.raw"][..], &LISTEN].concat()).ends_with(0);
    assert!(!pointer(&scratch).exists());
    end(live_restore(&scratch, &state), Signal::KILL);
    scratch.run(&["discard", "t.raw", "--yes"]).ends_with(0);
    assert!(!pointer(&scratch).exists());
}

#[test]
fn what_says_where_a_session_was_is_discarded_once_that_is_gone() {
    let scratch = parked(&["--state", "state"]);
    std::fs::remove_dir_all(scratch.path("state")).unwrap();
    let failed = scratch.run(&["status", "t.raw"]).fails(&["is not there", "is its file system mounted"]);
    let asked = scratch.run(&["discard", "t.raw"]).fails(&["nothing was discarded", "--yes"]);
    assert!(asked.stdout.contains("only not mounted, mount it"), "{asked:?}");
    scratch.run(&["discard", "t.raw", "--yes", "--remove-target"]).fails(&["is not removed"]);
    assert!(pointer(&scratch).is_file());
    follow(&scratch, &failed, "lifeboot discard", "--yes");
    assert!(!pointer(&scratch).exists() && Path::new(&scratch.path("t.raw")).exists());
    let anew = [&["live-restore", "web01@latest", "t.raw", "--force"][..], &LISTEN].concat();
    scratch.run(&anew).ends_with(0);
}

#[test]
fn status_tells_that_nobody_may_write_to_the_target() {
    let scratch = parked(&[]);
    let attribute = |how: &str| {
        let mut chattr = Command::new("chattr");
        chattr.arg(how).arg(scratch.path("t.raw")).stderr(Stdio::null());
        chattr.status().is_ok_and(|status| status.success())
    };
    // Not every file system can, and only root may.
    if !attribute("+i") {
        return;
    }
    let (status, started) = (
        scratch.json(&["status", "t.raw"]),
        scratch.run(&[&["live-restore", "web01@latest", "t.raw"][..], &LISTEN].concat()),
    );
    assert!(attribute("-i"));
    assert_eq!(started.code, Some(1), "{started:?}");
    assert!(status["waiting"].as_str().is_some_and(|why| why.contains("immutable: let it")), "{status}");
    assert_eq!(scratch.json(&["status", "t.raw"])["waiting"], serde_json::Value::Null);
}

#[test]
fn status_tells_that_a_sync_failed_and_what_may_be_lost() {
    let scratch = with_snapshot();
    let live = live_restore(&scratch, &["--no-background"]);
    write_as_guest(&scratch);
    end(live, Signal::KILL);
    let status = |args: &[&str]| {
        let mut command = scratch.command(&[&["status", "t.raw"], args].concat());
        Ran::of(command.env("XDG_RUNTIME_DIR", scratch.path("run")).output().unwrap()).ends_with(0)
    };
    let plain = status(&["--json"]).json();
    assert!(plain["phase"] == "stopped" && plain["loss"].is_null(), "{plain}");
    // As the agent notes it, when the file system of the session fails too.
    std::fs::create_dir_all(scratch.path("run/lifeboot")).unwrap();
    let note = format!("run/lifeboot/{}.lost", plain["session"].as_str().unwrap());
    std::fs::write(scratch.path(&note), "").unwrap();
    let failed = status(&["--json"]).json();
    assert!(failed["phase"] == "poisoned" && failed["waiting"].is_null(), "{failed}");
    let loss = failed["loss"].as_str().unwrap();
    assert!(loss.contains("a sync had failed") && loss.contains("may be lost"), "{loss}");
    let told = status(&[]).stdout;
    assert!(
        told.contains("failed: a sync failed; run the same command again") && told.contains(loss),
        "{told}"
    );
}

#[test]
fn a_target_that_its_machine_does_not_run_from_is_not_called_its_disk() {
    let scratch = parked(&[]);
    let told = || {
        let status = scratch.json(&["status", "t.raw"]);
        let why = status["waiting"].as_str().unwrap_or_default().to_owned();
        (scratch.run(&["status", "t.raw"]).ends_with(0).stdout, why)
    };
    let record = scratch.path("t.raw.lifeboot/session.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace(r#""handed_over": false"#, r#""handed_over": true"#)).unwrap();
    let session: serde_json::Value = serde_json::from_str(&text).unwrap();
    let moved = serde_json::json!({
        "version": 2, "session": session["session"], "starts": 1, "qmp": "/q", "moved": true
    });
    for is_known in [false, true] {
        if is_known {
            std::fs::write(scratch.path("t.raw.lifeboot/move.json"), moved.to_string()).unwrap();
        }
        assert_eq!(told().1, "");
        std::fs::rename(scratch.path("t.raw"), scratch.path("away.raw")).unwrap();
        let (shown, why) = told();
        assert!(shown.contains("not stand here") && why.contains("nothing stands at"), "{shown}: {why}");
        scratch.copy("away.raw", "t.raw");
        let (shown, why) = told();
        assert!(shown.contains("not stand here") && why.contains("is another one"), "{shown}: {why}");
        assert!(why.contains("(inode "), "{why}");
        std::fs::rename(scratch.path("away.raw"), scratch.path("t.raw")).unwrap();
    }
    // A copy of both.
    copy_whole(&scratch, "t.raw", "copy.raw");
    let status = scratch.json(&["status", "copy.raw"]);
    let its = format!("name {}, which is that target", scratch.path("t.raw").display());
    assert!(status["waiting"].as_str().is_some_and(|why| why.ends_with(&its)), "{status}");
}

#[test]
fn a_target_that_does_not_stand_at_its_path_while_it_is_served_is_told_of() {
    let scratch = with_snapshot();
    let args = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s"];
    let mut live = scratch.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(live.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.starts_with("complete: ")));
    let mut said = BufReader::new(live.stderr.take().unwrap()).lines().map(Result::unwrap);
    let lost = || scratch.json(&["status", "t.raw", "--state", "t.raw.lifeboot"])["loss"].clone();
    assert_eq!(lost(), serde_json::Value::Null);
    std::fs::rename(scratch.path("t.raw"), scratch.path("away.raw")).unwrap();
    scratch.copy("away.raw", "t.raw");
    let loss = lost();
    assert!(loss.as_str().is_some_and(|loss| loss.starts_with("another file stands at ")), "{loss}");
    assert!(said.any(|line| line.contains("WARN another file stands at ")));
    std::fs::remove_file(scratch.path("away.raw")).unwrap();
    std::fs::remove_file(scratch.path("t.raw")).unwrap();
    assert!(said.any(|line| line.contains("the target was removed")), "it is told again, as it is worse");
    let shown = scratch.run(&["status", "t.raw", "--state", "t.raw.lifeboot"]).ends_with(0).stdout;
    assert!(shown.contains("may be lost") && shown.contains("the target was removed"), "{shown}");
    kill_process(Pid::from_child(&live), Signal::TERM).unwrap();
    let report = lines.collect::<Vec<_>>().join("\n");
    assert!(live.wait().unwrap().success());
    assert!(report.contains("next: nothing stands at ") && report.contains("and is gone"), "{report}");
    assert!(!report.contains("can be started") && !report.contains("lifeboot save"), "{report}");
}
