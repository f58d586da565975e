//! Live-restores beside the other verbs.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use crate::support::{MIB, Scratch, assert_same, live_restore, park, slow_live_restore};

#[test]
fn the_target_of_a_live_restore_is_captured_whatever_its_state() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 8 * MIB, &[(0, 4 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let capture = |name: &str, words: &[&str]| {
        let ran = scratch.run(&["capture", "again", name]).ends_with(0);
        assert!(words.iter().all(|word| ran.stdout.contains(word)), "{ran:#?}");
        scratch.run(&["restore", "again@latest", "out.raw"]).ends_with(0);
        assert_same(&disk, &scratch.path("out.raw"));
        std::fs::remove_file(scratch.path("out.raw")).unwrap();
    };
    let mut live = slow_live_restore(&scratch);
    capture("t.raw", &["incremental: 0 of 64 chunks"]);
    scratch.run(&["capture", "again", "t.raw", "--full"]).fails(&[
        "t.raw.lifeboot",
        "not complete",
        "lifeboot save",
    ]);
    scratch.run(&["capture", "again", "t.raw", "d.raw"]).fails(&["d.raw is not served"]);
    park(&mut live);
    std::os::unix::fs::symlink("t.raw", scratch.path("link.raw")).unwrap();
    for name in ["t.raw", "link.raw"] {
        capture(name, &["incremental: 0 of 64 chunks"]);
    }
    let args = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--exit-when-done"];
    scratch.run(&args).ends_with(0);
    capture("t.raw", &["incremental: 0 of 64 chunks"]);
    // Together with another disk.
    scratch.run(&["capture", "both", "t.raw", "d.raw"]).ends_with(0);
    for name in ["disk0", "disk1"] {
        scratch.run(&["restore", &format!("both@latest/{name}"), name]).ends_with(0);
        assert_same(&disk, &scratch.path(name));
    }
    std::fs::remove_file(scratch.path("t.raw.lifeboot/parked.json")).unwrap();
    capture("t.raw", &["full scan", "no record"]);
    std::fs::write(scratch.path("t.raw.lifeboot/session.json"), "{").unwrap();
    scratch.run(&["capture", "again", "t.raw"]).fails(&["session.json is damaged"]);
}

#[test]
fn an_agent_that_was_killed_while_it_parked_is_not_taken_for_somebody_elses_writes() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 8 * MIB, &[(0, 4 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let (target, session) = (scratch.path("t.raw"), scratch.path("t.raw.lifeboot"));
    let stamp = session.join("parked.json");
    // Stands for a write, of the agent or of somebody else.
    let touch = |second: u64| {
        let target = File::options().write(true).open(&target).unwrap();
        target.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(second)).unwrap();
    };
    let served = |meanwhile: &dyn Fn()| {
        let said = File::create(scratch.path("said")).unwrap();
        let args = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--no-background"];
        let mut child = scratch.command(&args).stdout(Stdio::piped()).stderr(said).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().starts_with("ready: ")));
        meanwhile();
        park(&mut child);
        std::fs::read_to_string(scratch.path("said")).unwrap()
    };
    let changed = || {
        let plan = scratch.json(&["save", "t.raw", "--dry-run"]);
        plan["disks"][0]["changed_bytes"].as_u64().unwrap()
    };
    served(&|| {});
    let first = std::fs::read(&stamp).unwrap();
    served(&|| touch(1));
    // The checkpoint was written, the stamp not.
    std::fs::write(&stamp, &first).unwrap();
    assert_eq!(changed(), 0);
    let told = served(&|| touch(2));
    assert!(!told.contains("was written to"), "{told}");
    // By a power cut.
    std::fs::write(&stamp, &first).unwrap();
    std::fs::remove_file(session.join("live")).unwrap();
    assert_eq!(changed(), 0);
    let told = served(&|| touch(3));
    assert!(!told.contains("was written to"), "{told}");
    // Somebody else's are found all the same.
    touch(4);
    assert!(changed() > 0);
    let told = served(&|| {});
    assert!(told.contains("was written to"), "{told}");
}

#[test]
fn a_session_that_was_parked_again_because_another_could_not_be_served_is_known_to_be_untouched() {
    let scratch = Scratch::new();
    scratch.disk("a.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.disk("b.raw", 4 * MIB, &[(0, 2 << 20, 2)]);
    scratch.run(&["capture", "two", "a.raw", "b.raw"]).ends_with(0);
    let args = ["live-restore", "two@latest", "ta.raw", "tb.raw", "--listen", "unix:s", "--exit-when-done"];
    scratch.run(&args).ends_with(0);
    std::fs::write(scratch.path("tb.raw.lifeboot/journal"), "").unwrap();
    scratch.run(&args).fails(&["tb.raw.lifeboot"]);
    let capture = ["capture", "again", "ta.raw"];
    let ran = scratch.run(&capture).ends_with(0);
    assert!(ran.stdout.contains("incremental: 0 of 32 chunks"), "{ran:#?}");
    let target = File::options().write(true).open(scratch.path("ta.raw")).unwrap();
    target.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let ran = scratch.run(&capture).ends_with(0);
    assert!(ran.stdout.contains("it was written to"), "{ran:#?}");
}

#[test]
fn a_save_announces_no_name_that_it_does_not_have() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let args = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--exit-when-done"];
    scratch.run(&args).ends_with(0);
    let made = || {
        let all = scratch.json(&["snapshots", "n"]);
        let names = all.as_array().unwrap().iter().map(|one| one["snapshot"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    for _ in 0..3 {
        let ran = scratch.run(&["save", "t.raw", "n"]).ends_with(0);
        let [saving, saved] = ran.stdout.lines().collect::<Vec<_>>()[..] else { panic!("{ran:#?}") };
        assert!(saving.contains("as disk0 of a new snapshot of n:"), "{saving}");
        assert!(saved.contains(made().iter().max().unwrap().as_str()), "{saved}");
        // Those just made have taken seconds that have not passed.
        let foretold = scratch.json(&["save", "t.raw", "n", "--dry-run"]);
        let name = foretold["snapshot"].as_str().unwrap().to_owned();
        assert!(name.starts_with("n@") && !made().contains(&name), "{name}: {:?}", made());
    }
    let ran = scratch.run(&["save", "t.raw", "n", "--dry-run"]).ends_with(0);
    assert!(ran.stdout.starts_with("would save ") && !ran.stdout.contains("n@"), "{ran:#?}");
}

#[test]
fn a_copied_session_that_is_kept_in_a_state_directory_goes_on_with_its_copied_target() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 8 * MIB, &[(0, 4 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let mut live = live_restore(&scratch, &["--state", "st", "--limit", "20"]);
    park(&mut live);
    scratch.copy("t.raw", "u.raw");
    let go_on = |target: &str, state: &str, further: &[&str]| {
        let args = ["live-restore", "web01@latest", target, "--state", state, "--listen", "unix:s"];
        scratch.run(&[&args[..], &["--exit-when-done"], further].concat())
    };
    go_on("u.raw", "nothing", &["--moved"]).fails(&["no session of", "copy the state directory"]);
    // The original's is left to it, whatever is missing.
    go_on("u.raw", "st", &["--moved"]).fails(&["t.raw, which is still there", "cp -a"]);
    scratch.run(&["save", "u.raw", "--state", "st", "--moved"]).fails(&["which is still there"]);
    scratch.copy("st", "st2");
    scratch.run(&["save", "u.raw", "copy", "--state", "st2", "--moved"]).ends_with(0);
    go_on("u.raw", "st2", &["--moved"]).ends_with(0);
    assert_same(&disk, &scratch.path("u.raw"));
    assert_eq!(scratch.json(&["status", "u.raw", "--state", "st2"])["phase"], "complete");
    // From now on it is its own.
    go_on("u.raw", "st2", &[]).ends_with(0);
    go_on("u.raw", "st2", &["--moved"]).ends_with(0);
    scratch.copy("d.raw", "v.raw");
    go_on("v.raw", "st2", &["--moved"]).fails(&["u.raw, which is still there"]);
    go_on("t.raw", "st", &[]).ends_with(0);
    assert_same(&disk, &scratch.path("t.raw"));
}

#[test]
fn a_copied_session_does_not_go_on_with_the_target_of_its_original_unless_that_is_away() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 8 * MIB, &[(0, 4 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let mut live = live_restore(&scratch, &["--state", "st", "--limit", "20"]);
    park(&mut live);
    scratch.copy("st", "st2");
    let go_on = |state: &str, further: &[&str]| {
        let args = ["live-restore", "web01@latest", "t.raw", "--state", state, "--listen", "unix:s2"];
        scratch.run(&[&args[..], &["--exit-when-done"], further].concat())
    };
    let said = ["is a copy of the one in", "which is still there", "leave --state out"];
    go_on("st2", &[]).fails(&said);
    go_on("st2", &["--moved"]).fails(&said);
    scratch.run(&["save", "t.raw", "--state", "st2"]).fails(&said);
    let status = scratch.json(&["status", "t.raw", "--state", "st2"]);
    assert!(status["waiting"].as_str().unwrap().contains(said[0]), "{status}");
    // An agent of the original is no other program that holds the target.
    let mut live = live_restore(&scratch, &["--limit", "20"]);
    go_on("st2", &[]).fails(&said);
    park(&mut live);
    std::fs::rename(scratch.path("st"), scratch.path("away")).unwrap();
    go_on("st2", &[]).ends_with(0);
    assert_same(&disk, &scratch.path("t.raw"));
}
