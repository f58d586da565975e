//! The disk as a strip of cells: what is home, absent, on its way, written by the guest, damaged.

use std::ops::Range;

use super::session::Session;

/// What is shown of a part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// None of it is home.
    Absent,
    /// Some of it is home.
    Part,
    /// All of it is home.
    Home,
    /// As much of it as is home, or at least half of that, was written by the guest.
    Guest,
    /// Some of it is being fetched, or written home, just now.
    Fetching,
    /// The repository could not give some of it.
    Damaged,
}

impl Cell {
    /// A character for it.
    #[must_use]
    pub const fn letter(self) -> char {
        match self {
            Self::Absent => '.',
            Self::Part => '+',
            Self::Home => '#',
            Self::Guest => 'w',
            Self::Fetching => '>',
            Self::Damaged => '!',
        }
    }
}

impl Session {
    /// The disk as so many cells of one size, or as fewer where it is small. Cells are multiples of 64 blocks.
    #[must_use]
    pub fn strip(&self, cells: usize) -> Vec<Cell> {
        let (v, g) = (self.map.v(), self.map.g());
        let words = v.word_count();
        let cells = cells.clamp(1, words.max(1));
        let bounds = |cell: usize| words * cell / cells..words * (cell + 1) / cells;
        let mut strip: Vec<Cell> = (0..cells)
            .map(|cell| {
                let (mut all, mut home, mut guest) = (0, 0, 0);
                for word in bounds(cell) {
                    all += v.full_word(word).count_ones();
                    home += v.word(word).count_ones();
                    guest += (v.word(word) & g.word(word)).count_ones();
                }
                match home {
                    0 => Cell::Absent,
                    _ if guest * 2 >= home => Cell::Guest,
                    _ if home < all => Cell::Part,
                    _ => Cell::Home,
                }
            })
            .collect();
        let mut mark = |chunks: &Range<u64>, mark: Cell| {
            let blocks = self.map.blocks_of_chunks(chunks);
            let touched = (blocks.start / 64) as usize..(blocks.end.div_ceil(64) as usize).min(words);
            for (cell, shown) in strip.iter_mut().enumerate() {
                let has = bounds(cell);
                if has.start < touched.end && touched.start < has.end {
                    *shown = mark;
                }
            }
        };
        let in_flight = self.fills.lock().plan.in_flight_runs();
        let decoded: Vec<u64> = self.decoded.lock().keys().copied().collect();
        for run in in_flight.into_iter().chain(decoded.into_iter().map(|chunk| chunk..chunk + 1)) {
            if run.clone().any(|chunk| !self.map.is_whole(chunk)) {
                mark(&run, Cell::Fetching);
            }
        }
        let damage = self.stats.damage.lock().summary(|chunk| self.map.absent_bytes(chunk));
        for run in &damage.runs {
            mark(&run.chunks, Cell::Damaged);
        }
        strip
    }
}
