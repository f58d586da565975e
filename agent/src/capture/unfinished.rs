//! The target of a live-restore is no disk before all of it is home: where the guest neither read nor wrote, it has holes.

use std::path::Path;

use anyhow::Context as _;

use crate::cli::Failure;
use crate::live_restore::{self, StateDir};
use crate::status::Phase;

/// Refuses a source that a live-restore has not filled yet. Only sessions at the usual place are found, not those
/// kept with `--state`.
///
/// # Errors
/// Where there is such a session, or one of which it is not known whether it is complete.
pub(super) fn refuse(source: &Path) -> anyhow::Result<()> {
    let state = StateDir::of(source, None)?;
    let unknown = || {
        format!(
            "it is not known whether the live-restore in {} has filled the source {}",
            state.path().display(),
            source.display()
        )
    };
    let Some(record) = state.record().with_context(unknown)? else { return Ok(()) };
    let status = match live_restore::ask_status(state.path()).with_context(unknown)? {
        Some(status) => status,
        None => live_restore::stopped_status(&state, &record).with_context(unknown)?,
    };
    let how = match status.phase {
        Phase::Complete => return Ok(()),
        Phase::Running => "",
        Phase::Stopped | Phase::Poisoned => "run its live-restore again, and ",
    };
    Err(Failure::new(
        format_args!(
            "the source {} is the target of a live-restore that is not complete: session {} ({}) has brought {:.1} % of \
             {}/{} home",
            source.display(),
            status.session,
            state.path().display(),
            status.percent(),
            status.snapshot,
            status.disk,
        ),
        format_args!(
            "{how}wait until `lifeboot status {}` says that it is complete; what it restores is kept as {} already, but for \
             what the guest wrote since",
            source.display(),
            status.snapshot,
        ),
    )
    .into())
}
