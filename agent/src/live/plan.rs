//! Which chunks the background brings home next. Pure.

use std::collections::VecDeque;
use std::ops::Range;

/// What the plan is told of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// Nothing is to be done: it is home, on its way, or cannot be had.
    Skip,
    /// It is absent, and all zeroes.
    Zero,
    /// It is absent, and must be fetched.
    Data,
}

/// Neighbouring chunks to bring home in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) chunks: Range<u64>,
    pub(super) is_zero: bool,
}

/// The order of the background: first the runs that the caller gave (pack order), then everything
/// that was left out, from the disk's start to its end, as often as it is asked to begin again.
#[derive(Debug)]
pub(super) struct FillPlan {
    runs: VecDeque<Range<u64>>,
    chunk_count: u64,
    sweep: u64,
    in_flight: Vec<Range<u64>>,
    again: bool,
}

impl FillPlan {
    pub(super) fn new(runs: Vec<Range<u64>>, chunk_count: u64) -> Self {
        let runs = runs.into_iter().map(|run| run.start..run.end.min(chunk_count)).collect();
        Self { runs, chunk_count, sweep: 0, in_flight: Vec::new(), again: false }
    }

    /// The next piece: of one kind, of at most `most_data` chunks to fetch or `most_zero` zero ones.
    /// `None` where nothing is left to begin.
    pub(super) fn next(
        &mut self,
        most_data: u64,
        most_zero: u64,
        state: impl Fn(u64) -> Chunk,
    ) -> Option<Piece> {
        while let Some(run) = self.runs.front_mut() {
            if let Some(piece) = take(run, &self.in_flight, most_data, most_zero, &state) {
                return Some(self.begun(piece));
            }
            self.runs.pop_front();
        }
        let mut rest = self.sweep..self.chunk_count;
        let piece = take(&mut rest, &self.in_flight, most_data, most_zero, &state);
        self.sweep = rest.start;
        if let Some(piece) = piece {
            return Some(self.begun(piece));
        }
        if self.again && self.in_flight.is_empty() {
            self.again = false;
            self.sweep = 0;
        }
        None
    }

    /// The piece is home, or was given up; `again` where it must be tried later.
    pub(super) fn ended(&mut self, chunks: &Range<u64>, again: bool) {
        self.in_flight.retain(|piece| piece != chunks);
        self.again |= again;
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Looks at every chunk once more after what is in flight.
    pub(super) fn begin_again(&mut self) {
        self.again = true;
    }

    fn begun(&mut self, piece: Piece) -> Piece {
        self.in_flight.push(piece.chunks.clone());
        piece
    }
}

fn take(
    run: &mut Range<u64>,
    in_flight: &[Range<u64>],
    most_data: u64,
    most_zero: u64,
    state: impl Fn(u64) -> Chunk,
) -> Option<Piece> {
    let state = |chunk: u64| {
        if in_flight.iter().any(|piece| piece.contains(&chunk)) { Chunk::Skip } else { state(chunk) }
    };
    let (start, kind) =
        run.clone().map(|chunk| (chunk, state(chunk))).find(|(_, kind)| *kind != Chunk::Skip).or_else(
            || {
                run.start = run.end;
                None
            },
        )?;
    let is_zero = kind == Chunk::Zero;
    let most = if is_zero { most_zero } else { most_data };
    let mut end = start + 1;
    while end < run.end && end - start < most && state(end) == kind {
        end += 1;
    }
    run.start = end;
    Some(Piece { chunks: start..end, is_zero })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_chunk_comes_once_in_pieces_of_one_kind(
            kinds in prop::collection::vec(0_u8..3, 1..80),
            runs in prop::collection::vec((0_u64..80, 1_u64..20), 0..6),
            most in 1_u64..8,
        ) {
            let count = kinds.len() as u64;
            let runs = runs.into_iter().map(|(start, len)| start.min(count)..(start + len).min(count)).collect();
            let mut plan = FillPlan::new(runs, count);
            let mut home = BTreeSet::new();
            loop {
                let state = |chunk: u64| match kinds[chunk as usize] {
                    _ if home.contains(&chunk) => Chunk::Skip,
                    0 => Chunk::Skip,
                    1 => Chunk::Zero,
                    _ => Chunk::Data,
                };
                let Some(piece) = plan.next(most, 2 * most, state) else { break };
                let limit = if piece.is_zero { 2 * most } else { most };
                prop_assert!(piece.chunks.end - piece.chunks.start <= limit);
                for chunk in piece.chunks.clone() {
                    prop_assert_eq!(kinds[chunk as usize], if piece.is_zero { 1 } else { 2 });
                    prop_assert!(home.insert(chunk), "chunk {} came twice", chunk);
                }
                plan.ended(&piece.chunks, false);
            }
            prop_assert_eq!(home.len(), kinds.iter().filter(|&&kind| kind != 0).count());
        }
    }

    #[test]
    fn a_piece_that_must_be_tried_again_comes_again_once_the_others_have_ended() {
        let mut plan = FillPlan::new(Vec::new(), 4);
        let first = plan.next(2, 2, |_| Chunk::Data).unwrap();
        let second = plan.next(2, 2, |_| Chunk::Data).unwrap();
        assert_eq!(plan.next(2, 2, |_| Chunk::Data), None);
        plan.ended(&first.chunks, true);
        assert_eq!(plan.next(2, 2, |_| Chunk::Data), None);
        plan.ended(&second.chunks, false);
        assert_eq!(plan.next(2, 2, |_| Chunk::Data), None, "the sweep is wound back here");
        assert_eq!(plan.next(2, 2, |_| Chunk::Data), Some(first));
    }
}
