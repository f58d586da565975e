//! What a backup lacks because its repository is damaged is named, in it and in those on top of it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use e2e::captured::Captured;
use e2e::lifeboot::status;
use e2e::process::{run, run_any};
use serde_json::Value;

use super::{CHUNK, DISK_BYTES, ends, name, save, show};

/// Damages the middle of every pack, where chunks are.
fn damage_packs(captured: &Captured) {
    for pack in fs::read_dir(captured.repository.path().join("packs")).unwrap() {
        let file = fs::File::options().read(true).write(true).open(pack.unwrap().path()).unwrap();
        let len = file.metadata().unwrap().len();
        file.write_all_at(&[0x5a; 64], len / 2).unwrap();
    }
}

#[test]
fn what_is_known_to_be_damaged_is_named_in_every_backup_that_inherits_it() {
    let captured = Captured::new("save-inherited", DISK_BYTES, 19).unwrap();
    damage_packs(&captured);
    let mut live = captured.start(&["--exit-when-done"]).unwrap();
    assert_eq!(live.process().wait().unwrap().code(), Some(3));
    let backups = |verbs: &[&[&str]]| {
        for verb in verbs {
            let mut command = captured.repository.verb(verb[0], &[&["--json"], &verb[1..]].concat()).unwrap();
            let output = run_any(command.arg(&captured.target)).unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(3), "{verb:?}: {said}");
            assert!(said.contains("as damaged as in the snapshot that was restored"), "{verb:?}: {said}");
        }
    };
    let all: [&[&str]; 3] = [&["save", "--dry-run"], &["save"], &["capture", "after"]];
    backups(&all);
    let live = captured.start(&["--no-background"]).unwrap();
    backups(&all);
    // What the guest writes over is whole again.
    let damaged = status(&captured.target).unwrap()["damaged"].clone();
    for range in damaged.as_array().unwrap() {
        let at = range["offset"].as_u64().unwrap();
        live.export().qemu_io(&[&format!("write -P 0x77 {at} {}", range["len"])]).unwrap();
    }
    save(&captured, &["--dry-run"]);
    save(&captured, &[]);
    live.park().unwrap();
    save(&captured, &["--dry-run"]);
    save(&captured, &[]);
}

#[test]
fn a_chunk_whose_rest_is_damaged_is_named_and_lost_in_every_restore() {
    let captured = Captured::new("save-damaged", DISK_BYTES, 8).unwrap();
    let live = captured.start(&["--no-background"]).unwrap();
    // Whole blocks: they need nothing of the backup. The disk begins with noise or text everywhere but in holes.
    let script = format!(
        "for c in range({}): h.pwrite(b'\\x77' * 4096, c * {CHUNK})\nh.pwrite(b'\\x78' * {CHUNK}, 0)\nh.flush()",
        DISK_BYTES / CHUNK
    );
    live.export().nbdsh("", &script).unwrap();
    live.park().unwrap();
    let whole = captured.work.file("whole");
    run(Command::new("cp").arg("-a").arg(captured.repository.path()).arg(&whole)).unwrap();
    for pack in fs::read_dir(captured.repository.path().join("packs")).unwrap() {
        let pack = pack.unwrap().path();
        let file = fs::File::options().read(true).write(true).open(&pack).unwrap();
        let len = file.metadata().unwrap().len();
        // Chunks come first, the map's nodes and the table last.
        for at in (4096..len * 3 / 4).step_by(512) {
            file.write_all_at(&[0x5a; 64], at).unwrap();
        }
    }
    let mut command = captured.repository.verb("save", &["--json"]).unwrap();
    let output = run_any(command.arg(&captured.target)).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("is not saved"), "{said}");
    let saved: Value = serde_json::from_slice(&output.stdout).unwrap();
    let damaged = saved["damaged"].as_array().unwrap();
    assert!(
        !damaged.is_empty() && damaged.iter().all(|range| range["offset"].as_u64() >= Some(CHUNK)),
        "{saved}"
    );
    let shown = show(&captured, name(&saved));
    assert!(shown["note"].as_str().unwrap().contains("lacks what the guest wrote"), "{shown}");
    // A restore says so as well.
    let out = captured.work.file("restored.raw");
    ends(captured.repository.verb("restore", &[name(&saved)]).unwrap().arg(&out), 1, &["cannot be restored"]);
    let mut command = captured.repository.verb("restore", &["--keep-going", name(&saved)]).unwrap();
    ends(command.arg(&out), 3, &["damaged"]);
    let first = fs::read(&out).unwrap();
    assert!(
        first[..usize::try_from(CHUNK).unwrap()].iter().all(|byte| *byte == 0x78),
        "a whole chunk needs no backup"
    );
    // A copy from before the damage has what stood there before the guest wrote: that is no substitute.
    let out = captured.work.file("restored-with-copy.raw");
    let further = ["--json", "--keep-going", "--fallback", whole.to_str().unwrap(), name(&saved)];
    let restored = run_any(captured.repository.verb("restore", &further).unwrap().arg(&out)).unwrap();
    assert_eq!(restored.status.code(), Some(3), "{}", String::from_utf8_lossy(&restored.stderr));
    let restored: Value = serde_json::from_slice(&restored.stdout).unwrap();
    let chunks = |report: &Value| -> Vec<u64> {
        let of = |range: &Value, member: &str| range[member].as_u64().unwrap();
        let damaged = report["damaged"].as_array().unwrap().iter();
        let each = |range| of(range, "offset")..of(range, "offset") + of(range, "len");
        damaged.flat_map(|range| each(range).step_by(CHUNK as usize)).collect()
    };
    assert_eq!(chunks(&restored), chunks(&saved), "these and no others");
}
