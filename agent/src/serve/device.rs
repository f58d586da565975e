//! A snapshot's disk, read-only: every block comes from the repository, nothing is kept but a cache.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use block::{
    AlignedBuf, Attempt, BLOCK_SIZE, BlockDevice, ByteRange, DeviceFuture, Durability, Error, ErrorKind,
    Extent, ExtentState, Geometry, OpenDevice, Result, ZeroMode,
};

use super::room::{Room, Rooms};
use crate::live::{ChunkSource as _, SourceError, SourceErrorKind, Urgency};
use crate::source::{ChunkStore, DiskSource};

/// A disk of a snapshot that can be opened on any thread.
pub(super) struct SnapshotDisk<S: ChunkStore> {
    source: Arc<DiskSource<S>>,
    rooms: Rooms,
}

impl<S: ChunkStore> SnapshotDisk<S> {
    /// The disk that `source` brings, which fetches within `rooms`.
    pub(super) const fn new(source: Arc<DiskSource<S>>, rooms: Rooms) -> Self {
        Self { source, rooms }
    }
}

impl<S: ChunkStore> OpenDevice for SnapshotDisk<S> {
    fn open(&self) -> Result<Rc<dyn BlockDevice>> {
        Ok(Rc::new(SnapshotDevice { source: Arc::clone(&self.source), rooms: self.rooms.clone() }))
    }
}

/// Chunks that are looked at for one answer about extents: a shard has others to serve. Whoever wants more asks again.
const MOST_CHUNKS: usize = 1 << 18;

struct SnapshotDevice<S: ChunkStore> {
    source: Arc<DiskSource<S>>,
    rooms: Rooms,
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

    /// Gives `take` each part of `range` that lies in one chunk, with its bytes, or none where these are zeroes. As many chunks are
    /// asked for before the first is waited for as there is room for.
    async fn fetch_each(
        &self,
        range: ByteRange,
        urgency: Urgency,
        room: &Room,
        mut take: impl FnMut(ByteRange, Option<&[u8]>),
    ) -> Result<()> {
        let layout = self.source.layout();
        let mut wanted = range.split(u64::from(layout.chunk_size)).peekable();
        let mut fetches = VecDeque::new();
        let mut result = Ok(());
        loop {
            while result.is_ok()
                && let Some(&(chunk, part)) = wanted.peek()
            {
                if self.source.is_zero(chunk) {
                    take(part, None);
                } else if let Some(data) = self.source.cached(chunk) {
                    take(part, Some(&data[self.part(chunk, part)]));
                } else {
                    let len = layout.chunk_range(chunk).len();
                    let place = match room.try_take(len) {
                        Some(place) => place,
                        None if fetches.is_empty() => room.take(len).await,
                        None => break,
                    };
                    fetches.push_back((place, chunk, part, self.source.fetch(chunk, urgency)));
                }
                wanted.next();
            }
            let Some((place, chunk, part, fetch)) = fetches.pop_front() else { return result };
            match fetch.await {
                Ok(data) => take(part, Some(&data[self.part(chunk, part)])),
                // Whoever serves this logs it: it is at the client's will. What was asked for keeps its place until it is here.
                Err(error) => result = result.and(Err(failed(chunk, &error).at(part))),
            }
            drop(place);
        }
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
            let take = |part: ByteRange, bytes: Option<&[u8]>| {
                let at = (part.start() - offset) as usize;
                let out = &mut buf[at..at + part.len() as usize];
                match bytes {
                    Some(bytes) => out.copy_from_slice(bytes),
                    None => out.fill(0),
                }
            };
            let result = self.fetch_each(range, Urgency::Demand, &self.rooms.reads, take).await;
            (result, buf)
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
            self.fetch_each(range, Urgency::Readahead, &self.rooms.caching, |_, _| {}).await
        })
    }
}
