//! What is known of a session that no agent serves.

use anyhow::Context as _;
use block::{DirectIo, Engine, FileDisk, FileOptions, OpenDevice as _};

use super::distrust;
use super::open::cannot_resume;
use super::record::SessionRecord;
use super::state_dir::{JOURNAL, StateDir};
use crate::live::{BootId, peek};
use crate::status::{Phase, Status};

/// What is known of a session that no agent serves.
///
/// # Errors
/// Where its journal is missing, cannot be read, or is damaged.
pub fn stopped_status(state: &StateDir, record: &SessionRecord) -> anyhow::Result<Status> {
    let mut status = Status::at_rest(record, Phase::Stopped);
    if !record.was_begun() {
        return Ok(status);
    }
    let path = state.file(JOURNAL);
    if !path.exists() {
        return Err(state.unusable(format!("the journal {} is missing", path.display())).into());
    }
    let live = distrust::look_at_live(state, record)?;
    let boot = BootId::current().context("cannot read the kernel's boot id")?;
    let engine = Engine::THREADS;
    let options = FileOptions::new(engine).direct(DirectIo::Off).read_only(true);
    let journal = FileDisk::open(&path, options)?;
    let peeked = engine.run(async {
        let journal = journal.open()?;
        anyhow::Ok(peek(&*journal, live, boot).await)
    })?;
    let peek = peeked.map_err(|error| cannot_resume(state, error))?;
    status.home_bytes = peek.home_bytes;
    status.guest_bytes = peek.guest_bytes;
    if peek.complete {
        status.phase = Phase::Complete;
    }
    Ok(status)
}
