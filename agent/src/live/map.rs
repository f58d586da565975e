//! Where each block lives: `V`, `P` and `G`, and the runs that changed since they were last committed.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{BLOCK_SIZE, ByteRange};

use super::bits::{Bits, words_for, zeroed_words};
use super::journal::BlockRun;
use super::live_file::LiveFile;
use super::mistakes::{Mistake, makes};
use super::source::DiskLayout;
use super::sync::Mutex;

/// The restore map of one disk.
#[derive(Debug)]
pub(super) struct BlockMap {
    disk: DiskLayout,
    block_count: u64,
    live: LiveFile,
    p: Box<[AtomicU64]>,
    /// How many bits of `V` are set.
    home: AtomicU64,
    /// `E`: the runs in which `V` or `G` grew since they were last noted, so that a flush need not scan.
    ///
    /// A bit is set and its run pushed under this lock: so whoever finds a bit set already, and
    /// acknowledges because of it, is followed by a noting that finds the run.
    touched: Mutex<Vec<Range<u64>>>,
    /// Blocks that came home since the last noting.
    uncommitted: AtomicU64,
}

impl BlockMap {
    pub(super) fn new(disk: DiskLayout, live: LiveFile) -> Self {
        let block_count = disk.size.div_ceil(BLOCK_SIZE);
        Self {
            disk,
            block_count,
            live,
            p: zeroed_words(words_for(block_count)),
            home: AtomicU64::new(0),
            touched: Mutex::new(Vec::new()),
            uncommitted: AtomicU64::new(0),
        }
    }

    pub(super) const fn disk(&self) -> DiskLayout {
        self.disk
    }

    pub(super) const fn block_count(&self) -> u64 {
        self.block_count
    }

    pub(super) const fn live(&self) -> &LiveFile {
        &self.live
    }

    pub(super) fn v(&self) -> Bits<'_> {
        self.live.v()
    }

    pub(super) fn g(&self) -> Bits<'_> {
        self.live.g()
    }

    pub(super) fn p(&self) -> Bits<'_> {
        Bits::new(&self.p, self.block_count)
    }

    /// The blocks that a range touches.
    pub(super) const fn blocks(&self, range: ByteRange) -> Range<u64> {
        range.units(BLOCK_SIZE)
    }

    /// The blocks that a range covers whole. The last block ends where the disk does.
    pub(super) fn whole_blocks(&self, range: ByteRange) -> Range<u64> {
        let start = range.start().div_ceil(BLOCK_SIZE);
        let end = if range.end() == self.disk.size { self.block_count } else { range.end() / BLOCK_SIZE };
        start..end.max(start)
    }

    /// The bytes of some blocks, up to the disk's end.
    pub(super) fn bytes(&self, blocks: &Range<u64>) -> ByteRange {
        ByteRange::from_bounds(blocks.start * BLOCK_SIZE, (blocks.end * BLOCK_SIZE).min(self.disk.size))
    }

    pub(super) fn chunk_of(&self, block: u64) -> u64 {
        block * BLOCK_SIZE / u64::from(self.disk.chunk_size)
    }

    pub(super) fn chunks_of(&self, blocks: &Range<u64>) -> Range<u64> {
        if blocks.is_empty() {
            return 0..0;
        }
        self.chunk_of(blocks.start)..self.chunk_of(blocks.end - 1) + 1
    }

    pub(super) fn blocks_of_chunks(&self, chunks: &Range<u64>) -> Range<u64> {
        self.blocks(self.disk.run_range(chunks))
    }

    pub(super) fn is_whole(&self, chunk: u64) -> bool {
        self.v().all(self.blocks_of_chunks(&(chunk..chunk + 1)))
    }

    /// How many bytes of a chunk are not home.
    pub(super) fn absent_bytes(&self, chunk: u64) -> u64 {
        let runs = self.v().runs(self.blocks_of_chunks(&(chunk..chunk + 1)));
        runs.filter(|(_, is_home)| !is_home).map(|(run, _)| self.bytes(&run).len()).sum()
    }

    pub(super) fn home(&self) -> u64 {
        self.home.load(Ordering::Acquire)
    }

    pub(super) fn is_all_home(&self) -> bool {
        self.home() == self.block_count
    }

    /// Every block is home, on stable storage, and the journal says so.
    pub(super) fn is_all_stable(&self) -> bool {
        self.p().count() == self.block_count
    }

    /// Bytes that came home since the last commit began.
    pub(super) fn uncommitted_bytes(&self) -> u64 {
        self.uncommitted.load(Ordering::Relaxed) * BLOCK_SIZE
    }

    pub(super) fn has_touched(&self) -> bool {
        !self.touched.lock().is_empty()
    }

    /// The guest is about to change these blocks.
    pub(super) fn mark_guest(&self, blocks: Range<u64>) {
        if self.g().all(blocks.clone()) {
            return;
        }
        let mut touched = self.touched.lock();
        self.g().set(blocks.clone());
        // Blocks that are not home yet are pushed when they are.
        if self.v().any(blocks.clone()) {
            push(&mut touched, blocks);
        }
    }

    /// The target now holds the truth of these blocks; the number of those for which that is new.
    pub(super) fn mark_home(&self, blocks: Range<u64>) -> u64 {
        if self.v().all(blocks.clone()) {
            return 0;
        }
        let set_before = makes(Mistake::BitBeforeList).then(|| self.v().set(blocks.clone()));
        let mut touched = self.touched.lock();
        let new = set_before.unwrap_or_else(|| self.v().set(blocks.clone()));
        push(&mut touched, blocks);
        self.home.fetch_add(new, Ordering::AcqRel);
        self.uncommitted.fetch_add(new, Ordering::Relaxed);
        new
    }

    /// Takes the runs that are home and not yet known on stable storage, or known there with fewer of `G`.
    pub(super) fn note(&self) -> Vec<BlockRun> {
        let mut touched = {
            let mut list = self.touched.lock();
            self.uncommitted.store(0, Ordering::Relaxed);
            std::mem::take(&mut *list)
        };
        touched.sort_unstable_by_key(|run| run.start);
        let mut runs = Vec::new();
        let mut at = 0;
        for run in touched {
            let run = run.start.max(at)..run.end;
            at = at.max(run.end);
            if run.is_empty() {
                continue;
            }
            for (home, _) in self.v().runs(run).filter(|(_, is_home)| *is_home) {
                for (part, guest) in self.g().runs(home) {
                    push_run(&mut runs, part, guest);
                }
            }
        }
        runs
    }

    /// These runs are on stable storage, and so is a journal that says so.
    pub(super) fn mark_stable(&self, runs: &[BlockRun]) {
        let p = self.p();
        for run in runs {
            p.set(run.start..run.start + u64::from(run.len));
        }
    }

    /// After the bits were set from elsewhere: counts them, and notes as touched what the journal
    /// does not say yet (`guest` is what it says of `G`).
    pub(super) fn recount(&self, guest: &Bits<'_>) {
        let (v, p, g) = (self.v(), self.p(), self.g());
        self.home.store(v.count(), Ordering::Release);
        let mut touched = self.touched.lock();
        touched.clear();
        for word in 0..v.word_count() {
            let new = v.word(word) & !(p.word(word) & (guest.word(word) | !g.word(word)));
            if new != 0 {
                let start = word as u64 * 64;
                push(&mut touched, start..(start + 64).min(self.block_count));
            }
        }
    }
}

fn push(touched: &mut Vec<Range<u64>>, run: Range<u64>) {
    if let Some(last) = touched.last_mut()
        && run.start <= last.end
        && run.end >= last.start
    {
        last.start = last.start.min(run.start);
        last.end = last.end.max(run.end);
        return;
    }
    touched.push(run);
}

fn push_run(runs: &mut Vec<BlockRun>, blocks: Range<u64>, guest: bool) {
    let mut start = blocks.start;
    if let Some(last) = runs.last_mut()
        && last.guest == guest
        && last.start + u64::from(last.len) == start
        && let Ok(len) = u32::try_from(blocks.end - last.start)
    {
        last.len = len;
        return;
    }
    while start < blocks.end {
        let len = u32::try_from(blocks.end - start).unwrap_or(u32::MAX);
        runs.push(BlockRun { start, len, guest });
        start += u64::from(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::live_file::LiveWords;

    fn map() -> BlockMap {
        let disk = DiskLayout { size: 64 * BLOCK_SIZE + 512, chunk_size: 16384 };
        BlockMap::new(disk, LiveFile::new(LiveWords::in_memory(disk), disk))
    }

    #[test]
    fn the_last_block_is_whole_where_the_disk_ends() {
        let map = map();
        assert_eq!(map.block_count(), 65);
        assert_eq!(map.whole_blocks(ByteRange::from_bounds(64 * BLOCK_SIZE, 64 * BLOCK_SIZE + 512)), 64..65);
        assert_eq!(map.whole_blocks(ByteRange::from_bounds(64 * BLOCK_SIZE, 64 * BLOCK_SIZE + 511)), 64..64);
        assert_eq!(map.whole_blocks(ByteRange::from_bounds(1, 4097)), 1..1);
        assert_eq!(map.bytes(&(64..65)).len(), 512);
    }

    #[test]
    fn what_is_noted_is_what_came_home_since_with_the_guests_part_of_it() {
        let map = map();
        map.mark_home(0..4);
        map.mark_guest(8..10);
        map.mark_home(8..12);
        let noted = map.note();
        assert_eq!(
            noted,
            [
                BlockRun { start: 0, len: 4, guest: false },
                BlockRun { start: 8, len: 2, guest: true },
                BlockRun { start: 10, len: 2, guest: false },
            ]
        );
        map.mark_stable(&noted);
        assert!(map.note().is_empty());
        map.mark_home(0..4);
        assert!(map.note().is_empty(), "nothing is new");
        map.mark_guest(1..2);
        assert_eq!(map.note(), [BlockRun { start: 1, len: 1, guest: true }]);
    }

    #[test]
    fn a_block_that_the_guest_began_to_write_is_not_noted_before_it_is_home() {
        let map = map();
        map.mark_guest(3..4);
        assert!(map.note().is_empty());
        map.mark_home(3..4);
        assert_eq!(map.note(), [BlockRun { start: 3, len: 1, guest: true }]);
    }

    #[test]
    fn a_block_that_two_threads_bring_home_is_noted_before_either_flush_ends() {
        for _ in 0..50 {
            let map = map();
            let committer = Mutex::new(());
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        for block in 0..map.block_count() {
                            map.mark_home(block..block + 1);
                            let _alone = committer.lock();
                            map.mark_stable(&map.note());
                            assert!(map.p().contains(block), "block {block}");
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn a_recount_finds_what_the_journal_does_not_say() {
        let map = map();
        map.v().set(0..10);
        map.p().set(0..8);
        map.g().set(2..4);
        let journal = zeroed_words(2);
        map.recount(&Bits::new(&journal, map.block_count()));
        assert_eq!(map.home(), 10);
        let noted = map.note();
        assert!(noted.contains(&BlockRun { start: 2, len: 2, guest: true }), "{noted:?}");
        assert!(noted.iter().any(|run| run.start + u64::from(run.len) == 10), "{noted:?}");
    }
}
