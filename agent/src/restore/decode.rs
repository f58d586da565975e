//! Reading and decoding: from stored bytes to verified pieces of the disk.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc;

use block::{AlignedBuf, ByteRange};
use parking_lot::Mutex;
use repository::{ChunkDecoder, ChunkReader, DiskMap, Fetch};
use tokio::sync::mpsc as local;

use super::damage::DamageLog;
use super::plan::Wanted;
use super::writer::Write;
use crate::capture::Stop;
use crate::output::Progress;

/// One read, and the chunks that it serves.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) fetch: Fetch,
    /// The chunks of the whole stretch; the fetch names its own.
    pub(super) wanted: Arc<Vec<Wanted>>,
}

/// What the decoders of a restore share.
pub(super) struct Decoders<'a> {
    pub(super) map: &'a DiskMap,
    pub(super) reader: ChunkReader,
    /// Whether what is not written reads as zeroes.
    pub(super) target_is_zero: bool,
    pub(super) damage: &'a DamageLog,
    pub(super) stop: &'a Stop,
    pub(super) progress: &'a Progress,
    pub(super) jobs: Mutex<mpsc::Receiver<Job>>,
    pub(super) free: Mutex<mpsc::Receiver<AlignedBuf>>,
    pub(super) piece_len: usize,
}

/// The nobody-is-there errors of channels: whoever left has said why.
#[derive(Debug, thiserror::Error)]
#[error("another part of the restore has ended")]
struct Gone;

/// What one decoder works with.
struct Hands<'a> {
    writes: local::UnboundedSender<Write>,
    decoder: ChunkDecoder,
    stored: Vec<u8>,
    single: Vec<u8>,
    /// Consecutive chunks, decoded so far, and the index of the next.
    piece: Option<(Piece, u64)>,
    shared: &'a Decoders<'a>,
}

struct Piece {
    offset: u64,
    buf: AlignedBuf,
    len: usize,
}

impl Decoders<'_> {
    /// Works until there are no more jobs, or something failed.
    pub(super) fn run(&self, writes: local::UnboundedSender<Write>) {
        if let Err(error) = self.work(writes)
            && !error.is::<Gone>()
        {
            self.stop.keep(error);
        }
    }

    fn work(&self, writes: local::UnboundedSender<Write>) -> anyhow::Result<()> {
        let mut hands = Hands {
            writes,
            decoder: ChunkDecoder::new()?,
            stored: Vec::new(),
            single: Vec::new(),
            piece: None,
            shared: self,
        };
        loop {
            let Ok(job) = self.jobs.lock().recv() else { return Ok(()) };
            self.stop.check()?;
            hands.bring_back(&job.fetch, &job.wanted[job.fetch.items.clone()])?;
        }
    }

    fn range(&self, index: u64) -> ByteRange {
        let start = index * u64::from(self.map.chunk_size());
        ByteRange::from_bounds(start, start + self.map.chunk_len(index) as u64)
    }
}

impl Hands<'_> {
    fn bring_back(&mut self, fetch: &Fetch, wanted: &[Wanted]) -> anyhow::Result<()> {
        self.stored.resize(fetch.len, 0);
        let read = self.shared.reader.read_stored_range(fetch.pack, fetch.offset, &mut self.stored);
        for chunk in wanted {
            // Where the long read failed, what can be had of it is read chunk by chunk.
            let place = read.is_ok().then(|| fetch.place(&chunk.at));
            self.decode(chunk, place)?;
        }
        self.send_piece()
    }

    /// Decodes one chunk behind the ones before it, and copies it to wherever else it stands.
    fn decode(&mut self, chunk: &Wanted, place: Option<Range<usize>>) -> anyhow::Result<()> {
        let len = self.shared.map.chunk_len(chunk.index);
        let mut piece = self.piece_for(chunk.index, len)?;
        let out = &mut piece.buf[piece.len..piece.len + len];
        let decoded = match place {
            Some(place) => self.decoder.decode(&chunk.at, &self.stored[place], &chunk.id, out),
            None => {
                let read = self.shared.reader.read_stored(&chunk.at, &mut self.single);
                read.and_then(|()| self.decoder.decode(&chunk.at, &self.single, &chunk.id, out))
            }
        };
        if let Err(error) = decoded {
            self.piece = Some((piece, u64::MAX));
            return self.lost(chunk, &error);
        }
        for &index in &chunk.more {
            // A shorter last chunk has an id of its own, so all places have this length.
            let mut copy = self.buffer()?;
            copy.set_len(len);
            copy.copy_from_slice(&piece.buf[piece.len..piece.len + len]);
            self.send(Write::Bytes(self.shared.range(index).start(), copy))?;
            self.shared.progress.advance(len as u64);
        }
        piece.len += len;
        self.piece = Some((piece, chunk.index + 1));
        self.shared.progress.advance(len as u64);
        Ok(())
    }

    /// The piece that chunk `index` goes into: the one before it if it fits there, or a new one.
    fn piece_for(&mut self, index: u64, len: usize) -> anyhow::Result<Piece> {
        if let Some((piece, next)) = self.piece.take() {
            if next == index && piece.len + len <= self.shared.piece_len {
                return Ok(piece);
            }
            self.piece = Some((piece, next));
            self.send_piece()?;
        }
        let mut buf = self.buffer()?;
        buf.set_len(self.shared.piece_len);
        Ok(Piece { offset: self.shared.range(index).start(), buf, len: 0 })
    }

    fn send_piece(&mut self) -> anyhow::Result<()> {
        let Some((mut piece, _)) = self.piece.take() else { return Ok(()) };
        piece.buf.set_len(piece.len);
        self.send(Write::Bytes(piece.offset, piece.buf))
    }

    /// A chunk that cannot be had leaves zeroes, never what happened to be there, wherever it stands.
    fn lost(&mut self, chunk: &Wanted, error: &repository::Error) -> anyhow::Result<()> {
        self.send_piece()?;
        for &index in std::iter::once(&chunk.index).chain(&chunk.more) {
            let range = self.shared.range(index);
            self.shared.damage.note(range, Some(chunk.id.to_string()), error.clone())?;
            if !self.shared.target_is_zero {
                self.send(Write::Zeroes(range))?;
            }
            self.shared.progress.advance(range.len());
        }
        Ok(())
    }

    fn buffer(&self) -> anyhow::Result<AlignedBuf> {
        self.shared.stop.check()?;
        Ok(self.shared.free.lock().recv().map_err(|_| Gone)?)
    }

    fn send(&self, write: Write) -> anyhow::Result<()> {
        Ok(self.writes.send(write).map_err(|_| Gone)?)
    }
}
