//! Opening: what kind of thing it is, how large, and what its file system or driver can do.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{AtFlags, FallocateFlags, OFlags, SeekFrom, StatxFlags};

use super::{DirectIo, FileOptions, Inner};
use crate::{ALIGNMENT, AlignedBuf, Error, ErrorKind, Geometry, Result};

/// What was found out at opening.
#[derive(Debug)]
pub(super) struct Support {
    pub(super) block_device: bool,
    pub(super) direct: bool,
    /// The granularity at which room is given back and taken, in bytes.
    pub(super) hole_unit: u64,
    /// Whether there is no point in trying FALLOC_FL_ZERO_RANGE (found out by trying).
    pub(super) no_zero_range: AtomicBool,
    /// Whether there is no point in trying FALLOC_FL_PUNCH_HOLE.
    pub(super) no_punch: AtomicBool,
    /// Whether there is no point in trying RWF_DSYNC.
    pub(super) no_dsync: AtomicBool,
    /// Whether there is no point in trying BLKDISCARD.
    pub(super) no_discard: AtomicBool,
}

pub(super) fn open(path: &Path, options: FileOptions) -> Result<Inner> {
    let file = OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        // A FIFO must not block us before we see that it is one.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| Error::io(format_args!("open {}", path.display()), source))?;
    inspect(file, path, options)
}

pub(super) fn create(path: &Path, size: u64, options: FileOptions) -> Result<Inner> {
    let failed = |source| Error::io(format_args!("create {} of {size} bytes", path.display()), source);
    let mut how = OpenOptions::new();
    how.read(true).write(true);
    if options.overwrite {
        how.create(true).truncate(true)
    } else {
        how.create_new(true)
    };
    let file = how.open(path).map_err(failed)?;
    let opened = file
        .set_len(size)
        .and_then(|()| sync_parent(path))
        .map_err(failed)
        .and_then(|()| inspect(file, path, FileOptions { read_only: false, ..options }));
    if opened.is_err() && !options.overwrite {
        // It is ours and holds nothing; why it failed matters more than whether this works.
        let _ = std::fs::remove_file(path);
    }
    opened
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

pub(super) fn inspect(file: File, path: &Path, options: FileOptions) -> Result<Inner> {
    let failed = |doing: &str, source| Error::io(format_args!("{doing} {}", path.display()), source);
    let metadata = file.metadata().map_err(|source| failed("inspect", source))?;
    let block_device = metadata.file_type().is_block_device();
    if !block_device && !metadata.is_file() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format_args!("{} is neither a regular file nor a block device", path.display()),
        ));
    }
    let size = if block_device {
        rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|errno| failed("find the size of", errno.into()))?
    } else {
        metadata.len()
    };
    clear_nonblock(&file).map_err(|source| failed("prepare", source))?;
    // The kernel lets a device that is set read-only be opened for writing, and fails the writes.
    let read_only = options.read_only
        || (block_device
            && is_read_only_device(&file).map_err(|source| failed("ask for the state of", source))?);
    let unit = direct_unit(&file, block_device, size, options, path)?;
    let hole_unit = if block_device {
        u64::from(rustix::fs::ioctl_blksszget(&file).unwrap_or(ALIGNMENT as u32))
    } else {
        metadata.blksize().next_power_of_two().clamp(512, 1 << 20)
    };
    let unit_or_byte = unit.unwrap_or(1);
    let (punches, discards) = if read_only {
        (false, false)
    } else if block_device {
        (
            queue_limit(metadata.rdev(), "write_zeroes_max_bytes"),
            queue_limit(metadata.rdev(), "discard_max_bytes"),
        )
    } else {
        (punches_holes(&file, size, hole_unit), false)
    };
    let geometry = Geometry {
        size,
        minimum_io: unit_or_byte,
        preferred_io: unit_or_byte.max(ALIGNMENT as u32),
        read_only,
        can_trim: punches || discards,
        fast_zero: punches,
        shared_flush: true,
    };
    let support = Support {
        block_device,
        direct: unit.is_some(),
        hole_unit: hole_unit.max(u64::from(unit_or_byte)),
        no_zero_range: AtomicBool::new(false),
        no_punch: AtomicBool::new(!punches && !block_device),
        no_dsync: AtomicBool::new(false),
        no_discard: AtomicBool::new(!discards),
    };
    Ok(Inner {
        fd: Arc::new(OwnedFd::from(file)),
        path: path.to_owned(),
        geometry,
        support,
        engine: options.engine,
        locks: super::RangeLock::default(),
        sync_failed: AtomicBool::new(false),
        missing: super::Missing::default(),
    })
}

fn clear_nonblock(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags.difference(OFlags::NONBLOCK))?)
}

/// Switches the description to direct I/O if that is wanted and works. Returns its granularity.
fn direct_unit(
    file: &File,
    block_device: bool,
    size: u64,
    options: FileOptions,
    path: &Path,
) -> Result<Option<u32>> {
    if options.direct == DirectIo::Off {
        return Ok(None);
    }
    match try_direct(file, block_device, size) {
        Ok(unit) => Ok(Some(unit)),
        Err(error) if options.direct == DirectIo::On => {
            Err(Error::io(format_args!("no direct I/O on {}", path.display()), error)
                .with_kind(ErrorKind::Unsupported))
        }
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "I/O goes through the page cache");
            Ok(None)
        }
    }
}

fn try_direct(file: &File, block_device: bool, size: u64) -> io::Result<u32> {
    let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::Unsupported, why));
    let statx = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let told = StatxFlags::from_bits_retain(statx.stx_mask).contains(StatxFlags::DIOALIGN);
    let (memory, unit) = if told {
        (statx.stx_dio_mem_align, statx.stx_dio_offset_align)
    } else if block_device {
        let sector = rustix::fs::ioctl_blksszget(file)?;
        (sector, sector)
    } else if rustix::fs::fstatfs(file)?.f_type == libc::TMPFS_MAGIC as _ {
        // It accepts the flag and uses its pages all the same.
        return refuse("the file is in memory");
    } else {
        (ALIGNMENT as u32, ALIGNMENT as u32)
    };
    if unit == 0 || memory == 0 {
        return refuse("the file system has no direct I/O");
    }
    if !unit.is_power_of_two() || memory as usize > ALIGNMENT {
        return refuse("the alignment that direct I/O asks for is beyond ours");
    }
    if !size.is_multiple_of(u64::from(unit)) {
        return refuse("the size is not a multiple of the direct-I/O alignment");
    }
    let flags = rustix::fs::fcntl_getfl(file)?;
    rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT)?;
    // Some file systems take the flag and refuse the transfers.
    let mut buf = AlignedBuf::zeroed(unit as usize);
    if size > 0
        && let Err(errno) = rustix::io::pread(file.as_fd(), &mut buf[..], 0)
    {
        rustix::fs::fcntl_setfl(file, flags)?;
        return Err(errno.into());
    }
    Ok(unit)
}

/// Whether the file system can make holes: tried beyond the end, where there is nothing to lose.
fn punches_holes(file: &File, size: u64, hole_unit: u64) -> bool {
    let Some(at) = size.checked_next_multiple_of(hole_unit).filter(|at| at.checked_add(hole_unit).is_some())
    else {
        return false;
    };
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, hole_unit).is_ok()
}

/// Whether a block device refuses writes, whoever opened it: `blockdev --setro`, a medium's switch.
fn is_read_only_device(file: &File) -> io::Result<bool> {
    /// `_IO(0x12, 94)` of linux/fs.h.
    const BLKROGET: libc::Ioctl = 0x125e;
    let mut flag: libc::c_int = 0;
    // SAFETY: `flag` is the one `int` that BLKROGET writes; it outlives the call, which keeps no pointer to it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, std::ptr::from_mut(&mut flag)) };
    if result == 0 { Ok(flag != 0) } else { Err(io::Error::last_os_error()) }
}

/// Whether a limit of the device's queue says that it has the ability at all.
fn queue_limit(device: u64, name: &str) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let directory = format!("/sys/dev/block/{major}:{minor}");
    // A partition's queue is its parent's.
    ["queue", "../queue"].iter().any(|queue| {
        std::fs::read_to_string(format!("{directory}/{queue}/{name}"))
            .is_ok_and(|limit| limit.trim().parse::<u64>().is_ok_and(|bytes| bytes > 0))
    })
}
