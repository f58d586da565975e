//! What can be done at once on the calling thread, because it is in the page cache. In direct mode
//! nothing is.

use std::io::IoSliceMut;
use std::os::fd::AsFd;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{Errno, ReadWriteFlags};

use super::Inner;
use super::pace::Pace;
use crate::{Attempt, ByteRange, Result};

/// The most bytes written inline: what a socket brings at a time.
const INLINE_WRITE_MAX: usize = 512 << 10;
/// What the kernel reads ahead as one where nobody has set it otherwise (`read_ahead_kb`), and what it and the disk then read in
/// order.
const PIECE: u64 = 128 << 10;
/// A page of the cache.
const PAGE: u64 = 4096;

/// What was found not to work. Shared by all handles of a disk.
#[derive(Debug, Default)]
pub(super) struct Missing {
    nowait: AtomicBool,
    cachestat: AtomicBool,
    /// To send what is in the page cache: a page that cannot be read may be there too.
    pub(super) resident: AtomicBool,
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
    match pace.timed(|| rustix::io::pwrite(&inner.fd, data, offset)) {
        Ok(count) if count == data.len() => Ok(Attempt::Done),
        // In part, or not at all: the waiting form does all of it, or reports why not.
        Ok(_) | Err(_) => Ok(Attempt::WouldWait),
    }
}

/// Whether all of `range` is in the page cache.
pub(super) fn is_resident(inner: &Inner, range: ByteRange) -> bool {
    let is_never = inner.is_direct() || inner.missing.resident.load(Ordering::Relaxed);
    if is_never || range.is_empty() || !range.fits(inner.geometry.size) {
        return false;
    }
    if !inner.missing.cachestat.load(Ordering::Relaxed) {
        match is_cached(inner, range) {
            Some(is_cached) => return is_cached && is_filled(inner, range.end() - 1),
            None => inner.missing.cachestat.store(true, Ordering::Relaxed),
        }
    }
    // Before Linux 6.5 both ends have to speak for the whole: pages come and go in runs.
    edges_are_resident(inner, range)
}

fn edges_are_resident(inner: &Inner, range: ByteRange) -> bool {
    [range.start(), range.end() - 1].iter().all(|&at| read_nowait(inner, at, &mut [0]) == Ok(1))
}

/// Has the kernel read into the page cache what it lacks of `range`, and what who reads in order is likely to want next; whether all of
/// it is there or on its way. `buf` is as long as `range`, and holds anything afterwards.
pub(super) fn begin_loading(inner: &Inner, range: ByteRange, buf: &mut [u8]) -> bool {
    let is_never = inner.is_direct()
        || [&inner.missing.nowait, &inner.missing.cachestat, &inner.missing.resident]
            .iter()
            .any(|missing| missing.load(Ordering::Relaxed));
    if is_never || range.is_empty() {
        return false;
    }
    let len = buf.len();
    for begin in (0..len).step_by(PIECE as usize) {
        let at = range.start() + begin as u64;
        let piece = ByteRange::from_bounds(at, at + PIECE.min((len - begin) as u64));
        // It is not to be had yet: to ask is what begins it, and as much of the rest as the kernel begins at a time.
        if is_cached(inner, piece) != Some(true) {
            let _ = read_nowait(inner, at, &mut buf[begin..]);
        }
    }
    // Where nothing is read ahead, or memory is short, it is not.
    is_cached(inner, range) == Some(true)
}

/// Bytes of `range`: where all of them have been read into the page cache, so has what lies between. The last one comes first, since
/// it is read last as a rule.
pub(super) fn probes(range: ByteRange) -> impl Iterator<Item = u64> {
    let others = (range.start()..range.end()).step_by(PIECE as usize);
    std::iter::once(range.end() - 1).chain(others)
}

/// Whether the page of the byte `at`, which is in the page cache, has been read: others are still waited for. Where that cannot be
/// asked, as on tmpfs, it has.
pub(super) fn is_filled(inner: &Inner, at: u64) -> bool {
    matches!(read_nowait(inner, at, &mut [0]), Ok(1) | Err(Errno::OPNOTSUPP | Errno::NOSYS))
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

/// Whether all pages of `range` are in the cache, read or still awaited, if the kernel tells.
fn is_cached(inner: &Inner, range: ByteRange) -> Option<bool> {
    let pages = range.units(PAGE);
    Some(cached_pages(inner.fd.as_fd(), range)? == pages.end - pages.start)
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
