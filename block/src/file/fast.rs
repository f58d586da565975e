//! What can be done at once on the calling thread, because it is in the page cache. In direct mode
//! nothing is.

use std::cell::Cell;
use std::io::IoSliceMut;
use std::os::fd::AsFd;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::io::{Errno, ReadWriteFlags};

use super::Inner;
use crate::{Attempt, ByteRange, Result};

/// The most bytes written inline: what a socket brings at a time.
const INLINE_WRITE_MAX: usize = 512 << 10;
/// A page of the cache.
const PAGE: u64 = 4096;
/// An inline write that took longer than this was made to wait, or its thread had to give way meanwhile.
const STALL: Duration = Duration::from_millis(1);
/// Two stalls with fewer writes than this between them are the kernel's throttling of whoever dirties pages
/// faster than the disk takes them.
const WRITES_BETWEEN_STALLS: u32 = 32;
/// How many writes then go to the queue, where waiting holds up nobody else.
const WRITES_AFTER_STALLS: u32 = 256;

/// What was found not to work. Shared by all handles of a disk.
#[derive(Debug, Default)]
pub(super) struct Missing {
    nowait: AtomicBool,
    cachestat: AtomicBool,
}

/// Whether a handle may write inline now.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Writes that still go to the queue.
    detours: Cell<u32>,
    /// Writes for which the last stall still counts.
    suspicion: Cell<u32>,
}

impl Pace {
    fn takes_a_detour(&self) -> bool {
        let left = self.detours.get();
        self.detours.set(left.saturating_sub(1));
        left > 0
    }

    fn wrote(&self, took: Duration) {
        let suspicion = self.suspicion.get();
        if took <= STALL {
            self.suspicion.set(suspicion.saturating_sub(1));
        } else if suspicion == 0 {
            self.suspicion.set(WRITES_BETWEEN_STALLS);
        } else {
            self.suspicion.set(0);
            self.detours.set(WRITES_AFTER_STALLS);
        }
    }
}

pub(super) fn try_read(inner: &Inner, offset: u64, buf: &mut [u8]) -> Result<Attempt> {
    inner.range(offset, buf.len())?;
    if buf.is_empty() {
        return Ok(Attempt::Done);
    }
    if inner.is_direct() || inner.missing.nowait.load(Ordering::Relaxed) {
        return Ok(Attempt::WouldWait);
    }
    let len = buf.len();
    match read_nowait(inner, offset, buf) {
        Ok(count) if count == len => Ok(Attempt::Done),
        Ok(_) => Ok(Attempt::WouldWait),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            inner.missing.nowait.store(true, Ordering::Relaxed);
            Ok(Attempt::WouldWait)
        }
        // Whatever it is, the waiting form meets it again and reports it.
        Err(_) => Ok(Attempt::WouldWait),
    }
}

/// Writes small requests with a plain `pwrite`, which only copies into the page cache; most file systems refuse to
/// promise that (RWF_NOWAIT), so what may make it wait is bounded here: its size, edges of pages that would have
/// to be read first, and the kernel's throttling, of which few writes get a taste.
pub(super) fn try_write(inner: &Inner, pace: &Pace, offset: u64, data: &[u8]) -> Result<Attempt> {
    inner.check_writable()?;
    let range = inner.range(offset, data.len())?;
    if range.is_empty() {
        return Ok(Attempt::Done);
    }
    if inner.is_direct() || data.len() > INLINE_WRITE_MAX || pace.takes_a_detour() {
        return Ok(Attempt::WouldWait);
    }
    if !range.is_aligned(PAGE) && !edges_are_resident(inner, range) {
        return Ok(Attempt::WouldWait);
    }
    let begun = Instant::now();
    let written = rustix::io::pwrite(&inner.fd, data, offset);
    pace.wrote(begun.elapsed());
    match written {
        Ok(count) if count == data.len() => Ok(Attempt::Done),
        // In part, or not at all: the waiting form does all of it, or reports why not.
        Ok(_) | Err(_) => Ok(Attempt::WouldWait),
    }
}

/// Whether all of `range` is in the page cache.
pub(super) fn is_resident(inner: &Inner, range: ByteRange) -> bool {
    if inner.is_direct() || range.is_empty() || !range.fits(inner.geometry.size) {
        return false;
    }
    if !inner.missing.cachestat.load(Ordering::Relaxed) {
        match cached_pages(inner.fd.as_fd(), range) {
            Some(pages) => return pages == range.units(PAGE).end - range.units(PAGE).start,
            None => inner.missing.cachestat.store(true, Ordering::Relaxed),
        }
    }
    // Before Linux 6.5 both ends have to speak for the whole: pages come and go in runs.
    edges_are_resident(inner, range)
}

fn edges_are_resident(inner: &Inner, range: ByteRange) -> bool {
    [range.start(), range.end() - 1].iter().all(|&at| read_nowait(inner, at, &mut [0]) == Ok(1))
}

fn read_nowait(inner: &Inner, offset: u64, buf: &mut [u8]) -> rustix::io::Result<usize> {
    rustix::io::preadv2(&inner.fd, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT)
}

/// `cachestat(2)`: the same number on every architecture that got it with Linux 6.5.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// How many pages of `range` are in the cache, if the kernel tells.
fn cached_pages(file: BorrowedFd<'_>, range: ByteRange) -> Option<u64> {
    let wanted = CachestatRange { offset: range.start(), len: range.len() };
    let mut stat = Cachestat::default();
    // SAFETY: the call reads one structure and writes the other, both laid out as the kernel has them, and
    // both alive until it returns.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            std::ptr::from_ref(&wanted),
            std::ptr::from_mut(&mut stat),
            0,
        )
    };
    (result == 0).then_some(stat.cached)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_micros(3);
    const SLOW: Duration = Duration::from_millis(4);

    #[test]
    fn one_slow_write_among_many_changes_nothing() {
        let pace = Pace::default();
        for write in 0..10 * WRITES_BETWEEN_STALLS {
            assert!(!pace.takes_a_detour());
            pace.wrote(if write % (WRITES_BETWEEN_STALLS + 1) == 0 { SLOW } else { QUICK });
        }
    }

    #[test]
    fn two_slow_writes_send_the_next_ones_to_the_queue_and_then_it_is_tried_again() {
        let pace = Pace::default();
        for took in [SLOW, QUICK, SLOW] {
            assert!(!pace.takes_a_detour());
            pace.wrote(took);
        }
        assert!((0..WRITES_AFTER_STALLS).all(|_| pace.takes_a_detour()));
        assert!(!pace.takes_a_detour());
    }
}
