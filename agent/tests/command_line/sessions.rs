//! Live-restores beside the other verbs.

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{MIB, Scratch, assert_same, slow_live_restore};

#[test]
fn the_target_of_a_live_restore_is_captured_only_when_it_is_complete() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d.raw", 8 * MIB, &[(0, 4 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let snapshot = scratch.json(&["snapshots"])[0]["snapshot"].as_str().unwrap().to_owned();
    let refused = ["t.raw", "t.raw.lifeboot", "not complete", &snapshot, "lifeboot status t.raw"];

    let mut live = slow_live_restore(&scratch);
    let ran = scratch.run(&["capture", "again", "t.raw"]).fails(&refused);
    assert!(!ran.stderr.contains("run its live-restore again"), "{ran:?}");
    kill_process(Pid::from_child(&live), Signal::TERM).unwrap();
    assert!(live.wait().unwrap().success());
    std::os::unix::fs::symlink("t.raw", scratch.path("link.raw")).unwrap();
    for name in ["t.raw", "link.raw"] {
        let ran = scratch.run(&["capture", "again", name]);
        ran.fails(&["t.raw.lifeboot", "not complete", "run its live-restore again"]);
    }
    assert_eq!(scratch.json(&["snapshots"]).as_array().unwrap().len(), 1);

    let args = ["live-restore", "web01@latest", "t.raw", "--listen", "unix:s", "--exit-when-done"];
    scratch.run(&args).ends_with(0);
    scratch.run(&["capture", "again", "t.raw"]).ends_with(0);
    scratch.run(&["restore", "again@latest", "out.raw"]).ends_with(0);
    assert_same(&disk, &scratch.path("out.raw"));

    std::fs::write(scratch.path("t.raw.lifeboot/session.json"), "{").unwrap();
    scratch.run(&["capture", "again", "t.raw"]).fails(&["session.json is damaged"]);
}
