//! What the server says of itself is what it does, seen by programs that others wrote: nbdinfo, nbdcopy, nbdsh, QEMU's storage daemon.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::path::PathBuf;
use std::process::Command;

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::serve_raw;
use e2e::nbd::Export;
use e2e::process::{Process, run, run_any, run_json};
use e2e::work_dir::WorkDir;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;
/// Holds the background back, so that what a client asks for is still in the backup.
const SLOW: &[&str] = &["--limit", "4KiB"];

/// All that `nbdinfo --can` and `--is` know, and what is true of an export of ours that may be written to.
const ABILITIES: &[(&str, &str, bool)] = &[
    ("--can", "connect", true),
    ("--can", "read", true),
    ("--can", "write", true),
    ("--can", "flush", true),
    ("--can", "fua", true),
    ("--can", "trim", true),
    ("--can", "zero", true),
    ("--can", "fast-zero", true),
    ("--can", "df", true),
    ("--can", "cache", true),
    ("--can", "multi-conn", true),
    ("--can", "structured-reply", true),
    ("--is", "read-only", false),
    ("--is", "rotational", false),
    ("--is", "tls", false),
];

/// Asks nbdinfo for each ability, and demands that its JSON says the same.
fn ensure_able(export: &Export) {
    let info = export.info().unwrap();
    for (how, what, expected) in ABILITIES {
        let output = run_any(Command::new("nbdinfo").args([*how, *what, export.uri().as_str()])).unwrap();
        let code = if *expected { 0 } else { 2 };
        assert_eq!(output.status.code(), Some(code), "{how} {what}: {output:?}");
        let key = format!("{}_{}", &how[2..], what.replace('-', "_"));
        if let Some(said) = info["exports"][0].get(&key) {
            assert_eq!(said, *expected, "{key} in {info}");
        }
    }
    let list = run_json(Command::new("nbdinfo").args(["--json", "--list", &export.uri()])).unwrap();
    let listed = list["exports"].as_array().unwrap();
    assert!(!listed.is_empty());
    // One disk, though it may have more than one name.
    for (listed, key) in
        listed.iter().flat_map(|one| ["export-size", "contexts", "description"].map(|key| (one, key)))
    {
        assert_eq!(listed.get(key), info["exports"][0].get(key), "{key}: {list} and {info}");
    }
}

/// Demands that a context's map is whole, and the same when it is asked of nbdinfo's other form.
fn ensure_mapped(export: &Export) {
    let info = export.info().unwrap();
    let contexts = info["exports"][0]["contexts"].as_array().unwrap();
    assert!(contexts.len() >= 2, "{info}");
    for context in contexts {
        let context = context.as_str().unwrap();
        let extents = export.map(context).unwrap();
        let end = extents.iter().fold(0, |end, extent| {
            assert_eq!(extent.offset, end, "{context}: extents follow one another");
            assert!(extent.len_bytes > 0, "{context}: {extent:?}");
            end + extent.len_bytes
        });
        assert_eq!(end, DISK_BYTES, "{context}");
        let map = format!("--map={context}");
        let totals =
            run_json(Command::new("nbdinfo").args(["--json", &map, "--totals", &export.uri()])).unwrap();
        for total in totals.as_array().unwrap() {
            let flags = total["type"].as_u64().unwrap();
            let of_these = extents.iter().filter(|extent| extent.flags == flags);
            let bytes: u64 = of_these.map(|extent| extent.len_bytes).sum();
            assert_eq!(total["size"], bytes, "{context}: {totals}");
        }
    }
}

#[test]
fn nbdinfo_finds_a_file_able_to_do_what_it_is_said_to() {
    let work = WorkDir::new("abilities").unwrap();
    let disk = work.file("disk.raw");
    disk::make(&disk, DISK_BYTES, 31).unwrap();
    let served = |further: &[&str], name: &str| {
        let socket = work.socket(name);
        (serve_raw(&disk, &socket, further).unwrap(), Export::first(socket))
    };
    let (mut process, export) = served(&[], "writable");
    ensure_able(&export);
    ensure_mapped(&export);
    assert!(process.terminate().unwrap().success());
    let (_process, export) = served(&["--read-only"], "read-only");
    for what in ["write", "trim", "zero"] {
        let output = run_any(Command::new("nbdinfo").args(["--can", what, &export.uri()])).unwrap();
        assert_eq!(output.status.code(), Some(2), "{what}");
    }
    run(Command::new("nbdinfo").args(["--is", "read-only", &export.uri()])).unwrap();
    ensure_mapped(&export);
}

#[test]
fn nbdinfo_finds_a_live_restore_able_to_do_what_it_is_said_to() {
    let captured = Captured::new("live-abilities", DISK_BYTES, 32).unwrap();
    let live = captured.start(SLOW).unwrap();
    let export = live.export();
    ensure_able(&export);
    ensure_mapped(&export);
    export.qemu_io(&["write -P 0x77 5M 64k", "flush", "read -P 0x77 5M 64k"]).unwrap();
    let info = export.info().unwrap();
    let contexts = info["exports"][0]["contexts"].as_array().unwrap();
    let bitmap = contexts.iter().filter_map(|name| name.as_str()).find(|name| name.contains("dirty-bitmap"));
    let written = export.map(bitmap.expect("what the guest writes is kept")).unwrap();
    let written: Vec<_> = written.into_iter().filter(|extent| extent.flags == 1).collect();
    assert_eq!(
        written.iter().map(|extent| (extent.offset, extent.len_bytes)).collect::<Vec<_>>(),
        [(5 * MIB, 64 << 10)]
    );
    ensure_mapped(&export);
}

#[test]
fn nbdcopy_copies_a_live_restore_out_and_another_disk_in_over_many_connections() {
    let captured = Captured::new("live-nbdcopy", DISK_BYTES, 33).unwrap();
    let live = captured.start(SLOW).unwrap();
    let uri = live.export().uri();
    let parallel = ["--connections=16", "--threads=4", "--requests=32", "--request-size=131072"];
    let copy = captured.work.file("copy.raw");
    run(Command::new("nbdcopy").args(parallel).arg(&uri).arg(&copy)).unwrap();
    disk::ensure_same(&captured.disk, &copy).unwrap();
    let other = captured.work.file("other.raw");
    disk::make(&other, DISK_BYTES, 34).unwrap();
    run(Command::new("nbdcopy").args(parallel).arg("--flush").arg(&other).arg(&uri)).unwrap();
    live.export().ensure_same(&other).unwrap();
    let (_, parked) = live.park().unwrap();
    assert!(parked.success());
}

/// What libnbd's own checks would keep from us.
#[test]
fn what_is_illegal_is_refused_by_a_live_restore_and_changes_nothing() {
    let captured = Captured::new("live-illegal", DISK_BYTES, 35).unwrap();
    let live = captured.start(SLOW).unwrap();
    let script = r#"
import errno
size = h.get_size()
h.set_strict_mode(0)

def fails_with(expected, what, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum in expected, '%s: %s' % (what, error)
    else:
        raise AssertionError('%s was accepted' % what)
    assert len(h.pread(512, 0)) == 512, 'after %s' % what

EINVAL, ENOSPC = [errno.EINVAL], [errno.ENOSPC]
for at in (size, size - 511, 2**63 - 512, 2**64 - 512):
    fails_with(EINVAL, 'a read at %d' % at, lambda: h.pread(512, at))
    fails_with(ENOSPC, 'a write at %d' % at, lambda: h.pwrite(b'x' * 512, at))
    fails_with(ENOSPC, 'zeroes at %d' % at, lambda: h.zero(512, at))
    fails_with(EINVAL, 'a trim at %d' % at, lambda: h.trim(512, at))
    fails_with(EINVAL, 'a cache at %d' % at, lambda: h.cache(512, at))
    fails_with(EINVAL, 'a status at %d' % at, lambda: h.block_status(512, at, lambda *a: 0))
fails_with(EINVAL, 'an unknown flag of a read', lambda: h.pread(512, 0, 0x4000))
fails_with(EINVAL, 'an unknown flag of a write', lambda: h.pwrite(b'x' * 512, 0, 0x4000))
fails_with(EINVAL, 'an unknown flag of a trim', lambda: h.trim(512, 0, 0x4000))
fails_with(EINVAL, 'an unknown flag of zeroes', lambda: h.zero(512, 0, 0x4000))
fails_with(EINVAL, 'an unknown flag of a flush', lambda: h.flush(0x4000))
fails_with(EINVAL, 'an unknown flag of a cache', lambda: h.cache(512, 0, 0x4000))
"#;
    live.export().nbdsh("h.add_meta_context('base:allocation')", script).unwrap();
    live.export().ensure_same(&captured.disk).unwrap();
}

#[test]
fn qemus_storage_daemon_serves_what_it_has_from_us() {
    let captured = Captured::new("storage-daemon", DISK_BYTES, 36).unwrap();
    let live = captured.start(SLOW).unwrap();
    let file = captured.work.file("file.raw");
    disk::make(&file, DISK_BYTES, 37).unwrap();
    let socket = captured.work.socket("file");
    let mut server = serve_raw(&file, &socket, &[]).unwrap();
    let again: Vec<(PathBuf, Export)> =
        vec![(captured.disk.clone(), live.export()), (file, Export::first(&socket))];
    for (number, (expected, export)) in again.into_iter().enumerate() {
        let path = captured.work.socket(&format!("again{number}"));
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!(
                "driver=nbd,node-name=d,server.type=unix,server.path={},export={},discard=unmap",
                export.socket.display(),
                export.name
            ))
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", path.display()))
            .args(["--export", "type=nbd,id=e,node-name=d,writable=on,name=again"]);
        let mut daemon = Process::spawn(&command).unwrap();
        while !path.exists() {
            assert!(daemon.is_running(), "{:?}", daemon.lines());
            std::thread::yield_now();
        }
        let again = Export::new(&path, "again");
        again.ensure_same(&expected).unwrap();
        let commands = [
            "write -P 0x21 7M 1M",
            "write -z 9M 1M",
            "discard 11M 1M",
            "aio_write -P 0x22 13M 3M",
            "aio_flush",
            "flush",
            "read -P 0x21 7M 1M",
            "read -P 0 9M 1M",
            "read -P 0x22 13M 3M",
        ];
        again.qemu_io(&commands).unwrap();
        assert!(daemon.terminate().unwrap().success());
        export.qemu_io(&["read -P 0x21 7M 1M", "read -P 0 9M 1M", "read -P 0x22 13M 3M"]).unwrap();
    }
    assert!(server.terminate().unwrap().success());
    let (_, parked) = live.park().unwrap();
    assert!(parked.success());
}
