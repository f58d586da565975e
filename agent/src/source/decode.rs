//! The decoding threads: from pieces that arrived to chunks that are verified and given to whoever waits.
//!
//! Chunks are hashed side by side where that is faster, so a thread takes as many of the background's pieces as
//! make up [`BATCH_CHUNKS`]. What a guest waits for is decoded alone, and first.

use std::sync::Arc;

use block::{AlignedBuf, BufPart, GiveWay};
use parking_lot::{Condvar, MutexGuard};

use super::chunk_store::{ChunkStore, Decode, Key, Placed, Undecoded};
use super::piece::{Piece, RunSlot, Waiter};
use super::pool::{Shared, State, deliver};
use crate::live::{ChunkData, SourceError, Urgency};

/// Enough chunks to fill the widest vector units (16 lanes) twice. It also bounds what a miss may have to wait for.
const BATCH_CHUNKS: usize = 16;
/// Plain bytes that are decoded together at most, unless one piece is longer.
const BATCH_PLAIN_BYTES: usize = 4 << 20;
/// How far the decoding threads step back.
const DECODE_NICENESS: i32 = 3;

/// Where a chunk is decoded to.
enum Room {
    /// Straight into a run that waits, where there is one: it saves a copy.
    Run(RunSlot, BufPart),
    Own(AlignedBuf),
}

impl Room {
    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::Run(_, part) => part,
            Self::Own(buf) => buf,
        }
    }
}

impl<S: ChunkStore> Shared<S> {
    /// Decodes until the pool is closed. It steps back behind whatever else wants the processor: a
    /// guest and who serves it come first.
    pub(super) fn decode_loop(&self) {
        // Where that is not allowed, all is as it would be without.
        if let Ok(own) = rustix::process::getpriority_process(None) {
            let _ = rustix::process::setpriority_process(None, own + DECODE_NICENESS);
        }
        self.decode_those(Urgency::Background, &self.to_decode);
    }

    /// The same for what guests wait for alone, and at a guest's priority.
    pub(super) fn decode_urgent_loop(&self) {
        let _ = block::short_turns();
        self.decode_those(Urgency::Demand, &self.to_decode_urgent);
    }

    /// Wakes a thread to decode what arrived.
    pub(super) fn wake_decoder(&self, urgency: Urgency) {
        if urgency == Urgency::Demand {
            self.to_decode_urgent.notify_one();
        }
        self.to_decode.notify_one();
    }

    fn decode_those(&self, at_least: Urgency, wakes: &Condvar) {
        // Guests and who serves them wait for a processor that a decoder has, some milliseconds unless it makes way; a decoder of
        // what guests wait for too, or reads of what is home wait for those that are not.
        let mut way = GiveWay::default();
        let mut decoder = self.store.decoder(move || way.now());
        let mut state = self.state.lock();
        loop {
            if state.closed {
                // Whoever waited for what is left was told.
                return;
            }
            let batch = self.next_batch(&mut state, at_least);
            if batch.is_empty() {
                wakes.wait(&mut state);
                continue;
            }
            let len: u64 = batch.iter().map(Piece::stored_len).sum();
            MutexGuard::unlocked(&mut state, || self.decode(&mut decoder, batch));
            state.arrived_bytes -= len;
            self.wake_fetcher(&state);
        }
    }

    /// The most urgent piece; of what no guest waits for as many as make up a batch.
    fn next_batch(&self, state: &mut State<S::Place>, at_least: Urgency) -> Vec<Piece<S::Place>> {
        let mut batch = Vec::new();
        let (mut chunks, mut bytes) = (0, 0);
        for (lane, arrived) in state.arrived.iter_mut().enumerate().skip(at_least.lane()).rev() {
            while let Some(piece) = arrived.front() {
                let len: usize = piece.chunks.iter().map(|(key, _)| self.store.plain_len(*key)).sum();
                chunks += piece.chunks.len();
                bytes += len;
                if !batch.is_empty() && (chunks > BATCH_CHUNKS || bytes > BATCH_PLAIN_BYTES) {
                    break;
                }
                batch.extend(arrived.pop_front());
                if lane >= Urgency::Readahead.lane() {
                    break;
                }
            }
            if !batch.is_empty() {
                break;
            }
        }
        batch
    }

    fn decode(&self, decoder: &mut S::Decoder, batch: Vec<Piece<S::Place>>) {
        let mut chunks = Vec::new();
        for piece in &batch {
            let mut stored = piece.stored.as_deref().expect("a piece that arrived has its bytes");
            for (key, place) in &piece.chunks {
                let (this, others) = stored.split_at(place.stored_len() as usize);
                chunks.push((*key, place, this, self.place_for(*key)));
                stored = others;
            }
        }
        let mut undecoded: Vec<_> = chunks
            .iter_mut()
            .map(|(_, place, stored, into)| Undecoded { place: *place, stored, out: into.bytes() })
            .collect();
        let results = decoder.decode_each(&mut undecoded);
        for ((key, _, _, into), result) in chunks.into_iter().zip(results) {
            self.end(key, into, result);
        }
    }

    fn place_for(&self, key: Key) -> Room {
        let run = self.state.lock().queue.waiters(key).iter().find_map(|waiter| match waiter {
            Waiter::Run(into) => Some(into.clone()),
            Waiter::One(_) => None,
        });
        let taken = run.and_then(|into| into.run.take_part(into.slot).map(|part| Room::Run(into, part)));
        // A chunk has one fetch: a part that cannot be had was given up just now, as the pool was closed.
        taken.unwrap_or_else(|| Room::Own(self.buffers.take(self.store.plain_len(key))))
    }

    /// Ends the fetch of a chunk and gives it, or why it could not be had, to everybody who waits.
    fn end(&self, key: Key, into: Room, result: Result<(), SourceError>) {
        match into {
            Room::Run(into, part) => self.end_run_chunk(key, &into, part, result),
            Room::Own(buf) => {
                let result = result.map(|()| ChunkData::new(buf));
                let waiters = {
                    let mut state = self.state.lock();
                    let urgency = state.queue.urgency(key);
                    debug_assert!(urgency.is_some() || state.closed, "a fetch under way is known");
                    if let (Ok(chunk), Some(Urgency::Demand | Urgency::Readahead)) = (&result, urgency) {
                        self.cache.insert(key, chunk.clone());
                    }
                    state.queue.finish(key)
                };
                waiters.into_iter().for_each(|waiter| deliver(waiter, result.clone()));
            }
        }
    }

    /// Ends the fetch of a chunk that was decoded into a run's part, and copies it for the others.
    fn end_run_chunk(&self, key: Key, into: &RunSlot, part: BufPart, result: Result<(), SourceError>) {
        let waiters = self.state.lock().queue.finish(key);
        let others: Vec<Waiter> = waiters
            .into_iter()
            .filter(|waiter| {
                !matches!(waiter, Waiter::Run(other)
                    if Arc::ptr_eq(&other.run, &into.run) && other.slot == into.slot)
            })
            .collect();
        if !others.is_empty() {
            let copy = result.clone().map(|()| {
                let mut copy = self.buffers.take(part.len());
                copy.copy_from_slice(&part);
                ChunkData::new(copy)
            });
            if let Ok(chunk) = &copy {
                self.cache.insert(key, chunk.clone());
            }
            others.into_iter().for_each(|waiter| deliver(waiter, copy.clone()));
        }
        into.run.settle(into.slot, part, result);
    }
}
