//! The threads of a capture: one reads, as many as there are cores hash and compress, and the repository's
//! own write the packs. What is read is the caller's affair: files here, views of a live-restore in `save`.

use std::sync::mpsc;

use anyhow::Context as _;
use block::Engine;
use parking_lot::Mutex;
use repository::DiskWriter;

use super::order::InOrder;
use super::reader::{self, Freed, Piece, Plan};
use super::source::Source;
use super::stop::Stop;
use super::workers::Workers;
use crate::cli::Interrupt;
use crate::output::Progress;

/// More workers than this would only hold more memory: a disk is slower.
const MAX_WORKERS: usize = 16;

/// What the one who reads is given: buffers to fill, and where pieces go, numbered from 0 on.
pub(crate) struct Feed<'a> {
    /// How many buffers it may make at the start.
    pub(crate) buffers: usize,
    pub(crate) pieces: mpsc::Sender<Piece>,
    /// Buffers come back here.
    pub(crate) freed: tokio::sync::mpsc::UnboundedReceiver<Freed>,
    /// Where new ones are put in.
    pub(crate) free: tokio::sync::mpsc::UnboundedSender<Freed>,
    pub(crate) stop: &'a Stop,
}

/// Reads all sources and puts every chunk of them that their plans name; holes are zeroes.
///
/// # Errors
/// The first thing that failed, or the interrupt.
pub(super) fn run(
    engine: Engine,
    sources: &[Source],
    plans: &[Plan],
    disks: &[DiskWriter],
    level: i32,
    progress: &Progress,
    interrupt: Interrupt,
) -> anyhow::Result<()> {
    for (plan, disk) in plans.iter().zip(disks) {
        for hole in &plan.holes {
            disk.put_zero(hole.clone())?;
        }
    }
    feed(engine, disks, level, progress, interrupt, async |feed| reader::read_all(plans, sources, feed).await)
}

/// Puts every chunk of the pieces that `read` feeds.
///
/// # Errors
/// The first thing that failed, or the interrupt.
pub(crate) fn feed(
    engine: Engine,
    disks: &[DiskWriter],
    level: i32,
    progress: &Progress,
    interrupt: Interrupt,
    read: impl AsyncFnOnce(Feed<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let stop = Stop::new(interrupt);
    let (piece_sender, pieces) = mpsc::channel();
    let (freed, freed_receiver) = tokio::sync::mpsc::unbounded_channel();
    let free = freed.clone();
    let workers = Workers {
        disks,
        level,
        stop: &stop,
        progress,
        pieces: Mutex::new(pieces),
        freed,
        order: InOrder::new(),
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from).min(MAX_WORKERS);
    // For each worker one in hand and one that waits, and some that are being read or wait for their turn.
    let buffers = 2 * threads + 8;
    std::thread::scope(|scope| {
        let mut spawned = Ok(());
        for _ in 0..threads {
            let worker = std::thread::Builder::new().name("capture".into());
            spawned = spawned.and(worker.spawn_scoped(scope, || workers.run()).map(drop));
        }
        // The reader needs no thread of its own: this one has nothing else to do.
        let read = spawned.context("cannot start a thread").and_then(|()| {
            let feed = Feed { buffers, pieces: piece_sender, freed: freed_receiver, free, stop: &stop };
            engine.try_run(read(feed))?
        });
        if let Err(error) = read {
            stop.keep(error);
        }
    });
    drop(workers);
    stop.conclude()
}
