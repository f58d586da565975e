//! Sources that are NBD exports: what of them is data, and reading it over as many connections as the server allows.
//!
//! The client blocks, so each connection has a thread of its own. What is to be read waits for all of them in one queue. The first
//! connection is kept from the first look at the export to its last byte: some servers end with it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, bail};
use block::{AlignedBuf, ByteRange};
use nbd_server::ErrorKind;
use nbd_server::client::{Connection, NbdUri, Patience, Reads};
use parking_lot::Mutex;
use proto::wire::{Descriptor, MAX_STATUS_EXTENT_BYTES, MetaContext};
use tokio::sync::oneshot;

use crate::cli::{Failure, Interrupt};

/// How long a server may say nothing while something is asked of it: as long as one may take that has to wait for its own source.
const PATIENCE: Duration = Duration::from_secs(5 * 60);
/// More connections than this gain nothing.
const MAX_CONNECTIONS: u64 = 4;
/// What is worth a connection of its own, in bytes.
const CONNECTION_BYTES: u64 = 64 << 20;
/// Pieces in flight on all connections together: what a long way needs.
const MAX_READS: usize = 16;

/// An export, connected to.
#[derive(Debug)]
pub(super) struct ExportSource {
    uri: NbdUri,
    text: String,
    size: u64,
    interrupt: Interrupt,
    /// Nothing is read any more: nobody need wait for the server.
    over: Arc<AtomicBool>,
    first: Mutex<Option<Connection>>,
}

/// What of an export holds data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Data {
    /// In order.
    pub(super) ranges: Vec<ByteRange>,
    /// Why there may be zeroes among them that the server did not tell of.
    pub(super) why_more: Option<String>,
}

impl ExportSource {
    /// Connects to the export, which is called `text`.
    ///
    /// # Errors
    /// Where there is no such export, or not all of it can be read.
    pub(super) fn open(uri: &NbdUri, text: String, interrupt: &Interrupt) -> anyhow::Result<Self> {
        let mut source = Self {
            uri: uri.clone(),
            text,
            size: 0,
            interrupt: interrupt.clone(),
            over: Arc::default(),
            first: Mutex::new(None),
        };
        let mut connection = source.connect(vec![MetaContext::Allocation])?;
        source.size = connection.info().size;
        let minimum = u64::from(connection.info().block_sizes.minimum);
        let rest = source.size % minimum;
        if rest != 0 {
            // No client may ask for less than a block. Many servers do not mind, and then nothing is lost.
            let mut tail = vec![0; usize::try_from(rest).expect("less than a block")];
            if let Err(error) = connection.read(source.size - rest, &mut tail) {
                interrupt.check()?;
                return Err(Failure::new(
                    format_args!(
                        "the source {} has {} bytes, its server reads blocks of {minimum} alone, and the last {rest} bytes are none",
                        source.text, source.size
                    ),
                    "have it serve a size of whole blocks, or smaller blocks",
                )
                .because(error)
                .into());
            }
        }
        *source.first.get_mut() = Some(connection);
        Ok(source)
    }

    /// Its size in bytes.
    pub(super) const fn size(&self) -> u64 {
        self.size
    }

    /// Its URI, as it was written.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    fn connect(&self, contexts: Vec<MetaContext>) -> anyhow::Result<Connection> {
        let (interrupt, over) = (self.interrupt.clone(), Arc::clone(&self.over));
        let patience =
            Patience::until(PATIENCE, move || interrupt.is_raised() || over.load(Ordering::Relaxed));
        self.checked(Connection::open(&self.uri, contexts, patience))
    }

    /// Who waited in vain because of the interrupt failed because of that.
    fn checked<T>(&self, result: nbd_server::Result<T>) -> anyhow::Result<T> {
        if result.is_err() {
            self.interrupt.check()?;
        }
        Ok(result?)
    }

    /// Its first `len` bytes, or some more, or all that there are.
    pub(super) fn head(&self, len: usize) -> anyhow::Result<Vec<u8>> {
        let mut first = self.first.lock();
        let connection = first.as_mut().context("the export is being read")?;
        // A block, or a few.
        let minimum = connection.info().block_sizes.minimum as usize;
        let len = len.next_multiple_of(minimum);
        let mut head = vec![0; usize::try_from(self.size).map_or(len, |size| size.min(len))];
        self.checked(connection.read(0, &mut head))?;
        Ok(head)
    }

    /// Where data is, as far as the server tells. Bytes of which it says only that no room is allocated for them are data: they
    /// may read as anything.
    pub(super) fn data(&self) -> anyhow::Result<Data> {
        let mut first = self.first.lock();
        let connection = first.as_mut().context("the export is being read")?;
        let Some(context) = connection.context(&MetaContext::Allocation) else {
            let why = "its server does not tell where there are only zeroes".to_owned();
            return Ok(Data { ranges: whole(0, self.size), why_more: Some(why) });
        };
        let minimum = u64::from(connection.info().block_sizes.minimum);
        let most = if connection.replies().is_extended() { u64::MAX } else { MAX_STATUS_EXTENT_BYTES };
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < self.size {
            self.interrupt.check()?;
            let told = match connection.block_status(at, (self.size - at).min(most)) {
                Ok(told) => told,
                Err(error) if error.kind() == ErrorKind::Refused => {
                    ranges.extend(whole(at, self.size));
                    return Ok(Data { ranges, why_more: Some(error.to_string()) });
                }
                failed => self.checked(failed)?,
            };
            let extents = told.into_iter().filter(|(id, _)| *id == context).flat_map(|(_, extents)| extents);
            let reach = add_data(&mut ranges, at, extents, self.size);
            // The next question begins with a block; so would every server's answer end, if all were right.
            let next = if reach == self.size { reach } else { reach - reach % minimum };
            if next <= at {
                ranges.extend(whole(at, self.size));
                let why = format!("its server tells nothing of byte {at}");
                return Ok(Data { ranges, why_more: Some(why) });
            }
            at = next;
        }
        Ok(Data { ranges, why_more: None })
    }

    /// Begins to read; `data_bytes` is how much that will be.
    pub(super) fn reader(self: &Arc<Self>, data_bytes: u64) -> anyhow::Result<ExportReader> {
        let first = self.first.lock().take().context("the export is being read already")?;
        let connections =
            if first.allows_more() { (data_bytes / CONNECTION_BYTES).clamp(1, MAX_CONNECTIONS) } else { 1 };
        let most = MAX_READS / usize::try_from(connections).expect("a few");
        let (jobs, queue) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut reader = ExportReader { source: Arc::clone(self), jobs: Some(jobs), threads: Vec::new() };
        let mut first = Some(first);
        for number in 0..connections {
            let (source, queue, first) = (Arc::clone(self), Arc::clone(&queue), first.take());
            let work = move || {
                let connection = match first {
                    Some(first) => first,
                    // Those that there are do the work without it: a server may say that it takes several, and take only one.
                    None => match source.connect(Vec::new()) {
                        Ok(further) if further.info().size == source.size => further,
                        Ok(_) => {
                            return tracing::debug!("another connection shows an export of another size");
                        }
                        Err(error) => {
                            return tracing::debug!(error = %format!("{error:#}"), "no further connection");
                        }
                    },
                };
                work(connection, &queue, most);
            };
            let spawned = std::thread::Builder::new().name("nbd source".into()).spawn(work);
            match spawned {
                Ok(thread) => reader.threads.push(thread),
                Err(error) if number == 0 => return Err(error).context("cannot start a thread"),
                Err(_) => break,
            }
        }
        Ok(reader)
    }
}

fn whole(start: u64, end: u64) -> Vec<ByteRange> {
    vec![ByteRange::from_bounds(start, end)]
}

/// Adds what the extents that begin at `start` say is data; where they end, `size` at most.
fn add_data(
    ranges: &mut Vec<ByteRange>,
    start: u64,
    extents: impl IntoIterator<Item = Descriptor>,
    size: u64,
) -> u64 {
    let mut at = start;
    for extent in extents {
        let end = at.saturating_add(extent.len).min(size);
        if extent.flags & Descriptor::ZERO == 0 && at < end {
            match ranges.last_mut() {
                Some(last) if last.end() >= at => {
                    *last = ByteRange::from_bounds(last.start(), end.max(last.end()))
                }
                _ => ranges.push(ByteRange::from_bounds(at, end)),
            }
        }
        at = end;
    }
    at
}

/// Bytes to be read, and where to put the answer.
#[derive(Debug)]
struct Job {
    offset: u64,
    bytes: AlignedBuf,
    answer: oneshot::Sender<nbd_server::Result<AlignedBuf>>,
}

impl AsMut<[u8]> for Job {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

/// Reads pieces of an export, several at once. Dropping it ends its connections.
#[derive(Debug)]
pub(super) struct ExportReader {
    source: Arc<ExportSource>,
    jobs: Option<mpsc::Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl ExportReader {
    /// Fills `bytes` from `offset`.
    pub(super) async fn read(&self, offset: u64, bytes: AlignedBuf) -> anyhow::Result<AlignedBuf> {
        let (answer, answered) = oneshot::channel();
        if let Some(jobs) = &self.jobs {
            // Where nobody takes it any more the answer is dropped with it.
            let _ = jobs.send(Job { offset, bytes, answer });
        }
        match answered.await {
            Ok(result) => self.source.checked(result),
            Err(_) => {
                self.source.interrupt.check()?;
                bail!("the connections to it have ended");
            }
        }
    }
}

impl Drop for ExportReader {
    fn drop(&mut self) {
        self.source.over.store(true, Ordering::Relaxed);
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // Whatever it panicked about, nobody has an answer from it.
            let _ = thread.join();
        }
    }
}

/// Reads what is in the queue until there will be no more, `most` pieces at once.
fn work(connection: Connection, queue: &Mutex<mpsc::Receiver<Job>>, most: usize) {
    let mut reads = Reads::new(connection);
    let error = loop {
        match step(&mut reads, queue, most) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => break error,
        }
    };
    for job in reads.into_bufs() {
        let _ = job.answer.send(Err(error.clone()));
    }
}

/// Asks for as much as may be in flight, and hands over what comes next; `false` where nothing more is to be read.
fn step(reads: &mut Reads<Job>, queue: &Mutex<mpsc::Receiver<Job>>, most: usize) -> nbd_server::Result<bool> {
    while reads.in_flight() < most {
        let job = if reads.in_flight() == 0 {
            let Ok(job) = queue.lock().recv() else { return Ok(false) };
            job
        } else {
            // Where another connection waits for work, there is none.
            let Some(Ok(job)) = queue.try_lock().map(|queue| queue.try_recv()) else { break };
            job
        };
        reads.begin(job.offset, job)?;
    }
    if let Some((job, result)) = reads.wait_one()? {
        // Nobody waits for it where the capture has failed.
        let _ = job.answer.send(result.map(|()| job.bytes));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_reads_as_zeroes_is_no_data() {
        let extent = |len, flags| Descriptor { len, flags };
        let hole = Descriptor::HOLE;
        let zero = Descriptor::ZERO;
        let mut ranges = Vec::new();
        // Two answers: extents that touch become one, and the last one reaches beyond the export.
        let reach = add_data(&mut ranges, 0, [extent(10, 0), extent(5, hole), extent(5, hole | zero)], 100);
        assert_eq!(reach, 20);
        let reach =
            add_data(&mut ranges, reach, [extent(10, zero), extent(10, 0), extent(u64::MAX, hole)], 100);
        assert_eq!(reach, 100);
        assert_eq!(ranges, [ByteRange::from_bounds(0, 15), ByteRange::from_bounds(30, 100)]);
        // A part that is told of again, because a question begins with a whole block.
        add_data(&mut ranges, 90, [extent(10, 0)], 110);
        assert_eq!(ranges, [ByteRange::from_bounds(0, 15), ByteRange::from_bounds(30, 100)]);
    }
}
