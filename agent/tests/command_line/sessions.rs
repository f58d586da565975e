//! Live-restores beside the other verbs.

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{MIB, Scratch, assert_same, slow_live_restore};

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
    kill_process(Pid::from_child(&live), Signal::TERM).unwrap();
    assert!(live.wait().unwrap().success());
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
