//! Where absent blocks come from: the trait that the engine asks for decoded, verified chunks.
//!
//! Nothing here fetches. Whoever implements [`ChunkSource`] keeps one fetch per chunk however many
//! want it, raises a fetch in place when somebody more urgent joins, decodes off the shard's
//! thread, and verifies a chunk's hash before a byte of it is given out.

use std::fmt;
use std::future::Future;
use std::ops::{Deref, Range};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use block::{AlignedBuf, ByteRange};

/// The size of a disk and of its chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskLayout {
    /// The disk's size in bytes. The last chunk ends where the disk ends.
    pub size: u64,
    /// A chunk's size in bytes: a power of two, at least 64 KiB in repositories (4 KiB in tests).
    pub chunk_size: u32,
}

impl DiskLayout {
    /// How many chunks the disk has.
    #[must_use]
    pub const fn chunk_count(self) -> u64 {
        self.size.div_ceil(self.chunk_size as u64)
    }

    /// Where chunk number `chunk` lies on the disk; the last one may be shorter than the others.
    #[must_use]
    pub const fn chunk_range(self, chunk: u64) -> ByteRange {
        let start = chunk.saturating_mul(self.chunk_size as u64);
        let end = start.saturating_add(self.chunk_size as u64);
        ByteRange::from_bounds(start, if end < self.size { end } else { self.size })
    }

    /// Where the chunks of `chunks` lie together.
    #[must_use]
    pub const fn run_range(self, chunks: &Range<u64>) -> ByteRange {
        let start = self.chunk_range(chunks.start).start();
        let end = if chunks.end > chunks.start { self.chunk_range(chunks.end - 1).end() } else { start };
        ByteRange::from_bounds(start, end)
    }
}

/// Who waits for a chunk. A later variant goes before an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// The sweep that brings the whole disk home.
    Background,
    /// Somebody may ask soon: the boot trace says so, or a neighbour was asked for.
    Expected,
    /// Somebody will probably ask next: it lies ahead of a stream of reads.
    Readahead,
    /// A guest waits.
    Demand,
}

impl Urgency {
    /// Every urgency, the least first.
    pub const ALL: [Self; 4] = [Self::Background, Self::Expected, Self::Readahead, Self::Demand];

    /// Its place in [`Urgency::ALL`].
    #[must_use]
    pub const fn lane(self) -> usize {
        self as usize
    }
}

/// The decoded, verified bytes of one chunk, shared by all who asked for it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ChunkData(Arc<AlignedBuf>);

impl ChunkData {
    /// Shares `bytes`: exactly the chunk's length, as [`DiskLayout::chunk_range`] has it.
    #[must_use]
    pub fn new(bytes: AlignedBuf) -> Self {
        Self(Arc::new(bytes))
    }

    /// The buffer itself where nobody else holds it, else a copy of it.
    #[must_use]
    pub fn into_buf(self) -> AlignedBuf {
        Arc::try_unwrap(self.0).unwrap_or_else(|shared| AlignedBuf::from_slice(&shared))
    }
}

impl Deref for ChunkData {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// The bytes of several neighbouring chunks in one buffer.
#[derive(Debug)]
pub struct RunData {
    /// The bytes of the whole run, from the first chunk's start to the last chunk's end.
    pub bytes: AlignedBuf,
    /// The chunks that could not be had, with the reason; what `bytes` holds for them means nothing.
    pub failed: Vec<(u64, SourceError)>,
    /// The chunks that were not fetched, because [`ChunkSource::withdraw`] took them back; likewise.
    pub withdrawn: Vec<u64>,
}

/// Whether trying again may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceErrorKind {
    /// The bytes of this chunk came and are wrong (CRC, decoding, hash): asking again gives the same.
    Damaged,
    /// The repository is there, but what holds this chunk is not: it may be put back.
    Missing,
    /// The repository cannot be reached just now.
    Unavailable,
    /// The source was closed; nothing more comes from it.
    Closed,
}

/// Why a chunk could not be had.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{context}")]
pub struct SourceError {
    kind: SourceErrorKind,
    context: Arc<str>,
}

impl SourceError {
    /// A failure of `kind`; `context` says what was being fetched, from where, and the cause.
    pub fn new(kind: SourceErrorKind, context: impl fmt::Display) -> Self {
        Self { kind, context: context.to_string().into() }
    }

    /// Whether trying again may help.
    #[must_use]
    pub const fn kind(&self) -> SourceErrorKind {
        self.kind
    }
}

/// The future of a fetch. Dropping it gives up the caller's interest and nothing else: others that
/// wait for the same chunk still get it.
pub type FetchFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The snapshot's disk, by chunk. Shared by all shards.
pub trait ChunkSource: Send + Sync {
    /// The disk's size and its chunks'.
    fn layout(&self) -> DiskLayout;

    /// Whether the disk map says that this chunk is all zeroes. Answers from memory, without
    /// waiting: the engine asks for each chunk that it touches.
    fn is_zero(&self, chunk: u64) -> bool;

    /// The bytes of one chunk. Never called for a chunk that [`ChunkSource::is_zero`].
    ///
    /// One fetch per chunk is in flight however many callers wait; a more urgent caller raises it
    /// in place. The source does not retry for longer than a moment: the engine does, with backoff,
    /// on [`SourceErrorKind::Unavailable`].
    fn fetch(&self, chunk: u64, urgency: Urgency) -> FetchFuture<'_, Result<ChunkData, SourceError>>;

    /// The bytes of neighbouring chunks in one buffer, so that they are written home in one piece.
    /// The engine asks for runs of up to 4 MiB in which no chunk is zero, at less than [`Urgency::Demand`].
    ///
    /// The default fetches each chunk, all at once, and copies them together. An implementation
    /// that decodes straight into the run's buffer saves that copy.
    fn fetch_run(&self, chunks: Range<u64>, urgency: Urgency) -> FetchFuture<'_, RunData> {
        Box::pin(async move {
            let layout = self.layout();
            let whole = layout.run_range(&chunks);
            let len = usize::try_from(whole.len()).expect("a run was bounded by its caller");
            let bytes = AlignedBuf::zeroed(len);
            let mut run = RunData { bytes, failed: Vec::new(), withdrawn: Vec::new() };
            let mut waiting: Vec<_> = chunks.map(|chunk| Some((chunk, self.fetch(chunk, urgency)))).collect();
            std::future::poll_fn(|cx| {
                for slot in &mut waiting {
                    let Some((chunk, fetch)) = slot else { continue };
                    let Poll::Ready(result) = fetch.as_mut().poll(cx) else { continue };
                    match result {
                        Ok(data) => {
                            let range = layout.chunk_range(*chunk);
                            let at = (range.start() - whole.start()) as usize;
                            run.bytes[at..at + range.len() as usize].copy_from_slice(&data);
                        }
                        Err(error) => run.failed.push((*chunk, error)),
                    }
                    *slot = None;
                }
                if waiting.iter().all(Option::is_none) { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            run
        })
    }

    /// Joins a fetch of this chunk that is wanted or under way already, which becomes as urgent as this; `None`
    /// where there is no such fetch.
    fn join(&self, chunk: u64, urgency: Urgency) -> Option<FetchFuture<'_, Result<ChunkData, SourceError>>> {
        Some(self.fetch(chunk, urgency))
    }

    /// How many bytes of fetches that nobody waits for keep the source busy: the engine asks for no more at once.
    fn prefetch_bytes(&self) -> u64 {
        8 << 20
    }

    /// Takes back what runs were asked for that nobody waits for ([`Urgency::Expected`] at most) and that has not begun:
    /// these runs end, and name it. What has begun, what somebody has joined and what a single fetch asked for goes on.
    ///
    /// The default has nothing that has not begun.
    fn withdraw(&self) {}

    /// How many plain bytes [`ChunkSource::withdraw`] would take back, about.
    fn waiting_bytes(&self) -> u64 {
        0
    }
}
