//! The restored disk as one shard serves it: what is home from the target, the rest from the backup.

use std::cell::RefCell;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{
    AlignedBuf, Attempt, BLOCK_SIZE, BlockDevice, ByteRange, DeviceFuture, Durability, Error, ErrorKind,
    Extent, Geometry, Result, ZeroMode,
};

use super::mistakes::{Mistake, makes, makes_mistakes};
use super::session::Session;
use super::stats::Phase;
use super::streams::Streams;

/// Chunks of one read that are looked at: what a longer one asks for is no hint of what comes next.
const MOST_SEEN: u64 = 64;

/// One shard's handle of a session. Clones share everything.
#[derive(Clone)]
pub struct LiveDevice {
    pub(super) session: Arc<Session>,
    pub(super) target: Rc<dyn BlockDevice>,
    pub(super) journal: Rc<dyn BlockDevice>,
    /// The streams of the client whose handle this is.
    streams: Rc<RefCell<Streams>>,
}

impl LiveDevice {
    pub(super) fn new(
        session: Arc<Session>,
        target: Rc<dyn BlockDevice>,
        journal: Rc<dyn BlockDevice>,
    ) -> Self {
        Self { session, target, journal, streams: Rc::default() }
    }

    /// The session that all shards share.
    #[must_use]
    pub const fn session(&self) -> &Arc<Session> {
        &self.session
    }

    pub(super) fn check(&self, offset: u64, len: u64) -> Result<ByteRange> {
        let size = self.session.map.disk().size;
        ByteRange::new(offset, len).filter(|range| range.fits(size)).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidRange,
                format_args!("{len} bytes at {offset} of a disk of {size} bytes"),
            )
        })
    }

    /// Reads from the target. After a failed sync the kernel may have dropped what it could not write,
    /// and give what was there before: a guest gets an error then, not old data.
    pub(super) async fn read_target(&self, offset: u64, buf: AlignedBuf) -> (Result<()>, AlignedBuf) {
        let (result, buf) = self.target.read(offset, buf).await;
        if makes(Mistake::ReadAfterFailedSync) {
            return (result, buf);
        }
        (result.and_then(|()| self.session.check_open()), buf)
    }

    /// A guest reads this.
    fn saw(&self, range: ByteRange) {
        if self.session.is_watching() {
            let map = &self.session.map;
            let chunks = map.chunks_of(&map.blocks(range));
            self.session.is_asked_for(chunks.start..chunks.end.min(chunks.start + MOST_SEEN), &self.streams);
        }
    }

    async fn read_timed(&self, offset: u64, buf: AlignedBuf) -> (Result<()>, AlignedBuf) {
        let session = &*self.session;
        if !session.pace.is_watching() {
            return self.read_target(offset, buf).await;
        }
        let begun = session.clock.now();
        let done = self.read_target(offset, buf).await;
        session.pace.took(session.clock.now().saturating_sub(begun));
        done
    }

    /// A write of whole blocks that are not all home, where nobody has to be waited for.
    fn try_write_absent(&self, range: ByteRange, data: &[u8]) -> Result<Attempt> {
        let session = &*self.session;
        let map = &session.map;
        let blocks = map.blocks(range);
        // What this cannot do `write_range` can. It is also where the mistakes are that tests ask for.
        if range.is_empty() || map.whole_blocks(range) != blocks || makes_mistakes() {
            return Ok(Attempt::WouldWait);
        }
        let Some(_change) = session.try_begin_change()? else { return Ok(Attempt::WouldWait) };
        if !session.needs_no_copy(&blocks) {
            return Ok(Attempt::WouldWait);
        }
        let mut holds = Vec::new();
        for chunk in map.chunks_of(&blocks).filter(|&chunk| !map.is_whole(chunk)) {
            let Some(hold) = session.holds.try_shared(chunk) else { return Ok(Attempt::WouldWait) };
            holds.push(hold);
        }
        map.mark_guest(blocks.clone());
        let attempt = self.target.try_write(range.start(), data)?;
        if attempt == Attempt::Done {
            map.mark_home(blocks);
        }
        Ok(attempt)
    }

    /// Whether the truth of all of it is in the backup, which has zeroes there.
    fn is_zero_in_backup(&self, range: ByteRange) -> bool {
        let map = &self.session.map;
        let blocks = map.blocks(range);
        let mut chunks = map.chunks_of(&blocks);
        chunks.all(|chunk| self.session.source.is_zero(chunk)) && !map.v().any(blocks)
    }

    pub(super) fn is_home(&self, range: ByteRange) -> bool {
        let map = &self.session.map;
        self.session.phase() == Phase::Complete || map.v().all(map.blocks(range))
    }
}

impl BlockDevice for LiveDevice {
    fn geometry(&self) -> Geometry {
        let target = self.target.geometry();
        Geometry {
            size: self.session.map.disk().size,
            preferred_io: target.preferred_io.max(BLOCK_SIZE as u32),
            read_only: false,
            ..target
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<Attempt> {
        let range = self.check(offset, buf.len() as u64)?;
        self.session.check_open()?;
        if !self.is_home(range) {
            if !self.is_zero_in_backup(range) {
                return Ok(Attempt::WouldWait);
            }
            self.saw(range);
            return Ok(Attempt::Zeroes);
        }
        let attempt = self.target.try_read(offset, buf)?;
        if attempt == Attempt::Done {
            self.saw(range);
            self.session.pace.took(Duration::ZERO);
        }
        Ok(attempt)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<Attempt> {
        let range = self.check(offset, data.len() as u64)?;
        if !self.is_home(range) {
            return self.try_write_absent(range, data);
        }
        let Some(_change) = self.session.try_begin_change()? else { return Ok(Attempt::WouldWait) };
        if !self.session.needs_no_copy(&self.session.map.blocks(range)) {
            return Ok(Attempt::WouldWait);
        }
        // What is home is never filled, so this takes no hold. `G` goes before the write: a kill
        // in the middle of it leaves a block that differs from the backup.
        if !makes(Mistake::FastWriteUnmarked) {
            self.session.map.mark_guest(self.session.map.blocks(range));
        }
        self.target.try_write(offset, data)
    }

    fn resident(&self, range: ByteRange) -> Option<(BorrowedFd<'_>, u64)> {
        let is_served = range.fits(self.session.map.disk().size) && self.session.check_open().is_ok();
        if !is_served || !self.is_home(range) {
            return None;
        }
        let resident = self.target.resident(range)?;
        self.saw(range);
        Some(resident)
    }

    fn not_resident(&self) {
        self.target.not_resident();
    }

    fn read(&self, offset: u64, buf: AlignedBuf) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        let checked =
            self.check(offset, buf.len() as u64).and_then(|range| self.session.check_open().map(|()| range));
        match checked {
            Ok(range) => {
                self.saw(range);
                if self.is_home(range) {
                    Box::pin(self.read_timed(offset, buf))
                } else {
                    Box::pin(self.read_mixed(range, buf))
                }
            }
            Err(error) => Box::pin(std::future::ready((Err(error), buf))),
        }
    }

    fn for_client(&self) -> Option<Rc<dyn BlockDevice>> {
        Some(Rc::new(Self { streams: Rc::default(), ..self.clone() }))
    }

    fn write(
        &self,
        offset: u64,
        buf: AlignedBuf,
        durability: Durability,
    ) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        match self.check(offset, buf.len() as u64) {
            Ok(range) => Box::pin(self.write_range(range, buf, durability)),
            Err(error) => Box::pin(std::future::ready((Err(error), buf))),
        }
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(range.start(), range.len())?;
            self.zero_range(range, mode, durability).await
        })
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(range.start(), range.len())?;
            self.trim_range(range, durability).await
        })
    }

    fn flush(&self) -> DeviceFuture<'_, Result<()>> {
        Box::pin(self.flush_all())
    }

    fn extents(&self, range: ByteRange, limit: usize) -> DeviceFuture<'_, Result<Vec<Extent>>> {
        Box::pin(async move {
            self.check(range.start(), range.len())?;
            self.session.check_open()?;
            self.extents_of(range, limit).await
        })
    }

    fn prefetch(&self, range: ByteRange) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(range.start(), range.len())?;
            self.prefetch_range(range).await
        })
    }
}

impl std::fmt::Debug for LiveDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveDevice").field("session", &self.session).finish_non_exhaustive()
    }
}
