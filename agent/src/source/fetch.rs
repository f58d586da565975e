//! The fetching threads: what each takes next, and how it carries that out.
//!
//! A thread that has taken an order wakes the next one if there is more to take; so one wake is enough
//! however much becomes possible at once.

use std::sync::atomic::Ordering;
use std::time::Instant;

use parking_lot::MutexGuard;

use super::chunk_store::{ChunkStore, Key, Placed};
use super::piece::{Piece, Waiter};
use super::pool::{Shared, State, deliver};
use crate::live::{SourceErrorKind, Urgency};

/// The background fetches neighbours together up to so many plain bytes.
const PIECE_PLAIN_BYTES: usize = 512 << 10;
/// Stored bytes that may wait for the decode pool before the background stops fetching.
const DECODE_BACKLOG_BYTES: u64 = 3 << 20;

/// What a fetching thread takes: a piece to read, or chunks still to be found.
enum Order<P> {
    Find { keys: Vec<Key>, urgency: Urgency },
    Read(Piece<P>),
}

impl<S: ChunkStore> Shared<S> {
    /// Wakes a fetching thread if there is anything for it. That one wakes the next when it has taken its
    /// order, and so on: whoever makes something possible need not know how much.
    pub(super) fn wake_fetcher(&self, state: &State<S::Place>) {
        let is_urgent = state.queue.may_start(Urgency::Readahead) || has_urgent_piece(state);
        let has_more = !state.located.is_empty() || state.queue.may_start(Urgency::Background);
        if is_urgent || (has_more && self.may_begin(state)) {
            self.to_fetch.notify_one();
        }
    }

    /// Whether the background may begin another fetch.
    fn may_begin(&self, state: &State<S::Place>) -> bool {
        let slots = self.options.slots.saturating_sub(self.options.reserved_for_demand).max(1);
        state.background_slots < slots
            && state.window.has_room()
            && state.arrived_bytes < DECODE_BACKLOG_BYTES
    }

    /// Fetches until the pool is closed.
    pub(super) fn fetch_loop(&self) {
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

    fn next_order(&self, state: &mut State<S::Place>) -> Option<Order<S::Place>> {
        if let Some((key, urgency)) = state.queue.start(Urgency::Readahead) {
            self.wake_fetcher(state);
            return Some(Order::Find { keys: vec![key], urgency });
        }
        if has_urgent_piece(state) {
            // Somebody urgent joined it meanwhile: no window holds it back.
            state.background_slots += 1;
            return state.located.pop().map(Order::Read);
        }
        if !self.may_begin(state) {
            return None;
        }
        let order = if let Some(piece) = state.located.pop() {
            Order::Read(piece)
        } else {
            let (first, urgency) = state.queue.start(Urgency::Background)?;
            let mut keys = vec![first];
            let mut plain = self.store.plain_len(first);
            while plain + self.store.plain_len(first) <= PIECE_PLAIN_BYTES {
                let Some((key, _)) = state.queue.start(Urgency::Background) else { break };
                plain += self.store.plain_len(key);
                keys.push(key);
            }
            Order::Find { keys, urgency }
        };
        state.background_slots += 1;
        Some(order)
    }

    /// Finds chunks, reads them and hands them to the decode pool. No lock is held meanwhile.
    fn carry_out(&self, order: Order<S::Place>) {
        let begun = Instant::now();
        let (piece, background) = match order {
            Order::Read(piece) => (Some(piece), true),
            Order::Find { keys, urgency } => (self.find(keys), urgency == Urgency::Background),
        };
        let Some(mut piece) = piece else {
            if background {
                self.state.lock().background_slots -= 1;
            }
            return;
        };
        let len = piece.stored_len();
        if background {
            let mut state = self.state.lock();
            state.window.begin(len);
            self.wake_fetcher(&state);
        }
        let arrives = self.throttle.reserve(begun, len);
        let mut stored = self.stored_buffer(len);
        let result = self.store.read(&piece.chunks[0].1, &mut stored);
        if let Some(arrives) = arrives {
            std::thread::sleep(arrives.saturating_duration_since(Instant::now()));
        }
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state.lock();
        if background {
            state.background_slots -= 1;
            match result {
                Ok(()) => state.window.end(len, begun.elapsed()),
                Err(_) => state.window.cancel(len),
            }
        }
        match result {
            Ok(()) => {
                piece.stored = Some(stored);
                self.counters.stored_bytes.fetch_add(len, Ordering::Relaxed);
                let urgency = urgency_of(&state, &piece);
                state.arrived_bytes += len;
                state.arrived[urgency.lane()].push_back(piece);
                drop(state);
                self.to_decode.notify_one();
            }
            Err(error) if error.kind() == SourceErrorKind::Missing && piece.chunks.len() > 1 => {
                // A pack that is cut short may hold some of them: each alone.
                state.located.extend(piece.into_single_chunks().rev());
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
    fn find(&self, keys: Vec<Key>) -> Option<Piece<S::Place>> {
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
            let waiting = std::mem::take(&mut state.located);
            // The last is taken first: what was located before goes before these.
            state.located = others.into_iter().chain(waiting).collect();
        }
        first
    }
}

/// Whether somebody urgent has joined the located piece that is next.
fn has_urgent_piece<P: Placed>(state: &State<P>) -> bool {
    state.located.last().is_some_and(|piece| urgency_of(state, piece) > Urgency::Background)
}

/// How urgent the most urgent chunk of a piece is by now.
fn urgency_of<P: Placed>(state: &State<P>, piece: &Piece<P>) -> Urgency {
    let urgencies = piece.chunks.iter().filter_map(|(key, _)| state.queue.urgency(*key));
    urgencies.max().unwrap_or(Urgency::Background)
}
