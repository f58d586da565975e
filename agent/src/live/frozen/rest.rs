//! A view of a session that no agent serves: what a resumed session would find, with nothing changed for it.
//!
//! | what is there | blocks that are home | what the guest wrote |
//! |---|---|---|
//! | a journal, and a live file to believe | the live file's | the live file's and the journal's |
//! | a journal that says parked | the journal's | the journal's |
//! | a journal alone (the host went down, a sync failed, the live file was lost) | the journal's | all that is home: an unflushed write to it may have reached the target |
//! | a live file to believe, and a journal that cannot be used | the live file's | the live file's |
//!
//! The caller holds the target's lock, as for a resumption, and the target is checked in the same way.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::BlockDevice;

use super::copies::Copies;
use super::reader::Backup;
use super::set::FrozenSet;
use super::{Frozen, FrozenOptions, FrozenReader, Holds, View};
use crate::live::begin::check_identity;
use crate::live::bits::{Bits, words_for, zeroed_words};
use crate::live::clock::Clock;
use crate::live::error::{Error, ErrorKind, Result};
use crate::live::fingerprint::{Evidence, check_contents};
use crate::live::journal::{Journal, SessionId};
use crate::live::live_file::{BootId, LiveFile, LiveWords};
use crate::live::parts::{ChunkCheck, Identity, Resumed, WrittenPast};
use crate::live::source::ChunkSource;

/// What a session at rest is made of.
pub struct RestParts {
    /// What is restored, and to where.
    pub identity: Identity,
    /// The session's name.
    pub session: SessionId,
    /// Where absent chunks come from.
    pub source: Arc<dyn ChunkSource>,
    /// By what the reader waits.
    pub clock: Arc<dyn Clock>,
    /// How long a source that is out of reach is waited for.
    pub source_timeout: Duration,
    /// The live file's words, where there is one of the right size.
    pub live: Option<LiveWords>,
    /// The running kernel.
    pub boot: BootId,
    /// The kernel that the session's last agent served under, where that is known.
    pub last_boot: Option<BootId>,
    /// By what the target is checked; without it nothing is checked.
    pub check: Option<Arc<dyn ChunkCheck>>,
    /// As in [`crate::live::SessionParts`].
    pub written_past: WrittenPast,
}

/// A session at rest, frozen as it is.
pub struct AtRest {
    frozen: Frozen,
    backup: Arc<Backup>,
    ended: Resumed,
    is_whole: bool,
    counts_as_written: bool,
    journal_is_lost: bool,
}

impl AtRest {
    /// Looks at a session that no agent serves, and changes nothing. `journal` is its journal, where there is one.
    ///
    /// # Errors
    /// As for [`crate::live::Session::resume`].
    pub async fn open(
        parts: RestParts,
        target: &dyn BlockDevice,
        journal: Option<&dyn BlockDevice>,
    ) -> Result<Self> {
        let disk = parts.source.layout();
        let blocks = disk.size.div_ceil(block::BLOCK_SIZE);
        let (home_words, guest_words) = (zeroed_words(words_for(blocks)), zeroed_words(words_for(blocks)));
        let (home, guest) = (Bits::new(&home_words, blocks), Bits::new(&guest_words, blocks));
        let live = parts.live.filter(|live| live.words().len() == LiveWords::count_for(disk));
        let live = live.map(|words| LiveFile::new(words, disk));
        let believed = live.as_ref().filter(|live| live.is_believable(parts.session, parts.boot, disk));
        let is_poisoned = live.as_ref().is_some_and(|live| live.is_poisoned(parts.session, parts.boot, disk));
        let opened = async {
            let missing = || Error::new(ErrorKind::Damaged, "the journal is missing");
            let journal = journal.ok_or_else(missing)?;
            let header = Journal::read_header(journal).await?;
            check_identity(&header, parts.session, &parts.identity, disk)?;
            Journal::open(journal, header, &home, &guest).await
        };
        let replayed = match opened.await {
            Ok((_, replayed)) => Some(replayed),
            Err(error) if believed.is_some() => {
                tracing::warn!(%error, "the journal cannot be used; the live file of this boot says all that it would");
                home.clear_all();
                guest.clear_all();
                None
            }
            Err(error) => return Err(error),
        };
        let is_parked = replayed.is_some_and(|replayed| replayed.parked);
        let ended = Resumed::told_by(is_parked, believed.is_some(), is_poisoned, parts.last_boot, parts.boot);
        if let (Some(check), Some(_)) = (&parts.check, replayed) {
            let live_guest = live.as_ref().filter(|_| believed.is_some() || is_poisoned).map(LiveFile::g);
            let evidence = Evidence {
                home,
                guest: std::iter::once(guest).chain(live_guest).collect(),
                is_exact: is_parked || live_guest.is_some(),
            };
            check_contents(&**check, &*parts.source, target, &evidence).await?;
        }
        for word in 0..home.word_count() {
            if let Some(live) = believed {
                home.or_word(word, live.v().word(word));
                guest.or_word(word, live.g().word(word));
            }
            if believed.is_none() && ended.is_from_journal_alone() {
                guest.or_word(word, home.word(word));
            }
        }
        let is_whole = home.count() == blocks;
        let counts_as_written = parts.written_past.counts(ended, is_whole);
        if counts_as_written {
            guest.or(&home);
        }
        let set = FrozenSet::new(disk, &home, &guest);
        let nothing_is_copied = FrozenOptions { memory_bytes: 0, spill: None };
        let view = View {
            set,
            holds: Holds::new(),
            copies: Copies::new(nothing_is_copied),
            failure: parking_lot::Mutex::new(None),
        };
        let backup = Backup { source: parts.source, clock: parts.clock, timeout: parts.source_timeout };
        Ok(Self {
            frozen: Frozen { view: Arc::new(view), session: None },
            backup: Arc::new(backup),
            ended,
            is_whole,
            counts_as_written,
            journal_is_lost: replayed.is_none(),
        })
    }

    /// The view.
    #[must_use]
    pub const fn frozen(&self) -> &Frozen {
        &self.frozen
    }

    /// How the session had ended.
    #[must_use]
    pub const fn ended(&self) -> Resumed {
        self.ended
    }

    /// Whether the whole disk is home.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Whether all that is home counts as written by the guest: somebody may have written to the target past the session.
    #[must_use]
    pub const fn counts_as_written(&self) -> bool {
        self.counts_as_written
    }

    /// Whether the journal could not be used, and the live file told all.
    #[must_use]
    pub const fn journal_is_lost(&self) -> bool {
        self.journal_is_lost
    }

    /// What reads it on the calling thread, over that thread's handle of the target.
    #[must_use]
    pub fn reader(&self, target: Rc<dyn BlockDevice>) -> FrozenReader {
        FrozenReader::rest(Arc::clone(&self.frozen.view), target, Arc::clone(&self.backup))
    }
}

impl std::fmt::Debug for AtRest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AtRest")
            .field("frozen", &self.frozen)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}
