//! Whether `io_uring` works here: tried for real, not read from a version number.

use std::io::{self, Write};
use std::os::fd::AsRawFd;

use io_uring::{IoUring, Probe, opcode, types};

/// Entries of a submission queue. More operations than this may be in flight.
const ENTRIES: u32 = 256;
/// Entries of a completion queue: above what one shard keeps in flight, so that it never overflows.
const COMPLETIONS: u32 = 4096;

/// How rings are set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setup {
    /// The flags of Linux 6.0 that spare interrupts between processors: a ring belongs to one thread here.
    cooperative: bool,
}

impl Setup {
    fn ring(self) -> io_uring::Builder {
        let mut ring = IoUring::builder();
        ring.setup_cqsize(COMPLETIONS);
        if self.cooperative {
            // Not DEFER_TASKRUN: with tokio-uring 0.5 it hangs on O_DIRECT.
            ring.setup_coop_taskrun().setup_single_issuer();
        }
        ring
    }

    pub(super) fn runtime(self) -> io::Result<tokio_uring::Runtime> {
        tokio_uring::Runtime::new(tokio_uring::builder().entries(ENTRIES).uring_builder(&self.ring()))
    }
}

/// Makes a ring as the shards will, checks that it knows our operations, and reads through it.
pub(super) fn probe() -> io::Result<Setup> {
    let cooperative = Setup { cooperative: true };
    match try_ring(cooperative) {
        Ok(()) => Ok(cooperative),
        // The kernel is older than these flags.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let plain = Setup { cooperative: false };
            try_ring(plain)?;
            Ok(plain)
        }
        Err(error) => Err(error),
    }
}

fn try_ring(setup: Setup) -> io::Result<()> {
    let mut ring: IoUring = setup.ring().build(ENTRIES)?;
    let mut known = Probe::new();
    ring.submitter().register_probe(&mut known)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::ReadFixed::CODE,
        opcode::WriteFixed::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
    ];
    if !needed.iter().all(|&code| known.is_supported(code)) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring is too old"));
    }
    let fd = rustix::fs::memfd_create("lifeboot-probe", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(b"probe")?;
    let mut buf = [0u8; 5];
    let read = opcode::Read::new(types::Fd(file.as_raw_fd()), buf.as_mut_ptr(), 5).offset(0).build();
    // SAFETY: `buf` and `file` outlive the operation: its completion is awaited in this function, and where
    // that fails, dropping the ring cancels it and waits.
    unsafe { ring.submission().push(&read) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().map(|entry| entry.result());
    match result {
        Some(5) if buf == *b"probe" => Ok(()),
        Some(error) if error < 0 => Err(io::Error::from_raw_os_error(-error)),
        other => Err(io::Error::other(format!("a read through the ring came to {other:?}"))),
    }
}
