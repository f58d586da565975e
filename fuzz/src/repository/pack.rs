//! The end of a pack: table and trailer.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | what is made to fit: bit 0 the trailer's magic, id and CRC; bit 1 its counts; bit 2 the records' places; bit 3 the table's CRC |
//! | 1.. | the last bytes of the file: records, then the trailer (64) |

use repository::{PackId, fuzzing};

use super::files::Bytes;
use super::{PAGE, entries, has, put, u32_at};
use crate::memory::bounded;

const ID: [u8; 16] = [1; 16];
const RECORD: usize = 56;
const TRAILER: usize = 64;
const HEADER: usize = 64;
const MAX_RECORDS: usize = 65536;

/// The file that an input stands for.
fn file(mode: u8, tail: &[u8]) -> Vec<u8> {
    let mut tail = tail.to_vec();
    let mut data_len = 0;
    if let Some(trailer_at) = tail.len().checked_sub(TRAILER) {
        let count = if has(mode, 1) { trailer_at / RECORD } else { u32_at(&tail, trailer_at + 8) as usize };
        let table_at = trailer_at.saturating_sub(count.saturating_mul(RECORD));
        if has(mode, 2) {
            let mut at = HEADER;
            for record in tail[table_at..trailer_at].chunks_exact_mut(RECORD) {
                record[32..36].fill(0);
                put(record, 36, &(at as u32).to_le_bytes());
                record[41..44].fill(0);
                record[55] = 0;
                at += u32_at(record, 40) as usize;
            }
            data_len = at - HEADER;
        }
        let len = (HEADER + data_len + tail.len()).next_multiple_of(PAGE);
        if has(mode, 1) {
            let data_end = if has(mode, 2) { HEADER + data_len } else { len - tail.len() };
            put(&mut tail, trailer_at + 8, &(count as u32).to_le_bytes());
            put(&mut tail, trailer_at + 16, &((len - TRAILER - count * RECORD) as u64).to_le_bytes());
            put(&mut tail, trailer_at + 24, &(data_end as u64).to_le_bytes());
            tail[trailer_at + 48..trailer_at + 60].fill(0);
        }
        if has(mode, 3) {
            let crc = crc32fast::hash(&tail[table_at..trailer_at]);
            put(&mut tail, trailer_at + 12, &crc.to_le_bytes());
        }
        if has(mode, 0) {
            put(&mut tail, trailer_at, b"LBPKTAIL");
            put(&mut tail, trailer_at + 32, &ID);
            let crc = crc32fast::hash(&tail[trailer_at..trailer_at + 60]);
            put(&mut tail, trailer_at + 60, &crc.to_le_bytes());
        }
    }
    let len = (HEADER + data_len + tail.len()).next_multiple_of(PAGE);
    let mut file = vec![0; len];
    put(&mut file, len - tail.len(), &tail);
    file
}

/// The end of a pack: little memory is held for any; what is believed lies within the pack, without gaps and overlaps, and
/// encodes to the bytes that were read.
pub fn pack(data: &[u8]) {
    let Some((mode, tail)) = data.split_first() else { return };
    let bytes = file(*mode, tail);
    let id = PackId::from_bytes(ID);
    let source = Bytes::new(&bytes);
    let Ok(read) = bounded(bytes.len(), 8, 4096, || fuzzing::pack_end(&source, id)) else { return };
    assert!(read.entries.len() <= MAX_RECORDS);
    let mut end = HEADER as u64;
    for (_, at) in &read.entries {
        assert_eq!((at.pack, u64::from(at.offset)), (id, end), "a gap, or an overlap");
        end = at.end();
    }
    assert_eq!(end, read.data_end, "the table does not cover the data");
    let wanted = TRAILER + read.entries.len() * RECORD;
    assert_eq!(
        read.data_end as usize + read.end.len(),
        bytes.len(),
        "another length would have been written"
    );
    assert!(read.end[read.end.len() - wanted..] == bytes[bytes.len() - wanted..], "other bytes were read");
}

/// Ends of packs that were written, as they are, and to be made to fit whatever becomes of them.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let id = PackId::from_bytes(ID);
    let mut seeds = Vec::new();
    for count in [0, 1, 3] {
        let all = entries(count, count.max(1));
        let data_end = 64 + u64::from(count) * 100;
        let end = fuzzing::encode_pack_end(id, data_end, &all);
        let tail = &end[end.len() - TRAILER - all.len() * RECORD..];
        for mode in [0b0000, 0b1001, 0b1111] {
            seeds.push([&[mode], tail].concat());
        }
    }
    seeds
}
