//! The bytes of the journal's header and records. Pure: nothing here reads or writes a device. Those of a checkpoint
//! are in `checkpoint`.

use std::fmt;

use block::{AlignedBuf, BLOCK_SIZE};

use super::checkpoint::body_len_max;
use crate::live::error::{Error, ErrorKind, Result};
use crate::live::source::DiskLayout;

/// The unit of the journal's layout in bytes.
pub(super) const PAGE: usize = 4096;

const HEADER_MAGIC: [u8; 8] = *b"LBJRNL\x02\n";
const RECORD_MAGIC: [u8; 4] = *b"LBRC";
const VERSION: u32 = 2;
const LOG_PAGES: u32 = 4096;
/// Of a disk whose size needs more bits the checkpoints would have more pages than 32 bits count.
const DISK_SIZE_BITS: u32 = 54;
/// A log holds at least one record and its copy, and is small enough to be read into memory.
const LOG_PAGES_ALLOWED: std::ops::RangeInclusive<u32> = 2..=16 * LOG_PAGES;
/// Together with the fixed fields, two names of this length fit into the header's page.
const NAME_MAX: usize = 1900;
const NAMES_AT: usize = 64;
const RECORD_HEADER: usize = 48;
const RUN_LEN: usize = 12;
const GUEST_BIT: u64 = 1 << 63;
const START_MASK: u64 = (1 << 48) - 1;
/// The most pages of one copy of a record: 1 MiB.
const RECORD_PAGES_MAX: usize = 256;
/// The most runs that one record holds.
const RECORD_RUNS_MAX: usize = (RECORD_PAGES_MAX * PAGE - RECORD_HEADER) / RUN_LEN;

/// The name of a session: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

impl SessionId {
    fn first_half(self) -> u64 {
        u64::from_le_bytes(self.0[..8].try_into().expect("eight bytes"))
    }
}

/// Blocks that are home, and whether the guest wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockRun {
    /// The first block's number.
    pub start: u64,
    /// How many blocks.
    pub len: u32,
    /// Whether the guest wrote them.
    pub guest: bool,
}

/// How many pages each part of a journal has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalLayout {
    /// How many chunks can ever be home in part. The others are whole from the first checkpoint on.
    pub partial_max: u64,
    /// Pages of one checkpoint place.
    pub slot_pages: u32,
    /// Pages of the log.
    pub log_pages: u32,
}

impl JournalLayout {
    /// The layout for a disk: its checkpoint places hold any state that the disk can be in.
    ///
    /// # Panics
    /// Where the disk is larger than any that a journal's header may name: 16 PiB.
    #[must_use]
    pub fn for_disk(layout: DiskLayout) -> Self {
        Self::with_partial(layout, layout.chunk_count())
    }

    /// The layout for a restore that begins with all but `partial_max` chunks whole: bits of `P` are never cleared,
    /// so no more than these can be home in part.
    ///
    /// # Panics
    /// Where the disk is larger than any that a journal's header may name: 16 PiB.
    #[must_use]
    pub fn with_partial(layout: DiskLayout, partial_max: u64) -> Self {
        let body = body_len_max(layout.chunk_count(), chunk_blocks(layout), partial_max);
        let pages = 1 + body.div_ceil(PAGE as u64);
        let slot_pages = u32::try_from(pages).expect("a disk has fewer than 2^42 blocks");
        Self { partial_max, slot_pages, log_pages: LOG_PAGES }
    }

    /// The size of the whole journal in bytes.
    #[must_use]
    pub const fn len_bytes(self) -> u64 {
        (1 + 2 * self.slot_pages as u64 + self.log_pages as u64) * PAGE as u64
    }

    /// The most runs of one record.
    pub(super) fn record_runs_max(self) -> usize {
        let pages = (self.log_pages as usize / 2).min(RECORD_PAGES_MAX);
        (pages * PAGE - RECORD_HEADER) / RUN_LEN
    }

    pub(in crate::live) const fn slot_at(self, slot: u64) -> u64 {
        (1 + slot * self.slot_pages as u64) * PAGE as u64
    }

    pub(in crate::live) const fn log_at(self) -> u64 {
        self.slot_at(2)
    }

    pub(super) const fn log_len(self) -> usize {
        self.log_pages as usize * PAGE
    }
}

/// Blocks of one chunk.
pub(super) fn chunk_blocks(disk: DiskLayout) -> u64 {
    u64::from(disk.chunk_size) / BLOCK_SIZE
}

/// Whose journal this is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::live) struct Header {
    pub(in crate::live) session: SessionId,
    pub(in crate::live) disk: DiskLayout,
    pub(in crate::live) journal: JournalLayout,
    pub(in crate::live) snapshot: String,
    pub(in crate::live) target: String,
}

impl Header {
    pub(in crate::live) fn encode(&self) -> Result<AlignedBuf> {
        for name in [&self.snapshot, &self.target] {
            if name.len() > NAME_MAX {
                return Err(Error::new(ErrorKind::Unsuitable, format_args!("the name {name} is too long")));
            }
        }
        let mut page = AlignedBuf::zeroed(PAGE);
        page[..8].copy_from_slice(&HEADER_MAGIC);
        put(&mut page, 8, &VERSION.to_le_bytes());
        put(&mut page, 12, &(BLOCK_SIZE as u32).to_le_bytes());
        put(&mut page, 16, &self.session.0);
        put(&mut page, 32, &self.disk.size.to_le_bytes());
        put(&mut page, 40, &self.disk.chunk_size.to_le_bytes());
        put(&mut page, 44, &self.journal.slot_pages.to_le_bytes());
        put(&mut page, 48, &self.journal.log_pages.to_le_bytes());
        put(&mut page, 52, &(self.snapshot.len() as u16).to_le_bytes());
        put(&mut page, 54, &(self.target.len() as u16).to_le_bytes());
        put(&mut page, 56, &self.journal.partial_max.to_le_bytes());
        put(&mut page, NAMES_AT, self.snapshot.as_bytes());
        put(&mut page, NAMES_AT + self.snapshot.len(), self.target.as_bytes());
        seal(&mut page);
        Ok(page)
    }

    pub(in crate::live) fn decode(page: &[u8]) -> Result<Self> {
        if page.len() != PAGE || page[..6] != HEADER_MAGIC[..6] {
            return Err(Error::new(ErrorKind::NotAJournal, "the journal does not begin as one does"));
        }
        let version = u32_at(page, 8);
        if version != VERSION && version != 0 && is_sealed(page) {
            let kind = if version > VERSION { ErrorKind::NewerFormat } else { ErrorKind::OlderFormat };
            return Err(Error::new(
                kind,
                format_args!(
                    "the journal has format version {version}; this lifeboot reads version {VERSION}"
                ),
            ));
        }
        let damaged = || Error::new(ErrorKind::Damaged, "the journal's header is damaged");
        if !is_sealed(page) || page[..8] != HEADER_MAGIC || version != VERSION {
            return Err(damaged());
        }
        let disk = DiskLayout { size: u64_at(page, 32), chunk_size: u32_at(page, 40) };
        let (snapshot_len, target_len) = (u16_at(page, 52) as usize, u16_at(page, 54) as usize);
        let chunks_are_sane = disk.chunk_size.is_power_of_two() && u64::from(disk.chunk_size) >= BLOCK_SIZE;
        if snapshot_len > NAME_MAX
            || target_len > NAME_MAX
            || disk.size >> DISK_SIZE_BITS != 0
            || !chunks_are_sane
        {
            return Err(damaged());
        }
        let name = |start: usize, len: usize| {
            String::from_utf8(page[start..start + len].to_vec()).map_err(|_| damaged())
        };
        let header = Self {
            session: SessionId(page[16..32].try_into().expect("sixteen bytes")),
            disk,
            journal: JournalLayout {
                partial_max: u64_at(page, 56),
                slot_pages: u32_at(page, 44),
                log_pages: u32_at(page, 48),
            },
            snapshot: name(NAMES_AT, snapshot_len)?,
            target: name(NAMES_AT + snapshot_len, target_len)?,
        };
        let journal = header.journal;
        let is_laid_out = journal.partial_max <= disk.chunk_count()
            && journal.slot_pages == JournalLayout::with_partial(disk, journal.partial_max).slot_pages
            && LOG_PAGES_ALLOWED.contains(&journal.log_pages);
        if u32_at(page, 12) != BLOCK_SIZE as u32 || !is_laid_out {
            return Err(damaged());
        }
        Ok(header)
    }
}

/// One copy of a record that holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) generation: u64,
    pub(super) sequence: u64,
    /// The whole disk is home.
    pub(super) complete: bool,
    pub(super) copy: u8,
    pub(super) pages: usize,
    pub(super) runs: Vec<BlockRun>,
}

/// A record, both copies of it, as it is written.
///
/// # Panics
/// Where there are more than [`RECORD_RUNS_MAX`] runs.
pub(super) fn encode_record(
    session: SessionId,
    generation: u64,
    sequence: u64,
    complete: bool,
    runs: &[BlockRun],
) -> AlignedBuf {
    assert!(runs.len() <= RECORD_RUNS_MAX, "the caller splits long records");
    let len = record_len(runs.len());
    let mut buf = AlignedBuf::zeroed(2 * len);
    put(&mut buf, 0, &RECORD_MAGIC);
    put(&mut buf, 8, &generation.to_le_bytes());
    put(&mut buf, 16, &sequence.to_le_bytes());
    put(&mut buf, 24, &session.first_half().to_le_bytes());
    put(&mut buf, 32, &((len / PAGE) as u32).to_le_bytes());
    put(&mut buf, 36, &(runs.len() as u32).to_le_bytes());
    buf[40] = u8::from(complete) << 1;
    for (index, run) in runs.iter().enumerate() {
        let at = RECORD_HEADER + index * RUN_LEN;
        let start = run.start & START_MASK | if run.guest { GUEST_BIT } else { 0 };
        put(&mut buf, at, &start.to_le_bytes());
        put(&mut buf, at + 8, &run.len.to_le_bytes());
    }
    let (first, second) = buf.split_at_mut(len);
    second.copy_from_slice(first);
    second[41] = 1;
    for copy in [first, second] {
        let crc = crc32fast::hash(copy);
        put(copy, 4, &crc.to_le_bytes());
    }
    buf
}

/// Bytes of one copy of a record of so many runs.
pub(super) const fn record_len(runs: usize) -> usize {
    (RECORD_HEADER + runs * RUN_LEN).next_multiple_of(PAGE)
}

/// The record that begins at the start of `log`, or `None` where none of this session holds there,
/// or one of its runs reaches beyond `block_count`.
pub(super) fn decode_record(log: &[u8], session: SessionId, block_count: u64) -> Option<Record> {
    let header = log.get(..RECORD_HEADER)?;
    if header[..4] != RECORD_MAGIC || u64_at(header, 24) != session.first_half() {
        return None;
    }
    let (pages, count) = (u32_at(header, 32) as usize, u32_at(header, 36) as usize);
    if count > RECORD_RUNS_MAX || pages * PAGE != record_len(count) || header[41] > 1 {
        return None;
    }
    let record = log.get(..pages * PAGE)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&record[..4]);
    hasher.update(&[0; 4]);
    hasher.update(&record[8..]);
    if hasher.finalize() != u32_at(record, 4) {
        return None;
    }
    let mut runs = Vec::with_capacity(count);
    for bytes in record[RECORD_HEADER..].chunks_exact(RUN_LEN).take(count) {
        let word = u64_at(bytes, 0);
        let run = BlockRun { start: word & START_MASK, len: u32_at(bytes, 8), guest: word & GUEST_BIT != 0 };
        if run.start.checked_add(u64::from(run.len)).is_none_or(|end| end > block_count) {
            return None;
        }
        runs.push(run);
    }
    Some(Record {
        generation: u64_at(header, 8),
        sequence: u64_at(header, 16),
        complete: header[40] & 2 != 0,
        copy: header[41],
        pages,
        runs,
    })
}

pub(super) fn put(buf: &mut [u8], at: usize, bytes: &[u8]) {
    buf[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u16_at(buf: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(buf[at..at + 2].try_into().expect("two bytes"))
}

pub(super) fn u32_at(buf: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(buf[at..at + 4].try_into().expect("four bytes"))
}

pub(super) fn u64_at(buf: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(buf[at..at + 8].try_into().expect("eight bytes"))
}

/// Puts the checksum of a page into its last four bytes.
pub(super) fn seal(page: &mut [u8]) {
    let crc = crc32fast::hash(&page[..PAGE - 4]);
    put(page, PAGE - 4, &crc.to_le_bytes());
}

pub(super) fn is_sealed(page: &[u8]) -> bool {
    crc32fast::hash(&page[..PAGE - 4]) == u32_at(page, PAGE - 4)
}
