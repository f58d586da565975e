//! What is said of a discard when it is done.

use std::path::Path;

use serde::Serialize;

use crate::cli::Outcome;
use crate::output::Output;

/// Whose the target is once a session was discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner<'a> {
    /// Nobody's: it was this session's, or there was none.
    Nobody,
    /// It never was this session's.
    Another,
    /// That of the session in this directory, of which a copy was discarded.
    Original(&'a Path),
}

/// What was done.
#[derive(Serialize)]
pub(super) struct Report<'a> {
    /// Whether there was a session.
    pub(super) discarded: bool,
    pub(super) session: Option<&'a str>,
    pub(super) snapshot: Option<&'a str>,
    pub(super) target: &'a Path,
    pub(super) target_removed: bool,
    /// Bytes that the guest wrote.
    pub(super) guest_bytes: Option<u64>,
    /// Bytes that were on the target.
    pub(super) home_bytes: Option<u64>,
    pub(super) size_bytes: Option<u64>,
    pub(super) complete: bool,
}

impl<'a> Report<'a> {
    /// Where no session is known, and nothing was done.
    pub(super) const fn of_nothing(target: &'a Path) -> Self {
        Self {
            discarded: false,
            session: None,
            snapshot: None,
            target,
            target_removed: false,
            guest_bytes: None,
            home_bytes: None,
            size_bytes: None,
            complete: false,
        }
    }

    /// Says what was done, and what the target is now.
    pub(super) fn tell(&self, output: &Output, owner: Owner<'_>) -> anyhow::Result<Outcome> {
        let what =
            if self.discarded { "the session is discarded" } else { "what was left of a session is removed" };
        let target = self.target.display();
        let became = if self.target_removed {
            format!("{target} is removed")
        } else if !self.target.exists() {
            format!("{target} does not exist")
        } else if owner == Owner::Another {
            format!("{target} stays untouched: it is not this session's target")
        } else if let Owner::Original(dir) = owner {
            format!("{target} stays as it is, with its session in {}", dir.display())
        } else if self.complete {
            format!("{target} stays: it is the whole disk")
        } else {
            format!(
                "{target} stays as it is: only part of a disk, of no use without its session but to look for data in"
            )
        };
        let told = output.document(self).and_then(|()| output.line(format_args!("{what}; {became}")));
        Outcome::Done.once_told(told, what, became)
    }
}
