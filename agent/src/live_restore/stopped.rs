//! What is known of a session that no agent serves.

use anyhow::Context as _;
use block::{DirectIo, Engine, FileDisk, FileOptions, OpenDevice as _};

use super::open::cannot_resume;
use super::parts::parse_id;
use super::record::SessionRecord;
use super::state_dir::{JOURNAL, StateDir};
use super::target;
use super::{advice, distrust};
use crate::cli::Failure;
use crate::live::{BootId, Resumed, SessionId, is_live_file_believable, peek};
use crate::status::{Phase, Status};

/// What to say where a session's journal cannot be used. What its guest wrote can be saved all the same, for as long as
/// the live file is to be believed.
pub(super) fn unusable_journal(state: &StateDir, what: impl std::fmt::Display) -> Failure {
    let record = state.record().ok().flatten();
    match record.filter(|record| has_believable_live_file(state, record).unwrap_or(false)) {
        Some(record) => Failure::new(
            what,
            format!(
                "save what the guest wrote, before this host is restarted: `{}`; keep a copy of the target and of {}; then {}, \
                     and a new one begins with --force",
                state.saving(&record),
                state.path().display(),
                state.giving_up()
            ),
        ),
        None => state.unusable(what),
    }
}

/// Whether the live file has all that the guest wrote.
pub(crate) fn has_believable_live_file(state: &StateDir, record: &SessionRecord) -> anyhow::Result<bool> {
    let layout = record.layout();
    let Some(live) = distrust::look_at_live(state, record)? else { return Ok(false) };
    let session = SessionId(parse_id(&record.session)?);
    Ok(is_live_file_believable(live, session, BootId::current()?, layout))
}

/// What is known of a session that no agent serves.
///
/// # Errors
/// Where its journal is missing, cannot be read, or is damaged.
pub fn stopped_status(state: &StateDir, record: &SessionRecord) -> anyhow::Result<Status> {
    let mut status = Status::at_rest(record, Phase::Stopped);
    status.target = state.target(record).to_owned();
    status.moved = state.is_moved(record);
    if !record.was_begun() {
        return Ok(status);
    }
    let path = state.file(JOURNAL);
    if !path.exists() {
        return Err(unusable_journal(state, format!("the journal {} is missing", path.display())).into());
    }
    let live = distrust::look_at_live(state, record)?;
    let boot = BootId::current().context("cannot read the kernel's boot id")?;
    let engine = Engine::THREADS;
    let options = FileOptions::new(engine).direct(DirectIo::Off).read_only(true);
    let journal = FileDisk::open(&path, options)?;
    let peeked = engine.run(async {
        let journal = journal.open()?;
        anyhow::Ok(peek(&*journal, live, boot, record.last_boot()).await)
    })?;
    let peek = peeked.map_err(|error| cannot_resume(state, error))?;
    status.home_bytes = peek.home_bytes;
    status.stable_bytes = peek.stable_bytes;
    status.guest_bytes = peek.guest_bytes;
    let ended = match peek.ended {
        // What tells of the sync stands beside the live file, which is not believed then.
        Resumed::LiveFileLost if distrust::is_lost(record) => Resumed::SyncFailed,
        ended => ended,
    };
    status.loss = advice::loss(ended).map(str::to_owned);
    if peek.complete {
        status.phase = Phase::Complete;
    } else if ended == Resumed::SyncFailed {
        status.phase = Phase::Poisoned;
    }
    status.waiting =
        trouble(state, record, peek.complete).map(|failure| match crate::cli::told(&failure.into()) {
            (what, Some(advice)) => format!("{what}: {advice}"),
            (what, None) => what,
        });
    Ok(status)
}

/// What is in the way of the session, or what is not as it says.
fn trouble(state: &StateDir, record: &SessionRecord, is_whole: bool) -> Option<Failure> {
    if record.handed_over {
        return state.check_its_target(record).err();
    }
    let trouble = target::trouble(state, record);
    let trouble = trouble.or_else(|| state.stands_beside_another(record, state.target(record)));
    // Nothing of a disk that is home needs to be written.
    trouble.or_else(|| target::unwritable(state, record).filter(|_| !is_whole))
}
