//! The Linux kernel's own NBD client, in a guest: it has neither structured replies nor extended headers, splits and merges as it
//! likes, and has a file system on top.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use e2e::disk;
use e2e::guest::{GuestImage, ensure_sound, read_file};
use e2e::machine::Machine;
use e2e::process::Process;
use e2e::programs::ours;
use e2e::small_guest::make_nbd_initrd;
use e2e::work_dir::WorkDir;

const MIB: u64 = 1 << 20;

/// A server of `disk` on a TCP port of the loopback, which a guest reaches by its gateway. Port 0 lets the system choose.
fn serve(disk: &std::path::Path, port: u16) -> (Process, u16) {
    let mut command = ours("lifeboot-nbd").unwrap();
    command.arg(disk).args(["--listen", &format!("tcp:127.0.0.1:{port}")]);
    let mut process = Process::spawn(&command).unwrap();
    let port = process.wait_for("its port", |line| {
        let rest = &line[line.find("127.0.0.1:")? + "127.0.0.1:".len()..];
        rest.split(|byte: char| !byte.is_ascii_digit()).next()?.parse::<u16>().ok()
    });
    (process, port.unwrap())
}

#[test]
fn the_kernels_client_makes_a_file_system_and_finds_it_whole_after_the_server_was_killed() {
    let image = GuestImage::prepare().unwrap();
    let work = WorkDir::new("kernel-client").unwrap();
    let disk = work.file("disk.raw");
    disk::make(&disk, 128 * MIB, 51).unwrap();
    let (mut server, port) = serve(&disk, 0);
    let initrd = work.file("initrd");
    make_nbd_initrd(&image, &initrd).unwrap();
    let card =
        ["-netdev", "user,id=net,restrict=off", "-device", "virtio-net-pci,netdev=net"].map(str::to_owned);
    let mut machine = Machine::start_small(&image, &initrd, &card, work.path()).unwrap();
    machine.wait_ready().unwrap();
    machine.run("ip link set lo up && ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0").unwrap();
    // Several connections are several sockets of one device: flushes on one of them must cover the writes of all.
    let connect = format!("nbd-client 10.0.2.2 {port} /dev/nbd0 -connections 4 -block-size 512");
    println!("{}", machine.run(&connect).unwrap());
    assert_eq!(machine.run("blockdev --getsize64 /dev/nbd0").unwrap().trim(), (128 * MIB).to_string());
    machine.run("mkfs.ext4 -q -F -E discard /dev/nbd0 && mount /dev/nbd0 /tmp").unwrap();
    let fio = |further: &str| {
        format!(
            "fio --name=kernel --directory=/tmp --ioengine=psync --direct=1 --rw=randwrite --bsrange=4k-256k --size=32M --fsync=32 \
             --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed=3 --allow_file_create=1 --output-format=terse {further}"
        )
    };
    machine.run(&fio("")).unwrap();
    machine.run("echo kept >/tmp/kept && sync && umount /tmp").unwrap();
    machine.run("nbd-client -d /dev/nbd0").unwrap();
    ensure_sound(&disk).unwrap();

    // What was flushed is there though the server is killed, and the guest connects anew.
    server.kill().unwrap();
    let (_server, again) = serve(&disk, port);
    assert_eq!(again, port);
    machine.run(&connect).unwrap();
    machine.run("fsck.ext4 -f -n /dev/nbd0 && mount /dev/nbd0 /tmp").unwrap();
    assert_eq!(machine.run("cat /tmp/kept").unwrap().trim(), "kept");
    machine.run(&fio("--verify_only=1")).unwrap();
    machine.run("umount /tmp && nbd-client -d /dev/nbd0").unwrap();
    assert_eq!(machine.run("dmesg | grep -ci 'i/o error' || true").unwrap().trim(), "0");
    machine.process().write_line("0 echo o > /proc/sysrq-trigger").unwrap();
    machine.process().wait_success().unwrap();
    ensure_sound(&disk).unwrap();
    assert_eq!(read_file(&disk, "/kept").unwrap(), b"kept\n");
}
