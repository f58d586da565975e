//! How a session begins: made anew, or gone on with from its journal and its live file.

use std::sync::Arc;

use block::{BLOCK_SIZE, BlockDevice};

use super::bits::{Bits, words_for, zeroed_words};
use super::error::{Error, ErrorKind, Result};
use super::fingerprint::{Evidence, check_contents};
use super::journal::{Header, Journal, JournalLayout, SessionId};
use super::live_file::LiveFile;
use super::map::BlockMap;
use super::mistakes::{Mistake, makes};
use super::parts::{Identity, Resumed, SessionParts};
use super::session::Session;
use super::source::{ChunkSource, DiskLayout};
use super::stats::Phase;

impl Session {
    /// Begins a restore: makes the journal and the first checkpoint.
    ///
    /// `target_is_zero` where the target is known to read as zeroes from its start to its end, and its own
    /// making is on stable storage: then zero chunks are home from the start. The caller holds the
    /// target's lock.
    pub async fn create(
        parts: SessionParts,
        id: SessionId,
        target_is_zero: bool,
        target: &dyn BlockDevice,
        journal: &dyn BlockDevice,
    ) -> Result<Arc<Self>> {
        let disk = parts.source.layout();
        check_target(target, disk)?;
        let map = BlockMap::new(disk, LiveFile::new(parts.live.clone(), disk));
        map.live().reset();
        if target_is_zero || makes(Mistake::ZeroAssumedOnCreate) {
            target.flush().await?;
            mark_zero_chunks(&map, &*parts.source);
        }
        let mut layout = Self::journal_layout(&*parts.source, target_is_zero);
        layout.log_pages = parts.options.log_pages.unwrap_or(layout.log_pages);
        let Identity { snapshot, target } = parts.identity.clone();
        let header = Header { session: id, disk, journal: layout, snapshot, target };
        let journal = Journal::create(journal, header, &map.p(), &map.g()).await?;
        map.live().begin(id, parts.boot, disk);
        map.recount(&map.g());
        Ok(Self::assemble(parts, map, journal, Phase::Filling))
    }

    /// The layout of a new session's journal, whose room is to be taken beforehand.
    ///
    /// Zero chunks are whole from the start where the target is known to be zero; a bit of `P` is never cleared, so only
    /// the others can ever be home in part.
    pub fn journal_layout(source: &dyn ChunkSource, target_is_zero: bool) -> JournalLayout {
        let disk = source.layout();
        let chunks = 0..disk.chunk_count();
        let partial_max = chunks.filter(|&chunk| !target_is_zero || !source.is_zero(chunk)).count();
        JournalLayout::with_partial(disk, partial_max as u64)
    }

    /// Goes on with a restore: from the live file where that may be believed, else from the journal.
    ///
    /// The caller holds the target's lock, so that nothing of a predecessor is in flight any more. On failure
    /// nothing was written, unless it is one of `Device`.
    ///
    /// # Errors
    /// `NotAJournal` where the journal does not begin as one does: its creation was cut short, or it is damaged.
    /// `Elsewhere` where the journal belongs to another session, snapshot or disk, `WrongTarget` where the
    /// target does not hold what the journal says; `Damaged` and `NewerFormat`.
    pub async fn resume(
        parts: SessionParts,
        id: SessionId,
        target: &dyn BlockDevice,
        journal: &dyn BlockDevice,
    ) -> Result<(Arc<Self>, Resumed)> {
        Self::resume_telling(parts, id, target, journal, |_| Ok(())).await
    }

    /// As [`Session::resume`]; `tell` is told how the session had ended before the live file is believed again. What
    /// follows from a loss of writes it puts on stable storage: after another crash nothing else remembers it.
    ///
    /// # Errors
    /// As there; and what `tell` says.
    pub async fn resume_telling(
        parts: SessionParts,
        id: SessionId,
        target: &dyn BlockDevice,
        journal_device: &dyn BlockDevice,
        tell: impl FnOnce(Resumed) -> block::Result<()>,
    ) -> Result<(Arc<Self>, Resumed)> {
        let disk = parts.source.layout();
        check_target(target, disk)?;
        let header = Journal::read_header(journal_device).await?;
        if !makes(Mistake::ForeignJournal) {
            check_identity(&header, id, &parts.identity, disk)?;
        }
        let map = BlockMap::new(disk, LiveFile::new(parts.live.clone(), disk));
        let guest_words = zeroed_words(words_for(map.block_count()));
        let guest = Bits::new(&guest_words, map.block_count());
        let (mut journal, replayed) = Journal::open(journal_device, header, &map.p(), &guest).await?;
        let believes_live_file = map.live().is_believable(id, parts.boot, disk);
        let is_poisoned = map.live().is_poisoned(id, parts.boot, disk);
        let resumed =
            Resumed::told_by(replayed.parked, believes_live_file, is_poisoned, parts.last_boot, parts.boot);
        if let Some(check) = &parts.check {
            // On the boot that they were set in, the live file's bits of `G` leave nothing out, poisoned or not.
            let live_guest = (believes_live_file || is_poisoned).then(|| map.g());
            let evidence = Evidence {
                home: map.p(),
                guest: std::iter::once(guest).chain(live_guest).collect(),
                is_exact: replayed.parked || live_guest.is_some(),
            };
            check_contents(&**check, &*parts.source, target, &evidence).await?;
        }
        tell(resumed)?;
        if !believes_live_file && !makes(Mistake::LiveFileNotEmptied) {
            map.live().reset();
        }
        let begins_too_soon = makes(Mistake::LiveFileBegunTooSoon);
        if !believes_live_file && begins_too_soon {
            map.live().begin(id, parts.boot, disk);
            for _ in 0..8 {
                target.read(0, block::AlignedBuf::zeroed(0)).await.0?;
            }
        }
        let (p, v, g) = (map.p(), map.v(), map.g());
        for word in 0..p.word_count() {
            let is_unflushed = resumed.is_from_journal_alone() && !makes(Mistake::UnflushedWritesForgotten);
            let unflushed_writes = if is_unflushed { p.word(word) } else { 0 };
            if !believes_live_file && !makes(Mistake::GuestForgottenOnResume) {
                g.or_word(word, guest.word(word) | unflushed_writes);
            }
            v.or_word(word, p.word(word));
            if makes(Mistake::StableFromLiveFile) {
                p.or_word(word, v.word(word));
            }
        }
        let is_whole = v.count() == v.len();
        if parts.written_past.counts(resumed, is_whole) {
            g.or(&v);
        }
        if makes(Mistake::ZeroAssumedOnResume) {
            mark_zero_chunks(&map, &*parts.source);
        }
        if !makes(Mistake::ParkedForEver) {
            journal.checkpoint(journal_device, false, &p, &g).await?;
        }
        if !believes_live_file && !begins_too_soon {
            map.live().begin(id, parts.boot, disk);
        }
        map.recount(&g);
        if makes(Mistake::ResumeForgetsUncommitted) {
            drop(map.note());
        }
        let phase = if replayed.complete && map.is_all_home() { Phase::Complete } else { Phase::Filling };
        if replayed.mended > 0 {
            tracing::warn!(
                records = replayed.mended,
                "records of the journal were damaged; their copies were used"
            );
        }
        tracing::info!(session = %id, ?resumed, records = replayed.records, home = map.home(), "resumed");
        let session = Self::assemble(parts, map, journal, phase);
        Ok((session, resumed))
    }
}

pub(super) fn check_target(target: &dyn BlockDevice, disk: DiskLayout) -> Result<()> {
    let geometry = target.geometry();
    let problem = if geometry.size < disk.size {
        format!("the target has {} bytes, the disk {}", geometry.size, disk.size)
    } else if geometry.read_only {
        "the target is read-only".to_owned()
    } else if u64::from(geometry.minimum_io) > BLOCK_SIZE {
        format!("the target's smallest write is {} bytes; at most {BLOCK_SIZE} will do", geometry.minimum_io)
    } else if !geometry.shared_flush {
        "a flush of the target covers only one of its handles".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Unsuitable, problem))
}

pub(super) fn check_identity(
    header: &Header,
    id: SessionId,
    identity: &Identity,
    disk: DiskLayout,
) -> Result<()> {
    let problem = if header.session != id {
        format!(
            "the journal here is that of session {}, begun on {}, not of {id}",
            header.session, header.target
        )
    } else if header.snapshot != identity.snapshot {
        format!("the session here restores {}, not {}", header.snapshot, identity.snapshot)
    } else if header.disk != disk {
        format!("the session here is of a disk of {} bytes, not {}", header.disk.size, disk.size)
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Elsewhere, problem))
}

/// Marks zero chunks as home, a run of them at a time: most of a large disk is zeroes.
fn mark_zero_chunks(map: &BlockMap, source: &dyn ChunkSource) {
    let count = map.disk().chunk_count();
    let end_of_run =
        |start, zero| (start..count).find(|&chunk| source.is_zero(chunk) != zero).unwrap_or(count);
    let mut end = 0;
    while end < count {
        let start = end_of_run(end, false);
        if start == count {
            return;
        }
        end = end_of_run(start, true);
        let blocks = map.blocks_of_chunks(&(start..end));
        map.p().set(blocks.clone());
        map.v().set(blocks);
    }
}
