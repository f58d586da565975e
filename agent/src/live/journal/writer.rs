//! The journal on its device: made, opened, appended to, checkpointed. One caller at a time.

use block::{AlignedBuf, BlockDevice, ByteRange, Durability, ZeroMode};

use super::checkpoint::{CheckpointFlags, encode_checkpoint};
use super::format::{BlockRun, Header, PAGE, chunk_blocks, encode_record, record_len};
use super::replay::{LogEnd, order_checkpoints, replay_log};
use crate::live::bits::Bits;
use crate::live::error::{Error, ErrorKind, Result};
use crate::live::mistakes::{Mistake, makes};

/// What a device writes whole or not at all, in bytes.
const SECTOR: usize = 512;

/// The writing half of a journal. After any error it must not be used again.
#[derive(Debug)]
pub(in crate::live) struct Journal {
    header: Header,
    generation: u64,
    /// Bytes of the log that are in use.
    used: usize,
    sequence: u64,
    /// The journal says that the whole disk is home.
    complete: bool,
    /// The newest checkpoint as it was read: where it stands, and its bytes.
    unproven: Option<(u64, AlignedBuf)>,
}

/// What is to be put on stable storage.
#[derive(Clone, Copy, Debug)]
pub(in crate::live) struct Entry<'a> {
    pub(in crate::live) runs: &'a [BlockRun],
    /// The whole disk is home.
    pub(in crate::live) complete: bool,
}

/// What opening a journal found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::live) struct Replayed {
    /// The newest checkpoint was written by a session that ended in order, and nothing followed it.
    pub(in crate::live) parked: bool,
    /// The whole disk is home.
    pub(in crate::live) complete: bool,
    /// Records after the checkpoint.
    pub(in crate::live) records: u64,
    /// Records of which one copy was damaged.
    pub(in crate::live) mended: u64,
}

impl Journal {
    /// Makes a journal whose first checkpoint says `p` and `g`. It is on stable storage afterwards.
    ///
    /// The device may hold an older journal: that one is void before the new one begins.
    pub(in crate::live) async fn create(
        device: &dyn BlockDevice,
        header: Header,
        p: &Bits<'_>,
        g: &Bits<'_>,
    ) -> Result<Self> {
        check_room(device, &header)?;
        let zeroes = ByteRange::from_bounds(0, header.journal.len_bytes());
        device.write_zeroes(zeroes, ZeroMode::ALLOCATE, Durability::Volatile).await?;
        device.flush().await?;
        let page = header.encode()?;
        let mut all_but_the_first_sector = header.encode()?;
        all_but_the_first_sector[..SECTOR].fill(0);
        let mut journal =
            Self { header, generation: 0, used: 0, sequence: 0, complete: false, unproven: None };
        if makes(Mistake::HeaderFirst) {
            let page = journal.header.encode()?;
            write(device, 0, page).await?;
            device.flush().await?;
        }
        journal.checkpoint(device, false, p, g).await?;
        // A sector is never torn, so a header that begins with zeroes was not finished, and one that
        // does not is whole.
        write(device, 0, all_but_the_first_sector).await?;
        device.flush().await?;
        write(device, 0, page).await?;
        device.flush().await?;
        Ok(journal)
    }

    /// Reads whose journal it is.
    pub(in crate::live) async fn read_header(device: &dyn BlockDevice) -> Result<Header> {
        if device.geometry().size < PAGE as u64 {
            return Err(Error::new(ErrorKind::NotAJournal, "the journal is shorter than its header"));
        }
        Header::decode(&read(device, 0, PAGE).await?)
    }

    /// Opens a journal and sets in `p` and `g` what it says. Writes nothing; the caller begins with a checkpoint.
    pub(in crate::live) async fn open(
        device: &dyn BlockDevice,
        header: Header,
        p: &Bits<'_>,
        g: &Bits<'_>,
    ) -> Result<(Self, Replayed)> {
        check_room(device, &header)?;
        let layout = header.journal;
        let pages =
            [read(device, layout.slot_at(0), PAGE).await?, read(device, layout.slot_at(1), PAGE).await?];
        let log = read(device, layout.log_at(), layout.log_len()).await?;
        for (slot, checkpoint) in order_checkpoints([&pages[0], &pages[1]], header.session, layout) {
            let len = PAGE + checkpoint.body_len.next_multiple_of(PAGE);
            let newest = read(device, layout.slot_at(slot), len).await?;
            let body = &newest[PAGE..PAGE + checkpoint.body_len];
            if !checkpoint.apply(body, chunk_blocks(header.disk), p, g) {
                continue;
            }
            let LogEnd { complete, mended, records } =
                replay_log(&log, header.session, checkpoint.generation, p.len(), |run| {
                    let blocks = run.start..run.start + u64::from(run.len);
                    p.set(blocks.clone());
                    if run.guest {
                        g.set(blocks);
                    }
                })?;
            let replayed = Replayed {
                parked: checkpoint.flags.parked && records == 0,
                complete: checkpoint.flags.complete || complete,
                records,
                mended,
            };
            let journal = Self {
                header,
                generation: checkpoint.generation,
                used: layout.log_len(),
                sequence: 0,
                complete: replayed.complete,
                unproven: (!makes(Mistake::ReadTakenForStable)).then_some((layout.slot_at(slot), newest)),
            };
            return Ok((journal, replayed));
        }
        Err(Error::new(ErrorKind::Damaged, "the journal is damaged: no checkpoint of it holds"))
    }

    pub(in crate::live) const fn header(&self) -> &Header {
        &self.header
    }

    /// Puts an entry on stable storage. Where the log is full, a checkpoint of `p` and `g` makes room;
    /// `p` must not yet hold more than the journal says and the runs that `on_stable` was told of.
    pub(in crate::live) async fn append(
        &mut self,
        device: &dyn BlockDevice,
        entry: Entry<'_>,
        p: &Bits<'_>,
        g: &Bits<'_>,
        mut on_stable: impl FnMut(&[BlockRun]),
    ) -> Result<()> {
        let Entry { runs, complete } = entry;
        let most = self.header.journal.record_runs_max();
        let pieces: Vec<&[BlockRun]> = if runs.is_empty() { vec![runs] } else { runs.chunks(most).collect() };
        let last = pieces.len() - 1;
        for (index, piece) in pieces.into_iter().enumerate() {
            if self.used + 2 * record_len(piece.len()) > self.header.journal.log_len() {
                self.checkpoint(device, false, p, g).await?;
            }
            self.append_one(device, complete && index == last, piece).await?;
            if !makes(Mistake::JournalUnsynced) {
                device.flush().await?;
            }
            on_stable(piece);
        }
        Ok(())
    }

    /// Writes one record. The log must have room for it.
    async fn append_one(
        &mut self,
        device: &dyn BlockDevice,
        complete: bool,
        runs: &[BlockRun],
    ) -> Result<()> {
        let record = encode_record(self.header.session, self.generation, self.sequence, complete, runs);
        let at = self.header.journal.log_at() + self.used as u64;
        self.used += record.len();
        self.sequence += 1;
        self.complete |= complete;
        write(device, at, record).await
    }

    /// Writes a checkpoint to the older place and syncs it. The log begins anew.
    pub(in crate::live) async fn checkpoint(
        &mut self,
        device: &dyn BlockDevice,
        parked: bool,
        p: &Bits<'_>,
        g: &Bits<'_>,
    ) -> Result<()> {
        if let Some((at, newest)) = self.unproven.take() {
            // It may never have reached the disk, where its sync failed: then it is read from memory and nothing
            // would write it any more. The older place is all that the disk has, and is overwritten below.
            write(device, at, newest).await?;
            device.flush().await?;
        }
        let generation = self.generation + u64::from(!makes(Mistake::GenerationNotRaised));
        let flags = CheckpointFlags { parked, complete: self.complete };
        let Header { session, disk, journal, .. } = self.header;
        let checkpoint = encode_checkpoint(session, generation, flags, chunk_blocks(disk), p, g);
        let room = journal.slot_pages as usize * PAGE;
        assert!(checkpoint.len() <= room, "more chunks are home in part than were not whole at the start");
        let place = if makes(Mistake::CheckpointOverNewer) { 1 } else { generation % 2 };
        write(device, self.header.journal.slot_at(place), checkpoint).await?;
        if !makes(Mistake::CheckpointUnsynced) {
            device.flush().await?;
        }
        self.generation = generation;
        self.used = 0;
        self.sequence = 0;
        Ok(())
    }
}

fn check_room(device: &dyn BlockDevice, header: &Header) -> Result<()> {
    let (has, needs) = (device.geometry().size, header.journal.len_bytes());
    if has < needs {
        return Err(Error::new(
            ErrorKind::Damaged,
            format_args!("the journal has {has} bytes; for this disk it must have {needs}"),
        ));
    }
    Ok(())
}

async fn read(device: &dyn BlockDevice, offset: u64, len: usize) -> Result<AlignedBuf> {
    let (result, buf) = device.read(offset, AlignedBuf::zeroed(len)).await;
    result?;
    Ok(buf)
}

async fn write(device: &dyn BlockDevice, offset: u64, buf: AlignedBuf) -> Result<()> {
    device.write(offset, buf, Durability::Volatile).await.0?;
    Ok(())
}
