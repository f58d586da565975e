//! The journal's parsers, for the fuzz targets in `fuzz/`. Not an interface: nothing else may use it.

use super::checkpoint::{CheckpointFlags, decode_checkpoint_header, encode_checkpoint};
use super::format::{BlockRun, Header, JournalLayout, SessionId, chunk_blocks, encode_record};
use super::replay::{LogEnd, replay_log};
use crate::live::DiskLayout;
use crate::live::bits::{Bits, words_for, zeroed_words};
use crate::live::error::Result;

/// Parses a header; its bytes, encoded anew.
pub fn header(page: &[u8]) -> Result<Vec<u8>> {
    Ok(Header::decode(page)?.encode()?.to_vec())
}

/// A header's bytes.
pub fn encode_header(session: SessionId, disk: DiskLayout, snapshot: &str, target: &str) -> Result<Vec<u8>> {
    let (snapshot, target) = (snapshot.to_owned(), target.to_owned());
    let journal = JournalLayout::for_disk(disk);
    Ok(Header { session, disk, journal, snapshot, target }.encode()?.to_vec())
}

/// What is home, and what of it the guest wrote: a bit a block, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    /// `P`.
    pub p: Vec<u64>,
    /// `G`.
    pub g: Vec<u64>,
}

/// A checkpoint, page and body, of a disk.
pub fn encode_checkpoint_of(session: SessionId, disk: DiskLayout, generation: u64, home: &Home) -> Vec<u8> {
    let blocks = disk.size.div_ceil(block::BLOCK_SIZE);
    let words = |from: &[u64]| {
        let words = zeroed_words(words_for(blocks));
        let bits = Bits::new(&words, blocks);
        for (index, word) in from.iter().enumerate() {
            bits.or_word(index, word & bits.full_word(index));
        }
        words
    };
    let (p, g) = (words(&home.p), words(&home.g));
    let (p, g) = (Bits::new(&p, blocks), Bits::new(&g, blocks));
    let flags = CheckpointFlags::default();
    let checkpoint = encode_checkpoint(session, generation, flags, chunk_blocks(disk), &p, &g);
    checkpoint.to_vec()
}

/// Parses a checkpoint's page and body of a disk: its generation and what it says; `None` where it does not hold.
pub fn checkpoint(bytes: &[u8], session: SessionId, disk: DiskLayout) -> Option<(u64, Home)> {
    const PAGE: usize = super::format::PAGE;
    let blocks = disk.size.div_ceil(block::BLOCK_SIZE);
    let header = decode_checkpoint_header(bytes.get(..PAGE)?, session, JournalLayout::for_disk(disk))?;
    let body = bytes.get(PAGE..PAGE + header.body_len)?;
    let (p, g) = (zeroed_words(words_for(blocks)), zeroed_words(words_for(blocks)));
    let (p, g) = (Bits::new(&p, blocks), Bits::new(&g, blocks));
    let words = |bits: &Bits<'_>| (0..bits.word_count()).map(|index| bits.word(index)).collect();
    let holds = header.apply(body, chunk_blocks(disk), &p, &g);
    let home = Home { p: words(&p), g: words(&g) };
    assert!(holds || home.p.iter().chain(&home.g).all(|word| *word == 0), "half of it was applied");
    holds.then_some((header.generation, home))
}

/// A record, both copies of it.
pub fn record(
    session: SessionId,
    generation: u64,
    sequence: u64,
    complete: bool,
    runs: &[BlockRun],
) -> Vec<u8> {
    encode_record(session, generation, sequence, complete, runs).to_vec()
}

/// What a log says.
#[derive(Debug, Default)]
pub struct Log {
    /// The runs of its records, in order.
    pub runs: Vec<BlockRun>,
    /// How many records held.
    pub records: u64,
    /// Of how many of those one copy did not.
    pub mended: u64,
    /// Whether one says that the whole disk is home.
    pub complete: bool,
}

/// Replays the records of `generation` on a disk of so many blocks.
pub fn log(bytes: &[u8], session: SessionId, generation: u64, blocks: u64) -> Result<Log> {
    let mut runs = Vec::new();
    let LogEnd { complete, mended, records } =
        replay_log(bytes, session, generation, blocks, |run| runs.push(run))?;
    Ok(Log { runs, records, mended, complete })
}
