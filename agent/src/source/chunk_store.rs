//! What the fetching threads need from wherever chunks are kept.

use crate::live::SourceError;

/// A chunk of one of the disks that a pool serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The disk's number in the pool.
    pub disk: u32,
    /// The chunk's number on the disk.
    pub chunk: u64,
}

/// Where the stored bytes of a chunk are.
pub trait Placed: Send + 'static {
    /// How many stored bytes the chunk has.
    fn stored_len(&self) -> u64;
    /// Whether these bytes begin where those of `previous` end, so that one fetch brings both.
    fn follows(&self, previous: &Self) -> bool;
}

/// Keeps stored chunks. Its calls wait for the source and are made on threads that may wait.
pub trait ChunkStore: Send + Sync + 'static {
    /// Where a chunk is.
    type Place: Placed;
    /// Turns stored bytes into a chunk; each thread of the decode pool keeps one.
    type Decoder: Decode<Self::Place>;

    /// Finds a chunk.
    fn place(&self, key: Key) -> Result<Self::Place, SourceError>;
    /// Fills `stored` with the bytes from where `first` begins.
    fn read(&self, first: &Self::Place, stored: &mut [u8]) -> Result<(), SourceError>;
    /// A decoder for one thread, which calls `pause` between pieces of its work.
    fn decoder(&self, pause: impl FnMut() + Send + 'static) -> Self::Decoder;
    /// The plain length of a chunk in bytes.
    fn plain_len(&self, key: Key) -> usize;
}

/// A chunk to decode, alone or together with others.
pub struct Undecoded<'a, P> {
    /// Where its stored bytes were read from.
    pub place: &'a P,
    /// They.
    pub stored: &'a [u8],
    /// What to fill. On an error it holds anything.
    pub out: &'a mut [u8],
}

/// Decodes and verifies.
pub trait Decode<P> {
    /// Decodes each chunk into the whole of its `out`, and succeeds only where that is the very chunk.
    /// How each went, in the same order.
    fn decode_each(&mut self, chunks: &mut [Undecoded<'_, P>]) -> Vec<Result<(), SourceError>>;
}
