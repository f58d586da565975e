//! Neighbouring chunks that one fetch brings, and the runs that wait for them.

use std::sync::Arc;

use block::{AlignedBuf, BufPart};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::chunk_store::{Key, Placed};
use crate::live::{ChunkData, RunData, SourceError};

/// Chunks whose stored bytes lie one after another; never empty.
pub(super) struct Piece<P> {
    pub(super) chunks: Vec<(Key, P)>,
    /// The stored bytes of all of them, once they are here.
    pub(super) stored: Option<AlignedBuf>,
}

impl<P: Placed> Piece<P> {
    /// Splits located chunks into pieces, in their order.
    pub(super) fn join_neighbours(chunks: Vec<(Key, P)>) -> Vec<Self> {
        let mut pieces: Vec<Self> = Vec::new();
        for (key, place) in chunks {
            match pieces.last_mut() {
                Some(piece) if piece.chunks.last().is_some_and(|(_, last)| place.follows(last)) => {
                    piece.chunks.push((key, place));
                }
                _ => pieces.push(Self { chunks: vec![(key, place)], stored: None }),
            }
        }
        pieces
    }

    /// Its chunks, each as a piece of its own.
    pub(super) fn into_single_chunks(self) -> impl DoubleEndedIterator<Item = Self> {
        self.chunks.into_iter().map(|chunk| Self { chunks: vec![chunk], stored: None })
    }

    /// The number of stored bytes of all of its chunks.
    pub(super) fn stored_len(&self) -> u64 {
        self.chunks.iter().map(|(_, place)| place.stored_len()).sum()
    }

    pub(super) fn holds(&self, key: Key) -> bool {
        self.chunks.iter().any(|(held, _)| *held == key)
    }
}

/// Somebody who waits for a chunk.
#[derive(Clone)]
pub(super) struct RunSlot {
    pub(super) run: Arc<Run>,
    pub(super) slot: usize,
}

pub(super) enum Waiter {
    One(oneshot::Sender<Result<ChunkData, SourceError>>),
    Run(RunSlot),
}

impl Waiter {
    pub(super) const fn is_run(&self) -> bool {
        matches!(self, Self::Run(_))
    }
}

/// A part of a run's buffer.
enum Part {
    /// Nobody has it.
    Free(BufPart),
    /// Somebody fills it.
    Taken,
    Settled(BufPart),
}

/// A run of chunks that are decoded into one buffer, each into its part.
pub(super) struct Run {
    first: u64,
    inner: Mutex<RunInner>,
}

struct RunInner {
    parts: Vec<Part>,
    missing: usize,
    failed: Vec<(u64, SourceError)>,
    withdrawn: Vec<u64>,
    done: Option<oneshot::Sender<RunData>>,
}

impl Run {
    /// A run of chunks from `first` on with these plain lengths, which `buf` has room for exactly.
    pub(super) fn new(
        first: u64,
        lengths: &[usize],
        buf: AlignedBuf,
    ) -> (Arc<Self>, oneshot::Receiver<RunData>) {
        let (done, receiver) = oneshot::channel();
        let parts: Vec<_> = BufPart::split(buf, lengths).into_iter().map(Part::Free).collect();
        let (missing, failed, withdrawn) = (parts.len(), Vec::new(), Vec::new());
        let inner = RunInner { missing, parts, failed, withdrawn, done: Some(done) };
        (Arc::new(Self { first, inner: Mutex::new(inner) }), receiver)
    }

    /// The part of a slot, to decode into. `None` while somebody else has it, and when it is settled.
    pub(super) fn take_part(&self, slot: usize) -> Option<BufPart> {
        let mut inner = self.inner.lock();
        // There are none any more once all were settled.
        let part = inner.parts.get_mut(slot)?;
        match std::mem::replace(part, Part::Taken) {
            Part::Free(free) => Some(free),
            other => {
                *part = other;
                None
            }
        }
    }

    /// Settles a slot: its part holds the chunk, or the chunk could not be had.
    pub(super) fn settle(&self, slot: usize, part: BufPart, result: Result<(), SourceError>) {
        let mut inner = self.inner.lock();
        inner.parts[slot] = Part::Settled(part);
        if let Err(error) = result {
            inner.failed.push((self.first + slot as u64, error));
        }
        inner.missing -= 1;
        if inner.missing > 0 {
            return;
        }
        let settled = |part| match part {
            Part::Settled(part) => part,
            Part::Free(_) | Part::Taken => unreachable!("every slot was settled"),
        };
        let parts = inner.parts.drain(..).map(settled).collect();
        let failed = std::mem::take(&mut inner.failed);
        let withdrawn = std::mem::take(&mut inner.withdrawn);
        let done = inner.done.take().expect("a run ends once");
        drop(inner);
        // A run whose caller went away is nobody's any more.
        let _ = done.send(RunData { bytes: BufPart::join(parts), failed, withdrawn });
    }

    /// Settles a slot with bytes that were decoded elsewhere.
    pub(super) fn settle_copy(&self, slot: usize, result: Result<&[u8], SourceError>) {
        let mut part = self.take_part(slot).expect("a chunk has one fetch, which settles each slot once");
        let result = result.map(|bytes| part.copy_from_slice(bytes));
        self.settle(slot, part, result);
    }

    /// Settles a slot as one that was not fetched, because that is to wait. Nobody else has it.
    pub(super) fn withdraw(&self, slot: usize) {
        if let Some(part) = self.take_part(slot) {
            self.inner.lock().withdrawn.push(self.first + slot as u64);
            self.settle(slot, part, Ok(()));
        }
    }

    /// Settles a slot as one that cannot be had, unless somebody has settled it or is about to.
    pub(super) fn give_up(&self, slot: usize, why: SourceError) {
        if let Some(part) = self.take_part(slot) {
            self.settle(slot, part, Err(why));
        }
    }
}
