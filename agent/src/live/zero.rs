//! Trims and zeroes. Of absent blocks they fetch nothing: the target is made zero there, and they are home.
//!
//! What a range covers of a block in part is written as zero bytes by `write_zeroes` (which may bring
//! that chunk home first), and left alone by `trim`: a trim never rounds outward.

use std::ops::Range;

use block::{AlignedBuf, BLOCK_SIZE, ByteRange, DeviceFuture, Durability, ErrorKind, Result, ZeroMode};

use super::device::LiveDevice;
use super::mistakes::{Mistake, makes};
use super::stats::Stats;

/// Blocks that are held at once: a range as long as the disk must not take a hold of each chunk.
const STEP_BYTES: u64 = 64 << 20;

impl LiveDevice {
    pub(super) async fn zero_range(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<()> {
        self.session.check_open()?;
        let (head, whole, tail) = self.split_at_blocks(range);
        for step in steps(&whole) {
            let bytes = self.session.map.bytes(&step);
            self.change_whole_blocks(step, || self.target.write_zeroes(bytes, mode, Durability::Volatile))
                .await?;
        }
        for part in [head, tail] {
            if !part.is_empty() {
                let zeroes = AlignedBuf::zeroed(part.len() as usize);
                self.write_range(part, zeroes, Durability::Volatile).await.0?;
            }
        }
        self.make_stable(durability).await
    }

    pub(super) async fn trim_range(&self, range: ByteRange, durability: Durability) -> Result<()> {
        self.session.check_open()?;
        let map = &self.session.map;
        let whole =
            if makes(Mistake::TrimRoundedOutward) { map.blocks(range) } else { map.whole_blocks(range) };
        for step in steps(&whole) {
            let runs: Vec<_> = map.v().runs(step).collect();
            for (run, is_home) in runs {
                let bytes = map.bytes(&run);
                if is_home {
                    self.trim_home(run).await?;
                } else {
                    // It may have come home meanwhile; zeroes are right all the same.
                    let zero = || self.target.write_zeroes(bytes, ZeroMode::UNMAP, Durability::Volatile);
                    self.change_whole_blocks(run, zero).await?;
                }
            }
        }
        self.make_stable(durability).await
    }

    async fn trim_home(&self, blocks: Range<u64>) -> Result<()> {
        let bytes = self.session.map.bytes(&blocks);
        match self.change_whole_blocks(blocks, || self.target.trim(bytes, Durability::Volatile)).await {
            // To keep what is there is a trim as well.
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    /// Runs `change`, which sets the contents of all of `blocks`, as a guest's write of them.
    async fn change_whole_blocks<'a>(
        &'a self,
        blocks: Range<u64>,
        change: impl FnOnce() -> DeviceFuture<'a, Result<()>>,
    ) -> Result<()> {
        let session = &*self.session;
        let _change = session.begin_change().await?;
        self.preserve(&blocks).await;
        let _holds = self.hold_shared(&blocks).await;
        session.map.mark_guest(blocks.clone());
        if makes(Mistake::HomeBeforeZeroes) {
            session.map.mark_home(blocks.clone());
        }
        let result = change().await;
        match &result {
            Ok(()) => self.written(blocks).await,
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            Err(_) => session.stats.target_failed(),
        }
        result
    }

    /// The part before the first whole block, the whole blocks, and the part after the last.
    fn split_at_blocks(&self, range: ByteRange) -> (ByteRange, Range<u64>, ByteRange) {
        let map = &self.session.map;
        let whole = map.whole_blocks(range);
        if whole.is_empty() {
            return (range, 0..0, ByteRange::from_bounds(range.end(), range.end()));
        }
        let bytes = map.bytes(&whole);
        (
            ByteRange::from_bounds(range.start(), bytes.start()),
            whole,
            ByteRange::from_bounds(bytes.end(), range.end()),
        )
    }

    async fn make_stable(&self, durability: Durability) -> Result<()> {
        match durability {
            Durability::Stable => self.flush_all().await,
            Durability::Volatile => Ok(()),
        }
    }

    /// Makes the absent blocks of zero chunks zero on the target, for the background.
    pub(super) async fn zero_fill(&self, chunks: &Range<u64>) -> Result<()> {
        let session = &*self.session;
        let map = &session.map;
        let per_step = (STEP_BYTES / u64::from(map.disk().chunk_size)).max(1);
        let mut start = chunks.start;
        while start < chunks.end {
            let step = start..chunks.end.min(start + per_step);
            start = step.end;
            let _change = session.begin_change().await?;
            let _holds = self.hold_exclusive(&step).await;
            let absent: Vec<_> =
                map.v().runs(map.blocks_of_chunks(&step)).filter(|(_, is_home)| !is_home).collect();
            for (run, _) in absent {
                let bytes = map.bytes(&run);
                if makes(Mistake::HomeBeforeZeroes) {
                    map.mark_home(run.clone());
                }
                self.target.write_zeroes(bytes, ZeroMode::UNMAP, Durability::Volatile).await?;
                Stats::add(&session.stats.zeroed, bytes.len());
                map.mark_home(run);
            }
        }
        Ok(())
    }
}

fn steps(blocks: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let (step, end) = (STEP_BYTES / BLOCK_SIZE, blocks.end);
    (blocks.start..end).step_by(step as usize).map(move |start| start..end.min(start + step))
}
