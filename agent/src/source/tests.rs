//! The pool over a store in memory, whose answers can be held back.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::{ChunkStore, Decode, FetchPool, Key, Placed, PoolOptions, SourcePace, Undecoded};
use crate::live::{ChunkData, FetchFuture, SourceError, SourceErrorKind, Urgency};

const CHUNK: usize = 4096;

struct Place(Key);

impl Placed for Place {
    fn stored_len(&self) -> u64 {
        CHUNK as u64
    }

    fn follows(&self, previous: &Self) -> bool {
        self.0.chunk == previous.0.chunk + 1
    }
}

#[derive(Default)]
struct Memory {
    /// Chunks whose stored bytes are damaged.
    damaged: HashSet<u64>,
    /// Where what holds the chunks is cut short: reads that reach beyond the chunks before this one fail.
    cut_at: Option<u64>,
    reads: AtomicUsize,
    /// The first chunks of the reads, in their order.
    order: Mutex<Vec<u64>>,
    decoded: AtomicUsize,
    /// Reads that begin at these chunks wait until they are let go.
    held: Mutex<HashSet<u64>>,
    let_go: Condvar,
    decoding: Mutex<Decoding>,
}

/// What becomes of what arrived.
#[derive(Default)]
struct Decoding {
    /// It waits until it is let go.
    is_held: bool,
    /// Somebody waits.
    waits: bool,
}

/// Counts what it decodes.
struct Plain(Arc<Memory>);

fn bytes_of(chunk: u64) -> Vec<u8> {
    vec![chunk as u8; CHUNK]
}

impl ChunkStore for Arc<Memory> {
    type Place = Place;
    type Decoder = Plain;

    fn place(&self, key: Key) -> Result<Place, SourceError> {
        Ok(Place(key))
    }

    fn read(&self, first: &Place, stored: &mut [u8]) -> Result<(), SourceError> {
        let chunk = first.0.chunk;
        self.order.lock().push(chunk);
        self.reads.fetch_add(1, Ordering::SeqCst);
        let mut held = self.held.lock();
        self.let_go.wait_while(&mut held, |held| held.contains(&chunk));
        drop(held);
        let end = chunk + (stored.len() / CHUNK) as u64;
        if self.cut_at.is_some_and(|cut_at| end > cut_at) {
            return Err(SourceError::new(SourceErrorKind::Missing, "cut short"));
        }
        for (chunk, stored) in (chunk..).zip(stored.chunks_mut(CHUNK)) {
            stored.copy_from_slice(&bytes_of(chunk));
            if self.damaged.contains(&chunk) {
                stored[0] ^= 1;
            }
        }
        Ok(())
    }

    fn decoder(&self, _: impl FnMut() + Send + 'static) -> Plain {
        Plain(Arc::clone(self))
    }

    fn plain_len(&self, _: Key) -> usize {
        CHUNK
    }
}

impl Decode<Place> for Plain {
    fn decode_each(&mut self, chunks: &mut [Undecoded<'_, Place>]) -> Vec<Result<(), SourceError>> {
        let decode = |undecoded: &mut Undecoded<'_, Place>| {
            let chunk = undecoded.place.0.chunk;
            if undecoded.stored != bytes_of(chunk) {
                return Err(SourceError::new(SourceErrorKind::Damaged, format!("chunk {chunk}")));
            }
            undecoded.out.copy_from_slice(undecoded.stored);
            Ok(())
        };
        let mut decoding = self.0.decoding.lock();
        decoding.waits = true;
        self.0.let_go.wait_while(&mut decoding, |decoding| decoding.is_held);
        drop(decoding);
        self.0.decoded.fetch_add(chunks.len(), Ordering::SeqCst);
        chunks.iter_mut().map(decode).collect()
    }
}

impl Memory {
    fn release(&self) {
        self.held.lock().clear();
        self.decoding.lock().is_held = false;
        self.let_go.notify_all();
    }
}

fn key(chunk: u64) -> Key {
    Key { disk: 0, chunk }
}

fn pool(memory: &Arc<Memory>, slots: usize) -> FetchPool<Arc<Memory>> {
    pool_at(memory, slots, SourcePace::default())
}

fn pool_at(memory: &Arc<Memory>, slots: usize, pace: SourcePace) -> FetchPool<Arc<Memory>> {
    let options =
        PoolOptions { slots, reserved_for_demand: 1, decoders: 2, cache_bytes: 16 * CHUNK as u64, pace };
    FetchPool::start(Arc::clone(memory), options).unwrap()
}

#[tokio::test]
async fn many_who_want_one_chunk_cost_one_fetch() {
    let memory = Arc::new(Memory { held: Mutex::new(HashSet::from([3])), ..Memory::default() });
    let pool = pool(&memory, 4);
    let wanted: Vec<_> = (0..20).map(|_| pool.fetch(key(3), Urgency::Demand)).collect();
    let run = pool.fetch_run(0, 3..4, Urgency::Background);
    memory.release();
    for fetch in wanted {
        assert_eq!(&fetch.await.unwrap()[..], bytes_of(3));
    }
    assert_eq!(&run.await.bytes[..], bytes_of(3));
    assert_eq!(memory.reads.load(Ordering::SeqCst), 1);
    pool.fetch(key(3), Urgency::Demand).await.unwrap();
    assert_eq!(memory.reads.load(Ordering::SeqCst), 1, "it stays in the cache");
}

#[tokio::test]
async fn a_run_arrives_in_one_buffer_and_whoever_joined_it_gets_the_chunk_too() {
    let memory = Arc::new(Memory { held: Mutex::new((0..40).collect()), ..Memory::default() });
    let pool = pool(&memory, 4);
    let run = pool.fetch_run(0, 8..24, Urgency::Background);
    let joined = pool.fetch(key(15), Urgency::Demand);
    memory.release();
    let run = run.await;
    assert!(run.failed.is_empty());
    assert_eq!(&run.bytes[..], (8..24).flat_map(bytes_of).collect::<Vec<u8>>());
    assert_eq!(&joined.await.unwrap()[..], bytes_of(15));
    assert_eq!(memory.decoded.load(Ordering::SeqCst), 16, "each once");
}

#[tokio::test]
async fn a_damaged_chunk_fails_alone() {
    let memory = Arc::new(Memory { damaged: HashSet::from([5]), ..Memory::default() });
    let pool = pool(&memory, 4);
    let run = pool.fetch_run(0, 4..8, Urgency::Background).await;
    let failed: Vec<u64> = run.failed.iter().map(|(chunk, _)| *chunk).collect();
    assert_eq!(failed, [5]);
    assert_eq!(&run.bytes[2 * CHUNK..], (6..8).flat_map(bytes_of).collect::<Vec<u8>>());
    let error = pool.fetch(key(5), Urgency::Demand).await.unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::Damaged);
}

#[tokio::test]
async fn what_a_short_pack_still_holds_arrives() {
    let memory = Arc::new(Memory { cut_at: Some(6), ..Memory::default() });
    let pool = pool(&memory, 4);
    let run = pool.fetch_run(0, 4..8, Urgency::Background).await;
    let mut failed: Vec<_> = run.failed.iter().map(|(chunk, error)| (*chunk, error.kind())).collect();
    failed.sort_unstable_by_key(|(chunk, _)| *chunk);
    assert_eq!(failed, [(6, SourceErrorKind::Missing), (7, SourceErrorKind::Missing)]);
    assert_eq!(&run.bytes[..2 * CHUNK], (4..6).flat_map(bytes_of).collect::<Vec<u8>>());
}

#[tokio::test]
async fn a_guest_is_served_while_the_background_is_stuck() {
    let memory = Arc::new(Memory { held: Mutex::new((0..1000).collect()), ..Memory::default() });
    let pool = pool(&memory, 3);
    let stuck: Vec<_> =
        (0..8).map(|run| pool.fetch_run(0, run * 100..run * 100 + 8, Urgency::Background)).collect();
    let served = pool.fetch(key(5000), Urgency::Demand).await.unwrap();
    assert_eq!(&served[..], bytes_of(5000));
    memory.release();
    for run in stuck {
        assert!(run.await.failed.is_empty());
    }
}

#[tokio::test]
async fn what_has_not_begun_and_nobody_waits_for_can_be_taken_back() {
    let memory = Arc::new(Memory { held: Mutex::new((0..10_000).collect()), ..Memory::default() });
    // One slot for what no guest waits for, which the first run takes; it finds some of the others with it.
    let pool = pool(&memory, 2);
    let runs: Vec<_> =
        (0..40).map(|run| pool.fetch_run(0, run * 100..run * 100 + 8, Urgency::Background)).collect();
    let of_another_disk = pool.fetch_run(1, 9000..9002, Urgency::Background);
    while memory.reads.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let guest = pool.join(key(1703), Urgency::Demand).expect("it is wanted");
    let needed = pool.fetch(key(3003), Urgency::Background);
    while memory.reads.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(pool.waiting_bytes(0), (39 * 8 - 1) * CHUNK as u64);
    pool.withdraw(0);
    assert_eq!(pool.waiting_bytes(0), CHUNK as u64, "what a single fetch wants is not taken back");
    memory.release();
    for (number, run) in runs.into_iter().enumerate() {
        let run = run.await;
        assert!(run.failed.is_empty());
        let first = number as u64 * 100;
        let all = first..first + 8;
        let mut withdrawn = run.withdrawn;
        withdrawn.sort_unstable();
        let had = match number {
            0 => all.clone(),
            17 => 1703..1704,
            30 => 3003..3004,
            _ => 0..0,
        };
        assert!(all.filter(|chunk| !had.contains(chunk)).eq(withdrawn), "run {number}");
        for chunk in had {
            let at = (chunk - first) as usize * CHUNK;
            assert_eq!(&run.bytes[at..at + CHUNK], bytes_of(chunk));
        }
    }
    assert_eq!(&guest.await.unwrap()[..], bytes_of(1703));
    assert_eq!(&needed.await.unwrap()[..], bytes_of(3003));
    assert!(of_another_disk.await.withdrawn.is_empty());
    assert_eq!(memory.decoded.load(Ordering::SeqCst), 8 + 1 + 1 + 2, "each once, and nothing else");
    let again = pool.fetch_run(0, 1704..1706, Urgency::Background).await;
    assert_eq!(&again.bytes[..], (1704..1706).flat_map(bytes_of).collect::<Vec<u8>>());
}

#[tokio::test]
async fn only_a_fetch_that_is_wanted_can_be_joined() {
    let memory = Arc::new(Memory { held: Mutex::new(HashSet::from([3])), ..Memory::default() });
    let pool = pool(&memory, 4);
    assert!(pool.join(key(3), Urgency::Demand).is_none());
    let run = pool.fetch_run(0, 3..5, Urgency::Expected);
    let joined = pool.join(key(3), Urgency::Demand).expect("it is under way");
    memory.release();
    assert_eq!(&joined.await.unwrap()[..], bytes_of(3));
    assert!(run.await.failed.is_empty());
    assert!(pool.join(key(3), Urgency::Demand).is_none(), "it has ended");
    assert_eq!(memory.decoded.load(Ordering::SeqCst), 2, "each once");
}

#[tokio::test]
async fn what_is_expected_goes_before_the_background_and_after_the_guest() {
    let memory = Arc::new(Memory { held: Mutex::new((0..10_000).collect()), ..Memory::default() });
    // One slot for what no guest waits for, which the first fetch takes.
    let pool = pool(&memory, 2);
    let first = pool.fetch(key(1), Urgency::Background);
    while memory.reads.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let later = [
        pool.fetch(key(100), Urgency::Background),
        pool.fetch(key(200), Urgency::Expected),
        pool.fetch(key(300), Urgency::Readahead),
    ];
    let guest = pool.fetch(key(400), Urgency::Demand);
    while memory.reads.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    memory.release();
    first.await.unwrap();
    guest.await.unwrap();
    for fetch in later {
        fetch.await.unwrap();
    }
    assert_eq!(*memory.order.lock(), [1, 400, 300, 200, 100]);
}

async fn is_closed(fetch: FetchFuture<'_, Result<ChunkData, SourceError>>) -> bool {
    fetch.await.is_err_and(|error| error.kind() == SourceErrorKind::Closed)
}

#[tokio::test]
async fn closing_the_pool_answers_everybody_though_the_source_does_not() {
    let memory = Arc::new(Memory { held: Mutex::new(HashSet::from([1])), ..Memory::default() });
    let pool = pool(&memory, 1);
    let running = pool.fetch(key(1), Urgency::Demand);
    let queued = pool.fetch(key(9), Urgency::Demand);
    let run = pool.fetch_run(0, 20..24, Urgency::Background);
    while memory.reads.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    pool.close();
    assert!(is_closed(running).await && is_closed(queued).await);
    assert_eq!(run.await.failed.len(), 4);
    assert!(is_closed(pool.fetch(key(30), Urgency::Demand)).await);
    assert!(pool.join(key(1), Urgency::Demand).is_none());
    assert_eq!(pool.fetch_run(0, 20..24, Urgency::Background).await.failed.len(), 4);
    // The thread that reads is left behind.
    drop(pool);
    assert!(memory.held.lock().contains(&1));
    memory.release();
}

#[tokio::test]
async fn a_source_that_was_made_slow_holds_up_no_end() {
    let memory = Arc::new(Memory::default());
    for pace in [
        SourcePace { bytes_per_second: 1, ..SourcePace::default() },
        SourcePace { delay: Duration::from_secs(3600), ..SourcePace::default() },
    ] {
        let before = memory.reads.load(Ordering::SeqCst);
        let pool = pool_at(&memory, 2, pace);
        let running = pool.fetch(key(1), Urgency::Demand);
        while memory.reads.load(Ordering::SeqCst) == before {
            tokio::task::yield_now().await;
        }
        pool.close();
        assert!(is_closed(running).await);
        // Its threads have the store too, until they end.
        drop(pool);
        while Arc::strong_count(&memory) > 1 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn what_is_being_decoded_while_the_pool_is_closed_is_settled_once() {
    let memory = Arc::new(Memory::default());
    memory.decoding.lock().is_held = true;
    let pool = pool(&memory, 4);
    let run = pool.fetch_run(0, 8..12, Urgency::Background);
    while !memory.decoding.lock().waits {
        tokio::task::yield_now().await;
    }
    let joined = pool.join(key(9), Urgency::Demand).expect("it is under way");
    pool.close();
    assert!(is_closed(joined).await);
    memory.release();
    let run = run.await;
    assert!(run.failed.is_empty(), "{:?}", run.failed);
    assert_eq!(&run.bytes[..], (8..12).flat_map(bytes_of).collect::<Vec<u8>>());
}
