//! How far a session is that no agent serves: read from its journal and live file, changing neither.

use block::{BLOCK_SIZE, BlockDevice};

use super::Identity;
use super::begin::check_identity;
use super::bits::{Bits, words_for, zeroed_words};
use super::error::Result;
use super::journal::Journal;
use super::journal::SessionId;
use super::live_file::{BootId, LiveFile, LiveWords};
use super::parts::Resumed;
use super::source::DiskLayout;

/// What is known of a session at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// Bytes that a resumed session will find home.
    pub home_bytes: u64,
    /// Those among them that the journal has: they are on stable storage.
    pub stable_bytes: u64,
    /// Bytes among them that the guest wrote.
    pub guest_bytes: u64,
    /// Whether the whole disk is home, on stable storage.
    pub complete: bool,
    /// How it had ended.
    pub ended: Resumed,
}

/// Whether the live file has everything that the guest of this session was told was written.
#[must_use]
pub fn is_live_file_believable(live: LiveWords, session: SessionId, boot: BootId, disk: DiskLayout) -> bool {
    live.words().len() == LiveWords::count_for(disk)
        && LiveFile::new(live, disk).is_believable(session, boot, disk)
}

/// Looks only at how a session's journal begins: that never changes, and may be read while an agent writes behind it.
///
/// # Errors
/// As for [`super::Session::resume`]: where it does not begin as one does, or is another session's.
pub async fn check_header(
    journal: &dyn BlockDevice,
    id: SessionId,
    identity: &Identity,
    disk: DiskLayout,
) -> Result<()> {
    let header = Journal::read_header(journal).await?;
    check_identity(&header, id, identity, disk)
}

/// Looks at a session that no agent serves. `live` is its live file, where there is one; `last_boot` the boot that it was served under.
///
/// # Errors
/// As for [`super::Session::resume`].
pub async fn peek(
    journal: &dyn BlockDevice,
    live: Option<LiveWords>,
    boot: BootId,
    last_boot: Option<BootId>,
) -> Result<Peek> {
    let header = Journal::read_header(journal).await?;
    let (session, disk) = (header.session, header.disk);
    let block_count = disk.size.div_ceil(BLOCK_SIZE);
    let (home, guest) = (zeroed_words(words_for(block_count)), zeroed_words(words_for(block_count)));
    let (home, guest) = (Bits::new(&home, block_count), Bits::new(&guest, block_count));
    let (_, replayed) = Journal::open(journal, header, &home, &guest).await?;
    let bytes = |bits: &Bits<'_>| (bits.count() * BLOCK_SIZE).min(disk.size);
    let stable_bytes = bytes(&home);
    let live = live.filter(|live| live.words().len() == LiveWords::count_for(disk));
    let live = live.map(|words| LiveFile::new(words, disk));
    let believed = live.as_ref().filter(|live| live.is_believable(session, boot, disk));
    let is_poisoned = live.as_ref().is_some_and(|live| live.is_poisoned(session, boot, disk));
    let peek = |home: &Bits<'_>, guest: &Bits<'_>| Peek {
        home_bytes: bytes(home),
        stable_bytes,
        guest_bytes: bytes(guest),
        complete: replayed.complete,
        ended: Resumed::told_by(replayed.parked, believed.is_some(), is_poisoned, last_boot, boot),
    };
    Ok(believed.map_or_else(|| peek(&home, &guest), |live| peek(&live.v(), &live.g())))
}
