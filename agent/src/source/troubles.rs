//! What a repository's failures mean, and which of them are remembered for a while.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use repository::{PackId, Repository};

use crate::live::SourceErrorKind;

/// So long the copies are asked first after the repository was out of reach, or a pack was not there.
const PASSED_OVER: Duration = Duration::from_secs(5);
/// Packs that are remembered as not being there; of more, the oldest are asked for again.
const PACKS_REMEMBERED: usize = 4096;

/// What a failure of this repository means.
pub(super) fn kind_of(repository: &Repository, error: &repository::Error) -> SourceErrorKind {
    if error.is_transient() || error.kind() == repository::ErrorKind::NotPermitted {
        SourceErrorKind::Unavailable
    } else if !error.is_missing() {
        SourceErrorKind::Damaged
    } else if repository.is_reachable() {
        SourceErrorKind::Missing
    } else {
        SourceErrorKind::Unavailable
    }
}

/// What the repository could not give lately. Kept only where there are copies.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    away: Option<Instant>,
    packs: HashMap<PackId, Instant>,
}

impl Troubles {
    pub(super) fn note(&mut self, now: Instant, pack: PackId, kind: SourceErrorKind) {
        if kind == SourceErrorKind::Unavailable {
            self.away = Some(now);
        } else {
            if self.packs.len() >= PACKS_REMEMBERED {
                self.packs.clear();
            }
            self.packs.insert(pack, now);
        }
    }

    pub(super) fn is_away(&self, now: Instant) -> bool {
        self.away.is_some_and(|since| now.duration_since(since) < PASSED_OVER)
    }

    pub(super) fn lacks(&self, now: Instant, pack: PackId) -> bool {
        self.packs.get(&pack).is_some_and(|since| now.duration_since(*since) < PASSED_OVER)
    }
}
