//! Disks of a store whose answers are held back until they are let go.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use block::{AlignedBuf, BlockDevice, ByteRange, ErrorKind, OpenDevice as _};
use parking_lot::{Condvar, Mutex};

use super::device::SnapshotDisk;
use super::room::{READ_BYTES, Rooms};
use crate::live::{ChunkSource as _, DiskLayout, SourceError, SourceErrorKind, Urgency};
use crate::source::{
    ChunkStore, Decode, DiskSource, FetchPool, Key, Placed, PoolOptions, Undecoded, ZeroChunks,
};

const CHUNK: u64 = 256 << 10;
const CHUNKS: u64 = 600;
/// It is all zeroes.
const ZERO: u64 = 5;
const DAMAGED: u64 = 597;
const LAYOUT: DiskLayout = DiskLayout { size: CHUNK * CHUNKS, chunk_size: CHUNK as u32 };

#[derive(Default)]
struct Held {
    is_let_go: Mutex<bool>,
    let_go: Condvar,
}

struct Place(Key);

impl Placed for Place {
    fn stored_len(&self) -> u64 {
        1
    }

    fn follows(&self, _: &Self) -> bool {
        false
    }
}

struct Fill;

impl Decode<Place> for Fill {
    fn decode_each(&mut self, chunks: &mut [Undecoded<'_, Place>]) -> Vec<Result<(), SourceError>> {
        let decode = |undecoded: &mut Undecoded<'_, Place>| {
            let chunk = undecoded.place.0.chunk;
            undecoded.out.fill(chunk as u8);
            let is_damaged = chunk == DAMAGED;
            if is_damaged { Err(SourceError::new(SourceErrorKind::Damaged, "its CRC")) } else { Ok(()) }
        };
        chunks.iter_mut().map(decode).collect()
    }
}

impl ChunkStore for Arc<Held> {
    type Place = Place;
    type Decoder = Fill;

    fn place(&self, key: Key) -> Result<Place, SourceError> {
        Ok(Place(key))
    }

    fn read(&self, _: &Place, _: &mut [u8]) -> Result<(), SourceError> {
        self.let_go.wait_while(&mut self.is_let_go.lock(), |is_let_go| !*is_let_go);
        Ok(())
    }

    fn decoder(&self, _: impl FnMut() + Send + 'static) -> Fill {
        Fill
    }

    fn plain_len(&self, _: Key) -> usize {
        CHUNK as usize
    }
}

struct Served {
    held: Arc<Held>,
    source: Arc<DiskSource<Arc<Held>>>,
    disk: SnapshotDisk<Arc<Held>>,
}

impl Served {
    fn new() -> Self {
        let held = Arc::new(Held::default());
        let options =
            PoolOptions { slots: 4, reserved_for_demand: 1, cache_bytes: 0, ..PoolOptions::default() };
        let pool = Arc::new(FetchPool::start(Arc::clone(&held), options).unwrap());
        let mut zero = ZeroChunks::all(CHUNKS);
        (0..CHUNKS).filter(|&chunk| chunk != ZERO).for_each(|chunk| zero.set_data(chunk));
        let source = Arc::new(DiskSource::new(pool, 0, LAYOUT, zero));
        let disk = SnapshotDisk::new(Arc::clone(&source), Rooms::new());
        Self { held, source, disk }
    }

    fn open(&self) -> Rc<dyn BlockDevice> {
        self.disk.open().unwrap()
    }

    /// How many bytes of chunks were asked for and are not here yet.
    fn asked(&self) -> u64 {
        let is_asked = |chunk: &u64| self.source.join(*chunk, Urgency::Background).is_some();
        (0..CHUNKS).filter(is_asked).count() as u64 * CHUNK
    }

    fn let_go(&self) {
        *self.held.is_let_go.lock() = true;
        self.held.let_go.notify_all();
    }
}

fn buf(len: u64) -> AlignedBuf {
    AlignedBuf::zeroed(len as usize)
}

fn expected(range: ByteRange) -> Vec<u8> {
    let byte = |chunk| if chunk == ZERO { 0 } else { chunk as u8 };
    range.split(CHUNK).flat_map(|(chunk, part)| vec![byte(chunk); part.len() as usize]).collect()
}

#[tokio::test]
async fn all_reads_together_fetch_no_further_ahead_than_there_is_room() {
    let served = Served::new();
    let (one, other) = (served.open(), served.open());
    let ranges =
        [ByteRange::new(0, 48 << 20), ByteRange::new(64 << 20, 48 << 20), ByteRange::new(CHUNK / 2, 9)];
    let ranges = ranges.map(Option::unwrap);
    let mut reads = [&one, &other, &other];
    let mut reads: Vec<_> = reads
        .iter_mut()
        .zip(ranges)
        .map(|(device, range)| device.read(range.start(), buf(range.len())))
        .collect();
    let mut nobody = Context::from_waker(Waker::noop());
    for read in &mut reads {
        assert!(matches!(read.as_mut().poll(&mut nobody), Poll::Pending));
        assert_eq!(served.asked(), u64::from(READ_BYTES));
    }
    // What may be read some time takes no room from who waits.
    let mut caching = one.prefetch(ByteRange::new(120 << 20, 28 << 20).unwrap());
    assert!(matches!(caching.as_mut().poll(&mut nobody), Poll::Pending));
    assert_eq!(served.asked(), u64::from(READ_BYTES) + (16 << 20));
    served.let_go();
    // Each holds what others wait for, so all of them go on.
    let [first, second, third]: [_; 3] = reads.try_into().ok().unwrap();
    let (first, second, third, cached) = tokio::join!(first, second, third, caching);
    for ((result, bytes), range) in [first, second, third].into_iter().zip(ranges) {
        result.unwrap();
        assert!(bytes[..] == expected(range), "{range}");
    }
    cached.unwrap();
}

#[tokio::test]
async fn a_read_that_fails_names_the_chunk_and_leaves_all_room_free() {
    let served = Served::new();
    served.let_go();
    let device = served.open();
    for _ in 0..3 {
        let (result, _) = device.read((DAMAGED - 200) * CHUNK, buf(203 * CHUNK)).await;
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        assert_eq!(error.range(), Some(LAYOUT.chunk_range(DAMAGED)));
        assert_eq!(error.to_string(), "chunk 597 of the disk: its CRC");
    }
    let (result, bytes) = device.read(0, buf(300 * CHUNK)).await;
    result.unwrap();
    assert!(bytes[..] == expected(ByteRange::new(0, 300 * CHUNK).unwrap()));
}
