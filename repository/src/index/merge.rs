//! Merging segments, so that a lookup asks few of them: logarithmically many for the number of captures.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::build::{MAX_ENTRIES, SegmentWriter};
use super::segment::{Scan, Segment};
use super::{Index, path};
use crate::capture::publish::remove_temporary;
use crate::error::Result;
use crate::id::{PackId, SegmentId};

/// So many segments of about the same size become one.
const FAN_IN: usize = 4;

/// Which of the segments of these sizes to merge next, if any: a tier is a factor of four in size.
fn plan(entries: &[u64]) -> Option<Vec<usize>> {
    let tier = |entries: u64| (entries.max(1)).ilog2() / 2;
    let mut tiers: Vec<(u32, usize)> = entries.iter().enumerate().map(|(at, n)| (tier(*n), at)).collect();
    tiers.sort_unstable();
    for run in tiers.chunk_by(|a, b| a.0 == b.0) {
        let chosen: Vec<usize> = run.iter().map(|(_, at)| *at).collect();
        if chosen.len() >= FAN_IN && chosen.iter().map(|at| entries[*at]).sum::<u64>() <= MAX_ENTRIES {
            return Some(chosen);
        }
    }
    None
}

/// Merges until there is nothing left to merge. Anybody may look things up meanwhile: the old segments stay readable to whoever has them
/// open, and their successor is durable before they go.
pub(crate) fn merge(index: &Index) -> Result<()> {
    index.refresh()?;
    loop {
        let view = index.view();
        let sizes: Vec<u64> = view.segments.iter().map(|segment| segment.entries()).collect();
        let Some(chosen) = plan(&sizes) else { return Ok(()) };
        let inputs: Vec<Arc<Segment>> = chosen.into_iter().map(|at| view.segments[at].clone()).collect();
        write_merged(index, &inputs)?;
        for input in &inputs {
            remove_temporary(&**index.storage(), &path(input.id()));
        }
        index.refresh()?;
    }
}

fn write_merged(index: &Index, inputs: &[Arc<Segment>]) -> Result<()> {
    let tables = inputs.iter().map(|input| input.packs()).collect::<Result<Vec<_>>>()?;
    let mut packs: Vec<PackId> = tables.concat();
    packs.sort_unstable();
    packs.dedup();
    let at_most = inputs.iter().map(|input| input.entries()).sum();
    let mut writer = SegmentWriter::create(index.storage().clone(), SegmentId::after(None)?, at_most)?;
    let mut scans: Vec<Scan<'_>> = inputs.iter().map(|input| input.scan()).collect();
    let mut heads = BinaryHeap::new();
    for (at, scan) in scans.iter_mut().enumerate() {
        heads.extend(scan.next()?.map(|record| Reverse((record.id, at, Held(record)))));
    }
    while let Some(Reverse((_, at, Held(record)))) = heads.pop() {
        // The number of a pack in another table, by its id in this one.
        let number =
            tables[at].get(record.pack.get() as usize).and_then(|pack| packs.binary_search(pack).ok());
        let number = number.ok_or_else(|| {
            crate::Error::damaged(format!(
                "index segment {} names a pack that it does not have",
                inputs[at].id()
            ))
        })?;
        writer.push(&record.in_pack(number as u32))?;
        heads.extend(scans[at].next()?.map(|record| Reverse((record.id, at, Held(record)))));
    }
    writer.seal(&packs)?.publish()
}

/// Rides along in the heap without taking part in its order.
struct Held(crate::record::Record);

impl PartialEq for Held {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for Held {}
impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Held {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What merging costs and leaves after so many captures of about the same size.
    fn run(captures: usize, size: u64) -> (usize, u64) {
        let (mut segments, mut written) = (Vec::new(), 0);
        for n in 0..captures as u64 {
            segments.push(size + n % 7);
            while let Some(mut chosen) = plan(&segments) {
                chosen.sort_unstable_by_key(|at| Reverse(*at));
                let sum = chosen.iter().map(|at| segments[*at]).sum();
                for at in chosen {
                    segments.swap_remove(at);
                }
                segments.push(sum);
                written += sum;
            }
        }
        (segments.len(), written)
    }

    #[test]
    fn segments_stay_few_and_each_entry_is_rewritten_seldom() {
        let (left, written) = run(5000, 1000);
        assert!(left <= 24, "{left} segments");
        assert!(written <= 5000 * 1010 * 8, "{written} entries written");
    }

    #[test]
    fn nothing_larger_than_a_segment_may_be_is_planned() {
        assert_eq!(plan(&[MAX_ENTRIES / 2; 6]), None);
        assert_eq!(plan(&[10, 11]), None);
        assert_eq!(plan(&[10, 1000, 11, 12, 13]), Some(vec![0, 2, 3, 4]));
    }
}
