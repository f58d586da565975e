//! What NBD has beyond reading and writing, as clients and servers that others wrote see it: lengths beyond 32 bits, CACHE, damage
//! with its place and a reason, and our own client against QEMU's server.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use e2e::captured::Captured;
use e2e::disk;
use e2e::lifeboot::{LiveRestore, lifeboot, serve_raw};
use e2e::nbd::{Export, Extent};
use e2e::process::{Process, run, run_json};
use e2e::programs::newer_qemu;
use e2e::work_dir::WorkDir;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Holds the background back, so that what a client asks for is still in the backup.
const SLOW: &[&str] = &["--limit", "4KiB"];

/// How the last client that began to transmit does it.
fn replies_of_client(process: &mut Process) -> String {
    process.wait_for_text("a client transmits").unwrap()
}

/// One of QEMU's tools, as it is installed.
fn installed(name: &str) -> Command {
    Command::new(name)
}

#[test]
fn qemu_zeroes_a_hundred_gigabytes_and_finds_them_in_the_map() {
    // What is installed may be as new.
    zero_a_hundred_gigabytes("terabyte", installed, "");
}

#[test]
fn a_newer_qemu_does_it_with_extended_headers() {
    if newer_qemu("qemu-io").unwrap().is_none() {
        println!("not tested: there is no QEMU 8.2 or newer here");
        return;
    }
    zero_a_hundred_gigabytes("terabyte-extended", |name| newer_qemu(name).unwrap().unwrap(), "Extended");
}

#[test]
fn a_newer_qemu_copies_a_disk_home_with_extended_headers() {
    let Some(mut qemu_img) = newer_qemu("qemu-img").unwrap() else {
        println!("not tested: there is no QEMU 8.2 or newer here");
        return;
    };
    let captured = Captured::new("extended-copy", 64 * MIB, 18).unwrap();
    let mut live = captured.start(&["--no-background", "-vv"]).unwrap();
    let copy = captured.work.file("copy.raw");
    run(qemu_img.args(["convert", "-W", "-m", "16", "-O", "raw", &live.export().uri()]).arg(&copy)).unwrap();
    disk::ensure_same(&captured.disk, &copy).unwrap();
    let line = replies_of_client(live.process());
    assert!(line.contains("Extended"), "{line}");
    let (_, parked) = live.park().unwrap();
    assert!(parked.success(), "{parked}");
}

/// Writes of zeroes in one request, with extended headers, or in thousands; with these tools of QEMU's. How the server replies.
fn zero_a_hundred_gigabytes(name: &str, tool: impl Fn(&str) -> Command, style: &str) {
    let work = WorkDir::new(name).unwrap();
    let (disk, size) = (work.file("disk.raw"), 1024 * GIB);
    fs::File::create(&disk).unwrap().set_len(size).unwrap();
    let socket = work.socket("nbd");
    let mut process = serve_raw(&disk, &socket, &["-vv"]).unwrap();
    let export = Export::first(socket);
    process.skip_output();
    let commands = [
        "write -P 0xa1 0 1M",
        "write -P 0xa2 60G 1M",
        "write -P 0xa3 900G 1M",
        // Only if it is fast: a server that wrote zeroes would be refused, and be here for long. In one request with extended
        // headers, else in thousands.
        "write -z -u -n 512k 100G",
        "read -P 0xa1 0 512k",
        "read -P 0 512k 512k",
        "read -P 0 60G 1M",
        "read -P 0xa3 900G 1M",
    ];
    export.qemu_io_by(tool("qemu-io"), &commands).unwrap();
    let line = replies_of_client(&mut process);
    assert!(line.contains(style), "{line}");

    let mut map = tool("qemu-img");
    let seen = run_json(map.args(["map", "--output=json", "-f", "raw", &export.uri()])).unwrap();
    let data = |extent: &serde_json::Value| {
        (extent["data"] == true)
            .then(|| (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap()))
    };
    let seen: Vec<_> = seen.as_array().unwrap().iter().filter_map(data).collect();
    assert_eq!(seen, [(0, MIB / 2), (900 * GIB, MIB)]);

    let extents = export.map("base:allocation").unwrap();
    let mut end = 0;
    for extent in &extents {
        assert_eq!(extent.offset, end, "extents follow one another: {extents:?}");
        end += extent.len_bytes;
    }
    assert_eq!(end, size);
    let data: u64 = extents.iter().filter(|extent| extent.flags == 0).map(|extent| extent.len_bytes).sum();
    assert_eq!(data, MIB / 2 + MIB);
}

fn at_home(live: &LiveRestore) -> Vec<Extent> {
    let map = live.export().map("qemu:allocation-depth").unwrap();
    map.into_iter().filter(|extent| extent.flags == 1).collect()
}

#[test]
fn cache_brings_its_range_home_and_no_more() {
    let captured = Captured::new("cache", 64 * MIB, 17).unwrap();
    let live = captured.start(SLOW).unwrap();
    let covers = |offset: u64, len: u64| {
        at_home(&live).iter().any(|run| run.offset <= offset && offset + len <= run.offset + run.len_bytes)
    };
    assert!(!covers(16 * MIB, 4 * MIB));
    // What is said of the range when CACHE was answered is true: nobody has to wait for it.
    let script = format!(
        r#"
assert h.can_cache()
h.set_strict_mode(0)
h.cache({}, {})
h.cache(0, 0)
try:
    h.cache(512, h.get_size())
except nbd.Error as error:
    assert error.errno == 'EINVAL', error
else:
    raise AssertionError('a CACHE past the end was accepted')
"#,
        4 * MIB,
        16 * MIB,
    );
    live.export().nbdsh("", &script).unwrap();
    assert!(covers(16 * MIB, 4 * MIB), "{:?}", at_home(&live));
    let home: u64 = at_home(&live).iter().map(|run| run.len_bytes).sum();
    assert!(home < 32 * MIB, "more came home than was asked for: {home} bytes");
    live.export().ensure_same(&captured.disk).unwrap();
}

#[test]
fn cache_of_a_plain_file_is_served() {
    let work = WorkDir::new("cache-file").unwrap();
    let disk = work.file("disk.raw");
    disk::make(&disk, 16 * MIB, 1).unwrap();
    let socket = work.socket("nbd");
    let _process = serve_raw(&disk, &socket, &[]).unwrap();
    let export = Export::first(socket);
    export.nbdsh("", "h.cache(h.get_size(), 0)\nh.cache(1, h.get_size() - 1)").unwrap();
    export.ensure_same(&disk).unwrap();
}

#[test]
fn a_damaged_chunk_is_named_to_the_client_with_its_place() {
    let captured = Captured::new("damage-named", 64 * MIB, 23).unwrap();
    let packs = captured.repository.path().join("packs");
    let entries = fs::read_dir(packs).unwrap().map(|entry| entry.unwrap().path());
    let pack = entries.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(&pack).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[!byte[0]], middle).unwrap();

    let live = captured.start(SLOW).unwrap();
    let setup = r#"
said = []
h.set_debug(True)
h.set_debug_callback(lambda context, text: said.append(text))
"#;
    // The chunks of a structured reply come one by one: those of data, and one that says where it ends, and why.
    let script = r#"
import errno
places = []
def chunk(data, offset, status, error):
    if status == nbd.READ_ERROR:
        places.append((offset, error.value))
size, step = h.get_size(), 4 << 20
for start in range(0, size, step):
    try:
        h.pread_structured(step, start, chunk)
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error
assert places and all(code == errno.EIO for _, code in places), places
why = [text for text in said if 'is damaged' in text]
assert why, 'nobody said why'
offset = places[0][0]
assert 'chunk' in why[0] and 'bytes %d..' % offset in why[0], (offset, why)
assert '\n' not in why[0].rstrip('\n'), why
# What is said to be damaged is; what lies before it can be read.
for step in (0, 4096):
    try:
        h.pread(512, offset + step)
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error
    else:
        raise AssertionError('%d can be read' % offset)
if offset > 0:
    h.pread(512, offset - 512)
"#;
    live.export().nbdsh(setup, script).unwrap();
}

#[test]
fn our_client_asks_qemus_server_what_lies_how_deep() {
    ask_how_deep("qemu-depth", installed);
}

#[test]
fn our_client_asks_a_newer_qemus_server_with_extended_headers() {
    if newer_qemu("qemu-nbd").unwrap().is_none() {
        println!("not tested: there is no QEMU 8.2 or newer here");
        return;
    }
    ask_how_deep("qemu-depth-extended", |name| newer_qemu(name).unwrap().unwrap());
}

fn ask_how_deep(name: &str, tool: impl Fn(&str) -> Command) {
    let work = WorkDir::new(name).unwrap();
    let (base, overlay, socket) = (work.file("base.qcow2"), work.file("overlay.qcow2"), work.socket("nbd"));
    let size = 64 * GIB;
    let qemu_img = |arguments: &[&str]| run(tool("qemu-img").args(arguments)).unwrap();
    let (base, overlay) = (base.to_str().unwrap(), overlay.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", base, &size.to_string()]);
    run(tool("qemu-io").args(["-c", "write 1G 1M", "-c", "write 50G 2M", base])).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay]);
    run(tool("qemu-io").args(["-c", "write 50G 1M", "-c", "write 60G 1M", overlay])).unwrap();
    let mut server = tool("qemu-nbd");
    server
        .args(["--persistent", "--allocation-depth", "--format", "qcow2", "--socket"])
        .arg(&socket)
        .arg(overlay);
    let mut server = Process::spawn(&server).unwrap();
    while !socket.exists() {
        assert!(server.is_running(), "{:?}", server.lines());
        std::thread::yield_now();
    }
    let listen = format!("unix:{}", socket.display());
    let said = run_json(&mut lifeboot(["status", "--json", "--listen", &listen]).unwrap()).unwrap();
    assert_eq!((&said["size"], &said["absent_bytes"]), (&size.into(), &(2 * MIB).into()), "{said}");
    let told = run(&mut lifeboot(["status", "--listen", &listen]).unwrap()).unwrap();
    assert!(told.contains("EXPORT") && !told.contains("LIVE-RESTORE"), "{told}");
}
