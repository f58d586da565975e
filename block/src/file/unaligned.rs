//! Requests finer than the direct-I/O alignment: the one place where a disk reads, changes and
//! writes back.

use super::handle::Handle;
use super::range_lock::Hold;
use crate::queue::{Direction, Queue};
use crate::{AlignedBuf, ByteRange, Durability, Result, engine};

impl<Q: Queue> Handle<Q> {
    /// Reads the units around `range` and keeps the part that was asked for.
    pub(super) async fn read_unaligned(
        &self,
        range: ByteRange,
        mut buf: AlignedBuf,
    ) -> (Result<()>, AlignedBuf) {
        let outer = self.outward(range);
        let (outer_len, len) = (outer.len() as usize, buf.len());
        let head = (range.start() - outer.start()) as usize;
        if outer_len <= buf.capacity() {
            buf.set_len(outer_len);
            let (result, mut buf) = self.transfer_all(Direction::Read, outer.start(), buf).await;
            buf.copy_within(head..head + len, 0);
            buf.set_len(len);
            return (result, buf);
        }
        let (result, bounce) = self.transfer_all(Direction::Read, outer.start(), bounce(outer_len)).await;
        buf.copy_from_slice(&bounce[head..head + len]);
        (result, buf)
    }

    /// Reads the units at both edges of `range`, puts the new bytes over them and writes all of it back, while
    /// nobody else writes there.
    pub(super) async fn write_unaligned(
        &self,
        range: ByteRange,
        buf: AlignedBuf,
        durability: Durability,
    ) -> (Result<()>, AlignedBuf) {
        let outer = self.outward(range);
        let _hold = self.inner.locks.hold(outer, Hold::Exclusive).await;
        let mut whole = bounce(outer.len() as usize);
        for unit in self.edges(range, outer) {
            let at = (unit.start() - outer.start()) as usize;
            let (result, edge) =
                self.transfer_all(Direction::Read, unit.start(), bounce(unit.len() as usize)).await;
            if let Err(error) = result {
                return (Err(error), buf);
            }
            whole[at..at + edge.len()].copy_from_slice(&edge);
        }
        let head = (range.start() - outer.start()) as usize;
        whole[head..head + buf.len()].copy_from_slice(&buf);
        let (result, _) = self.write_range(outer, whole, durability).await;
        (result, buf)
    }

    fn outward(&self, range: ByteRange) -> ByteRange {
        // The disk's size is a multiple of the unit in direct mode, so this stays inside it.
        range.aligned_outward(self.inner.unit()).expect("a range inside the disk rounds to one inside it")
    }

    /// The units that `range` covers in part.
    fn edges(&self, range: ByteRange, outer: ByteRange) -> impl Iterator<Item = ByteRange> {
        let unit = self.inner.unit();
        let first = ByteRange::from_bounds(outer.start(), outer.start() + unit);
        let last = ByteRange::from_bounds(outer.end() - unit, outer.end());
        let head = (range.start() != outer.start()).then_some(first);
        let tail = (range.end() != outer.end() && (first != last || head.is_none())).then_some(last);
        head.into_iter().chain(tail)
    }
}

fn bounce(len: usize) -> AlignedBuf {
    engine::thread_pool_of_buffers_if_any().map_or_else(|| AlignedBuf::zeroed(len), |pool| pool.take(len))
}
