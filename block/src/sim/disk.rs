//! The simulated disk's contents: what readers see, what is on stable storage, and every version between.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::Rng;
use crate::ByteRange;

/// The unit that is never torn: 512 bytes.
pub const SECTOR: u64 = 512;

/// How often things fail, per thousand operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A read fails.
    pub read: u32,
    /// A write, trim or zeroing fails, perhaps done in part.
    pub write: u32,
    /// A write finds no room, perhaps done in part.
    pub no_space: u32,
    /// A sync fails; what it should have written is written, forgotten or lost.
    pub sync: u32,
}

/// What a simulated disk is like.
#[derive(Clone, Copy, Debug)]
pub struct SimOptions {
    /// Size in bytes.
    pub size: u64,
    /// What [`crate::Geometry::minimum_io`] says. Any request is served all the same.
    pub minimum_io: u32,
    /// An operation completes after at most this many polls.
    pub max_delay: u32,
    /// Whether `try_read` and `try_write` are served, at random.
    pub fast_paths: bool,
    /// How often things fail.
    pub faults: Faults,
    /// From which all choices follow.
    pub seed: u64,
}

impl SimOptions {
    /// A disk of `size` bytes without faults.
    #[must_use]
    pub const fn new(size: u64, seed: u64) -> Self {
        let faults = Faults { read: 0, write: 0, no_space: 0, sync: 0 };
        Self { size, minimum_io: 512, max_delay: 6, fast_paths: true, faults, seed }
    }
}

/// What a disk was asked to do so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimStats {
    /// Reads begun.
    pub reads: u64,
    /// Writes, trims and zeroings begun.
    pub writes: u64,
    /// Bytes of all writes, trims and zeroings begun.
    pub bytes_written: u64,
    /// Syncs begun.
    pub syncs: u64,
    /// Syncs that failed.
    pub failed_syncs: u64,
    /// Reads that failed.
    pub failed_reads: u64,
    /// Writes, trims and zeroings that failed, but not for want of room.
    pub failed_writes: u64,
    /// Those that found no room.
    pub no_space: u64,
    /// Sectors of which a power cut lost what was written last, and of which it kept that.
    pub lost_sectors: u64,
    /// Sectors of which a power cut kept what was written last, although no sync covered it.
    pub kept_sectors: u64,
    /// Power cuts that lost some of what was not synced, and kept some.
    pub torn_cuts: u64,
    /// Sectors that landed after their process was dead.
    pub landed_late: u64,
    /// Sectors that a failed sync did not write.
    pub unwritten_sectors: u64,
}

/// What a disk is doing just now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnderWay {
    /// Writes, trims and zeroings that begin at or after the offset that was asked for, and before the end.
    pub writes: usize,
    /// Syncs.
    pub syncs: usize,
}

/// A disk in memory with a volatile cache. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct SimDisk(pub(super) Arc<Mutex<Contents>>);

#[derive(Debug)]
pub(super) struct Contents {
    pub(super) options: SimOptions,
    pub(super) rng: Rng,
    /// Counts power cuts: an operation of an earlier epoch is never heard of again.
    pub(super) epoch: u64,
    pub(super) full: bool,
    pub(super) stats: SimStats,
    view: Vec<u8>,
    stable: Vec<u8>,
    /// By sector: its versions since the last sync that covered it, oldest first.
    unsynced: BTreeMap<u64, Vec<Version>>,
    in_flight: BTreeMap<u64, Change>,
    /// Syncs under way in this epoch.
    pub(super) syncing: usize,
    orphans: BTreeSet<u64>,
    next_sequence: u64,
    next_change: u64,
}

#[derive(Debug)]
struct Version {
    sequence: u64,
    change: u64,
    bytes: Box<[u8]>,
}

#[derive(Debug)]
struct Change {
    range: ByteRange,
    what: NewBytes,
    /// The sectors that have not landed yet, in the order in which they will.
    left: Vec<u64>,
}

#[derive(Debug)]
pub(super) enum NewBytes {
    Given(Vec<u8>),
    Zero,
    /// Each sector becomes zero or stays.
    Forgotten,
}

impl SimDisk {
    /// A disk of zeroes, all of it on stable storage.
    #[must_use]
    pub fn new(options: SimOptions) -> Self {
        let len = usize::try_from(options.size).expect("a simulated disk fits in memory");
        Self(Arc::new(Mutex::new(Contents {
            options,
            rng: Rng::new(options.seed),
            epoch: 0,
            full: false,
            stats: SimStats::default(),
            view: vec![0; len],
            stable: vec![0; len],
            unsynced: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            syncing: 0,
            orphans: BTreeSet::new(),
            next_sequence: 1,
            next_change: 1,
        })))
    }

    /// A disk that holds `bytes`, all on stable storage; `options.size` is ignored.
    #[must_use]
    pub fn holding(bytes: &[u8], options: SimOptions) -> Self {
        let disk = Self::new(SimOptions { size: bytes.len() as u64, ..options });
        {
            let mut contents = disk.0.lock();
            contents.view.copy_from_slice(bytes);
            contents.stable.copy_from_slice(bytes);
        }
        disk
    }

    /// Cuts the power. Of what was written since the last sync, and of what is in flight, some is
    /// kept and some is lost, as `rng` has it. Every operation begun before fails.
    pub fn power_cut(&self, rng: &mut Rng) {
        self.0.lock().power_cut(rng);
    }

    /// Lets what a dead process left in flight land, whole, in part or not at all, until nothing
    /// of it is left. A successor that waits for the file's lock sees the disk after this.
    pub fn drain(&self, rng: &mut Rng) {
        let mut contents = self.0.lock();
        let mut orphans: Vec<u64> = std::mem::take(&mut contents.orphans).into_iter().collect();
        rng.shuffle(&mut orphans);
        for change in orphans {
            contents.land_orphan(change, rng);
        }
    }

    /// Lets one of the operations that a dead process left in flight land, if there is one.
    pub fn land_one_orphan(&self, rng: &mut Rng) -> bool {
        let mut contents = self.0.lock();
        let orphans: Vec<u64> = contents.orphans.iter().copied().collect();
        let Some(&change) = rng.pick(&orphans) else { return false };
        contents.orphans.remove(&change);
        contents.land_orphan(change, rng);
        true
    }

    /// Drops what is in memory and clean, as `posix_fadvise(POSIX_FADV_DONTNEED)` does. After a failed
    /// sync that is what readers saw and storage does not have.
    pub fn drop_clean_cache(&self) {
        self.0.lock().drop_clean_cache();
    }

    /// Sets how often things fail from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.0.lock().options.faults = faults;
    }

    /// Sets whether every write finds no room.
    pub fn set_full(&self, full: bool) {
        self.0.lock().full = full;
    }

    /// What the disk was asked to do so far.
    #[must_use]
    pub fn stats(&self) -> SimStats {
        self.0.lock().stats
    }

    /// What it is doing: changes that begin in `range`, and syncs.
    #[must_use]
    pub fn under_way(&self, range: ByteRange) -> UnderWay {
        let contents = self.0.lock();
        let begins_there =
            |change: &&Change| range.start() <= change.range.start() && change.range.start() < range.end();
        UnderWay { writes: contents.in_flight.values().filter(begins_there).count(), syncs: contents.syncing }
    }

    /// Looks at what a reader would see now, of the whole disk, without a copy of it.
    pub fn with_view<T>(&self, look: impl FnOnce(&[u8]) -> T) -> T {
        look(&self.0.lock().view)
    }

    /// What a reader would see now, of the whole disk.
    #[must_use]
    pub fn view(&self) -> Vec<u8> {
        self.0.lock().view.clone()
    }

    /// Overwrites bytes behind everybody's back, on stable storage: damage, or an older state of a file.
    ///
    /// # Panics
    /// Where the range lies outside the disk.
    pub fn poke(&self, offset: u64, bytes: &[u8]) {
        let mut contents = self.0.lock();
        let range = offset as usize..offset as usize + bytes.len();
        contents.view[range.clone()].copy_from_slice(bytes);
        contents.stable[range].copy_from_slice(bytes);
        // What was written there before must not come back at a power cut.
        let sectors = ByteRange::from_bounds(offset, offset + bytes.len() as u64).units(SECTOR);
        contents.unsynced.retain(|sector, _| !sectors.contains(sector));
    }
}

impl Contents {
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) {
        buf.copy_from_slice(&self.view[offset as usize..offset as usize + buf.len()]);
    }

    pub(super) fn is_zero(&self, range: ByteRange) -> bool {
        self.view[range.start() as usize..range.end() as usize].iter().all(|&byte| byte == 0)
    }

    /// Begins a change; nothing of it has landed yet.
    pub(super) fn begin(&mut self, range: ByteRange, what: NewBytes) -> u64 {
        let change = self.next_change;
        self.next_change += 1;
        let mut left: Vec<u64> = range.units(SECTOR).collect();
        self.rng.shuffle(&mut left);
        self.stats.writes += 1;
        self.stats.bytes_written += range.len();
        self.in_flight.insert(change, Change { range, what, left });
        change
    }

    /// Lands a random number of the change's sectors, at least one if any is left.
    pub(super) fn progress(&mut self, change: u64) {
        let left = self.in_flight.get(&change).map_or(0, |change| change.left.len());
        let count = 1 + self.rng.below(left as u64) as usize;
        self.land(change, count.min(left));
    }

    /// Lands what is left of the change and forgets it.
    pub(super) fn finish(&mut self, change: u64, stable: bool) {
        self.land(change, usize::MAX);
        let Some(change) = self.in_flight.remove(&change) else { return };
        if stable {
            for sector in change.range.units(SECTOR) {
                self.settle(sector, u64::MAX);
            }
        }
    }

    /// Ends the change where it stands.
    pub(super) fn abandon(&mut self, change: u64) {
        self.in_flight.remove(&change);
    }

    /// The process that waited for this change is gone; the change itself is not.
    pub(super) fn orphan(&mut self, change: u64) {
        if self.in_flight.contains_key(&change) {
            self.orphans.insert(change);
        }
    }

    /// What a sync that begins now has to cover.
    pub(super) fn sync_point(&mut self) -> u64 {
        self.stats.syncs += 1;
        self.next_sequence
    }

    pub(super) fn sync(&mut self, before: u64) {
        let (stable, size) = (&mut self.stable, self.options.size);
        self.unsynced.retain(|&sector, versions| {
            if let Some(newest) = take_before(versions, before) {
                stable[sector_bytes(sector, size)].copy_from_slice(&newest.bytes);
            }
            !versions.is_empty()
        });
    }

    /// What Linux does when write-back fails: every page is clean now, written or not.
    pub(super) fn fail_sync(&mut self, before: u64) {
        self.stats.failed_syncs += 1;
        let sectors: Vec<u64> = self.unsynced.keys().copied().collect();
        // A path that is gone fails all of it, a bad medium some.
        let fate_of_all = self.rng.chance(500).then(|| self.rng.below(3));
        for sector in sectors {
            match fate_of_all.unwrap_or_else(|| self.rng.below(3)) {
                0 => self.settle(sector, before),
                1 => {
                    self.stats.unwritten_sectors += 1;
                    self.forget(sector, before);
                }
                _ => {
                    self.stats.unwritten_sectors += 1;
                    self.forget(sector, before);
                    // Its page is dropped from memory; a page that was written since is not.
                    if !self.unsynced.contains_key(&sector) {
                        let range = self.sector_bytes(sector);
                        self.view[range.clone()].copy_from_slice(&self.stable[range]);
                    }
                }
            }
        }
    }

    fn power_cut(&mut self, rng: &mut Rng) {
        self.epoch += 1;
        self.syncing = 0;
        let (mut lost, mut kept_last) = (0, 0);
        self.orphans.clear();
        let in_flight: Vec<u64> = self.in_flight.keys().copied().collect();
        for change in in_flight {
            let left = self.in_flight.get(&change).map_or(0, |change| change.left.len());
            self.land(change, rng.below(left as u64 + 1) as usize);
            self.in_flight.remove(&change);
        }
        let keep_per_mille = *rng.pick(&[0, 50, 500, 950, 1000]).expect("the list is not empty");
        let torn = rng.chance(500);
        let mut kept_changes = BTreeMap::new();
        let unsynced = std::mem::take(&mut self.unsynced);
        for (sector, versions) in unsynced {
            let mut kept = None;
            let mut is_last = false;
            for version in &versions {
                let keep = if torn {
                    rng.chance(keep_per_mille)
                } else {
                    *kept_changes.entry(version.change).or_insert_with(|| rng.chance(keep_per_mille))
                };
                is_last = keep;
                if keep {
                    kept = Some(&version.bytes);
                }
            }
            *(if is_last { &mut kept_last } else { &mut lost }) += 1;
            let range = self.sector_bytes(sector);
            if let Some(bytes) = kept {
                self.stable[range].copy_from_slice(bytes);
            }
        }
        self.stats.lost_sectors += lost;
        self.stats.kept_sectors += kept_last;
        self.stats.torn_cuts += u64::from(lost > 0 && kept_last > 0);
        self.view.copy_from_slice(&self.stable);
    }

    fn drop_clean_cache(&mut self) {
        for sector in 0..self.options.size.div_ceil(SECTOR) {
            if !self.unsynced.contains_key(&sector) {
                let range = self.sector_bytes(sector);
                self.view[range.clone()].copy_from_slice(&self.stable[range]);
            }
        }
    }

    fn land_orphan(&mut self, change: u64, rng: &mut Rng) {
        let left = self.in_flight.get(&change).map_or(0, |change| change.left.len());
        let count = match rng.below(3) {
            0 => 0,
            1 => left,
            _ => rng.below(left as u64 + 1) as usize,
        };
        self.stats.landed_late += count as u64;
        self.land(change, count);
        self.in_flight.remove(&change);
    }

    /// Lands the next `count` sectors of a change in what readers see.
    fn land(&mut self, id: u64, count: usize) {
        for _ in 0..count {
            let Some(change) = self.in_flight.get_mut(&id) else { return };
            let Some(sector) = change.left.pop() else { return };
            let part =
                change.range.intersection(ByteRange::from_bounds(sector * SECTOR, (sector + 1) * SECTOR));
            let (start, end) = (part.start() as usize, part.end() as usize);
            match &change.what {
                NewBytes::Given(bytes) => {
                    let at = (part.start() - change.range.start()) as usize;
                    self.view[start..end].copy_from_slice(&bytes[at..at + (end - start)]);
                }
                NewBytes::Zero => self.view[start..end].fill(0),
                NewBytes::Forgotten => {
                    if self.rng.chance(700) {
                        self.view[start..end].fill(0);
                    }
                }
            }
            let sequence = self.next_sequence;
            self.next_sequence += 1;
            let bytes = self.view[self.sector_bytes(sector)].into();
            self.unsynced.entry(sector).or_default().push(Version { sequence, change: id, bytes });
        }
    }

    /// Puts the newest version of a sector from before `before` on stable storage.
    fn settle(&mut self, sector: u64, before: u64) {
        let range = self.sector_bytes(sector);
        let Some(versions) = self.unsynced.get_mut(&sector) else { return };
        if let Some(newest) = take_before(versions, before) {
            self.stable[range].copy_from_slice(&newest.bytes);
        }
        if versions.is_empty() {
            self.unsynced.remove(&sector);
        }
    }

    /// Marks the versions of a sector from before `before` clean without writing them.
    fn forget(&mut self, sector: u64, before: u64) {
        let Some(versions) = self.unsynced.get_mut(&sector) else { return };
        versions.retain(|version| version.sequence >= before);
        if versions.is_empty() {
            self.unsynced.remove(&sector);
        }
    }

    fn sector_bytes(&self, sector: u64) -> std::ops::Range<usize> {
        sector_bytes(sector, self.options.size)
    }
}

fn sector_bytes(sector: u64, size: u64) -> std::ops::Range<usize> {
    let start = sector * SECTOR;
    let end = (start + SECTOR).min(size);
    start as usize..end as usize
}

/// Takes out the versions from before `before`; the newest of them.
fn take_before(versions: &mut Vec<Version>, before: u64) -> Option<Version> {
    let covered = versions.partition_point(|version| version.sequence < before);
    versions.drain(..covered).next_back()
}
