//! A snapshot's disk, read-only: every block comes from the repository, nothing is kept but a cache.

use std::rc::Rc;
use std::sync::Arc;

use block::{
    AlignedBuf, Attempt, BLOCK_SIZE, BlockDevice, ByteRange, DeviceFuture, Durability, Error, ErrorKind,
    Extent, ExtentState, Geometry, OpenDevice, Result, ZeroMode,
};

use crate::live::{ChunkSource as _, SourceError, SourceErrorKind, Urgency};
use crate::source::{ChunkStore, DiskSource};

/// A disk of a snapshot that can be opened on any thread.
pub struct SnapshotDisk<S: ChunkStore> {
    source: Arc<DiskSource<S>>,
}

impl<S: ChunkStore> SnapshotDisk<S> {
    /// The disk that `source` brings.
    #[must_use]
    pub const fn new(source: Arc<DiskSource<S>>) -> Self {
        Self { source }
    }
}

impl<S: ChunkStore> OpenDevice for SnapshotDisk<S> {
    fn open(&self) -> Result<Rc<dyn BlockDevice>> {
        Ok(Rc::new(SnapshotDevice { source: Arc::clone(&self.source) }))
    }
}

/// Chunks that are looked at for one answer about extents: a shard has others to serve. Whoever wants more asks again.
const MOST_CHUNKS: usize = 1 << 18;
/// Chunks that one CACHE asks for at a time.
const PREFETCHED_AT_ONCE: usize = 16;

struct SnapshotDevice<S: ChunkStore> {
    source: Arc<DiskSource<S>>,
}

impl<S: ChunkStore> SnapshotDevice<S> {
    fn check(&self, offset: u64, len: u64) -> Result<ByteRange> {
        let size = self.source.layout().size;
        ByteRange::new(offset, len).filter(|range| range.fits(size)).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidRange,
                format_args!("{len} bytes at {offset} are not on a disk of {size} bytes"),
            )
        })
    }

    fn refuse(&self) -> Error {
        Error::new(ErrorKind::NotPermitted, "a snapshot cannot be written to")
    }

    fn part(&self, chunk: u64, part: ByteRange) -> std::ops::Range<usize> {
        let start = (part.start() - self.source.layout().chunk_range(chunk).start()) as usize;
        start..start + part.len() as usize
    }
}

fn failed(chunk: u64, error: &SourceError) -> Error {
    let kind = match error.kind() {
        SourceErrorKind::Damaged | SourceErrorKind::Missing => ErrorKind::Damaged,
        SourceErrorKind::Unavailable => ErrorKind::Io,
        SourceErrorKind::Closed => ErrorKind::Shutdown,
    };
    Error::new(kind, format_args!("chunk {chunk} of the disk: {error}"))
}

impl<S: ChunkStore> BlockDevice for SnapshotDevice<S> {
    fn geometry(&self) -> Geometry {
        let layout = self.source.layout();
        Geometry {
            size: layout.size,
            minimum_io: 1,
            preferred_io: layout.chunk_size.max(BLOCK_SIZE as u32),
            read_only: true,
            can_trim: false,
            fast_zero: false,
            shared_flush: true,
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<Attempt> {
        let range = self.check(offset, buf.len() as u64)?;
        let chunk_size = u64::from(self.source.layout().chunk_size);
        if range.units(chunk_size).all(|chunk| self.source.is_zero(chunk)) {
            return Ok(Attempt::Zeroes);
        }
        for (chunk, part) in range.split(chunk_size) {
            let at = (part.start() - offset) as usize;
            let out = &mut buf[at..at + part.len() as usize];
            if self.source.is_zero(chunk) {
                out.fill(0);
            } else if let Some(data) = self.source.cached(chunk) {
                out.copy_from_slice(&data[self.part(chunk, part)]);
            } else {
                return Ok(Attempt::WouldWait);
            }
        }
        Ok(Attempt::Done)
    }

    fn read(&self, offset: u64, mut buf: AlignedBuf) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(async move {
            let range = match self.check(offset, buf.len() as u64) {
                Ok(range) => range,
                Err(error) => return (Err(error), buf),
            };
            // All are asked for before the first is waited for.
            let wanted: Vec<_> = range
                .split(u64::from(self.source.layout().chunk_size))
                .map(|(chunk, part)| {
                    let fetch =
                        (!self.source.is_zero(chunk)).then(|| self.source.fetch(chunk, Urgency::Demand));
                    (chunk, part, fetch)
                })
                .collect();
            for (chunk, part, fetch) in wanted {
                let at = (part.start() - offset) as usize;
                let out = &mut buf[at..at + part.len() as usize];
                match fetch {
                    None => out.fill(0),
                    Some(fetch) => match fetch.await {
                        Ok(data) => out.copy_from_slice(&data[self.part(chunk, part)]),
                        // Whoever serves it logs it: this is at the client's will.
                        Err(error) => return (Err(failed(chunk, &error).at(part)), buf),
                    },
                }
            }
            (Ok(()), buf)
        })
    }

    fn write(&self, _: u64, buf: AlignedBuf, _: Durability) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(std::future::ready((Err(self.refuse()), buf)))
    }

    fn write_zeroes(&self, _: ByteRange, _: ZeroMode, _: Durability) -> DeviceFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Err(self.refuse())))
    }

    fn trim(&self, _: ByteRange, _: Durability) -> DeviceFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Err(self.refuse())))
    }

    fn flush(&self) -> DeviceFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn extents(&self, range: ByteRange, limit: usize) -> DeviceFuture<'_, Result<Vec<Extent>>> {
        let extents = self.check(range.start(), range.len()).map(|range| {
            let mut extents: Vec<Extent> = Vec::new();
            let parts = range.split(u64::from(self.source.layout().chunk_size));
            for (chunk, part) in parts.take(MOST_CHUNKS) {
                let zero = self.source.is_zero(chunk);
                let state = ExtentState { hole: zero, zero, depth: u32::from(!zero), dirty: false };
                let is_full = extents.len() == limit;
                match extents.last_mut() {
                    Some(last) if last.state == state => {
                        last.range = ByteRange::from_bounds(last.range.start(), part.end());
                    }
                    _ if is_full => break,
                    _ => extents.push(Extent { range: part, state }),
                }
            }
            extents
        });
        Box::pin(std::future::ready(extents))
    }

    fn prefetch(&self, range: ByteRange) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            let range = self.check(range.start(), range.len())?;
            let parts = range.split(u64::from(self.source.layout().chunk_size));
            let mut wanted = parts.filter(|(chunk, _)| !self.source.is_zero(*chunk)).peekable();
            while wanted.peek().is_some() {
                // All of them are asked for before the first is waited for.
                let fetches: Vec<_> = wanted
                    .by_ref()
                    .take(PREFETCHED_AT_ONCE)
                    .map(|(chunk, part)| (chunk, part, self.source.fetch(chunk, Urgency::Readahead)))
                    .collect();
                for (chunk, part, fetch) in fetches {
                    fetch.await.map_err(|error| failed(chunk, &error).at(part))?;
                }
            }
            Ok(())
        })
    }
}
