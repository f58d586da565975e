//! Hashing and compressing: what becomes of a piece between its read and its pack.

use std::ops::Range;
use std::sync::mpsc;

use parking_lot::Mutex;
use repository::{ChunkEncoder, ChunkId, Codec, DiskWriter, KeyRef, StoredChunk, chunk_ids, is_zero};
use tokio::sync::mpsc as local;

use super::order::InOrder;
use super::reader::{Freed, Piece};
use super::stop::Stop;
use crate::output::Progress;

/// What the workers of a capture share.
pub(super) struct Workers<'a> {
    pub(super) disks: &'a [DiskWriter],
    pub(super) level: i32,
    pub(super) stop: &'a Stop,
    pub(super) progress: &'a Progress,
    pub(super) pieces: Mutex<mpsc::Receiver<Piece>>,
    pub(super) freed: local::UnboundedSender<Freed>,
    pub(super) order: InOrder<Finished>,
}

/// A piece whose chunks are decided. It keeps its buffer until it is put away, so that the buffers bound
/// how many pieces wait for their turn.
pub(super) struct Finished {
    piece: Piece,
    chunks: Vec<Decided>,
    /// The compressed bytes of all its new chunks.
    compressed: Vec<u8>,
}

enum Decided {
    LeftOut,
    Zero,
    Known(ChunkId),
    New { id: ChunkId, crc: u32, codec: Codec, key: KeyRef, bytes: StoredBytes },
}

enum StoredBytes {
    /// The chunk as it was read.
    Plain,
    /// These of the piece's compressed bytes.
    Compressed(Range<usize>),
}

impl Workers<'_> {
    /// Works until there are no more pieces. After a failure, its own or another's, it only gives buffers back.
    pub(super) fn run(&self) {
        if let Err(error) = self.work() {
            self.stop.keep(error);
        }
        if self.stop.check().is_err() {
            // The reader may be waiting for a buffer that will not come.
            let _ = self.freed.send(None);
        }
    }

    fn work(&self) -> anyhow::Result<()> {
        let mut encoder = ChunkEncoder::new(self.level)?;
        loop {
            let Ok(piece) = self.pieces.lock().recv() else { return Ok(()) };
            self.stop.check()?;
            let sequence = piece.sequence;
            let finished = self.decide(piece, &mut encoder)?;
            self.order.bring(sequence, finished, |finished| self.put_away(finished))?;
        }
    }

    fn decide(&self, piece: Piece, encoder: &mut ChunkEncoder) -> anyhow::Result<Finished> {
        let disk = &self.disks[piece.disk];
        let plains: Vec<&[u8]> = piece.bytes.chunks(disk.chunk_size() as usize).collect();
        let data: Vec<&[u8]> = plains.iter().copied().filter(|plain| !is_zero(plain)).collect();
        // All together: several times faster than one by one where the processor cannot hash by itself.
        let mut ids = chunk_ids(&data).into_iter();
        let mut data = data.into_iter().peekable();
        let mut chunks = Vec::with_capacity(plains.len());
        let mut compressed = Vec::new();
        for (index, plain) in (piece.first_chunk..).zip(plains) {
            let id = match data.next_if(|data| std::ptr::eq(*data, plain)) {
                Some(_) => ids.next().expect("each chunk with data has an id"),
                None => {
                    let is_left_out = piece.left_out.contains(&index);
                    chunks.push(if is_left_out { Decided::LeftOut } else { Decided::Zero });
                    continue;
                }
            };
            if piece.left_out.contains(&index) {
                chunks.push(Decided::LeftOut);
                continue;
            }
            if disk.known(&id)? {
                chunks.push(Decided::Known(id));
                continue;
            }
            self.stop.check()?;
            let StoredChunk { bytes, crc, codec, key, .. } = encoder.encode(plain)?;
            let bytes = if codec == Codec::PLAIN {
                StoredBytes::Plain
            } else {
                let start = compressed.len();
                compressed.extend_from_slice(bytes);
                StoredBytes::Compressed(start..compressed.len())
            };
            chunks.push(Decided::New { id, crc, codec, key, bytes });
        }
        Ok(Finished { piece, chunks, compressed })
    }

    fn put_away(&self, finished: Finished) -> anyhow::Result<()> {
        let Finished { piece, chunks, compressed } = finished;
        let disk = &self.disks[piece.disk];
        let plains = piece.bytes.chunks(disk.chunk_size() as usize);
        for ((index, plain), decided) in (piece.first_chunk..).zip(plains).zip(chunks) {
            match decided {
                Decided::LeftOut => disk.put_lost(index)?,
                Decided::Zero => disk.put_zero(index..index + 1)?,
                Decided::Known(id) => {
                    let known = disk.put_known(index, &id)?;
                    anyhow::ensure!(known, "chunk {id} left the repository during the capture");
                }
                Decided::New { id, crc, codec, key, bytes } => {
                    let bytes = match bytes {
                        StoredBytes::Plain => plain,
                        StoredBytes::Compressed(range) => &compressed[range],
                    };
                    let plain_len = u32::try_from(plain.len()).expect("a chunk is at most 4 MiB");
                    disk.put_chunk(index, &id, &StoredChunk { bytes, plain_len, crc, codec, key })?;
                }
            }
        }
        self.progress.advance(piece.bytes.len() as u64);
        // The reader is gone once it has read everything.
        let _ = self.freed.send(Some(piece.bytes));
        Ok(())
    }
}
