//! Reading a range that is not all home: each run from where its truth is.
//!
//! A block that comes home while its chunk is being fetched may be answered from the backup all the
//! same: the write that brought it home was acknowledged after this read had begun.

use std::ops::Range;

use block::{AlignedBuf, ByteRange, Error, Result};

use super::device::LiveDevice;
use super::join::join_each;
use super::mistakes::{Mistake, makes};
use super::source::{ChunkData, Urgency};
use super::stats::Stats;

/// Parts of one read that are in progress at once.
const PARTS_AT_ONCE: usize = 16;

enum Part {
    Home(ByteRange),
    Absent(u64, ByteRange),
    Zero(ByteRange),
}

enum Bytes {
    /// From the target: exactly the part.
    Whole(AlignedBuf),
    /// The chunk that the part lies in.
    Chunk(u64, ChunkData),
    Zeroes,
}

impl LiveDevice {
    pub(super) async fn read_mixed(&self, range: ByteRange, mut buf: AlignedBuf) -> (Result<()>, AlignedBuf) {
        let disk = self.session.map.disk();
        let parts = self.parts(range);
        let results = join_each(parts, PARTS_AT_ONCE, |part| self.read_part(part)).await;
        let mut first_error: Option<Error> = None;
        for (part, result) in results {
            let into = (part.start() - range.start()) as usize..(part.end() - range.start()) as usize;
            match result {
                Ok(Bytes::Whole(bytes)) => buf[into].copy_from_slice(&bytes),
                Ok(Bytes::Chunk(chunk, data)) => {
                    let at = (part.start() - disk.chunk_range(chunk).start()) as usize;
                    buf[into].copy_from_slice(&data[at..at + part.len() as usize]);
                }
                Ok(Bytes::Zeroes) => buf[into].fill(0),
                Err(_) if makes(Mistake::ReadErrorAsZeroes) => buf[into].fill(0),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        (first_error.map_or(Ok(()), Err), buf)
    }

    fn parts(&self, range: ByteRange) -> Vec<Part> {
        let map = &self.session.map;
        let chunk_size = u64::from(map.disk().chunk_size);
        let mut parts = Vec::new();
        for (blocks, is_home) in map.v().runs(map.blocks(range)) {
            let bytes = map.bytes(&blocks).intersection(range);
            if is_home {
                parts.push(Part::Home(bytes));
                continue;
            }
            for (chunk, bytes) in bytes.split(chunk_size) {
                parts.push(if self.session.source.is_zero(chunk) {
                    Part::Zero(bytes)
                } else {
                    Part::Absent(chunk, bytes)
                });
            }
        }
        parts
    }

    async fn read_part(&self, part: Part) -> (ByteRange, Result<Bytes>) {
        match part {
            Part::Zero(range) => (range, Ok(Bytes::Zeroes)),
            Part::Home(range) => (range, self.read_home(range).await),
            Part::Absent(chunk, range) => (range, self.read_absent(chunk, range).await),
        }
    }

    async fn read_home(&self, range: ByteRange) -> Result<Bytes> {
        let chunk = self.session.map.chunk_of(range.start() / block::BLOCK_SIZE);
        if makes(Mistake::DecodedBeforeMap)
            && self.session.map.disk().chunk_range(chunk).end() >= range.end()
            && let Some(data) = self.session.decoded(chunk)
        {
            return Ok(Bytes::Chunk(chunk, data));
        }
        let buf = AlignedBuf::zeroed(range.len() as usize);
        let (result, buf) = self.read_target(range.start(), buf).await;
        result.map(|()| Bytes::Whole(buf))
    }

    async fn read_absent(&self, chunk: u64, range: ByteRange) -> Result<Bytes> {
        if let Some(data) = self.session.decoded(chunk) {
            return Ok(Bytes::Chunk(chunk, data));
        }
        // What is no longer decoded may be home by now.
        if self.is_home(range) {
            return self.read_home(range).await;
        }
        Stats::add(&self.session.stats.missed, range.len());
        let Some((data, is_brought_home)) = self.session.fetch_for_guest(chunk).await? else {
            return self.read_home(range).await;
        };
        if !is_brought_home {
            self.offer(chunk, &data).await;
        }
        Ok(Bytes::Chunk(chunk, data))
    }

    /// NBD's CACHE: brings home the chunks that `range` touches, whatever is damaged among them.
    ///
    /// It is as urgent as what lies ahead of a stream of reads: somebody says what it will read next, and whoever waits for a
    /// read of its own goes before. Since a client asked, it is not held back by the limit and the pace of the background. It is answered when all
    /// is home, and not when it was noted: so a client learns that its reads will not wait, or that the range is damaged, and one that
    /// asks for a whole disk is held to the pace of the source.
    pub(super) async fn prefetch_range(&self, range: ByteRange) -> Result<()> {
        let map = &self.session.map;
        let chunks: Range<u64> = map.chunks_of(&map.blocks(range));
        let absent: Vec<u64> = chunks.filter(|&chunk| !map.is_whole(chunk)).collect();
        let results =
            join_each(absent, PARTS_AT_ONCE, |chunk| self.bring_home(chunk, Urgency::Readahead)).await;
        results.into_iter().collect()
    }
}
