//! The threads that fetch and decode, and the orders they take work in.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use block::AlignedBuf;
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
/// The background fetches neighbours together up to so many plain bytes.
const PIECE_PLAIN_BYTES: usize = 512 << 10;
/// Stored bytes that may wait for the decode pool before the background stops fetching.
const DECODE_BACKLOG_BYTES: u64 = 8 << 20;
/// Buffers kept to be used again.
const SPARE_BYTES: usize = 32 << 20;

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
            slots: 32,
            reserved_for_demand: 8,
            decoders: cores,
            cache_bytes: 64 << 20,
            pace: SourcePace::default(),
        }
    }
}

/// What a pool has fetched since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchStats {
    /// Requests made to the source.
    pub requests: u64,
    /// Chunks that arrived.
    pub chunks: u64,
    /// Stored bytes that arrived.
    pub stored_bytes: u64,
    /// Their plain bytes.
    pub plain_bytes: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    requests: AtomicU64,
    pub(super) chunks: AtomicU64,
    stored_bytes: AtomicU64,
    pub(super) plain_bytes: AtomicU64,
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
    /// Pieces of the background that were located and wait for a slot.
    located: Vec<Piece<P>>,
    /// Pieces that arrived, by urgency.
    pub(super) arrived: [std::collections::VecDeque<Piece<P>>; LANES],
    pub(super) arrived_bytes: u64,
    window: Window,
    background_slots: usize,
    pub(super) closed: bool,
}

pub(super) struct Shared<S: ChunkStore> {
    pub(super) store: S,
    options: PoolOptions,
    throttle: Throttle,
    pub(super) cache: Cache<Key, ChunkData, ByBytes>,
    pub(super) state: Mutex<State<S::Place>>,
    /// Wakes a fetching thread: there is something to fetch, or room for it.
    pub(super) to_fetch: Condvar,
    /// Wakes a decoding thread.
    pub(super) to_decode: Condvar,
    spares: Mutex<Vec<AlignedBuf>>,
    pub(super) counters: Counters,
}

/// Fetches chunks for any number of disks of one store. Dropping it ends its threads.
pub struct FetchPool<S: ChunkStore> {
    shared: Arc<Shared<S>>,
    threads: Vec<JoinHandle<()>>,
}

/// What a fetching thread takes: a piece to read, or chunks still to be found.
enum Order<P> {
    Find { keys: Vec<Key>, urgency: Urgency },
    Read(Piece<P>),
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
                located: Vec::new(),
                arrived: std::array::from_fn(|_| std::collections::VecDeque::new()),
                arrived_bytes: 0,
                window: Window::default(),
                background_slots: 0,
                closed: false,
            }),
            to_fetch: Condvar::new(),
            to_decode: Condvar::new(),
            spares: Mutex::new(Vec::new()),
            counters: Counters::default(),
        });
        let mut pool = Self { shared, threads: Vec::new() };
        for number in 0..options.slots.max(1) {
            pool.spawn(format!("fetch-{number}"), Shared::fetch_loop)?;
        }
        for number in 0..options.decoders.max(1) {
            pool.spawn(format!("decode-{number}"), Shared::decode_loop)?;
        }
        Ok(pool)
    }

    fn spawn(&mut self, name: String, work: fn(&Shared<S>)) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name).stack_size(512 << 10);
        self.threads.push(thread.spawn(move || work(&shared))?);
        Ok(())
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
        let (sender, receiver) = oneshot::channel();
        let mut state = self.shared.state.lock();
        if state.closed {
            return Box::pin(std::future::ready(Err(closed())));
        }
        self.shared.join(&mut state, key, urgency, Waiter::One(sender));
        drop(state);
        Box::pin(async move { receiver.await.unwrap_or_else(|_| Err(closed())) })
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
        let buf = self.shared.buffer(lengths.iter().sum());
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
        drop(state);
        Box::pin(async move {
            receiver.await.unwrap_or_else(|_| RunData {
                bytes: AlignedBuf::zeroed(lengths.iter().sum()),
                failed: chunks.map(|chunk| (chunk, closed())).collect(),
            })
        })
    }

    /// Takes a buffer back, to be used again.
    pub fn recycle(&self, buf: AlignedBuf) {
        let mut spares = self.shared.spares.lock();
        if spares.iter().map(AlignedBuf::capacity).sum::<usize>() + buf.capacity() <= SPARE_BYTES {
            spares.push(buf);
        }
    }

    /// What was fetched until now.
    pub fn stats(&self) -> FetchStats {
        let counters = &self.shared.counters;
        FetchStats {
            requests: counters.requests.load(Ordering::Relaxed),
            chunks: counters.chunks.load(Ordering::Relaxed),
            stored_bytes: counters.stored_bytes.load(Ordering::Relaxed),
            plain_bytes: counters.plain_bytes.load(Ordering::Relaxed),
        }
    }
}

impl<S: ChunkStore> Drop for FetchPool<S> {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.closed = true;
        let waiters = state.queue.close();
        drop(state);
        for waiter in waiters {
            deliver(waiter, Err(closed()));
        }
        self.shared.to_fetch.notify_all();
        self.shared.to_decode.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl<S: ChunkStore> Shared<S> {
    fn join(&self, state: &mut State<S::Place>, key: Key, urgency: Urgency, waiter: Waiter) {
        match state.queue.join(key, urgency, waiter) {
            Joined::Queued => {
                self.to_fetch.notify_one();
            }
            Joined::Raised => {
                raise(state, key, urgency);
                self.to_fetch.notify_one();
            }
            Joined::Shared => {}
        }
    }

    fn fetch_loop(&self) {
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
            return Some(Order::Find { keys: vec![key], urgency });
        }
        if state.located.last().is_some_and(|piece| urgency_of(state, piece) > Urgency::Background) {
            // Somebody urgent joined it meanwhile: no window holds it back.
            state.background_slots += 1;
            return state.located.pop().map(Order::Read);
        }
        let slots = self.options.slots.saturating_sub(self.options.reserved_for_demand).max(1);
        let may_begin = state.background_slots < slots
            && state.window.has_room()
            && state.arrived_bytes < DECODE_BACKLOG_BYTES;
        if !may_begin {
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
                self.to_fetch.notify_one();
            }
            return;
        };
        let len = piece.stored_len();
        if background {
            self.state.lock().window.begin(len);
            // The window may have room for one more beside this one.
            self.to_fetch.notify_one();
        }
        let arrives = self.throttle.reserve(begun, len);
        let result = self.store.read(&piece.chunks[0].1, len);
        if let Some(arrives) = arrives {
            std::thread::sleep(arrives.saturating_duration_since(Instant::now()));
        }
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state.lock();
        if background {
            state.background_slots -= 1;
            match result {
                Ok(_) => state.window.end(len, begun.elapsed()),
                Err(_) => state.window.cancel(len),
            }
            self.to_fetch.notify_one();
        }
        match result {
            Ok(stored) => {
                piece.stored = stored;
                self.counters.stored_bytes.fetch_add(len, Ordering::Relaxed);
                let urgency = urgency_of(&state, &piece);
                state.arrived_bytes += len;
                state.arrived[urgency.lane()].push_back(piece);
                drop(state);
                self.to_decode.notify_one();
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
            self.to_fetch.notify_one();
        }
        first
    }

    /// A buffer of `len` bytes, of unknown contents.
    pub(super) fn buffer(&self, len: usize) -> AlignedBuf {
        let mut spares = self.spares.lock();
        let fits = |buf: &AlignedBuf| buf.capacity() >= len && buf.capacity() / 2 <= len.max(1);
        if let Some(at) = spares.iter().rposition(fits) {
            let mut buf = spares.swap_remove(at);
            buf.set_len(len);
            return buf;
        }
        drop(spares);
        AlignedBuf::zeroed(len)
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
    if let Some(at) = state.located.iter().position(|piece| piece.holds(key)) {
        let piece = state.located.remove(at);
        state.located.push(piece);
        return;
    }
    for lane in 0..urgency.lane() {
        if let Some(at) = state.arrived[lane].iter().position(|piece| piece.holds(key)) {
            let piece = state.arrived[lane].remove(at).expect("it was found there");
            state.arrived[urgency.lane()].push_back(piece);
            return;
        }
    }
}

fn urgency_of<P: Placed>(state: &State<P>, piece: &Piece<P>) -> Urgency {
    let urgencies = piece.chunks.iter().filter_map(|(key, _)| state.queue.urgency(*key));
    urgencies.max().unwrap_or(Urgency::Background)
}

fn closed() -> SourceError {
    SourceError::new(SourceErrorKind::Closed, "the source was closed")
}
