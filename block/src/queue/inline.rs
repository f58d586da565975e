//! Operations as plain system calls on the calling thread, which blocks meanwhile.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::{Errno, IoSlice, ReadWriteFlags};

use super::{Control, Direction, Queue, Transfer};
use crate::AlignedBuf;

/// The calling thread. For threads of their own that have nothing else to do.
pub(crate) struct Inline;

impl Queue for Inline {
    async fn transfer(
        &self,
        file: &Arc<OwnedFd>,
        transfer: Transfer,
        mut buf: AlignedBuf,
    ) -> (io::Result<usize>, AlignedBuf) {
        let result = perform_transfer(file.as_fd(), &transfer, &mut buf);
        (result, buf)
    }

    async fn control(&self, file: &Arc<OwnedFd>, control: Control) -> io::Result<()> {
        perform_control(file.as_fd(), control)
    }
}

pub(super) fn perform_transfer(
    file: BorrowedFd<'_>,
    transfer: &Transfer,
    buf: &mut AlignedBuf,
) -> io::Result<usize> {
    let window = transfer.window(buf);
    let offset = transfer.offset;
    uninterrupted(|| match transfer.direction {
        Direction::Read => rustix::io::pread(file, &mut buf[window.clone()], offset),
        Direction::Write => rustix::io::pwrite(file, &buf[window.clone()], offset),
        Direction::WriteStable => {
            let slices = [IoSlice::new(&buf[window.clone()])];
            rustix::io::pwritev2(file, &slices, offset, ReadWriteFlags::DSYNC)
        }
    })
}

pub(super) fn perform_control(file: BorrowedFd<'_>, control: Control) -> io::Result<()> {
    uninterrupted(|| match control {
        Control::Sync => rustix::fs::fdatasync(file),
        Control::Allocate { mode, offset, len } => {
            rustix::fs::fallocate(file, FallocateFlags::from_bits_retain(mode as u32), offset, len)
        }
    })
}

fn uninterrupted<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}
