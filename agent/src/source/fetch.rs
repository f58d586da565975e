//! The fetching threads: what each takes next, and how it carries that out.
//!
//! A thread that has taken an order wakes the next one if there is more to take; so one wake is enough
//! however much becomes possible at once.

use std::time::Instant;

use parking_lot::MutexGuard;

use super::chunk_store::{ChunkStore, Key, Placed};
use super::piece::{Piece, Waiter};
use super::pool::{Shared, State, deliver};
use crate::live::{SourceErrorKind, Urgency};

/// Neighbours are fetched together up to so many plain bytes.
const PIECE_PLAIN_BYTES: usize = 512 << 10;
/// The same while guests ask: what they ask for waits behind the rest of a piece.
const SMALL_PIECE_PLAIN_BYTES: usize = 256 << 10;
/// Stored bytes that may wait for the decode pool before nothing more is prefetched.
const DECODE_BACKLOG_BYTES: u64 = 3 << 20;

/// What a fetching thread takes: a piece to read, or chunks still to be found.
struct Order<P> {
    what: What<P>,
    urgency: Urgency,
}

enum What<P> {
    Find(Vec<Key>),
    Read(Piece<P>),
}

impl<S: ChunkStore> Shared<S> {
    /// Wakes a fetching thread if there is anything for it. That one wakes the next when it has taken its
    /// order, and so on: whoever makes something possible need not know how much.
    pub(super) fn wake_fetcher(&self, state: &State<S::Place>) {
        let may_prefetch = self.may_prefetch(state);
        let has_work = |urgency: Urgency| {
            (urgency == Urgency::Demand || may_prefetch)
                && (!state.located[urgency.lane()].is_empty() || state.queue.may_start(urgency))
        };
        if Urgency::ALL.into_iter().any(has_work) {
            self.to_fetch.notify_one();
        }
    }

    /// Whether another fetch may begin that no guest waits for.
    fn may_prefetch(&self, state: &State<S::Place>) -> bool {
        let slots = self.options.slots.saturating_sub(self.options.reserved_for_demand).max(1);
        state.prefetch_slots < slots && state.window.has_room() && state.arrived_bytes < DECODE_BACKLOG_BYTES
    }

    /// Fetches until the pool is closed.
    pub(super) fn fetch_loop(&self) {
        // Where that is not allowed, all is as it would be without.
        let _ = block::short_turns();
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return;
            }
            let Some(order) = self.next_order(&mut state) else {
                self.to_fetch.wait(&mut state);
                continue;
            };
            MutexGuard::unlocked(&mut state, || self.carry_out(order));
        }
    }

    /// The most urgent thing to do. What no guest waits for is held back by the window and by the slots that are kept
    /// for guests.
    fn next_order(&self, state: &mut State<S::Place>) -> Option<Order<S::Place>> {
        for urgency in Urgency::ALL.into_iter().rev() {
            if urgency < Urgency::Demand && !self.may_prefetch(state) {
                return None;
            }
            let what = match state.located[urgency.lane()].pop() {
                Some(piece) => Some(What::Read(piece)),
                None => self.next_keys(state, urgency).map(What::Find),
            };
            let Some(what) = what else { continue };
            if urgency < Urgency::Demand {
                state.prefetch_slots += 1;
            } else {
                self.wake_fetcher(state);
            }
            return Some(Order { what, urgency });
        }
        None
    }

    /// Chunks to look for together. A guest's are neighbours: it does not wait for others' chunks.
    fn next_keys(&self, state: &mut State<S::Place>, urgency: Urgency) -> Option<Vec<Key>> {
        let first = state.queue.start_next(urgency, |_| true)?;
        let most = if state.window.do_guests_ask() { SMALL_PIECE_PLAIN_BYTES } else { PIECE_PLAIN_BYTES };
        let mut keys = vec![first];
        let mut plain = self.store.plain_len(first);
        let mut last = first;
        while plain + self.store.plain_len(first) <= most {
            let follows = |key: Key| key.disk == last.disk && key.chunk == last.chunk + 1;
            let fits = |key: Key| urgency < Urgency::Demand || follows(key);
            let Some(key) = state.queue.start_next(urgency, fits) else { break };
            plain += self.store.plain_len(key);
            keys.push(key);
            last = key;
        }
        Some(keys)
    }

    /// Finds chunks, reads them and hands them to the decode pool. No lock is held meanwhile.
    fn carry_out(&self, Order { what, urgency }: Order<S::Place>) {
        let begun = Instant::now();
        let is_prefetch = urgency < Urgency::Demand;
        let piece = match what {
            What::Read(piece) => Some(piece),
            What::Find(keys) => self.find(keys, urgency),
        };
        let Some(mut piece) = piece else {
            if is_prefetch {
                self.state.lock().prefetch_slots -= 1;
            }
            return;
        };
        let len = piece.stored_len();
        let flight = is_prefetch.then(|| {
            let mut state = self.state.lock();
            let flight = state.window.begin(len);
            self.wake_fetcher(&state);
            flight
        });
        let arrives = self.throttle.reserve(begun, len);
        let mut stored = self.buffers.take(usize::try_from(len).expect("a fetch is a few chunks"));
        let result = self.store.read(&piece.chunks[0].1, &mut stored);
        let mut state = self.state.lock();
        if let Some(arrives) = arrives {
            self.closing.wait_while_until(&mut state, |state| !state.closed, arrives);
        }
        if let Some(flight) = flight {
            state.prefetch_slots -= 1;
            match result {
                Ok(()) => state.window.end(flight, begun.elapsed(), self.begun.elapsed()),
                Err(_) => state.window.cancel(flight),
            }
        }
        match result {
            Ok(()) => {
                piece.stored = Some(stored);
                let urgency = urgency_of(&state, &piece);
                state.arrived_bytes += len;
                state.arrived[urgency.lane()].push_back(piece);
                self.wake_decoder(urgency);
            }
            Err(error) if error.kind() == SourceErrorKind::Missing && piece.chunks.len() > 1 => {
                // A pack that is cut short may hold some of them: each alone.
                for single in piece.into_single_chunks().rev() {
                    let urgency = urgency_of(&state, &single);
                    state.located[urgency.lane()].push(single);
                }
                self.wake_fetcher(&state);
            }
            Err(error) => {
                let waiters: Vec<Waiter> =
                    piece.chunks.iter().flat_map(|(key, _)| state.queue.finish(*key)).collect();
                drop(state);
                waiters.into_iter().for_each(|waiter| deliver(waiter, Err(error.clone())));
            }
        }
    }

    /// Finds where chunks are; the first piece is for the caller, the others for whoever has a slot.
    fn find(&self, keys: Vec<Key>, urgency: Urgency) -> Option<Piece<S::Place>> {
        let mut found = Vec::with_capacity(keys.len());
        for key in keys {
            match self.store.place(key) {
                Ok(place) => found.push((key, place)),
                Err(error) => {
                    let waiters = self.state.lock().queue.finish(key);
                    waiters.into_iter().for_each(|waiter| deliver(waiter, Err(error.clone())));
                }
            }
        }
        let mut pieces = Piece::join_neighbours(found).into_iter();
        let first = pieces.next();
        let mut others: Vec<_> = pieces.collect();
        if !others.is_empty() {
            others.reverse();
            let mut state = self.state.lock();
            let waiting = std::mem::take(&mut state.located[urgency.lane()]);
            // The last is taken first: what was located before goes before these.
            state.located[urgency.lane()] = others.into_iter().chain(waiting).collect();
            self.wake_fetcher(&state);
        }
        first
    }
}

/// How urgent the most urgent chunk of a piece is by now.
fn urgency_of<P: Placed>(state: &State<P>, piece: &Piece<P>) -> Urgency {
    let urgencies = piece.chunks.iter().filter_map(|(key, _)| state.queue.urgency(*key));
    urgencies.max().unwrap_or(Urgency::Background)
}
