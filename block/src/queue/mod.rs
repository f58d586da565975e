//! Single operations on an open file, by whichever way the engine has: the ring, the thread pool,
//! or the calling thread itself. What makes a disk of them (ranges, locks, retries) is in `file`.

mod inline;
mod ring;
mod threads;

use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub(crate) use inline::Inline;
pub(crate) use ring::Ring;
pub(crate) use threads::{Threads, run_on_a_thread};

use crate::AlignedBuf;

/// Between memory and file, at an offset in the file.
#[derive(Clone, Debug)]
pub(crate) struct Transfer {
    pub(crate) direction: Direction,
    /// Where in the file.
    pub(crate) offset: u64,
    /// Which bytes of the buffer.
    pub(crate) span: Range<usize>,
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
    /// A write that is done when its bytes are on stable storage.
    WriteStable,
}

impl Direction {
    pub(crate) const fn is_write(self) -> bool {
        !matches!(self, Self::Read)
    }
}

/// An operation without a buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Control {
    /// Puts all data on stable storage.
    Sync,
    /// `fallocate(2)` with this mode.
    Allocate { mode: i32, offset: u64, len: u64 },
}

/// The most bytes of one transfer: the kernel cuts at 2 GiB less a page.
const TRANSFER_MAX: usize = 1 << 30;

impl Transfer {
    /// The span, within what the kernel does at once and within the buffer.
    fn window(&self, buf: &AlignedBuf) -> Range<usize> {
        let window = self.span.start..self.span.end.min(self.span.start + TRANSFER_MAX);
        assert!(window.start <= window.end && window.end <= buf.len(), "a transfer outside its buffer");
        window
    }
}

/// A way to get operations done. A transfer may be done in part, as with the system calls.
pub(crate) trait Queue: 'static {
    fn transfer(
        &self,
        file: &Arc<OwnedFd>,
        transfer: Transfer,
        buf: AlignedBuf,
    ) -> impl Future<Output = (io::Result<usize>, AlignedBuf)>;

    fn control(&self, file: &Arc<OwnedFd>, control: Control) -> impl Future<Output = io::Result<()>>;
}
