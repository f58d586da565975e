//! Writing packs: workers append, one thread writes in large aligned pieces, another seals (syncs) what is full.
//!
//! Workers wait for the disk only when all buffers are on their way. What is sealed is handed on in the order of capture; giving it
//! its name is the business of [`crate::capture::publish`].

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use zerocopy::little_endian::U32;

use super::format::{self, MAX_RECORDS};
use crate::aligned::AlignedBuf;
use crate::capture::publish::Publisher;
use crate::codec::StoredChunk;
use crate::error::{Error, Result};
use crate::header::{self, FileKind, HEADER_LEN};
use crate::id::{ChunkId, PackId};
use crate::record::{Record, RecordKind};
use crate::storage::{Storage, WriteFile, WriteHint};

/// What is written at once.
const PIECE_LEN: usize = 2 << 20;
/// How many pieces there are: being filled, waiting, being written.
const PIECES: usize = 8;
/// How many full packs may wait for their sync.
const UNSEALED: usize = 4;

/// A pack whose bytes are on stable storage under a temporary name.
pub(crate) struct SealedPack {
    pub(crate) id: PackId,
    /// Where it is now.
    pub(crate) path: String,
    pub(crate) records: Vec<Record>,
}

/// The first failure of a capture. Everybody stops at it and reports it.
#[derive(Clone, Default)]
pub(crate) struct Failure(Arc<Mutex<Option<Error>>>);

impl Failure {
    pub(crate) fn set(&self, error: Error) {
        self.0.lock().get_or_insert(error);
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.0.lock().clone().map_or(Ok(()), Err)
    }

    /// The failure, when a channel says that there must be one.
    fn expected(&self) -> Error {
        self.0.lock().clone().unwrap_or_else(|| Error::invalid("the capture has ended already"))
    }
}

enum Work {
    Begin(PackId),
    Piece(AlignedBuf),
    End(PackId, Vec<Record>),
    Commit,
}

enum Seal {
    Pack { file: Box<dyn WriteFile>, pack: SealedPack },
    Commit,
}

struct Filling {
    open: Option<OpenPack>,
    last: Option<PackId>,
    buffer: Option<AlignedBuf>,
    /// None once the capture has ended.
    work: Option<SyncSender<Work>>,
    free: Receiver<AlignedBuf>,
}

struct OpenPack {
    id: PackId,
    offset: u64,
    records: Vec<Record>,
}

/// The packs of one capture.
pub(crate) struct PackWriter {
    filling: Mutex<Filling>,
    failure: Failure,
    target_len: u64,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl PackWriter {
    /// Starts the two threads. The publisher gets each sealed pack; dropped without a commit, it removes what it was given.
    pub(crate) fn start(
        storage: Arc<dyn Storage>,
        publisher: Publisher,
        target_len: u64,
        failure: Failure,
    ) -> Result<Self> {
        let (work, work_queue) = sync_channel(PIECES);
        let (seal, seal_queue) = sync_channel(UNSEALED);
        let (give, free) = channel();
        for _ in 0..PIECES {
            give.send(AlignedBuf::new(PIECE_LEN)).expect("the receiver is here");
        }
        let threads = [
            spawn("pack-write", {
                let (storage, failure) = (storage, failure.clone());
                move || {
                    write_loop(&*storage, &work_queue, &give, &seal)
                        .unwrap_or_else(|error| failure.set(error))
                }
            })?,
            spawn("pack-seal", {
                let failure = failure.clone();
                move || seal_loop(&seal_queue, publisher).unwrap_or_else(|error| failure.set(error))
            })?,
        ];
        let filling = Filling { open: None, last: None, buffer: None, work: Some(work), free };
        Ok(Self { filling: Mutex::new(filling), failure, target_len, threads: Mutex::new(threads.into()) })
    }

    /// Appends one chunk.
    pub(crate) fn append(&self, id: &ChunkId, chunk: &StoredChunk<'_>, kind: RecordKind) -> Result<()> {
        let mut filling = self.filling.lock();
        let result = self.append_to(&mut filling, id, chunk, kind);
        result.inspect_err(|error| self.failure.set(error.clone()))
    }

    fn append_to(
        &self,
        filling: &mut Filling,
        id: &ChunkId,
        chunk: &StoredChunk<'_>,
        kind: RecordKind,
    ) -> Result<()> {
        self.failure.check()?;
        if filling.open.is_none() {
            let pack = PackId::after(filling.last)?;
            filling.last = Some(pack);
            self.send(filling, Work::Begin(pack))?;
            self.fill(filling, &header::encode(FileKind::Pack, *pack.as_bytes()))?;
            filling.open = Some(OpenPack { id: pack, offset: HEADER_LEN as u64, records: Vec::new() });
        }
        self.fill(filling, chunk.bytes)?;
        let open = filling.open.as_mut().expect("opened above");
        open.records.push(Record {
            id: *id.as_bytes(),
            pack: U32::ZERO,
            offset: U32::new(open.offset as u32),
            stored_len: U32::new(chunk.bytes.len() as u32),
            plain_len: U32::new(chunk.plain_len),
            crc: U32::new(chunk.crc),
            codec: chunk.codec.0,
            key: chunk.key.0,
            kind: kind.0,
            reserved: 0,
        });
        open.offset += chunk.bytes.len() as u64;
        if open.offset >= self.target_len || open.records.len() == MAX_RECORDS {
            self.end_pack(filling)?;
        }
        Ok(())
    }

    fn end_pack(&self, filling: &mut Filling) -> Result<()> {
        let Some(open) = filling.open.take() else { return Ok(()) };
        self.fill(filling, &format::encode_end(open.id, open.offset, &open.records))?;
        if let Some(last) = filling.buffer.take_if(|buffer| !buffer.is_empty()) {
            self.send(filling, Work::Piece(last))?;
        }
        self.send(filling, Work::End(open.id, open.records))
    }

    fn fill(&self, filling: &mut Filling, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let mut buffer = match filling.buffer.take() {
                Some(buffer) => buffer,
                None => filling.free.recv().map_err(|_| self.failure.expected())?,
            };
            bytes = buffer.fill(bytes);
            if buffer.is_full() {
                self.send(filling, Work::Piece(buffer))?;
            } else {
                filling.buffer = Some(buffer);
            }
        }
        Ok(())
    }

    fn send(&self, filling: &Filling, work: Work) -> Result<()> {
        let sender = filling.work.as_ref().ok_or_else(|| self.failure.expected())?;
        sender.send(work).map_err(|_| self.failure.expected())
    }

    /// Seals the last pack and has everything published; returns once packs and index are on stable storage.
    pub(crate) fn commit(&self) -> Result<()> {
        let mut filling = self.filling.lock();
        let sent = self.end_pack(&mut filling).and_then(|()| self.send(&filling, Work::Commit));
        filling.work = None;
        drop(filling);
        self.join();
        // What a thread found is the cause; that it could not be sent to is the consequence.
        self.failure.check().and(sent)
    }

    /// Ends the threads, and with them the publisher.
    pub(crate) fn abort(&self) {
        self.filling.lock().work = None;
        self.join();
    }

    fn join(&self) {
        for thread in self.threads.lock().drain(..) {
            if thread.join().is_err() {
                self.failure
                    .set(Error::io("a thread that writes packs panicked", std::io::Error::other("panic")));
            }
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    builder.spawn(body).map_err(|error| Error::io("cannot start a thread", error))
}

fn write_loop(
    storage: &dyn Storage,
    queue: &Receiver<Work>,
    give: &Sender<AlignedBuf>,
    seal: &SyncSender<Seal>,
) -> Result<()> {
    let mut current: Option<(String, Box<dyn WriteFile>)> = None;
    let result = write_all(storage, queue, give, seal, &mut current);
    if let Some((temporary, file)) = current {
        drop(file);
        crate::capture::publish::remove_temporary(storage, &temporary);
    }
    result
}

fn write_all(
    storage: &dyn Storage,
    queue: &Receiver<Work>,
    give: &Sender<AlignedBuf>,
    seal: &SyncSender<Seal>,
    current: &mut Option<(String, Box<dyn WriteFile>)>,
) -> Result<()> {
    for work in queue {
        match work {
            Work::Begin(id) => {
                let temporary = format!("tmp/{id}.pack");
                let file = storage.create(&temporary, WriteHint::Bulk).map_err(|error| {
                    Error::io("cannot create a pack", error).at(storage.describe(&temporary))
                })?;
                *current = Some((temporary, file));
            }
            Work::Piece(mut piece) => {
                let (temporary, file) = current.as_mut().expect("a pack begins before its pieces");
                file.append(piece.bytes()).map_err(|error| {
                    Error::io("cannot write a pack", error).at(storage.describe(temporary))
                })?;
                piece.clear();
                // Nobody may be waiting for it any more.
                let _ = give.send(piece);
            }
            Work::End(id, records) => {
                let (temporary, file) = current.take().expect("a pack begins before it ends");
                let pack = SealedPack { id, path: temporary, records };
                if let Err(refused) = seal.send(Seal::Pack { file, pack }) {
                    if let Seal::Pack { pack, .. } = refused.0 {
                        crate::capture::publish::remove_temporary(storage, &pack.path);
                    }
                    return Ok(());
                }
            }
            Work::Commit => {
                // A sealer that is gone has said why.
                let _ = seal.send(Seal::Commit);
            }
        }
    }
    Ok(())
}

fn seal_loop(queue: &Receiver<Seal>, mut publisher: Publisher) -> Result<()> {
    for seal in queue {
        match seal {
            Seal::Pack { mut file, pack } => {
                let synced = file.sync();
                drop(file);
                publisher.add(pack, synced)?;
            }
            Seal::Commit => publisher.commit()?,
        }
    }
    Ok(())
}
