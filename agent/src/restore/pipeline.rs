//! The threads of a restore: one plans, as many as there are cores read, decode and verify, one writes.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc;

use anyhow::Context as _;
use block::{ByteRange, Engine, FileDisk};
use parking_lot::Mutex;
use repository::{DiskMap, MapEntry, Repository};
use tokio::sync::mpsc as local;

use super::damage::DamageLog;
use super::decode::{self, Decoders, Job};
use super::plan::{self, Wanted};
use super::writer::{self, Write};
use crate::capture::Stop;
use crate::cli::Interrupt;
use crate::output::Progress;
use crate::source::{Fallbacks, Throttle};

/// Chunks that are planned together, in pack order: 8 GiB of disk at the usual chunk size, a few MiB of memory.
const STRETCH: u64 = 64 << 10;
const PIECE_LEN: usize = block::BufferPool::LARGE;
/// More decoders than this would only hold more memory: a disk is slower.
const MAX_DECODERS: usize = 16;
/// Buffers that are being written, beside those that the decoders hold.
const PIECES_IN_FLIGHT: usize = 16;
/// Reads that wait for a decoder.
const QUEUED_JOBS: usize = 64;

/// What is brought back, and where to.
pub(super) struct Restore<'a> {
    pub(super) repository: &'a Repository,
    pub(super) fallbacks: &'a Fallbacks,
    pub(super) map: &'a DiskMap,
    pub(super) target: &'a FileDisk,
    pub(super) target_is_zero: bool,
    pub(super) engine: Engine,
    pub(super) damage: &'a DamageLog,
    pub(super) progress: &'a Progress,
    /// Reads in flight, where there is reason for another number than that of the cores.
    pub(super) slots: Option<usize>,
    /// How slow the source is made.
    pub(super) throttle: Throttle,
}

impl Restore<'_> {
    /// Brings everything back; once this returns, all of it is on stable storage.
    ///
    /// # Errors
    /// The first thing that failed, or the interrupt.
    pub(super) fn run(&self, interrupt: Interrupt) -> anyhow::Result<()> {
        let stop = Stop::new(interrupt);
        let piece_len = PIECE_LEN.max(self.map.chunk_size() as usize);
        let cores = std::thread::available_parallelism().map_or(2, usize::from).min(MAX_DECODERS);
        let threads = self.slots.unwrap_or(cores);
        let pieces = threads * decode::PIECES_AT_ONCE + PIECES_IN_FLIGHT;
        let (job_sender, jobs) = mpsc::sync_channel(QUEUED_JOBS);
        let jobs = Arc::new(Mutex::new(jobs));
        let (write_sender, writes) = local::unbounded_channel();
        let (free_sender, free) = mpsc::channel();
        let decoders = Decoders {
            map: self.map,
            reader: self.repository.reader(),
            fallbacks: self.fallbacks,
            target_is_zero: self.target_is_zero,
            damage: self.damage,
            stop: &stop,
            progress: self.progress,
            throttle: &self.throttle,
            free: Mutex::new(free),
            piece_len,
        };
        std::thread::scope(|scope| {
            let (decoders, stop) = (&decoders, &stop);
            let mut spawned = Ok(());
            for _ in 0..threads {
                let (jobs, writes) = (Arc::clone(&jobs), write_sender.clone());
                let thread = std::thread::Builder::new().name("restore".into());
                spawned =
                    spawned.and(thread.spawn_scoped(scope, move || decoders.run(jobs, writes)).map(drop));
            }
            drop(jobs);
            let thread = std::thread::Builder::new().name("plan".into());
            let planner = thread.spawn_scoped(scope, move || {
                if let Err(error) = self.plan(&job_sender, &write_sender, stop) {
                    stop.keep(error);
                }
            });
            if let Err(error) = spawned.and(planner.map(drop)).context("cannot start a thread") {
                stop.keep(error);
            }
            let written = self.engine.run(writer::write_all(
                self.target,
                (pieces, piece_len),
                writes,
                free_sender,
                stop,
            ));
            if let Err(error) = written {
                stop.keep(error);
            }
        });
        drop(decoders);
        stop.conclude()
    }

    /// Goes through the map and hands out reads, a stretch at a time.
    fn plan(
        &self,
        jobs: &mpsc::SyncSender<Job>,
        writes: &local::UnboundedSender<Write>,
        stop: &Stop,
    ) -> anyhow::Result<()> {
        let count = self.map.chunk_count();
        let mut first = 0;
        while first < count {
            let end = count.min(first + STRETCH);
            let entries = self.entries(first..end)?;
            let plan::Survey { named, zeroes, lost } = plan::survey(first, &entries);
            for run in lost {
                self.lost(run, None, &repository::Error::lost(), writes)?;
            }
            if !self.target_is_zero {
                for run in zeroes {
                    drop(writes.send(Write::Zeroes(self.range(run))));
                }
            }
            let mut wanted = Vec::with_capacity(named.len());
            for chunk in named {
                // Where only a copy knows it: it is not found there, and then asked of the copies by its id.
                let at = self.repository.locate_needed(&chunk.id);
                match at.or_else(|error| self.fallbacks.or_else(error, |copy| copy.locate_needed(&chunk.id)))
                {
                    Ok(at) => {
                        let (index, more) = (chunk.places[0], chunk.places[1..].to_vec());
                        wanted.push(Wanted { id: chunk.id, at, index, more });
                    }
                    Err(error) => {
                        for index in chunk.places {
                            self.lost(index..index + 1, Some(chunk.id.to_string()), &error, writes)?;
                        }
                    }
                }
            }
            let fetches = plan::order(&mut wanted);
            let wanted = Arc::new(wanted);
            for fetch in fetches {
                stop.check()?;
                if jobs.send(Job { fetch, wanted: Arc::clone(&wanted) }).is_err() {
                    return stop.check();
                }
            }
            first = end;
        }
        Ok(())
    }

    /// The entries of the map; where part of it is damaged, as zeroes that are noted as lost.
    fn entries(&self, range: Range<u64>) -> anyhow::Result<Vec<MapEntry>> {
        let entries = self.map.entries(range.clone());
        let of_copy = |copy: &Repository| self.map.through(copy).entries(range.clone());
        match entries.or_else(|error| self.fallbacks.or_else(error, of_copy)) {
            Ok(entries) => Ok(entries),
            Err(error) if range.end - range.start == 1 => {
                self.damage.note(self.range(range), None, error)?;
                Ok(vec![MapEntry::Zero])
            }
            Err(_) => {
                let middle = range.start + (range.end - range.start) / 2;
                let mut entries = self.entries(range.start..middle)?;
                entries.extend(self.entries(middle..range.end)?);
                Ok(entries)
            }
        }
    }

    fn lost(
        &self,
        chunks: Range<u64>,
        id: Option<String>,
        error: &repository::Error,
        writes: &local::UnboundedSender<Write>,
    ) -> anyhow::Result<()> {
        let range = self.range(chunks);
        self.damage.note(range, id, error.clone())?;
        if !self.target_is_zero {
            drop(writes.send(Write::Zeroes(range)));
        }
        Ok(())
    }

    fn range(&self, chunks: Range<u64>) -> ByteRange {
        let chunk_size = u64::from(self.map.chunk_size());
        ByteRange::from_bounds(chunks.start * chunk_size, (chunks.end * chunk_size).min(self.map.size()))
    }
}
