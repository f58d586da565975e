//! What the size of a chunk costs: captures an image at each size and prints the table of docs/format.md.
//!
//! `cargo run --release -p repository --example chunk_size -- IMAGE [TRACE] [--threads N]`
//!
//! TRACE is a boot's requests, one JSON object a line with `op`, `offset`, `len`. Repositories are made beside the image's working
//! directory, in a temporary directory of the current one. Times are the least of three; CPU seconds hold on a busy machine too.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use repository::{
    CaptureOptions, ChunkDecoder, ChunkEncoder, ChunkId, DEFAULT_LEVEL, FetchLimits, InitOptions, Location,
    MapEntry, Repository, Snapshot, SnapshotMeta, Undecoded, chunk_ids, is_zero, plan_fetches,
};
use serde::Deserialize;

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const SIZES_KIB: [u32; 5] = [64, 128, 256, 512, 1024];
const ROUNDS: usize = 3;
/// What a worker takes at once.
const PIECE: u64 = 4 << 20;

fn main() -> Outcome<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut threads = 2;
    if let Some(at) = arguments.iter().position(|argument| argument == "--threads") {
        threads = arguments.get(at + 1).ok_or("--threads needs a number")?.parse()?;
        arguments.drain(at..at + 2);
    }
    let image = File::open(arguments.first().ok_or("which image?")?)?;
    let trace = arguments.get(1).map(|path| read_trace(Path::new(path))).transpose()?;
    println!(
        "| chunk | chunks | stored | boot: fetched stored (plain) | capture | again | read and verified | CPU of these | map + index per TB of data |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for kib in SIZES_KIB {
        measure(&image, trace.as_deref(), kib << 10, threads)?;
    }
    Ok(())
}

fn measure(image: &File, trace: Option<&[Request]>, chunk_size: u32, threads: usize) -> Outcome<()> {
    let mut best: [Option<(Duration, f64)>; 3] = [None; 3];
    let mut keep = |at: usize, took: (Duration, f64)| {
        best[at] = Some(best[at].map_or(took, |(time, cpu)| (time.min(took.0), cpu.min(took.1))));
    };
    let mut line = String::new();
    for _ in 0..ROUNDS {
        let dir = tempfile::tempdir_in(".")?;
        let path = dir.path().join("repo");
        let repo = Repository::init(&path, InitOptions { chunk_size })?;
        let (snapshot, took) = timed(|| capture(&repo, image, chunk_size, None, threads))?;
        keep(0, took);
        let (again, took) = timed(|| capture(&repo, image, chunk_size, Some(&snapshot), threads))?;
        keep(1, took);
        assert_eq!(again.manifest().disks[0].map, snapshot.manifest().disks[0].map);
        let (_, took) = timed(|| read_back(&repo, &snapshot, threads))?;
        keep(2, took);
        line = describe(&repo, &path, &snapshot, trace)?;
    }
    let [capture, again, back] = best.map(|took| took.expect("there are rounds"));
    let seconds = |time: (Duration, f64)| format!("{:.2} s", time.0.as_secs_f64());
    let (stored, costs) = line.split_once('@').expect("two parts");
    println!(
        "| {} KiB | {stored} | {} | {} | {} | {:.2}, {:.2}, {:.2} s | {costs} |",
        chunk_size >> 10,
        seconds(capture),
        seconds(again),
        seconds(back),
        capture.1,
        again.1,
        back.1
    );
    Ok(())
}

/// Runs something; how long it took, and how many seconds of all cores.
fn timed<T>(act: impl FnOnce() -> Outcome<T>) -> Outcome<(T, (Duration, f64))> {
    let (start, before) = (Instant::now(), cpu_seconds()?);
    let done = act()?;
    Ok((done, (start.elapsed(), cpu_seconds()? - before)))
}

fn cpu_seconds() -> Outcome<f64> {
    const TICKS_PER_SECOND: f64 = 100.0;
    let mut text = String::new();
    File::open("/proc/self/stat")?.read_to_string(&mut text)?;
    let fields: Vec<&str> = text.rsplit(')').next().ok_or("no stat")?.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).ok_or("no stat");
    Ok((ticks(11)? + ticks(12)?) / TICKS_PER_SECOND)
}

fn capture(
    repo: &Repository,
    image: &File,
    chunk_size: u32,
    parent: Option<&Snapshot>,
    threads: usize,
) -> Outcome<Snapshot> {
    let size = image.metadata()?.len();
    let mut capture = repo.begin_capture(&"measured".parse()?, CaptureOptions::default())?;
    let parent = parent.map(|parent| repo.disk_map(&parent.manifest().disks[0])).transpose()?;
    let disk = capture.begin_disk("disk0".parse()?, size, chunk_size, parent)?;
    let pieces = data_pieces(image, size)?;
    let per_piece = PIECE / u64::from(chunk_size);
    let mut zero_from = 0;
    for piece in &pieces {
        let first = piece * per_piece;
        disk.put_zero(zero_from..first)?;
        zero_from = (first + per_piece).min(disk.chunk_count());
    }
    disk.put_zero(zero_from..disk.chunk_count())?;
    let next = AtomicU64::new(0);
    on_threads(threads, || {
        let mut encoder = ChunkEncoder::new(DEFAULT_LEVEL)?;
        let mut buffer = vec![0; PIECE as usize];
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            let len = (size - piece * PIECE).min(PIECE) as usize;
            image.read_exact_at(&mut buffer[..len], piece * PIECE)?;
            let (mut places, mut plains) = (Vec::new(), Vec::new());
            for (index, plain) in (piece * per_piece..).zip(buffer[..len].chunks(chunk_size as usize)) {
                if is_zero(plain) {
                    disk.put_zero(index..index + 1)?;
                } else {
                    places.push(index);
                    plains.push(plain);
                }
            }
            for ((index, plain), id) in places.iter().zip(&plains).zip(chunk_ids(&plains)) {
                if !disk.put_known(*index, &id)? {
                    disk.put_chunk(*index, &id, &encoder.encode(plain)?)?;
                }
            }
        }
        Ok(())
    })?;
    Ok(capture.commit(SnapshotMeta::default())?)
}

/// Which pieces of the image are not holes: by its blocks if it is sparse, and by reading nothing else.
fn data_pieces(image: &File, size: u64) -> io::Result<Vec<u64>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(image, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(image, rustix::fs::SeekFrom::Hole(data))?;
        pieces.extend(data / PIECE..hole.div_ceil(PIECE));
        at = hole;
    }
    pieces.dedup();
    Ok(pieces)
}

fn on_threads(threads: usize, work: impl Fn() -> Outcome<()> + Sync) -> Outcome<()> {
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(&work)).collect();
        running.into_iter().try_for_each(|thread| thread.join().expect("a worker does not panic"))
    })
}

/// The chunks of a snapshot's disk, in the order of packs.
fn located(repo: &Repository, snapshot: &Snapshot) -> Outcome<Vec<(Location, ChunkId, u64)>> {
    let map = repo.disk_map(&snapshot.manifest().disks[0])?;
    let entries = map.entries(0..map.chunk_count())?;
    let chunks: Vec<(u64, ChunkId)> = (0..)
        .zip(entries)
        .filter_map(|(index, entry)| match entry {
            MapEntry::Chunk(id) => Some((index, id)),
            MapEntry::Zero | MapEntry::Lost => None,
        })
        .collect();
    let ids: Vec<ChunkId> = chunks.iter().map(|(_, id)| *id).collect();
    let mut located: Vec<_> =
        repo.locate_all(&ids)?.into_iter().zip(chunks).map(|(at, (index, id))| (at, id, index)).collect();
    located.sort_unstable();
    Ok(located)
}

fn read_back(repo: &Repository, snapshot: &Snapshot, threads: usize) -> Outcome<()> {
    let items = located(repo, snapshot)?;
    let fetches = plan_fetches(&items, |item| &item.0, FetchLimits::default());
    let next = AtomicU64::new(0);
    let reader = repo.reader();
    on_threads(threads, || {
        let mut decoder = ChunkDecoder::new()?;
        let (mut stored, mut plain) = (Vec::new(), Vec::new());
        while let Some(fetch) = fetches.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            stored.resize(fetch.len, 0);
            reader.read_stored_range(fetch.pack, fetch.offset, &mut stored)?;
            let wanted = &items[fetch.items.clone()];
            plain.resize(wanted.iter().map(|(at, ..)| at.plain_len as usize).sum(), 0);
            let mut room = plain.as_mut_slice();
            let mut chunks = Vec::with_capacity(wanted.len());
            for (at, id, _) in wanted {
                let (out, rest) = room.split_at_mut(at.plain_len as usize);
                room = rest;
                chunks.push(Undecoded { at, stored: &stored[fetch.place(at)], id, out });
            }
            decoder.decode_each(&mut chunks).into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    })
}

fn describe(
    repo: &Repository,
    path: &Path,
    snapshot: &Snapshot,
    trace: Option<&[Request]>,
) -> Outcome<String> {
    const TB: f64 = 1e12;
    const MB: f64 = 1e6;
    let stats = snapshot.manifest().disks[0].stats;
    let chunk_size = snapshot.manifest().disks[0].chunk_size;
    let boot = match trace {
        None => "not measured".into(),
        Some(trace) => {
            let items = located(repo, snapshot)?;
            let mut wanted: Vec<u64> = trace
                .iter()
                .filter(|request| request.op == "read" && request.len > 0)
                .flat_map(|read| {
                    let size = u64::from(chunk_size);
                    read.offset / size..=(read.offset + u64::from(read.len) - 1) / size
                })
                .collect();
            wanted.sort_unstable();
            wanted.dedup();
            let fetched: Vec<_> =
                items.iter().filter(|(_, _, index)| wanted.binary_search(index).is_ok()).collect();
            let sum = |of: fn(&Location) -> u32| {
                fetched.iter().map(|item| f64::from(of(&item.0))).sum::<f64>() / MB
            };
            format!("{:.1} MB ({:.1})", sum(|at| at.stored_len), sum(|at| at.plain_len))
        }
    };
    // A full map leaf has its bitmap and head, an index page its slack, the filter 11 bits an entry.
    let per_chunk = (16.0 + 128.0 + 1024.0 * 32.0) / 1024.0 + 4096.0 / 72.0 + 32.0 / 23.0;
    let blocks: u64 = files(&path.join("packs"))?;
    Ok(format!(
        "{} | {:.1} MB ({:.1} in packs) | {boot}@{:.0} MB",
        stats.new_chunks,
        stats.new_stored_bytes as f64 / MB,
        blocks as f64 / MB,
        TB / f64::from(chunk_size) * per_chunk / MB
    ))
}

fn files(dir: &Path) -> io::Result<u64> {
    std::fs::read_dir(dir)?.map(|entry| Ok(entry?.metadata()?.blocks() * 512)).sum()
}

#[derive(Deserialize)]
struct Request {
    op: String,
    #[serde(default)]
    offset: u64,
    #[serde(default)]
    len: u32,
}

fn read_trace(path: &Path) -> Outcome<Vec<Request>> {
    let text = std::fs::read_to_string(path)?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}
