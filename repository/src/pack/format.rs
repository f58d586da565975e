//! The end of a pack: its table of records and its trailer.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec::MAX_PLAIN_LEN;
use crate::error::{Error, Result};
use crate::header::HEADER_LEN;
use crate::id::PackId;
use crate::record::{RECORD_LEN, Record};
use crate::storage::{BULK_ALIGN, ReadFile};

/// A pack is closed once it holds so many bytes.
pub(crate) const TARGET_LEN: u64 = 64 << 20;
/// A pack is closed once it holds so many records.
pub(crate) const MAX_RECORDS: usize = 65536;
/// No pack is longer: a full one, the largest thing after it, the table.
pub(crate) const MAX_LEN: u64 = 128 << 20;

const TRAILER_LEN: usize = size_of::<Trailer>();
const MAGIC: [u8; 8] = *b"LBPKTAIL";

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Trailer {
    magic: [u8; 8],
    count: U32,
    table_crc: U32,
    table_offset: U64,
    data_end: U64,
    id: [u8; 16],
    reserved: [u8; 12],
    crc: U32,
}

/// All that follows the stored bytes, which end at `data_end`: padding, table, trailer. With it the file's length is aligned.
pub(crate) fn encode_end(id: PackId, data_end: u64, records: &[Record]) -> Vec<u8> {
    let table = records.as_bytes();
    let pad = (data_end + (table.len() + TRAILER_LEN) as u64).next_multiple_of(BULK_ALIGN as u64)
        - (data_end + (table.len() + TRAILER_LEN) as u64);
    let mut trailer = Trailer {
        magic: MAGIC,
        count: U32::new(records.len() as u32),
        table_crc: U32::new(crc32fast::hash(table)),
        table_offset: U64::new(data_end + pad),
        data_end: U64::new(data_end),
        id: *id.as_bytes(),
        reserved: [0; 12],
        crc: U32::ZERO,
    };
    trailer.crc = U32::new(crc32fast::hash(&trailer.as_bytes()[..TRAILER_LEN - 4]));
    let mut bytes = vec![0; pad as usize];
    bytes.extend_from_slice(table);
    bytes.extend_from_slice(trailer.as_bytes());
    bytes
}

/// What a pack says about itself.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) records: Vec<Record>,
    pub(crate) data_end: u64,
    pub(crate) table_offset: u64,
}

/// Reads and checks the end of a pack.
pub(crate) fn read_end(file: &dyn ReadFile, id: PackId) -> Result<Table> {
    let damaged = |how: &str| Error::damaged(format!("pack {id} {how}"));
    let read = |buf: &mut [u8], at: u64| {
        file.read_at(buf, at).map_err(|error| Error::io(format!("cannot read the end of pack {id}"), error))
    };
    let len = file.len_bytes().map_err(|error| Error::io(format!("cannot read pack {id}"), error))?;
    if len > MAX_LEN || len < (HEADER_LEN + TRAILER_LEN) as u64 || !len.is_multiple_of(BULK_ALIGN as u64) {
        return Err(damaged("has a length that no pack has: it is cut short or was added to"));
    }
    let mut trailer = [0; TRAILER_LEN];
    read(&mut trailer, len - TRAILER_LEN as u64)?;
    let crc = crc32fast::hash(&trailer[..TRAILER_LEN - 4]);
    let trailer = Trailer::ref_from_bytes(&trailer).map_err(|_| damaged("has no trailer"))?;
    if trailer.magic != MAGIC || trailer.crc.get() != crc || trailer.id != *id.as_bytes() {
        return Err(damaged("has a damaged trailer"));
    }
    let (count, table_offset, data_end) =
        (trailer.count.get() as usize, trailer.table_offset.get(), trailer.data_end.get());
    let table_len = count * RECORD_LEN;
    let fits = count <= MAX_RECORDS
        && table_offset.checked_add((table_len + TRAILER_LEN) as u64) == Some(len)
        && table_offset.checked_sub(data_end).is_some_and(|pad| pad < BULK_ALIGN as u64)
        && data_end >= HEADER_LEN as u64;
    if !fits || trailer.reserved != [0; 12] {
        return Err(damaged("has a trailer that does not fit its length"));
    }
    let mut table = vec![0; table_len];
    read(&mut table, table_offset)?;
    if crc32fast::hash(&table) != trailer.table_crc.get() {
        return Err(damaged("has a damaged table"));
    }
    let records = <[Record]>::ref_from_bytes(&table).map_err(|_| damaged("has a broken table"))?.to_vec();
    let mut end = HEADER_LEN as u64;
    for record in &records {
        let at = record.location(id);
        if u64::from(at.offset) != end || record.pack.get() != 0 || record.reserved != 0 {
            return Err(damaged("has a table with a gap"));
        }
        if at.plain_len as usize > MAX_PLAIN_LEN {
            return Err(damaged("has a table with something too long"));
        }
        end = at.end();
    }
    if end != data_end {
        return Err(damaged("has a table that does not cover it"));
    }
    Ok(Table { records, data_end, table_offset })
}
