//! What `discard` says of sessions in odd states is true, and what it advises is not refused.

use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{MIB, Ran, Scratch, live_restore, park, write};

/// A session of `t.raw` whose guest has written, parked.
fn parked(further: &[&str]) -> Scratch {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 4 * MIB, &[(0, 2 << 20, 1)]);
    scratch.run(&["capture", "web01", "d.raw"]).ends_with(0);
    let mut live = live_restore(&scratch, &[&["--no-background"], further].concat());
    let export = format!("nbd+unix:///?socket={}", scratch.path("s").display());
    let mut guest = Command::new("qemu-io");
    assert!(guest.args(["-f", "raw", "-c", "write -P 7 1M 64k", &export]).output().unwrap().status.success());
    park(&mut live);
    scratch
}

/// What `discard` says that nobody has told yes.
#[track_caller]
fn asked(scratch: &Scratch, further: &[&str]) -> Ran {
    scratch.run(&[&["discard", "t.raw"], further].concat()).fails(&["nothing was discarded: nobody said yes"])
}

fn change_record(scratch: &Scratch, name: &str, value: Value) {
    let path = scratch.path("t.raw.lifeboot/session.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record[name] = value;
    std::fs::write(path, record.to_string()).unwrap();
}

#[test]
fn a_session_that_is_named_by_its_directory_is_told_to_be_served_where_it_is() {
    let scratch = parked(&["--state", "st"]);
    let mut live = live_restore(&scratch, &["--no-background", "--state", "st"]);
    scratch.disk("other.raw", MIB, &[]);
    let dir = format!("st/{}", scratch.names("st")[0]);
    let said =
        scratch.run(&["discard", "other.raw", "--state", &dir, "--yes"]).fails(&["is served by the agent"]);
    assert!(
        said.stderr.contains("which restores to") && said.stderr.contains("/t.raw, is served"),
        "{said:?}"
    );
    assert!(!said.stderr.contains("other.raw"), "{said:?}");
    kill_process(Pid::from_child(&live), Signal::TERM).unwrap();
    live.wait().unwrap();
}

#[test]
fn nobody_is_told_to_save_what_cannot_be_saved() {
    let scratch = parked(&[]);
    let target = scratch.path("t.raw");
    asked(&scratch, &[]).tells_of("give --yes; `lifeboot save` keeps");
    scratch.run(&["save", "t.raw", "--dry-run"]).ends_with(0);
    let aside = scratch.path("aside.raw");
    std::fs::rename(&target, &aside).unwrap();
    asked(&scratch, &[])
        .tells_of("give --yes; what the guest wrote is in the session's own target: only where");
    scratch.copy("aside.raw", "t.raw");
    asked(&scratch, &[])
        .tells_of("give --yes; what the guest wrote is in the session's own target: only where");
    std::fs::rename(&aside, &target).unwrap();
    std::fs::File::options().write(true).open(&target).unwrap().set_len(MIB).unwrap();
    asked(&scratch, &[]).tells_of("give --yes; the target was cut off: only where a whole copy");
    scratch.run(&["save", "t.raw", "--dry-run"]).ends_with(1);

    // A machine was moved onto it, or was about to be.
    let scratch = parked(&[]);
    change_record(&scratch, "handed_over", true.into());
    let said = asked(&scratch, &[]);
    assert!(!said.stderr.contains("save"), "{said:?}");
    scratch.run(&["save", "t.raw", "--dry-run"]).ends_with(1);
    // Another file under its path: only who names the session's directory means it.
    let scratch = parked(&["--state", "a state"]);
    scratch.copy("t.raw", "copy.raw");
    std::fs::rename(scratch.path("copy.raw"), scratch.path("t.raw")).unwrap();
    let dir = scratch.path(&format!("a state/{}", scratch.names("a state")[0]));
    let named = format!("--state '{}' --yes` gives that session up", dir.display());
    asked(&scratch, &["--state", "a state"]).tells_of(&named);
    // What only the live file knows.
    let scratch = parked(&[]);
    std::fs::remove_file(scratch.path("t.raw.lifeboot/journal")).unwrap();
    asked(&scratch, &[]).tells_of("`lifeboot save` keeps");
    scratch.run(&["save", "t.raw", "--dry-run"]).ends_with(0);
    std::fs::remove_file(scratch.path("t.raw.lifeboot/live")).unwrap();
    let said = asked(&scratch, &[]);
    assert!(!said.stderr.contains("save"), "{said:?}");
    scratch.run(&["save", "t.raw", "--dry-run"]).ends_with(1);
}

#[test]
fn what_a_machine_runs_from_is_not_called_lost_where_it_has_another_name() {
    let scratch = parked(&[]);
    change_record(&scratch, "handed_over", true.into());
    let session = scratch.json(&["status", "t.raw"])["session"].clone();
    let moved = serde_json::json!({
        "version": 2, "session": session, "starts": 1, "qmp": "/q", "moved": true
    });
    for (is_known, says) in [(false, "or was about to be"), (true, "a running machine was moved")] {
        if is_known {
            write(&scratch.path("t.raw.lifeboot/move.json"), moved.to_string().as_bytes());
        }
        let said = |what: &str| {
            let said = asked(&scratch, &[]);
            assert!(said.stdout.contains(says) && said.stdout.contains(what), "{said:?}");
            assert!(!said.stdout.contains("lost with it"), "{said:?}");
        };
        said("onto the target, ");
        std::fs::rename(scratch.path("t.raw"), scratch.path("away.raw")).unwrap();
        said("whatever it is called now");
        said(&format!("nothing stands at {} any more", scratch.path("t.raw").display()));
        scratch.copy("away.raw", "t.raw");
        said("whatever it is called now");
        said(&format!("{} is another one", scratch.path("t.raw").display()));
        std::fs::rename(scratch.path("away.raw"), scratch.path("t.raw")).unwrap();
    }
}

#[test]
fn a_copy_of_a_session_is_given_up_without_a_word_against_its_original() {
    let scratch = parked(&["--state", "st"]);
    scratch.copy("st", "st2");
    let copy = ["--state", "st2"];
    let said = asked(&scratch, &copy);
    assert!(said.stdout.contains("this is a copy of the session, which is kept in"), "{said:?}");
    assert!(said.stderr.contains("give --yes") && !said.stderr.contains("save"), "{said:?}");
    let removing = ["discard", "t.raw", "--state", "st2", "--yes", "--remove-target"];
    scratch.run(&removing).fails(&["of which this is a copy: it is not removed"]);
    let told = scratch.run(&["discard", "t.raw", "--state", "st2", "--yes"]).ends_with(0).stdout;
    assert!(told.contains("with its session in") && !told.contains("only part of a disk"), "{told}");
    assert!(scratch.names("st2").is_empty());
    assert_eq!(scratch.json(&["status", "t.raw", "--state", "st"])["guest_bytes"], 65536);
}
