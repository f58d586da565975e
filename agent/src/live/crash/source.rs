//! The repository as stories have it: a disk in memory that may be away, damaged, missing, and come back.

use std::collections::BTreeSet;
use std::ops::Range;

use block::AlignedBuf;
use block::sim::{Rng, yield_now};
use parking_lot::Mutex;

use super::model::{UNIT, bytes_of};
use super::tally::{Kind, Tally};
use super::world::BACKUP;
use crate::live::parts::ChunkCheck;
use crate::live::source::{
    ChunkData, ChunkSource, DiskLayout, FetchFuture, SourceError, SourceErrorKind, Urgency,
};

/// A repository's disk in memory.
pub(super) struct SimSource {
    disk: DiskLayout,
    salt: u64,
    bytes: Vec<u8>,
    zero: Vec<bool>,
    verifies: bool,
    state: Mutex<SourceState>,
}

struct SourceState {
    rng: Rng,
    /// How many fetches in a thousand find nobody there.
    away_per_mille: u32,
    /// So many fetches more find nobody there, whichever they are.
    outage: u32,
    was_away: bool,
    damaged: BTreeSet<u64>,
    mended: BTreeSet<u64>,
    tally: Tally,
}

impl SimSource {
    /// A disk of which a third is zeroes. `salt` makes disks of one layout differ.
    pub(super) fn new(disk: DiskLayout, rng: &mut Rng, salt: u64, verifies: bool) -> Self {
        let zero: Vec<bool> = (0..disk.chunk_count()).map(|_| rng.chance(330)).collect();
        let mut source = Self {
            disk,
            salt,
            bytes: Vec::new(),
            zero,
            verifies,
            state: Mutex::new(SourceState {
                rng: rng.fork(),
                away_per_mille: 0,
                outage: 0,
                was_away: false,
                damaged: BTreeSet::new(),
                mended: BTreeSet::new(),
                tally: Tally::default(),
            }),
        };
        source.bytes = vec![0; disk.size as usize];
        for unit in 0..disk.size / UNIT {
            let at = (unit * UNIT) as usize;
            let bytes = bytes_of(source.value(unit), UNIT);
            source.bytes[at..at + UNIT as usize].copy_from_slice(&bytes);
        }
        source
    }

    pub(super) fn value(&self, unit: u64) -> u64 {
        let chunk = unit * UNIT / u64::from(self.disk.chunk_size);
        if self.zero[chunk as usize] { 0 } else { BACKUP | self.salt << 40 | (unit + 1) }
    }

    pub(super) fn bytes(&self, range: Range<u64>) -> &[u8] {
        &self.bytes[range.start as usize..range.end as usize]
    }

    pub(super) fn is_damaged(&self, chunk: u64) -> bool {
        self.state.lock().damaged.contains(&chunk)
    }

    /// What goes wrong from now on: fetches that find nobody there, now and then or for a while.
    pub(super) fn set_away(&self, per_mille: u32, outage: u32) {
        let mut state = self.state.lock();
        state.away_per_mille = per_mille;
        state.outage = outage;
        state.was_away |= outage > 0;
    }

    /// From now on these chunks are damaged, and no others.
    pub(super) fn set_damaged(&self, damaged: BTreeSet<u64>) {
        let mut state = self.state.lock();
        let before = std::mem::replace(&mut state.damaged, damaged);
        state.mended.extend(before);
    }

    /// What happened since this was asked last.
    pub(super) fn take_tally(&self) -> Tally {
        std::mem::take(&mut self.state.lock().tally)
    }
}

impl SourceState {
    /// How a fetch goes: how long it takes, whether nobody is there, whether the bytes are wrong.
    fn fate(&mut self, chunk: u64) -> (u64, bool, bool) {
        let polls = self.rng.below(12);
        let is_outage = self.outage > 0;
        self.outage = self.outage.saturating_sub(1);
        let away_per_mille = self.away_per_mille;
        let is_away = self.rng.chance(away_per_mille) || is_outage;
        let is_damaged = self.damaged.contains(&chunk);
        if is_outage {
            self.tally.count(Kind::SourceOutage, 1);
        }
        if is_away {
            let kind = if polls.is_multiple_of(2) { Kind::ChunkMissing } else { Kind::SourceAway };
            self.tally.count(kind, 1);
        } else if is_damaged {
            self.tally.count(Kind::ChunkDamaged, 1);
        } else {
            if self.mended.remove(&chunk) {
                self.tally.count(Kind::ChunkMended, 1);
            }
            if std::mem::take(&mut self.was_away) {
                self.tally.count(Kind::SourceBack, 1);
            }
        }
        (polls, is_away, is_damaged)
    }
}

impl ChunkCheck for SimSource {
    fn is_chunk(&self, chunk: u64, bytes: &[u8]) -> Option<bool> {
        let range = self.disk.chunk_range(chunk);
        Some(self.bytes(range.start()..range.end()) == bytes)
    }
}

impl ChunkSource for SimSource {
    fn layout(&self) -> DiskLayout {
        self.disk
    }

    fn is_zero(&self, chunk: u64) -> bool {
        self.zero[chunk as usize]
    }

    fn fetch(&self, chunk: u64, _urgency: Urgency) -> FetchFuture<'_, Result<ChunkData, SourceError>> {
        Box::pin(async move {
            let (polls, is_away, is_damaged) = self.state.lock().fate(chunk);
            for _ in 0..polls {
                yield_now().await;
            }
            assert!(!self.is_zero(chunk), "a zero chunk was fetched");
            if is_away {
                // Some of it, or all of it.
                let kinds = [SourceErrorKind::Missing, SourceErrorKind::Unavailable];
                return Err(SourceError::new(kinds[(polls % 2) as usize], "simulated: away"));
            }
            let range = self.disk.chunk_range(chunk);
            let chunk_bytes = self.bytes(range.start()..range.end());
            let mut decoded = AlignedBuf::from_slice(chunk_bytes);
            if is_damaged {
                decoded[(polls * 1000) as usize % range.len() as usize] ^= 0x40;
            }
            // The bytes stand for their own hash.
            if self.verifies && decoded[..] != *chunk_bytes {
                return Err(SourceError::new(SourceErrorKind::Damaged, "simulated: damaged"));
            }
            Ok(ChunkData::new(decoded))
        })
    }
}
