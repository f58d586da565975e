//! What the fetching and the decoding threads share, and how work is given to them.

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use block::{AlignedBuf, BufferPool, Shelf};
use parking_lot::{Condvar, Mutex, MutexGuard};
use quick_cache::sync::Cache;
use tokio::sync::oneshot;

use super::chunk_store::{ChunkStore, Key, Placed};
use super::piece::{Piece, Run, RunSlot, Waiter};
use super::queue::{FetchQueue, Joined};
use super::throttle::{SourcePace, Throttle};
use super::window::Window;
use crate::live::{ChunkData, FetchFuture, RunData, SourceError, SourceErrorKind, Urgency};

const LANES: usize = Urgency::ALL.len();
/// Buffers that wait to be used again.
const SPARE_BYTES: usize = 32 << 20;
/// How long what is being fetched when the end begins may take.
const FETCH_PATIENCE: Duration = Duration::from_secs(1);
/// How long the end of a pool waits for its threads. One that is stuck in a read of a source that is dead is left behind.
const END_PATIENCE: Duration = Duration::from_secs(1);
/// Plain bytes that are being decoded and written home, beside those that are in flight.
const DECODING_BYTES: u64 = 8 << 20;

/// How a pool works.
#[derive(Clone, Copy, Debug)]
pub struct PoolOptions {
    /// Fetches in flight at most.
    pub slots: usize,
    /// Slots that the background never takes.
    pub reserved_for_demand: usize,
    /// Threads that decode.
    pub decoders: usize,
    /// Bytes of decoded chunks that are kept for further reads.
    pub cache_bytes: u64,
    /// How slow the source is made.
    pub pace: SourcePace,
}

impl Default for PoolOptions {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self {
            slots: 64,
            reserved_for_demand: 16,
            decoders: cores,
            cache_bytes: 64 << 20,
            pace: SourcePace::default(),
        }
    }
}

#[derive(Clone)]
pub(super) struct ByBytes;

impl quick_cache::Weighter<Key, ChunkData> for ByBytes {
    fn weight(&self, _: &Key, chunk: &ChunkData) -> u64 {
        chunk.len() as u64
    }
}

pub(super) struct State<P> {
    pub(super) queue: FetchQueue<Key, Waiter>,
    /// Pieces that were located and wait for a slot, by urgency; the last of each is taken first.
    pub(super) located: [Vec<Piece<P>>; LANES],
    /// Pieces that arrived, by urgency.
    pub(super) arrived: [std::collections::VecDeque<Piece<P>>; LANES],
    pub(super) arrived_bytes: u64,
    pub(super) window: Window,
    /// Slots that are taken by what no guest waits for.
    pub(super) prefetch_slots: usize,
    pub(super) closed: bool,
    /// Threads that have not ended.
    threads: usize,
}

pub(super) struct Shared<S: ChunkStore> {
    pub(super) store: S,
    pub(super) options: PoolOptions,
    pub(super) throttle: Throttle,
    pub(super) cache: Cache<Key, ChunkData, ByBytes>,
    pub(super) state: Mutex<State<S::Place>>,
    /// Wakes a fetching thread: there is something to fetch, or room for it.
    pub(super) to_fetch: Condvar,
    /// Wakes a decoding thread.
    pub(super) to_decode: Condvar,
    /// Wakes the decoding thread that is there for guests alone.
    pub(super) to_decode_urgent: Condvar,
    /// Wakes whoever waits for a source that was made slow: the pool is closed.
    pub(super) closing: Condvar,
    /// Wakes whoever waits for the threads' end.
    ended: Condvar,
    /// Where chunks and what is stored of them are kept: they are taken and dropped on many threads.
    pub(super) buffers: Shelf,
    pub(super) begun: Instant,
}

/// Fetches chunks for any number of disks of one store. Dropping it closes it, and ends its threads.
pub struct FetchPool<S: ChunkStore> {
    shared: Arc<Shared<S>>,
    threads: Vec<JoinHandle<()>>,
}

impl<S: ChunkStore> FetchPool<S> {
    /// Starts the threads.
    ///
    /// # Errors
    /// What the operating system says where it refuses a thread.
    pub fn start(store: S, options: PoolOptions) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            store,
            options,
            throttle: Throttle::new(options.pace),
            cache: Cache::with_weighter(
                usize::try_from(options.cache_bytes >> 16).unwrap_or(usize::MAX).max(16),
                options.cache_bytes,
                ByBytes,
            ),
            state: Mutex::new(State {
                queue: FetchQueue::default(),
                located: std::array::from_fn(|_| Vec::new()),
                arrived: std::array::from_fn(|_| std::collections::VecDeque::new()),
                arrived_bytes: 0,
                window: Window::default(),
                prefetch_slots: 0,
                closed: false,
                threads: 0,
            }),
            to_fetch: Condvar::new(),
            to_decode: Condvar::new(),
            to_decode_urgent: Condvar::new(),
            closing: Condvar::new(),
            ended: Condvar::new(),
            buffers: Shelf::new(SPARE_BYTES),
            begun: Instant::now(),
        });
        let mut pool = Self { shared, threads: Vec::new() };
        for number in 0..options.slots.max(1) {
            pool.spawn(format!("fetch-{number}"), Shared::fetch_loop)?;
        }
        for number in 0..options.decoders.max(1) {
            pool.spawn(format!("decode-{number}"), Shared::decode_loop)?;
        }
        pool.spawn("decode-urgent".to_owned(), Shared::decode_urgent_loop)?;
        Ok(pool)
    }

    fn spawn(&mut self, name: String, work: fn(&Shared<S>)) -> std::io::Result<()> {
        let present = Present::new(&self.shared);
        let thread = std::thread::Builder::new().name(name).stack_size(512 << 10);
        self.threads.push(thread.spawn(move || {
            let Present(shared) = &present;
            work(shared);
        })?);
        Ok(())
    }

    /// Gives up what is being fetched, whatever the source does, and everything that is asked for from now on: whoever waits is
    /// told that the source was closed.
    pub fn close(&self) {
        let mut state = self.shared.state.lock();
        state.closed = true;
        let waiters = state.queue.close();
        drop(state);
        for waiter in waiters {
            match waiter {
                Waiter::One(sender) => drop(sender.send(Err(closed()))),
                // What is being decoded just now is settled by who decodes it.
                Waiter::Run(RunSlot { run, slot }) => run.give_up(slot, closed()),
            }
        }
        for condvar in [
            &self.shared.to_fetch,
            &self.shared.to_decode,
            &self.shared.to_decode_urgent,
            &self.shared.closing,
        ] {
            condvar.notify_all();
        }
    }

    /// The store that it fetches from.
    pub fn store(&self) -> &S {
        &self.shared.store
    }

    /// A chunk that is in the cache.
    pub fn cached(&self, key: Key) -> Option<ChunkData> {
        self.shared.cache.get(&key)
    }

    /// One chunk, from the cache or the store.
    pub fn fetch(&self, key: Key, urgency: Urgency) -> FetchFuture<'static, Result<ChunkData, SourceError>> {
        if let Some(chunk) = self.cached(key) {
            return Box::pin(std::future::ready(Ok(chunk)));
        }
        let state = self.shared.state.lock();
        if state.closed {
            return Box::pin(std::future::ready(Err(closed())));
        }
        self.wait_for(state, key, urgency)
    }

    /// The chunk where a fetch of it is wanted or under way already, which becomes as urgent as this; `None`
    /// where there is no such fetch.
    pub fn join(
        &self,
        key: Key,
        urgency: Urgency,
    ) -> Option<FetchFuture<'static, Result<ChunkData, SourceError>>> {
        let state = self.shared.state.lock();
        state.queue.urgency(key)?;
        Some(self.wait_for(state, key, urgency))
    }

    fn wait_for(
        &self,
        mut state: MutexGuard<'_, State<S::Place>>,
        key: Key,
        urgency: Urgency,
    ) -> FetchFuture<'static, Result<ChunkData, SourceError>> {
        let (sender, receiver) = oneshot::channel();
        self.shared.join(&mut state, key, urgency, Waiter::One(sender));
        self.shared.wake_fetcher(&state);
        drop(state);
        if urgency == Urgency::Demand {
            // It may have arrived, and wait to be decoded.
            self.shared.to_decode_urgent.notify_one();
        }
        Box::pin(async move { receiver.await.unwrap_or_else(|_| Err(closed())) })
    }

    /// How many plain bytes of prefetching keep the source busy.
    pub fn prefetch_bytes(&self) -> u64 {
        // Stored bytes are about half of the plain ones; as much again waits for them, and some is being decoded.
        self.shared.state.lock().window.size() * 4 + DECODING_BYTES
    }

    /// Neighbouring chunks of one disk in one buffer.
    pub fn fetch_run(
        &self,
        disk: u32,
        chunks: Range<u64>,
        urgency: Urgency,
    ) -> FetchFuture<'static, RunData> {
        let keys = chunks.clone().map(|chunk| Key { disk, chunk });
        let lengths: Vec<usize> = keys.clone().map(|key| self.shared.store.plain_len(key)).collect();
        let buf = self.shared.run_buffer(lengths.iter().sum());
        let (run, receiver) = Run::new(chunks.start, &lengths, buf);
        let mut state = self.shared.state.lock();
        for (slot, key) in keys.enumerate() {
            if state.closed {
                run.settle_copy(slot, Err(closed()));
            } else {
                let waiter = Waiter::Run(RunSlot { run: Arc::clone(&run), slot });
                self.shared.join(&mut state, key, urgency, waiter);
            }
        }
        self.shared.wake_fetcher(&state);
        drop(state);
        Box::pin(async move {
            receiver.await.unwrap_or_else(|_| RunData {
                bytes: AlignedBuf::zeroed(lengths.iter().sum()),
                failed: chunks.map(|chunk| (chunk, closed())).collect(),
                withdrawn: Vec::new(),
            })
        })
    }

    /// Takes back what runs of this disk asked for that nobody waits for, and of which no fetch has begun: they end, and name it.
    pub fn withdraw(&self, disk: u32) {
        self.shared.withdraw(disk);
    }

    /// How many plain bytes of this disk [`Self::withdraw`] would take back, about.
    pub fn waiting_bytes(&self, disk: u32) -> u64 {
        self.shared.waiting_bytes(disk)
    }
}

impl<S: ChunkStore> FetchPool<S> {
    /// Closes it after a while, if it is still there then: for an end that lets what was asked for just now be answered.
    pub fn close_later(self: &Arc<Self>) {
        let pool = Arc::downgrade(self);
        let close = move || {
            std::thread::sleep(FETCH_PATIENCE);
            if let Some(pool) = pool.upgrade() {
                pool.close();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("closing".to_owned()).spawn(close) {
            tracing::warn!(%error, "no thread can be had: what is being fetched is given up at once");
            self.close();
        }
    }
}

impl<S: ChunkStore> Drop for FetchPool<S> {
    fn drop(&mut self) {
        self.close();
        let mut state = self.shared.state.lock();
        let late = self.shared.ended.wait_while_for(&mut state, |state| state.threads > 0, END_PATIENCE);
        drop(state);
        if late.timed_out() {
            return;
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so; there is nothing to add.
            let _ = thread.join();
        }
    }
}

/// A thread of a pool that has not ended.
struct Present<S: ChunkStore>(Arc<Shared<S>>);

impl<S: ChunkStore> Present<S> {
    fn new(shared: &Arc<Shared<S>>) -> Self {
        shared.state.lock().threads += 1;
        Self(Arc::clone(shared))
    }
}

impl<S: ChunkStore> Drop for Present<S> {
    fn drop(&mut self) {
        self.0.state.lock().threads -= 1;
        self.0.ended.notify_all();
    }
}

impl<S: ChunkStore> Shared<S> {
    /// Adds somebody who waits for `key`, and raises what is already under way for it.
    fn join(&self, state: &mut State<S::Place>, key: Key, urgency: Urgency, waiter: Waiter) {
        if urgency == Urgency::Demand {
            state.window.guest_asks(self.begun.elapsed());
        }
        if state.queue.join(key, urgency, waiter) == Joined::Raised {
            raise(state, key, urgency);
        }
    }

    /// A buffer for a run, which the calling thread will write: best one that its ring knows.
    fn run_buffer(&self, len: usize) -> AlignedBuf {
        let lent = BufferPool::of_thread().ok().and_then(|pool| pool.try_take(len));
        lent.unwrap_or_else(|| self.buffers.take(len))
    }
}

/// Gives a chunk to somebody who waited for it.
pub(super) fn deliver(waiter: Waiter, result: Result<ChunkData, SourceError>) {
    match waiter {
        // Whoever went away does not want it any more.
        Waiter::One(sender) => drop(sender.send(result)),
        Waiter::Run(RunSlot { run, slot }) => run.settle_copy(slot, result.as_deref().map_err(Clone::clone)),
    }
}

/// Moves what is already under way for `key` to where it is taken first.
fn raise<P: Placed>(state: &mut State<P>, key: Key, urgency: Urgency) {
    for lane in 0..urgency.lane() {
        if let Some(at) = state.located[lane].iter().position(|piece| piece.holds(key)) {
            let piece = state.located[lane].remove(at);
            state.located[urgency.lane()].push(piece);
            return;
        }
        if let Some(at) = state.arrived[lane].iter().position(|piece| piece.holds(key)) {
            let piece = state.arrived[lane].remove(at).expect("it was found there");
            state.arrived[urgency.lane()].push_back(piece);
            return;
        }
    }
}

fn closed() -> SourceError {
    SourceError::new(SourceErrorKind::Closed, "the source was closed")
}
