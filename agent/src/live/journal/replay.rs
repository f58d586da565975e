//! What a journal's bytes say: the newest checkpoint that holds and the records after it. Pure.

use super::checkpoint::{CheckpointHeader, decode_checkpoint_header};
use super::format::{BlockRun, JournalLayout, PAGE, Record, SessionId, decode_record};
use crate::live::error::{Error, ErrorKind, Result};
use crate::live::mistakes::{Mistake, makes};

/// Where the log ends, and what it said on the way.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct LogEnd {
    /// Some record says that the whole disk is home.
    pub(super) complete: bool,
    /// Records of which only one copy held.
    pub(super) mended: u64,
    /// Records that held.
    pub(super) records: u64,
}

/// Applies the records of `generation` in `log`, in order, up to the first that does not hold.
///
/// # Errors
/// `Damaged` where a later record holds although that one does not, or where the log goes on after
/// a newer checkpoint than `generation`: what is missing was synced once.
pub(super) fn replay_log(
    log: &[u8],
    session: SessionId,
    generation: u64,
    block_count: u64,
    mut apply: impl FnMut(BlockRun),
) -> Result<LogEnd> {
    let mut end = LogEnd::default();
    let mut at = 0;
    while let Some(found) = next_record(log, at, session, generation, end.records, block_count)? {
        let Found { record, next, mended } = found;
        record.runs.iter().copied().for_each(&mut apply);
        end.complete |= record.complete;
        end.mended += u64::from(mended);
        end.records += 1;
        at = next;
    }
    Ok(end)
}

struct Found {
    record: Record,
    next: usize,
    mended: bool,
}

/// The record of `sequence` that begins at `at`, from either of its copies.
fn next_record(
    log: &[u8],
    at: usize,
    session: SessionId,
    generation: u64,
    sequence: u64,
    block_count: u64,
) -> Result<Option<Found>> {
    let decode = |at: usize| decode_record(log.get(at..)?, session, block_count);
    let is_next = |record: &Record| record.generation == generation && record.sequence == sequence;
    if let Some(record) = decode(at)
        && is_next(&record)
        && record.copy == 0
    {
        let len = record.pages * PAGE;
        let second = decode(at + len);
        let mended = second.is_none_or(|second| !is_next(&second) || second.copy != 1);
        return Ok(Some(Found { record, next: at + 2 * len, mended }));
    }
    let mut page = at;
    while page < log.len() {
        if let Some(record) = decode(page) {
            let is_its_copy = is_next(&record) && record.copy == 1 && page == at + record.pages * PAGE;
            if is_its_copy {
                return Ok(Some(Found { next: page + record.pages * PAGE, record, mended: true }));
            }
            if record.generation > generation
                || (record.generation == generation && record.sequence >= sequence)
            {
                return Err(Error::new(
                    ErrorKind::Damaged,
                    format_args!(
                        "the journal is damaged: record {sequence} after checkpoint {generation} does not hold, \
                         but record {} after checkpoint {} does",
                        record.sequence, record.generation
                    ),
                ));
            }
        }
        page += PAGE;
    }
    Ok(None)
}

/// The checkpoints whose pages hold, the newest first, with the place of each.
pub(super) fn order_checkpoints(
    pages: [&[u8]; 2],
    session: SessionId,
    layout: JournalLayout,
) -> Vec<(u64, CheckpointHeader)> {
    let mut found: Vec<(u64, CheckpointHeader)> = (0..)
        .zip(pages)
        .filter_map(|(slot, page)| Some((slot, decode_checkpoint_header(page, session, layout)?)))
        .filter(|(slot, header)| header.generation % 2 == *slot || makes(Mistake::CheckpointOverNewer))
        .collect();
    found.sort_by_key(|(_, header)| std::cmp::Reverse(header.generation));
    found
}
