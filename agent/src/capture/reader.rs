//! Reading the sources in order, several pieces at once, into buffers that come back when their contents
//! have been put away: those bound how much a capture holds in memory.

use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::sync::{Arc, mpsc};

use block::{AlignedBuf, BlockDevice, ByteRange, DirectIo, Engine, FileDisk, FileOptions, OpenDevice};
use rustix::io::ReadWriteFlags;
use tokio::task::JoinSet;

use super::export::{Data, ExportReader, ExportSource};
use super::file::FileSource;
use super::pipeline::Feed;
use super::source::{Contents, Source};

/// Bytes of a piece, unless a chunk is longer: so many that the chunks of one are hashed side by side.
pub(crate) const PIECE_LEN: usize = 2 << 20;

/// Consecutive chunks of a disk, as read.
#[derive(Debug)]
pub(crate) struct Piece {
    /// Its place in the order of capture.
    pub(crate) sequence: u64,
    pub(crate) disk: usize,
    pub(crate) first_chunk: u64,
    pub(crate) bytes: AlignedBuf,
    /// Chunks among them that could not be had: the snapshot says that they are lost.
    pub(crate) left_out: Vec<u64>,
}

/// A disk as the reader sees it.
#[derive(Debug)]
pub(super) struct Plan {
    disk: Disk,
    pub(super) chunk_size: u32,
    /// The chunks that may hold data, in order.
    pub(super) data: Vec<std::ops::Range<u64>>,
    /// The chunks that are zeroes without being read, in order.
    pub(super) holes: Vec<std::ops::Range<u64>>,
    /// Why more is read than is known to be data.
    pub(super) why_more: Option<String>,
    size: u64,
}

/// What a disk is read from.
#[derive(Debug)]
enum Disk {
    File(FileDisk),
    Export(Arc<ExportSource>),
}

/// The same, for the thread that reads.
#[derive(Clone)]
enum Device {
    File(Rc<dyn BlockDevice>),
    Export(Rc<ExportReader>),
}

impl Plan {
    /// Opens the source for bulk reading, and finds its holes.
    pub(super) fn new(source: &Source, chunk_size: u32, engine: Engine) -> anyhow::Result<Self> {
        let (disk, data) = match &source.contents {
            Contents::File(file) => {
                let options = FileOptions::new(engine).direct(how_to_read(file)).read_only(true);
                let disk = FileDisk::open(file.path(), options)?;
                let whole = ByteRange::from_bounds(0, source.size.min(disk.size()));
                let data = Data { ranges: disk.data_ranges(whole)?, why_more: None };
                (Disk::File(disk), data)
            }
            Contents::Export(export) => (Disk::Export(Arc::clone(export)), export.data()?),
        };
        let Data { ranges, why_more } = data;
        let data = chunk_runs(&ranges, u64::from(chunk_size));
        let holes = between(&data, source.size.div_ceil(u64::from(chunk_size)));
        Ok(Self { disk, chunk_size, data, holes, why_more, size: source.size })
    }

    fn open(&self) -> anyhow::Result<Device> {
        Ok(match &self.disk {
            Disk::File(file) => Device::File(file.open()?),
            Disk::Export(export) => Device::Export(Rc::new(export.reader(self.data_bytes())?)),
        })
    }

    /// Looks at these chunks alone: in order, neither touching nor overlapping.
    pub(super) fn only(mut self, chunks: &[std::ops::Range<u64>]) -> Self {
        self.data = common(&self.data, chunks);
        self.holes = common(&self.holes, chunks);
        self
    }

    /// How many chunks are looked at, holes among them.
    pub(super) fn chunks(&self) -> u64 {
        self.data.iter().chain(&self.holes).map(|run| run.end - run.start).sum()
    }

    /// How many bytes will be read.
    pub(super) fn data_bytes(&self) -> u64 {
        let chunk_size = u64::from(self.chunk_size);
        self.data.iter().map(|run| (run.end * chunk_size).min(self.size) - run.start * chunk_size).sum()
    }
}

/// What lies between these runs, up to `end`.
fn between(runs: &[std::ops::Range<u64>], end: u64) -> Vec<std::ops::Range<u64>> {
    let starts = std::iter::once(0).chain(runs.iter().map(|run| run.end));
    let ends = runs.iter().map(|run| run.start).chain(std::iter::once(end));
    starts.zip(ends).map(|(start, end)| start..end).filter(|hole| !hole.is_empty()).collect()
}

/// What two lists of runs, each in order, have in common.
fn common(a: &[std::ops::Range<u64>], b: &[std::ops::Range<u64>]) -> Vec<std::ops::Range<u64>> {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    let mut runs = Vec::new();
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        let run = x.start.max(y.start)..x.end.min(y.end);
        let a_ends_first = x.end < y.end;
        if !run.is_empty() {
            runs.push(run);
        }
        if a_ends_first {
            a.next()
        } else {
            b.next()
        };
    }
    runs
}

/// The chunks that the ranges touch, as runs that neither touch nor overlap.
fn chunk_runs(ranges: &[ByteRange], chunk_size: u64) -> Vec<std::ops::Range<u64>> {
    let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
    for range in ranges {
        let run = range.units(chunk_size);
        match runs.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => runs.push(run),
        }
    }
    runs
}

/// How to read a file: through the page cache if most of it is there already, around it if not, so
/// that a large cold disk neither pushes everything else out of memory nor pays for a copy.
fn how_to_read(source: &FileSource) -> DirectIo {
    const SAMPLES: u64 = 32;
    let mut byte = [0; 1];
    let mut cached = 0;
    let mut holding = 0;
    for sample in 0..SAMPLES {
        let at = source.size() / SAMPLES * sample;
        // A hole tells nothing; take the next data after it.
        let Ok(at) = rustix::fs::seek(source.as_fd(), rustix::fs::SeekFrom::Data(at)) else { continue };
        holding += 1;
        let buffer = &mut [std::io::IoSliceMut::new(&mut byte)];
        if rustix::io::preadv2(source.as_fd(), buffer, at, ReadWriteFlags::NOWAIT).is_ok() {
            cached += 1;
        }
    }
    if cached * 2 >= holding { DirectIo::Off } else { DirectIo::Auto }
}

/// A buffer that may be filled again, or the word that nothing more is wanted.
pub(crate) type Freed = Option<AlignedBuf>;

/// Reads all data of all disks and sends it as pieces. Runs on a thread of its own, inside the engine.
pub(super) async fn read_all(plans: &[Plan], sources: &[Source], feed: Feed<'_>) -> anyhow::Result<()> {
    let Feed { buffers, pieces, mut freed, free, stop } = feed;
    let piece_len = plans.iter().map(piece_len).max().unwrap_or(PIECE_LEN);
    for _ in 0..buffers {
        // The receiver is here.
        let _ = free.send(Some(AlignedBuf::zeroed(piece_len)));
    }
    drop(free);
    let mut sequence = 0;
    let mut reads = JoinSet::new();
    for (disk, (plan, source)) in plans.iter().zip(sources).enumerate() {
        let device = plan.open()?;
        for (first_chunk, range) in pieces_of(plan, source.size) {
            stop.check()?;
            // Reads that failed keep their buffers until they are looked at: wait for both.
            let free = loop {
                tokio::select! {
                    Some(read) = reads.join_next() => finished(read, sources, &pieces)?,
                    free = freed.recv() => break free,
                }
            };
            let Some(Some(mut bytes)) = free else { return stop.check() };
            bytes.set_len(usize::try_from(range.len()).expect("a piece is a few MiB"));
            let piece = Piece { sequence, disk, first_chunk, bytes, left_out: Vec::new() };
            reads.spawn_local(read_one(device.clone(), range, piece, pieces.clone()));
            sequence += 1;
        }
    }
    while let Some(read) = reads.join_next().await {
        finished(read, sources, &pieces)?;
    }
    Ok(())
}

/// A read that failed, with what it was to fill.
struct Failed {
    error: anyhow::Error,
    range: ByteRange,
    piece: Piece,
}

async fn read_one(
    device: Device,
    range: ByteRange,
    mut piece: Piece,
    pieces: mpsc::Sender<Piece>,
) -> Result<(), Box<Failed>> {
    let bytes = std::mem::replace(&mut piece.bytes, AlignedBuf::zeroed(0));
    let result = match device {
        Device::File(device) => {
            let (result, bytes) = device.read(range.start(), bytes).await;
            piece.bytes = bytes;
            result.map_err(anyhow::Error::from)
        }
        Device::Export(export) => export.read(range.start(), bytes).await.map(|bytes| piece.bytes = bytes),
    };
    match result {
        // Nobody takes pieces any more only after a failure, which is told elsewhere.
        Ok(()) => drop(pieces.send(piece)),
        Err(error) => return Err(Box::new(Failed { error, range, piece })),
    }
    Ok(())
}

fn finished(
    read: Result<Result<(), Box<Failed>>, tokio::task::JoinError>,
    sources: &[Source],
    pieces: &mpsc::Sender<Piece>,
) -> anyhow::Result<()> {
    let Err(failed) = read? else { return Ok(()) };
    let Failed { error, range, mut piece } = *failed;
    let source = &sources[piece.disk];
    // Of an export, the error itself says where it is.
    let Contents::File(file) = &source.contents else {
        return Err(error.context(format!("cannot read {range} of {}", source.name)));
    };
    // A source that became shorter is captured with zeroes at its end; that it changed is found and said later.
    let size = file.size_now()?;
    if size >= range.end() {
        return Err(error.context(format!("cannot read {range} of {source}")));
    }
    let left = usize::try_from(size.saturating_sub(range.start())).expect("less than a piece");
    let read = file.read_up_to(&mut piece.bytes[..left], range.start())?;
    piece.bytes[read..].fill(0);
    drop(pieces.send(piece));
    Ok(())
}

fn piece_len(plan: &Plan) -> usize {
    PIECE_LEN.max(plan.chunk_size as usize)
}

/// Cuts the data of a disk into pieces of whole chunks: the first chunk of each, and its bytes.
fn pieces_of(plan: &Plan, size: u64) -> impl Iterator<Item = (u64, ByteRange)> {
    let chunk_size = u64::from(plan.chunk_size);
    let per_piece = piece_len(plan) as u64 / chunk_size;
    plan.data.iter().flat_map(move |run| {
        run.clone().step_by(usize::try_from(per_piece).expect("a piece has few chunks")).map(move |first| {
            let end = (first + per_piece).min(run.end) * chunk_size;
            (first, ByteRange::from_bounds(first * chunk_size, end.min(size)))
        })
    })
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc as local;

    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::from_bounds(start, end)
    }

    #[test]
    fn data_ranges_that_share_a_chunk_become_one_run() {
        let runs = chunk_runs(&[range(0, 10), range(20, 99), range(100, 101), range(350, 360)], 100);
        assert_eq!(runs, [0..2, 3..4]);
        assert_eq!(chunk_runs(&[range(0, 100), range(100, 200), range(300, 301)], 100), [0..2, 3..4]);
        assert!(chunk_runs(&[], 100).is_empty());
    }

    #[test]
    fn runs_have_in_common_what_is_in_both() {
        assert_eq!(common(&[0..4, 6..9], &[1..2, 3..7, 8..20]), [1..2, 3..4, 6..7, 8..9]);
        assert!(common(&[0..2, 3..4], &[4..5, 6..9]).is_empty());
        assert_eq!(between(&[1..2, 4..5], 5), [0..1, 2..4]);
    }

    #[test]
    fn more_reads_than_buffers_may_fail_because_the_source_became_shorter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.raw");
        let bytes = vec![7; 4 * PIECE_LEN];
        std::fs::write(&path, &bytes).unwrap();
        let interrupt = crate::cli::Interrupt::default();
        let place = crate::capture::source::Place::File(path.clone());
        let source = Source::open("root".parse().unwrap(), place, false, &interrupt).unwrap();
        let plan = Plan::new(&source, 65536, Engine::THREADS).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        let (piece_sender, pieces) = mpsc::channel::<Piece>();
        let (free, freed) = local::unbounded_channel();
        let give_back = free.clone();
        let consumer = std::thread::spawn(move || {
            let mut read = vec![7; 4 * PIECE_LEN];
            for piece in pieces {
                let at = usize::try_from(piece.sequence).unwrap() * PIECE_LEN;
                read[at..][..piece.bytes.len()].copy_from_slice(&piece.bytes);
                let _ = give_back.send(Some(piece.bytes));
            }
            read
        });
        let stop = crate::capture::Stop::new(interrupt);
        let (plans, sources) = ([plan], [source]);
        let feed = Feed { buffers: 2, pieces: piece_sender, freed, free, stop: &stop };
        let reading = read_all(&plans, &sources, feed);
        Engine::THREADS.run(reading).unwrap();
        let read = consumer.join().unwrap();
        assert!(read[..100] == bytes[..100] && read[100..].iter().all(|byte| *byte == 0));
    }
}
