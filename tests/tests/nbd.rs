//! `lifeboot-nbd` serves a raw file to clients that others wrote.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use e2e::disk;
use e2e::lifeboot::serve_raw;
use e2e::nbd::Export;
use e2e::process::{Process, run, run_any, run_json};
use e2e::programs::ours;
use e2e::work_dir::WorkDir;
use serde_json::Value;

const DISK_BYTES: u64 = 96 << 20;
const MIB: u64 = 1 << 20;

/// A served disk. Its directory goes last.
struct Served {
    export: Export,
    process: Process,
    disk: PathBuf,
    work: WorkDir,
}

fn serve(name: &str, further: &[&str]) -> Served {
    let work = WorkDir::new(name).unwrap();
    let disk = work.file("disk.raw");
    disk::make(&disk, DISK_BYTES, 1).unwrap();
    let socket = work.socket("nbd");
    let process = serve_raw(&disk, &socket, further).unwrap();
    Served { export: Export::first(socket), process, disk, work }
}

#[test]
fn qemu_img_copies_the_disk_out() {
    let served = serve("convert-out", &[]);
    let copy = served.work.file("copy.raw");
    served.export.convert_to(&copy).unwrap();
    disk::ensure_same(&served.disk, &copy).unwrap();
    served.export.ensure_same(&copy).unwrap();
}

#[test]
fn qemu_img_copies_a_disk_in() {
    let served = serve("convert-in", &[]);
    let other = served.work.file("other.raw");
    disk::make(&other, DISK_BYTES, 2).unwrap();
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw"]).arg(&other);
    run(convert.arg(served.export.uri())).unwrap();
    disk::ensure_same(&served.disk, &other).unwrap();
}

#[test]
fn the_map_calls_no_data_a_hole_and_finds_the_holes() {
    let served = serve("map", &[]);
    let bytes = fs::read(&served.disk).unwrap();
    let extents = served.export.map("base:allocation").unwrap();
    let mut end = 0;
    for extent in &extents {
        assert_eq!(extent.offset, end, "extents follow one another");
        end += extent.len_bytes;
        let reads_zero = extent.flags & 2 != 0;
        let range = usize::try_from(extent.offset).unwrap()..usize::try_from(end).unwrap();
        assert!(!reads_zero || bytes[range].iter().all(|&byte| byte == 0), "data in {extent:?}");
    }
    assert_eq!(end, DISK_BYTES);
    let data: u64 =
        extents.iter().filter(|extent| extent.flags & 1 == 0).map(|extent| extent.len_bytes).sum();
    let allocated = disk::allocated_bytes(&served.disk).unwrap();
    assert!(data <= allocated + MIB, "{data} bytes are said to be data, {allocated} are");

    let mut map = Command::new("qemu-img");
    let seen = run_json(map.args(["map", "--output=json", "-f", "raw", &served.export.uri()])).unwrap();
    let seen_data: u64 = seen
        .as_array()
        .unwrap()
        .iter()
        .filter(|e| e["data"] == true)
        .map(|e| e["length"].as_u64().unwrap())
        .sum();
    assert_eq!(seen_data, data, "qemu-img sees what nbdinfo sees");
}

#[test]
fn qemu_io_reads_back_its_patterns() {
    let served = serve("qemu-io", &[]);
    let commands = [
        "write -P 0xa1 0 64k",
        "write -P 0xa2 64k 1M",
        // Finer than a block, across its edges, across chunks.
        "write -P 0xa3 3584 1024",
        "write -P 0xa4 1048064 1536",
        "write -f -P 0xa5 5M 4k",
        "write -z 6M 1M",
        "write -z -u 8M 3M",
        "discard 12M 2M",
        "flush",
        "read -P 0xa1 0 3584",
        "read -P 0xa3 3584 1024",
        "read -P 0xa1 4608 60928",
        "read -P 0xa2 64k 959k",
        "read -P 0xa4 1048064 1536",
        "read -P 0xa5 5M 4k",
        "read -P 0 6M 1M",
        "read -P 0 8M 3M",
        "aio_write -P 0xb1 20M 1M",
        "aio_write -P 0xb2 21M 1M",
        "aio_write -z 22M 1M",
        "aio_flush",
        "read -P 0xb1 20M 1M",
        "read -P 0xb2 21M 1M",
        "read -P 0 22M 1M",
        "writev -P 0xc1 30M 512 3584 64k",
        "readv -P 0xc1 30M 512 3584 64k",
    ];
    served.export.qemu_io(&commands).unwrap();
    let bytes = fs::read(&served.disk).unwrap();
    assert!(bytes[5 << 20..][..4096].iter().all(|&byte| byte == 0xa5), "the file has what was written");
}

#[test]
fn nbdinfo_finds_what_the_server_can_do() {
    let served = serve("nbdinfo", &[]);
    let info = served.export.info().unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], DISK_BYTES);
    let able = [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ];
    for what in able {
        assert_eq!(export[what], true, "{what} in {export}");
    }
    assert_eq!(export["is_read_only"], false);
    let contexts = export["contexts"].as_array().unwrap();
    assert!(contexts.contains(&Value::from("base:allocation")), "{export}");
    let size = |which: &str| export[which].as_u64().unwrap();
    assert_eq!(size("block_size_minimum"), 1);
    assert!(size("block_size_preferred") >= 4096 && size("block_size_maximum") >= 32 * MIB, "{export}");

    for what in
        ["connect", "structured-reply", "write", "flush", "fua", "trim", "zero", "df", "cache", "multi-conn"]
    {
        run(Command::new("nbdinfo").args(["--can", what, &served.export.uri()])).unwrap();
    }
    let list = run_json(Command::new("nbdinfo").args(["--json", "--list", &served.export.uri()])).unwrap();
    assert_eq!(list["exports"].as_array().map(Vec::len), Some(1), "{list}");
}

#[test]
fn nbdcopy_copies_both_ways_over_several_connections() {
    let served = serve("nbdcopy", &[]);
    let parallel = ["--connections=4", "--requests=16", "--request-size=262144"];
    let copy = served.work.file("copy.raw");
    fs::File::create(&copy).unwrap().set_len(DISK_BYTES).unwrap();
    run(Command::new("nbdcopy").args(parallel).arg(served.export.uri()).arg(&copy)).unwrap();
    disk::ensure_same(&served.disk, &copy).unwrap();

    let other = served.work.file("other.raw");
    disk::make(&other, DISK_BYTES, 3).unwrap();
    run(Command::new("nbdcopy").args(parallel).arg("--flush").arg(&other).arg(served.export.uri())).unwrap();
    disk::ensure_same(&served.disk, &other).unwrap();
}

#[test]
fn fio_verifies_what_four_connections_wrote() {
    let served = serve("fio", &[]);
    let uri = format!("--uri={}", served.export.uri());
    let mut fio = Command::new("fio");
    fio.args([
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bsrange=512-128k",
        "--blockalign=512",
    ])
    .args(["--size=24M", "--offset_increment=24M", "--numjobs=4", "--iodepth=16", "--fsync=64"])
    .args([
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_backlog=256",
        "--randseed=7",
        "--group_reporting",
    ])
    .args(["--output-format=json", "--output=report.json"])
    .current_dir(served.work.path());
    run(&mut fio).unwrap();
    let report = fs::read_to_string(served.work.file("report.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0);
    assert!(job["write"]["total_ios"].as_u64().unwrap() > 0, "{job}");
}

#[test]
fn a_request_beyond_the_rules_gets_its_error_and_the_connection_goes_on() {
    let served = serve("strict-off", &[]);
    let script = format!(
        r#"
import errno, os
size = {DISK_BYTES}
# libnbd would refuse most of what follows by itself.
h.set_strict_mode(0)

def fails_with(expected, what, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == expected, '%s: %s' % (what, error)
    else:
        raise AssertionError('%s was accepted' % what)
    assert len(h.pread(512, 0)) == 512, 'after %s' % what

fails_with(errno.EINVAL, 'a read past the end', lambda: h.pread(512, size))
fails_with(errno.EINVAL, 'a read across the end', lambda: h.pread(1024, size - 512))
fails_with(errno.EINVAL, 'a read far out', lambda: h.pread(512, 2**63 - 512))
fails_with(errno.ENOSPC, 'a write past the end', lambda: h.pwrite(b'x' * 512, size))
fails_with(errno.ENOSPC, 'a write across the end', lambda: h.pwrite(b'x' * 1024, size - 512))
fails_with(errno.ENOSPC, 'zeroes past the end', lambda: h.zero(512, size))
fails_with(errno.EINVAL, 'a trim past the end', lambda: h.trim(512, size))
fails_with(errno.EINVAL, 'an unknown flag', lambda: h.flush(0x4000))
before = h.pread(4096, 1 << 20)
h.pwrite(b'y', (1 << 20) + 17)
after = h.pread(4096, 1 << 20)
assert after == before[:17] + b'y' + before[18:], 'a byte is written alone'
h.pwrite(b'z' * 4096, size - 4096, nbd.CMD_FLAG_FUA)
assert h.pread(4096, size - 4096) == b'z' * 4096
h.zero(4096, size - 4096, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, size - 4096) == bytes(4096)
h.cache(65536, 0)
h.flush()
"#
    );
    served.export.nbdsh("", &script).unwrap();
    served.export.info().unwrap();
}

#[test]
fn a_client_without_structured_replies_is_served_as_well() {
    let served = serve("simple", &[]);
    let script = r#"
assert not h.get_structured_replies_negotiated()
data = h.pread(1 << 20, 0)
h.pwrite(data[::-1], 0)
assert h.pread(1 << 20, 0) == data[::-1]
h.pwrite(data, 0)
"#;
    served.export.nbdsh("h.set_request_structured_replies(False)", script).unwrap();
}

#[test]
fn a_client_that_vanishes_in_the_middle_costs_nobody_else_anything() {
    let served = serve("vanish", &[]);
    let script = r#"
import os
for n in range(32):
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(1 << 20)), 0)
os._exit(0)
"#;
    for _ in 0..8 {
        served.export.nbdsh("", script).unwrap();
    }
    served.export.qemu_io(&["write -P 0x55 0 1M", "read -P 0x55 0 1M"]).unwrap();
}

#[test]
fn silent_and_babbling_strangers_keep_nobody_out() {
    let served = serve("strangers", &[]);
    let mut noise = disk::Noise::new(5);
    let mut strangers = Vec::new();
    for number in 0..32 {
        let mut stranger = UnixStream::connect(&served.export.socket).unwrap();
        let babble = noise.bytes(number * 37);
        // It may have hung up already.
        let _ = stranger.write_all(&babble);
        strangers.push(stranger);
    }
    served.export.ensure_same(&served.disk).unwrap();
    drop(strangers);
    served.export.info().unwrap();
}

#[test]
fn a_read_only_export_says_so_and_changes_nothing() {
    let served = serve("read-only", &["--read-only"]);
    let before = served.work.file("before.raw");
    fs::copy(&served.disk, &before).unwrap();
    assert_eq!(served.export.info().unwrap()["exports"][0]["is_read_only"], true);
    let script = r#"
import errno
h.set_strict_mode(0)
for what in (lambda: h.pwrite(b'x' * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
    try:
        what()
    except nbd.Error as error:
        assert error.errnum == errno.EPERM, error
    else:
        raise AssertionError('a change was accepted')
"#;
    served.export.nbdsh("", script).unwrap();
    disk::ensure_same(&served.disk, &before).unwrap();
}

#[test]
fn a_killed_servers_socket_is_taken_over_and_a_live_ones_is_not() {
    let mut served = serve("takeover", &[]);
    let mut second = ours("lifeboot-nbd").unwrap();
    second.arg(&served.disk).arg("--listen").arg(format!("unix:{}", served.export.socket.display()));
    let refused = run_any(&mut second).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", String::from_utf8_lossy(&refused.stderr));
    served.export.info().unwrap();

    served.process.kill().unwrap();
    assert!(served.export.socket.exists(), "the killed server left its socket behind");
    served.process = serve_raw(&served.disk, &served.export.socket, &[]).unwrap();
    served.export.info().unwrap();
}

#[test]
fn both_engines_serve_over_tcp_too() {
    for engine in ["uring", "threads"] {
        let work = WorkDir::new("tcp").unwrap();
        let disk = work.file("disk.raw");
        disk::make(&disk, DISK_BYTES, 4).unwrap();
        let mut command = ours("lifeboot-nbd").unwrap();
        command.arg(&disk).args(["--listen", "tcp:127.0.0.1:0", "--io-engine", engine]);
        let mut process = Process::spawn(&command).unwrap();
        let port = process.wait_for("its port", |line| {
            let rest = &line[line.find("127.0.0.1:")? + "127.0.0.1:".len()..];
            rest.split(|byte: char| !byte.is_ascii_digit()).next()?.parse::<u16>().ok()
        });
        let uri = format!("nbd://127.0.0.1:{}", port.unwrap());
        let info = run_json(Command::new("nbdinfo").args(["--json", &uri])).unwrap();
        assert_eq!(info["exports"][0]["export-size"], Value::from(DISK_BYTES));
        run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw", &uri]).arg(&disk)).unwrap();
        assert!(process.terminate().unwrap().success(), "{engine}: SIGTERM is a good end");
    }
}

#[test]
fn nbdinfo_and_libnbd_start_the_server_that_they_ask() {
    let work = WorkDir::new("started").unwrap();
    let disk = work.file("disk.raw");
    disk::make(&disk, DISK_BYTES, 9).unwrap();
    let program = ours("lifeboot-nbd").unwrap().get_program().to_owned();
    // A socket that listens is given in either case; the first serves one connection of it.
    for further in [&["--stdio"][..], &[]] {
        let mut nbdinfo = Command::new("nbdinfo");
        nbdinfo.args(["--json", "--", "["]).arg(&program).args(further).arg(&disk).arg("]");
        let said = run_json(&mut nbdinfo).unwrap();
        assert_eq!(said["exports"][0]["export-size"], DISK_BYTES);
    }
    // A socket that is connected already, as stdin and stdout.
    let script = format!(
        "import nbd\nh = nbd.NBD()\nh.connect_command([{:?}, '--stdio', {:?}])\nprint(h.get_size())\nh.shutdown()\n",
        program.display().to_string(),
        disk.display().to_string()
    );
    let said = run(Command::new("/usr/bin/python3").args(["-c", &script])).unwrap();
    assert_eq!(said.trim(), DISK_BYTES.to_string());
}
