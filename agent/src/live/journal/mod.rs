//! What is known to be home on stable storage: the journal of one session.
//!
//! It is written and synced through a [`block::BlockDevice`], never memory-mapped: a mapped page may
//! reach the disk before the data that it speaks of has. All numbers are little-endian; everything
//! starts at a multiple of 4096 bytes (a *page*).
//!
//! | pages | what |
//! |---|---|
//! | 0 | header: whose journal this is; written once |
//! | `1 .. 1+s` | checkpoint place 0 |
//! | `1+s .. 1+2s` | checkpoint place 1 |
//! | `1+2s .. 1+2s+l` | log |
//!
//! `s` holds the largest checkpoint that the session can need: three bits a chunk, and a bit a block of the `k` chunks
//! that can ever be home in part (those that are not whole from the start); `l` is 16 MiB. The room is taken when the
//! session is made and never grows: docs/session.md has examples.
//!
//! **Header** (page 0)
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | `LBJRNL\x02\n` |
//! | 8 | 4 | format version: 2 |
//! | 12 | 4 | block size: 4096 |
//! | 16 | 16 | session id |
//! | 32 | 8 | disk size in bytes |
//! | 40 | 4 | chunk size in bytes |
//! | 44 | 4 | `s`, pages of one checkpoint place |
//! | 48 | 4 | `l`, pages of the log |
//! | 52 | 2 | length of the snapshot's name |
//! | 54 | 2 | length of the target's name, which is for people |
//! | 56 | 8 | `k`, the most chunks that can ever be home in part |
//! | 64 | | the snapshot's name, then the target's, UTF-8; zeroes to the end |
//! | 4092 | 4 | CRC-32 of the 4092 bytes before |
//!
//! **Checkpoint**: one page, then the body
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | `LBCKPT\x02\n` |
//! | 8 | 8 | generation, from 1; place 0 holds the even ones |
//! | 16 | 16 | session id |
//! | 32 | 8 | flags: 1 parked cleanly; 2 complete |
//! | 40 | 8 | length of the body in bytes |
//! | 48 | 4 | CRC-32 of the body |
//! | 52 | | zeroes |
//! | 4092 | 4 | CRC-32 of the 4092 bytes before |
//!
//! The body holds, for every 4096 chunks in order, three bytes: which chunks are whole in `P` (0 none, 1 all, 2 a bitmap
//! follows), which are home in part (likewise), and in which of these the guest wrote anything (0 none, 1 all of them, 2 a
//! bitmap follows); then those bitmaps, a bit a chunk, lowest first; then, for each chunk that is home in part, in order, a
//! bitmap of its blocks in `P`, in as many bytes as the blocks of a whole chunk need. So a checkpoint rounds `G` up to what is
//! home of a chunk.
//!
//! **Record**, in the log, in as many pages as it needs, written twice in one write: the second copy
//! follows the first. So one damaged byte loses nothing, and a torn write is never taken for whole.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | `LBRC` |
//! | 4 | 4 | CRC-32 of the record's pages, this field taken as zero |
//! | 8 | 8 | generation of the checkpoint it follows |
//! | 16 | 8 | sequence: 0 for the first record after the checkpoint, then one more each |
//! | 24 | 8 | the session id's first 8 bytes |
//! | 32 | 4 | pages of one copy |
//! | 36 | 4 | number of runs |
//! | 40 | 1 | flags: 2 the restore is complete |
//! | 41 | 1 | copy: 0 or 1 |
//! | 42 | 6 | zeroes |
//! | 48 | 12 each | runs: first block (48 bits), zeroes (15 bits), `G` (the top bit); then the count of blocks (4 bytes) |
//!
//! # Order of writes, and why
//! - A new journal is zeroed, and synced; then its first checkpoint; then the header but for its first 512 bytes; then these;
//!   each is synced before the next. So a journal whose first 512 bytes are zero was never finished. Whether it may
//!   be made anew, its owner knows: see `live_restore::open`.
//! - A record is synced before the next one is begun. So only the last can be torn by a crash. Where a
//!   record does not hold, and a later one of that generation does, the journal is *damaged*, not torn, and is
//!   refused: its missing runs may be flushed writes.
//! - When the log is full, a checkpoint goes to the older place and is synced; only then is the log
//!   written from its start again. A checkpoint says nothing that the log before it did not say, so a crash before
//!   that sync loses nothing. A log of a newer generation than the newest checkpoint that holds means damage.
//! - Replay is a bitwise or of the checkpoint and the records, so doing it twice changes nothing.
//! - Resuming always begins with a fresh checkpoint, so that a torn tail is never written behind. Before it goes to the
//!   older place the newest is written once more, as it was read, and synced: after a sync that failed it may stand in
//!   memory alone, and the older place have all that the disk knows.

mod checkpoint;
mod format;
pub mod fuzzing;
mod replay;
#[cfg(test)]
mod tests;
mod writer;

pub(super) use format::Header;
pub use format::{BlockRun, JournalLayout, SessionId};
pub(super) use writer::{Entry, Journal};
