//! Which chunks are brought home next that no guest waits for. Pure.

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

/// Why a chunk is brought home. An earlier one goes before a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lane {
    /// It lies ahead of a stream of a guest's reads.
    Stream,
    /// The boot trace has it.
    Trace,
    /// A guest asked for a neighbour.
    Near,
    /// It is absent.
    Sweep,
}

const WANTED: [Lane; 3] = [Lane::Stream, Lane::Trace, Lane::Near];
const LANES: usize = Lane::Sweep as usize + 1;
/// Ranges that are wanted ahead of streams, or near what was asked for: of more the oldest are left to the sweep.
const MOST_WANTED: usize = 256;

/// Neighbouring chunks to bring home in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) chunks: Range<u64>,
    pub(super) is_zero: bool,
    pub(super) lane: Lane,
}

/// How much a piece may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Chunks of a piece of the sweep.
    pub(super) sweep: u64,
    /// Chunks of a piece that is wanted before the sweep: few, since others may be wanted before the rest of it.
    pub(super) wanted: u64,
    /// Zero chunks of a piece.
    pub(super) zero: u64,
}

/// The order: what is wanted, in the order of [`Lane`]; then the runs that the caller gave (pack order); then
/// everything that was left out, from the disk's start to its end, as often as it is asked to begin again.
#[derive(Debug)]
pub(super) struct FillPlan {
    wanted: [VecDeque<Range<u64>>; WANTED.len()],
    runs: VecDeque<Range<u64>>,
    /// What was begun and then taken back before it was fetched, by lane: it goes before the others of its lane.
    withdrawn: [VecDeque<Range<u64>>; LANES],
    chunk_count: u64,
    sweep: u64,
    in_flight: Vec<Piece>,
    again: bool,
}

impl FillPlan {
    pub(super) fn new(runs: Vec<Range<u64>>, trace: &[u64], chunk_count: u64) -> Self {
        let within = |run: Range<u64>| run.start..run.end.min(chunk_count);
        Self {
            wanted: [VecDeque::new(), join_trace(trace, chunk_count), VecDeque::new()],
            runs: runs.into_iter().map(within).collect(),
            withdrawn: Default::default(),
            chunk_count,
            sweep: 0,
            in_flight: Vec::new(),
            again: false,
        }
    }

    /// These chunks lie ahead of a stream.
    pub(super) fn want_ahead(&mut self, chunks: impl IntoIterator<Item = Range<u64>>) {
        let lane = &mut self.wanted[Lane::Stream as usize];
        lane.extend(chunks);
        let most = lane.len().saturating_sub(MOST_WANTED);
        lane.drain(..most);
    }

    /// A guest asked for `chunk`: up to `reach` chunks on either side of it are likely next, those behind it less.
    pub(super) fn want_near(&mut self, chunk: u64, reach: u64) {
        let lane = &mut self.wanted[Lane::Near as usize];
        lane.push_front(chunk.saturating_sub(reach)..chunk);
        lane.push_front(chunk + 1..(chunk + 1).saturating_add(reach).min(self.chunk_count));
        lane.truncate(MOST_WANTED);
    }

    /// The next piece: of one kind, and no less urgent than `least`. `None` where there is nothing of that to begin.
    pub(super) fn next(&mut self, least: Lane, sizes: Sizes, state: impl Fn(u64) -> Chunk) -> Option<Piece> {
        // Zeroes need no fetch, so nobody waits for them.
        let data = |chunk| if state(chunk) == Chunk::Data { Chunk::Data } else { Chunk::Skip };
        for lane in WANTED.into_iter().filter(|lane| *lane <= least) {
            let queues = [&mut self.withdrawn[lane as usize], &mut self.wanted[lane as usize]];
            let taken = queues
                .into_iter()
                .find_map(|runs| take_first(runs, |run| take(run, &self.in_flight, sizes.wanted, 0, data)));
            if let Some((chunks, is_zero)) = taken {
                return Some(self.begun(Piece { chunks, is_zero, lane }));
            }
        }
        if least < Lane::Sweep {
            return None;
        }
        let lane = Lane::Sweep;
        let queues = [&mut self.withdrawn[lane as usize], &mut self.runs];
        let taken = queues.into_iter().find_map(|runs| {
            take_first(runs, |run| take(run, &self.in_flight, sizes.sweep, sizes.zero, &state))
        });
        if let Some((chunks, is_zero)) = taken {
            return Some(self.begun(Piece { chunks, is_zero, lane }));
        }
        let mut rest = self.sweep..self.chunk_count;
        let taken = take(&mut rest, &self.in_flight, sizes.sweep, sizes.zero, &state);
        self.sweep = rest.start;
        if let Some((chunks, is_zero)) = taken {
            return Some(self.begun(Piece { chunks, is_zero, lane }));
        }
        if self.again && self.in_flight.is_empty() {
            self.again = false;
            self.sweep = 0;
        }
        None
    }

    /// The piece is home, or was given up; `again` where it must be tried later.
    pub(super) fn ended(&mut self, chunks: &Range<u64>, again: bool) {
        self.in_flight.retain(|piece| piece.chunks != *chunks);
        self.again |= again;
    }

    /// These chunks of a piece that has ended were not fetched: they are still to come.
    pub(super) fn withdrawn(&mut self, lane: Lane, chunks: impl IntoIterator<Item = Range<u64>>) {
        self.withdrawn[lane as usize].extend(chunks);
    }

    /// Chunks that are being fetched.
    pub(super) fn fetching(&self) -> u64 {
        let fetched = self.in_flight.iter().filter(|piece| !piece.is_zero);
        fetched.map(|piece| piece.chunks.end - piece.chunks.start).sum()
    }

    /// Whether a piece with this chunk is on its way home.
    pub(super) fn is_in_flight(&self, chunk: u64) -> bool {
        self.in_flight.iter().any(|piece| piece.chunks.contains(&chunk))
    }

    /// Chunks of the boot trace that were not begun yet.
    pub(super) fn trace_left(&self) -> u64 {
        let lane = Lane::Trace as usize;
        self.withdrawn[lane].iter().chain(&self.wanted[lane]).map(|run| run.end - run.start).sum()
    }

    /// The chunks of the pieces that were begun and have not ended.
    pub(super) fn in_flight_runs(&self) -> Vec<Range<u64>> {
        self.in_flight.iter().map(|piece| piece.chunks.clone()).collect()
    }

    /// Looks at every chunk once more after what is in flight.
    pub(super) fn begin_again(&mut self) {
        self.again = true;
    }

    fn begun(&mut self, piece: Piece) -> Piece {
        self.in_flight.push(piece.clone());
        piece
    }
}

/// Chunks of a trace whose neighbours follow soon are fetched with these: this far ahead is looked for them.
const TRACE_LOOKAHEAD: usize = 64;
/// So many are joined at most.
const TRACE_JOINED: u64 = 4;

/// A trace as runs: in its order, but with neighbours that come soon after taken along.
fn join_trace(trace: &[u64], chunk_count: u64) -> VecDeque<Range<u64>> {
    let mut places = std::collections::HashMap::new();
    for (place, chunk) in trace.iter().enumerate().filter(|(_, chunk)| **chunk < chunk_count) {
        places.entry(*chunk).or_insert(place);
    }
    let mut runs = VecDeque::new();
    for (place, &chunk) in trace.iter().enumerate() {
        if places.remove(&chunk).is_none() {
            continue;
        }
        let mut end = chunk + 1;
        let is_soon = |at: &usize| *at < place + TRACE_LOOKAHEAD;
        while end - chunk < TRACE_JOINED && places.get(&end).is_some_and(is_soon) {
            places.remove(&end);
            end += 1;
        }
        runs.push_back(chunk..end);
    }
    runs
}

/// What `take` finds in the first of `runs` that has anything; those that have nothing are dropped.
fn take_first<T>(runs: &mut VecDeque<Range<u64>>, take: impl Fn(&mut Range<u64>) -> Option<T>) -> Option<T> {
    while let Some(run) = runs.front_mut() {
        if let Some(taken) = take(run) {
            return Some(taken);
        }
        runs.pop_front();
    }
    None
}

/// Takes the first chunks of one kind off `run`, and whether they are zeroes.
fn take(
    run: &mut Range<u64>,
    in_flight: &[Piece],
    most_data: u64,
    most_zero: u64,
    state: impl Fn(u64) -> Chunk,
) -> Option<(Range<u64>, bool)> {
    let state = |chunk: u64| {
        if in_flight.iter().any(|piece| piece.chunks.contains(&chunk)) { Chunk::Skip } else { state(chunk) }
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
    Some((start..end, is_zero))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const TWO: Sizes = Sizes { sweep: 2, wanted: 1, zero: 2 };

    proptest! {
        #[test]
        fn every_chunk_comes_once_in_pieces_of_one_kind(
            kinds in prop::collection::vec(0_u8..3, 1..80),
            runs in prop::collection::vec((0_u64..80, 1_u64..20), 0..6),
            trace in prop::collection::vec(0_u64..100, 0..40),
            near in prop::collection::vec(0_u64..80, 0..4),
            most in 1_u64..8,
        ) {
            let count = kinds.len() as u64;
            let runs = runs.into_iter().map(|(start, len)| start.min(count)..(start + len).min(count)).collect();
            let mut plan = FillPlan::new(runs, &trace, count);
            for chunk in near {
                plan.want_near(chunk.min(count - 1), 5);
            }
            plan.want_ahead(std::iter::once(3.min(count)..7.min(count)));
            let mut home = BTreeSet::new();
            let mut last = Lane::Stream;
            loop {
                let state = |chunk: u64| match kinds[chunk as usize] {
                    _ if home.contains(&chunk) => Chunk::Skip,
                    0 => Chunk::Skip,
                    1 => Chunk::Zero,
                    _ => Chunk::Data,
                };
                let sizes = Sizes { sweep: most, wanted: 2, zero: 2 * most };
                let Some(piece) = plan.next(Lane::Sweep, sizes, state) else { break };
                let limit = if piece.is_zero { 2 * most } else { most.max(2) };
                prop_assert!(piece.chunks.end - piece.chunks.start <= limit);
                prop_assert!(last <= piece.lane, "{:?} after {:?}", piece, last);
                last = piece.lane;
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
        let mut plan = FillPlan::new(Vec::new(), &[], 4);
        let next = |plan: &mut FillPlan| plan.next(Lane::Sweep, TWO, |_| Chunk::Data);
        let first = next(&mut plan).unwrap();
        let second = next(&mut plan).unwrap();
        assert_eq!(next(&mut plan), None);
        plan.ended(&first.chunks, true);
        assert_eq!(next(&mut plan), None);
        plan.ended(&second.chunks, false);
        assert_eq!(next(&mut plan), None, "the sweep is wound back here");
        assert_eq!(next(&mut plan), Some(first));
    }

    #[test]
    fn what_was_taken_back_comes_before_the_others_of_its_lane() {
        let mut plan = FillPlan::new(vec![8..12, 0..2], &[20, 22, 24], 30);
        let next = |plan: &mut FillPlan| plan.next(Lane::Sweep, TWO, |_| Chunk::Data).unwrap();
        let begun: Vec<Piece> = (0..5).map(|_| next(&mut plan)).collect();
        let places: Vec<_> = begun.iter().map(|piece| (piece.lane, piece.chunks.clone())).collect();
        assert_eq!(places[2..], [(Lane::Trace, 24..25), (Lane::Sweep, 8..10), (Lane::Sweep, 10..12)]);
        // Of 8..10 the first had been fetched.
        let back = [None, Some(22..23), Some(24..25), Some(9..10), Some(10..12)];
        for (piece, back) in begun.iter().zip(back) {
            plan.ended(&piece.chunks, false);
            plan.withdrawn(piece.lane, back);
        }
        assert_eq!((plan.trace_left(), plan.fetching()), (2, 0));
        let again: Vec<_> = (0..5).map(|_| next(&mut plan)).map(|piece| (piece.lane, piece.chunks)).collect();
        let sweep = [9..10, 10..12, 0..2].map(|chunks| (Lane::Sweep, chunks));
        assert_eq!(again[..2], [(Lane::Trace, 22..23), (Lane::Trace, 24..25)]);
        assert_eq!(again[2..], sweep);
    }

    #[test]
    fn a_trace_comes_in_its_order_with_neighbours_that_follow_soon() {
        let plan = FillPlan::new(Vec::new(), &[9, 4, 2, 5, 10, 3, 99, 4], 50);
        let runs: Vec<_> = plan.wanted[Lane::Trace as usize].iter().cloned().collect();
        assert_eq!(runs, [9..11, 4..6, 2..4]);
        assert_eq!(plan.trace_left(), 6);
    }

    #[test]
    fn what_is_near_the_last_read_comes_first_and_the_sweep_waits_when_it_is_told_to() {
        let mut plan = FillPlan::new(Vec::new(), &[], 100);
        plan.want_near(20, 2);
        plan.want_near(50, 2);
        let chunks: Vec<u64> = std::iter::from_fn(|| plan.next(Lane::Near, TWO, |_| Chunk::Data))
            .map(|piece| piece.chunks.start)
            .collect();
        assert_eq!(chunks, [51, 52, 48, 49, 21, 22, 18, 19]);
        assert_eq!(plan.fetching(), 8);
        assert!(plan.is_in_flight(49) && !plan.is_in_flight(50));
    }
}
