//! The files of a repository, byte for byte as docs/format.md has them.
//!
//! Checksums would keep almost every mutation from what lies behind them. So the inputs of these targets are the
//! contents of files, and a first byte says which checksums and counts are made to fit before the parser sees them.

mod chunk;
mod documents;
mod files;
mod ids;
mod index;
mod leases;
mod map;
mod names;
mod pack;

pub use chunk::{chunk, seeds as chunk_seeds};
pub use documents::{documents, seeds as documents_seeds};
pub use ids::{ids, seeds as ids_seeds};
pub use index::{index, seeds as index_seeds};
pub use leases::{leases, seeds as leases_seeds};
pub use map::{map, seeds as map_seeds};
pub use names::{names, seeds as names_seeds};
pub use pack::{pack, seeds as pack_seeds};

use repository::{ChunkId, Codec, KeyRef, Location, PackId, RecordKind};

const PAGE: usize = 4096;

/// The file of a document: a line with its length and hash, then the document.
fn framed(what: &str, body: &[u8]) -> Vec<u8> {
    let mut file = format!("lifeboot {what} 1 {} {}\n", body.len(), ChunkId::of(body)).into_bytes();
    file.extend_from_slice(body);
    file
}

fn has(mode: u8, bit: u8) -> bool {
    mode >> bit & 1 != 0
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The header of a binary file, as docs/format.md has it.
fn header(kind: &[u8; 4], id: [u8; 16]) -> [u8; 64] {
    let mut header = [0; 64];
    put(&mut header, 0, b"LIFEBOOT");
    put(&mut header, 8, kind);
    put(&mut header, 12, &1_u16.to_le_bytes());
    put(&mut header, 16, &id);
    let crc = crc32fast::hash(&header[..60]);
    put(&mut header, 60, &crc.to_le_bytes());
    header
}

/// Some things that are stored one after another in packs of so many each, in the order of their places.
fn entries(count: u32, per_pack: u32) -> Vec<(ChunkId, Location)> {
    let entry = |number: u32| {
        let at = Location {
            pack: PackId::from_bytes([(1 + number / per_pack) as u8; 16]),
            offset: 64 + number % per_pack * 100,
            stored_len: 100,
            plain_len: 65536,
            crc: number,
            codec: Codec::ZSTD,
            key: KeyRef::NONE,
            kind: RecordKind::CHUNK,
        };
        (ChunkId::of(&number.to_le_bytes()), at)
    };
    (0..count).map(entry).collect()
}
