//! The server on vsock, in a guest whose kernel leads it back to itself: hosts of tests have neither a guest with a CID nor always the
//! module.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use e2e::guest::GuestImage;
use e2e::machine::Machine;
use e2e::programs::ours;
use e2e::small_guest::make_vsock_initrd;
use e2e::work_dir::WorkDir;

#[test]
fn a_disk_is_copied_and_verified_over_vsock() {
    let image = GuestImage::prepare().unwrap();
    let work = WorkDir::new("vsock").unwrap();
    let initrd = work.file("initrd");
    make_vsock_initrd(&image, &initrd, &ours("lifeboot-nbd").unwrap()).unwrap();
    let mut machine = Machine::start_small(&image, &initrd, &[], work.path()).unwrap();
    machine.wait_ready().unwrap();
    // Its end is no whole chunk of anything.
    machine
        .run("dd if=/dev/urandom of=/disk bs=1M count=20 && dd if=/dev/urandom bs=512 count=3 >>/disk")
        .unwrap();
    let server = "lifeboot-nbd /disk --listen vsock:any:10809 >/log 2>&1 & echo $! >/pid";
    machine.run(server).unwrap();
    let up = "for try in {1..100}; do grep -q vsock /log && exit; sleep 0.1; done; cat /log; exit 1";
    machine.run(up).unwrap();
    let info = machine.run("nbdinfo nbd+vsock://1").unwrap();
    assert!(info.contains("newstyle-fixed"), "{info}");
    // Out of it, and back into it, over several connections.
    machine.run("nbdcopy --connections=4 nbd+vsock://1 /copy && cmp /copy /disk").unwrap();
    machine.run("dd if=/dev/zero of=/blank bs=1M count=8 && nbdcopy --connections=4 --allocated /blank nbd+vsock://1").unwrap();
    machine.run("cmp -n 8388608 /disk /blank && cmp -i 8388608 /disk /copy").unwrap();
    let fio = "fio --name=vsock --ioengine=nbd --uri=nbd+vsock://1 --rw=randwrite --bsrange=4k-1M --size=16M --iodepth=16 \
               --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed=5 --output-format=terse";
    machine.run(fio).unwrap();
    machine.run("kill $(cat /pid); for try in {1..100}; do [[ -d /proc/$(cat /pid) ]] || exit 0; sleep 0.1; done; exit 1").unwrap();
    let log = machine.run("cat /log").unwrap();
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
    machine.process().write_line("0 echo o > /proc/sysrq-trigger").unwrap();
    machine.process().wait_success().unwrap();
}
