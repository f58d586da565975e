//! The log: records, each written twice.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | bits 0 to 2: how many records were written; bit 3: what follows them is a log of its own making, with checksums that fit |
//! | then | each record: runs in it (1), of which each: start (2), length (1), the guest's (lowest bit of 1) |
//! | then | each damage: place in the log (4), what it is changed by (1) |
//! | or | the first 60 bytes of each page of a log |

use agent::live::{BlockRun, ErrorKind, fuzzing};

use super::{PAGE, SESSION, put};
use crate::input::Input;
use crate::memory::bounded;

const GENERATION: u64 = 6;
const BLOCKS: u64 = 70_000;
const MAX_RUNS: usize = 700;
const MAX_DAMAGES: usize = 16;
const MAX_PAGES: usize = 16;
const CONTENT: usize = 60;
const LOG_PAGES: usize = 64;

/// A record that was written.
struct Written {
    runs: Vec<BlockRun>,
    /// Where its two copies lie.
    at: [std::ops::Range<usize>; 2],
}

fn write(input: &mut Input<'_>, count: u8) -> (Vec<u8>, Vec<Written>) {
    let (mut log, mut written) = (Vec::new(), Vec::new());
    for sequence in 0..u64::from(count) {
        let wanted = usize::from(input.u8()) * MAX_RUNS / 255;
        let mut runs = Vec::new();
        for _ in 0..wanted {
            let (start, len, guest) = (u64::from(input.u16()), u32::from(input.u8()), input.u8() & 1 != 0);
            runs.push(BlockRun { start, len, guest });
        }
        let bytes = fuzzing::record(SESSION, GENERATION, sequence, false, &runs);
        let (start, half) = (log.len(), bytes.len() / 2);
        log.extend(bytes);
        written.push(Written { runs, at: [start..start + half, start + half..start + 2 * half] });
    }
    (log, written)
}

/// What was written and then damaged: a record of which a copy holds is not lost; what is said was written, in order, without a
/// gap; where a record is missing before one that holds, the journal is refused.
fn damaged(mut log: Vec<u8>, written: &[Written], mut input: Input<'_>) {
    log.resize(log.len() + 4 * PAGE, 0);
    let sound = log.clone();
    for _ in 0..MAX_DAMAGES {
        if input.is_empty() {
            break;
        }
        let (at, by) = (input.u32() as usize % log.len(), input.u8());
        log[at] ^= by;
    }
    let holds = |record: &Written| record.at.clone().map(|copy| log[copy.clone()] == sound[copy]);
    let lost = written.iter().position(|record| holds(record) == [false, false]);
    let later = |lost: usize| written[lost + 1..].iter().any(|record| holds(record) != [false, false]);
    let result = fuzzing::log(&log, SESSION, GENERATION, BLOCKS);
    if let Some(lost) = lost
        && later(lost)
    {
        assert_eq!(
            result.map_err(|error| error.kind()).err(),
            Some(ErrorKind::Damaged),
            "a gap was passed over"
        );
        return;
    }
    let result = result.expect("nothing is missing in between");
    let held = &written[..lost.unwrap_or(written.len())];
    let runs: Vec<BlockRun> = held.iter().flat_map(|record| record.runs.iter().copied()).collect();
    assert_eq!(result.records, held.len() as u64, "a record of which a copy holds was lost");
    assert!(result.runs == runs && !result.complete, "something was said that was not written");
    let mended = held.iter().filter(|record| holds(record) != [true, true]).count();
    assert_eq!(result.mended, mended as u64);
}

/// Records of somebody's making: whatever they say, nothing beyond the disk is home.
fn foreign(mut log: Vec<u8>, mut input: Input<'_>) {
    while !input.is_empty() && log.len() < MAX_PAGES * PAGE {
        let mut page = vec![0; PAGE];
        let content = input.bytes(CONTENT);
        put(&mut page, 0, content);
        put(&mut page, 0, b"LBRC\0\0\0\0");
        put(&mut page, 24, &SESSION.0[..8]);
        log.extend(page);
    }
    // From the last to the first, because a record of several pages covers those that follow.
    for at in (0..log.len()).step_by(PAGE).rev() {
        let pages = u32::from_le_bytes(log[at + 32..at + 36].try_into().expect("four bytes")) as usize;
        if log[at + 4..at + 8] == [0; 4] && pages > 0 && pages * PAGE <= log.len() - at {
            let crc = crc32fast::hash(&log[at..at + pages * PAGE]);
            put(&mut log, at + 4, &crc.to_le_bytes());
        }
    }
    log.resize(log.len().max(LOG_PAGES * PAGE), 0);
    let Ok(read) = bounded(log.len(), 8, 4096, || fuzzing::log(&log, SESSION, GENERATION, BLOCKS)) else {
        return;
    };
    let ends = |run: &BlockRun| run.start + u64::from(run.len) <= BLOCKS;
    assert!(read.runs.iter().all(ends), "something beyond the disk is home");
    assert!(read.mended <= read.records);
}

/// The log of a journal, damaged or of somebody else's making.
pub fn log(data: &[u8]) {
    let mut input = Input::new(data);
    let mode = input.u8();
    let (log, written) = write(&mut input, mode & 7);
    if mode & 8 == 0 { damaged(log, &written, input) } else { foreign(log, input) }
}

/// Logs of some records, sound and damaged in one copy; and records of somebody's making.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let record = [2_u8, 0, 10, 5, 1, 1, 0, 200, 0, 0, 99, 7, 1, 0, 50, 3, 0, 9, 9, 9, 1];
    // Two is a fifth of a hundredth of the most: five runs.
    let runs = usize::from(record[0]) * MAX_RUNS / 255;
    let record = &record[..1 + 4 * runs];
    let three = [&[3][..], record, record, record].concat();
    let damages: [&[u8]; 4] = [
        &[],
        &[0, 0, 0, 50, 1],
        &[0, 0, 0x30, 5, 0x80, 0, 0, 0, 7, 1],
        &[0, 0, 0x40, 60, 1, 0, 0, 0x50, 9, 1],
    ];
    let mut seeds: Vec<Vec<u8>> = damages.iter().map(|damage| [&three[..], damage].concat()).collect();
    for copies in 1..3_u64 {
        let mut bytes = vec![8];
        for copy in 0..copies {
            let page =
                fuzzing::record(SESSION, GENERATION, 0, true, &[BlockRun { start: 9, len: 4, guest: true }]);
            bytes.extend_from_slice(&page[copy as usize * PAGE..][..CONTENT]);
        }
        seeds.push(bytes);
    }
    seeds
}
