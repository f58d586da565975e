//! A guest's write.
//!
//! Order, for blocks that are not home: the chunk of a block that is written in part comes home
//! first; the chunks are held, shared; `G`; the target; `V`; the holds end; the guest hears of it.
//! For blocks that are home: `G`; the target; the guest hears of it. No fill touches what is home,
//! so that takes no hold.

use std::ops::Range;

use block::{AlignedBuf, ByteRange, Durability, Result};

use super::device::LiveDevice;
use super::holds::Hold;
use super::mistakes::{Mistake, catch_up, later, makes};
use super::source::Urgency;

impl LiveDevice {
    pub(super) async fn write_range(
        &self,
        range: ByteRange,
        buf: AlignedBuf,
        durability: Durability,
    ) -> (Result<()>, AlignedBuf) {
        let (mut result, buf) = self.write_volatile(range, buf).await;
        if result.is_ok() && durability == Durability::Stable && !makes(Mistake::FuaUnsynced) {
            result = self.flush_all().await;
        }
        (result, buf)
    }

    async fn write_volatile(&self, range: ByteRange, buf: AlignedBuf) -> (Result<()>, AlignedBuf) {
        let session = &*self.session;
        let map = &session.map;
        if range.is_empty() {
            return (session.check_open(), buf);
        }
        let blocks = map.blocks(range);
        if let Err(error) = self.bring_edges_home(range).await {
            return (Err(error), buf);
        }
        // After the fetch, so that parking never waits for the source.
        let _change = match session.begin_change().await {
            Ok(change) => change,
            Err(error) => return (Err(error), buf),
        };
        self.preserve(&blocks).await;
        catch_up(map);
        let mut holds = if self.is_home(range) { Vec::new() } else { self.hold_shared(&blocks).await };
        if makes(Mistake::HomeBeforeCompletion) {
            map.mark_home(blocks.clone());
        }
        if !makes(Mistake::HomeBeforeGuest) {
            map.mark_guest(blocks.clone());
        }
        let (result, buf) = self.target.write(range.start(), buf, Durability::Volatile).await;
        if result.is_err() {
            session.stats.target_failed();
            if makes(Mistake::HomeAfterFailedWrite) {
                map.mark_home(blocks);
            }
            return (result, buf);
        }
        if makes(Mistake::HoldEndsBeforeHome) {
            holds.clear();
            self.pause().await;
        }
        self.written(blocks).await;
        drop(holds);
        (Ok(()), buf)
    }

    /// Every touched block is home now: it was before, or all of it was written.
    pub(super) async fn written(&self, blocks: Range<u64>) {
        if makes(Mistake::AckBeforeHome) {
            return later(blocks);
        }
        let map = &self.session.map;
        map.mark_home(blocks.clone());
        if makes(Mistake::MappedJournal) {
            self.leak_to_journal().await;
        }
        if makes(Mistake::HomeBeforeGuest) {
            self.pause().await;
            map.mark_guest(blocks);
        }
    }

    /// Brings home the chunks of the blocks at either end that `range` covers in part.
    pub(super) async fn bring_edges_home(&self, range: ByteRange) -> Result<()> {
        let session = &*self.session;
        let map = &session.map;
        if makes(Mistake::PartialWithoutFill) {
            return Ok(());
        }
        let (touched, whole) = (map.blocks(range), map.whole_blocks(range));
        for block in [touched.start, touched.end - 1] {
            while !whole.contains(&block) && !map.v().contains(block) {
                self.bring_home(map.chunk_of(block), Urgency::Demand).await?;
            }
        }
        Ok(())
    }

    /// Holds the chunks of `blocks` that are not whole, in ascending order.
    pub(super) async fn hold_shared(&self, blocks: &Range<u64>) -> Vec<Hold> {
        let map = &self.session.map;
        let mut holds = Vec::new();
        for chunk in map.chunks_of(blocks) {
            if !map.is_whole(chunk) {
                holds.push(self.session.holds.shared(chunk).await);
            }
        }
        holds
    }
}
