//! Reading and decoding: from stored bytes to verified pieces of the disk.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use block::{AlignedBuf, ByteRange};
use parking_lot::Mutex;
use repository::{ChunkDecoder, ChunkReader, DiskMap, Fetch, Undecoded};
use tokio::sync::mpsc as local;

use super::damage::DamageLog;
use super::plan::Wanted;
use super::writer::Write;
use crate::capture::Stop;
use crate::output::Progress;
use crate::source::{Fallbacks, Throttle};

/// How many buffers one decoder fills before it gives any away. There are more in all, or copies would
/// be waited for in a circle.
pub(super) const PIECES_AT_ONCE: usize = 4;

/// How often somebody who waits for a source that is made slow looks whether the restore goes on.
const STOP_TICK: Duration = Duration::from_millis(50);

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
    /// Who is asked for what cannot be had there.
    pub(super) fallbacks: &'a Fallbacks,
    /// Whether what is not written reads as zeroes.
    pub(super) target_is_zero: bool,
    pub(super) damage: &'a DamageLog,
    pub(super) stop: &'a Stop,
    pub(super) progress: &'a Progress,
    pub(super) throttle: &'a Throttle,
    pub(super) free: Mutex<mpsc::Receiver<AlignedBuf>>,
    pub(super) piece_len: usize,
}

/// Where decoders take their jobs. Only decoders hold it: once all of them have left, the planner hears of it, and
/// does not wait for ever to be rid of a job.
pub(super) type Jobs = Arc<Mutex<mpsc::Receiver<Job>>>;

/// The nobody-is-there errors of channels: whoever left has said why.
#[derive(Debug, thiserror::Error)]
#[error("another part of the restore has ended")]
struct Gone;

/// What one decoder works with.
struct Hands<'a> {
    writes: local::UnboundedSender<Write>,
    decoder: ChunkDecoder,
    stored: Vec<u8>,
    shared: &'a Decoders<'a>,
}

/// Consecutive places of the disk, filled by the chunks `wanted[chunks]`.
struct Piece {
    chunks: Range<usize>,
    buf: AlignedBuf,
}

impl Decoders<'_> {
    /// Works until there are no more jobs, or something failed.
    pub(super) fn run(&self, jobs: Jobs, writes: local::UnboundedSender<Write>) {
        if let Err(error) = self.work(&jobs, writes)
            && !error.is::<Gone>()
        {
            self.stop.keep(error);
        }
    }

    fn work(&self, jobs: &Jobs, writes: local::UnboundedSender<Write>) -> anyhow::Result<()> {
        let mut hands = Hands { writes, decoder: ChunkDecoder::new()?, stored: Vec::new(), shared: self };
        loop {
            let Ok(job) = jobs.lock().recv() else { return Ok(()) };
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
        // Pieces that are decoded together, as many as the buffers that one job may hold.
        for pieces in self.cut(wanted).chunks(PIECES_AT_ONCE) {
            self.bring_back_pieces(fetch, wanted, pieces)?;
        }
        Ok(())
    }

    /// Cuts chunks into runs of neighbours on the disk that fit into one buffer each.
    fn cut(&self, wanted: &[Wanted]) -> Vec<Range<usize>> {
        let most = self.shared.piece_len / self.shared.map.chunk_size() as usize;
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (at, chunk) in wanted.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.len() < most && wanted[at - 1].index + 1 == chunk.index => run.end += 1,
                _ => runs.push(at..at + 1),
            }
        }
        runs
    }

    fn bring_back_pieces(
        &mut self,
        fetch: &Fetch,
        wanted: &[Wanted],
        runs: &[Range<usize>],
    ) -> anyhow::Result<()> {
        let chunks = &wanted[runs[0].start..runs[runs.len() - 1].end];
        let readable = self.read(fetch, chunks)?;
        let mut pieces = Vec::with_capacity(runs.len());
        for run in runs {
            let mut buf = self.buffer()?;
            buf.set_len(wanted[run.clone()].iter().map(|chunk| self.len(chunk)).sum());
            pieces.push(Piece { chunks: run.clone(), buf });
        }
        let mut results = self.decode(chunks, &readable, &mut pieces);
        self.rescue(chunks, &mut pieces, &mut results);
        let mut results = results.into_iter();
        for piece in pieces {
            let chunks = &wanted[piece.chunks.clone()];
            let results: Vec<_> = results.by_ref().take(chunks.len()).collect();
            self.give(piece.buf, chunks, results)?;
        }
        Ok(())
    }

    /// Waits for a source that is made slow, and no longer than the restore goes on.
    fn wait_until(&self, arrives: Instant) -> anyhow::Result<()> {
        loop {
            self.shared.stop.check()?;
            let left = arrives.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(STOP_TICK));
        }
    }

    /// Reads the stored bytes of `chunks`; where in them each one is, or why it could not be had.
    fn read(
        &mut self,
        fetch: &Fetch,
        chunks: &[Wanted],
    ) -> anyhow::Result<Vec<Result<Range<usize>, repository::Error>>> {
        let (first, last) = (fetch.place(&chunks[0].at), fetch.place(&chunks[chunks.len() - 1].at));
        let skip = first.start;
        self.stored.resize(last.end - skip, 0);
        if let Some(arrives) = self.shared.throttle.reserve(Instant::now(), self.stored.len() as u64) {
            self.wait_until(arrives)?;
        }
        let offset = fetch.offset + skip as u64;
        let reader = &self.shared.reader;
        let places = chunks.iter().map(|chunk| {
            let place = fetch.place(&chunk.at);
            place.start - skip..place.end - skip
        });
        if reader.read_stored_range(fetch.pack, offset, &mut self.stored).is_ok() {
            return Ok(places.map(Ok).collect());
        }
        // Whatever can be had of it is read chunk by chunk.
        let mut single = Vec::new();
        Ok(places
            .zip(chunks)
            .map(|(place, chunk)| {
                reader.read_stored(&chunk.at, &mut single)?;
                self.stored[place.clone()].copy_from_slice(&single);
                Ok(place)
            })
            .collect())
    }

    /// Decodes the chunks into their pieces; how each went.
    fn decode(
        &mut self,
        chunks: &[Wanted],
        readable: &[Result<Range<usize>, repository::Error>],
        pieces: &mut [Piece],
    ) -> Vec<Result<(), repository::Error>> {
        let mut outs = Vec::with_capacity(chunks.len());
        let mut rest_of_chunks = chunks.iter();
        for piece in pieces {
            let mut rest = &mut piece.buf[..];
            for chunk in rest_of_chunks.by_ref().take(piece.chunks.len()) {
                let (out, after) = rest.split_at_mut(self.shared.map.chunk_len(chunk.index));
                outs.push(out);
                rest = after;
            }
        }
        let mut undecoded = Vec::with_capacity(chunks.len());
        for ((chunk, place), out) in chunks.iter().zip(readable).zip(outs) {
            if let Ok(place) = place {
                let stored = &self.stored[place.clone()];
                undecoded.push(Undecoded { at: &chunk.at, stored, id: &chunk.id, out });
            }
        }
        let mut decoded = self.decoder.decode_each(&mut undecoded).into_iter();
        readable
            .iter()
            .map(|place| match place {
                Ok(_) => decoded.next().expect("each readable chunk was decoded"),
                Err(error) => Err(error.clone()),
            })
            .collect()
    }

    /// Asks the copies of the repository for what could not be had.
    fn rescue(
        &mut self,
        chunks: &[Wanted],
        pieces: &mut [Piece],
        results: &mut [Result<(), repository::Error>],
    ) {
        let mut rest = chunks.iter().zip(results);
        for piece in pieces {
            let mut at = 0;
            for (chunk, result) in rest.by_ref().take(piece.chunks.len()) {
                let out = at..at + self.len(chunk);
                at = out.end;
                if let Err(why) = &*result {
                    let fallbacks = self.shared.fallbacks;
                    let rescued = fallbacks.rescue(&chunk.id, &mut self.decoder, &mut piece.buf[out], why);
                    *result = rescued.map_err(|said| fallbacks.and_they_said(why.clone(), &said));
                }
            }
        }
    }

    /// Sends what was decoded to wherever it stands.
    fn give(
        &self,
        buf: AlignedBuf,
        chunks: &[Wanted],
        results: Vec<Result<(), repository::Error>>,
    ) -> anyhow::Result<()> {
        let whole = results.iter().all(Result::is_ok);
        let mut at = 0;
        for (chunk, result) in chunks.iter().zip(results) {
            let len = self.len(chunk);
            match result {
                Ok(()) => {
                    // A shorter last chunk has an id of its own, so all places have this length.
                    let first = (!whole).then_some(&chunk.index);
                    for &index in first.into_iter().chain(&chunk.more) {
                        let mut copy = self.buffer()?;
                        copy.set_len(len);
                        copy.copy_from_slice(&buf[at..at + len]);
                        self.send(Write::Bytes(self.shared.range(index).start(), copy))?;
                    }
                    self.shared.progress.advance(len as u64 * (1 + chunk.more.len() as u64));
                }
                Err(error) => self.lost(chunk, &error)?,
            }
            at += len;
        }
        if whole {
            return self.send(Write::Bytes(self.shared.range(chunks[0].index).start(), buf));
        }
        self.send(Write::Nothing(buf))
    }

    /// A chunk that cannot be had leaves zeroes, never what happened to be there, wherever it stands.
    fn lost(&self, chunk: &Wanted, error: &repository::Error) -> anyhow::Result<()> {
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

    fn len(&self, chunk: &Wanted) -> usize {
        self.shared.map.chunk_len(chunk.index)
    }

    fn buffer(&self) -> anyhow::Result<AlignedBuf> {
        self.shared.stop.check()?;
        Ok(self.shared.free.lock().recv().map_err(|_| Gone)?)
    }

    fn send(&self, write: Write) -> anyhow::Result<()> {
        Ok(self.writes.send(write).map_err(|_| Gone)?)
    }
}
