//! The damage that outlives an agent: `damaged.json` in the session's directory.
//!
//! `lifeboot status` must not forget what could not be brought home because the agent that found it has ended.
//!
//! | when | what is done |
//! |---|---|
//! | an agent starts | what is kept is recalled: damaged, until it was asked for once more |
//! | the damage has changed, at most once a second; the agent ends | it is kept: temporary name, sync, rename |
//! | nothing is damaged any more | the file is removed |
//!
//! It is a report and nothing else: no byte is served or left out because of it, so one that cannot be read is passed over.

use std::io;

use serde::{Deserialize, Serialize};

use super::record::SessionRecord;
use super::state_dir::StateDir;
use crate::live::Session;
use crate::status::{DamagedRange, Status};

pub(super) const FILE: &str = "damaged.json";
const VERSION: u32 = 1;

/// What could not be brought home.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptDamage {
    version: u32,
    /// Whose damage it is.
    session: String,
    /// How much it is in all, in bytes.
    pub damaged_bytes: u64,
    /// Where, and why; of very many ranges the first.
    pub damaged: Vec<DamagedRange>,
}

/// What the last agent of a session could not bring home; nothing where none was kept.
#[must_use]
pub fn kept_damage(state: &StateDir, record: &SessionRecord) -> KeptDamage {
    let path = state.file(FILE);
    let kept: KeptDamage = match std::fs::read(&path).map(|text| serde_json::from_slice(&text)) {
        Ok(Ok(kept)) => kept,
        Ok(Err(error)) => {
            tracing::warn!(path = %path.display(), %error, "the record of what is damaged cannot be understood");
            return KeptDamage::default();
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return KeptDamage::default();
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the record of what is damaged cannot be read");
            return KeptDamage::default();
        }
    };
    if kept.version == VERSION && kept.session == record.session { kept } else { KeptDamage::default() }
}

/// Has a session know what its last agent could not bring home.
pub(super) fn recall(session: &Session, state: &StateDir, record: &SessionRecord) {
    let chunk_size = u64::from(record.chunk_size);
    for range in kept_damage(state, record).damaged {
        let end = range.offset.saturating_add(range.len).min(record.size);
        session.recall_damage(range.offset / chunk_size..end.div_ceil(chunk_size), &range.reason);
    }
}

/// Keeps the damage of a running session.
#[derive(Debug)]
pub(super) struct DamageKeeper<'a> {
    state: &'a StateDir,
    /// What the file holds, as far as that is known.
    kept: Option<KeptDamage>,
    /// The latest attempt failed, and that was said.
    failed: bool,
}

impl<'a> DamageKeeper<'a> {
    /// Nothing is known of what is kept in `state`.
    pub(super) const fn new(state: &'a StateDir) -> Self {
        Self { state, kept: None, failed: false }
    }

    /// Keeps the damage that `status` tells of, where it has changed.
    pub(super) fn keep(&mut self, status: &Status) {
        let damage = KeptDamage {
            version: VERSION,
            session: status.session.clone(),
            damaged_bytes: status.damaged_bytes,
            damaged: status.damaged.clone(),
        };
        if self.kept.as_ref() == Some(&damage) {
            return;
        }
        let result = if status.is_damaged() { self.state.replace(FILE, &damage) } else { self.remove() };
        match result {
            Ok(()) => (self.kept, self.failed) = (Some(damage), false),
            Err(error) => {
                if !self.failed {
                    let path = self.state.file(FILE);
                    tracing::warn!(path = %path.display(), %error, "what is damaged cannot be kept for later");
                }
                self.failed = true;
            }
        }
    }

    fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(self.state.file(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_restore::record::tests::record;
    use crate::status::Phase;

    fn session(dir: &std::path::Path) -> (StateDir, SessionRecord) {
        let state = StateDir::of(&dir.join("t.raw"), None).unwrap();
        state.create().unwrap();
        let record = SessionRecord { boot: None, ..record() };
        (state, record)
    }

    fn status(record: &SessionRecord, damaged: &[DamagedRange]) -> Status {
        let mut status = Status::at_rest(record, Phase::Stopped);
        status.damaged_bytes = damaged.iter().map(|range| range.len).sum();
        status.damaged = damaged.to_vec();
        status
    }

    #[test]
    fn damage_is_kept_until_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (state, record) = session(dir.path());
        let ranges = [DamagedRange { offset: 1 << 20, len: 1 << 17, reason: "its pack is gone".into() }];
        let mut keeper = DamageKeeper::new(&state);
        keeper.keep(&status(&record, &ranges));
        let kept = kept_damage(&state, &record);
        assert_eq!((kept.damaged_bytes, kept.damaged.as_slice()), (1 << 17, ranges.as_slice()));
        keeper.keep(&status(&record, &[]));
        assert_eq!(kept_damage(&state, &record), KeptDamage::default());
        assert!(!state.file(FILE).exists());
    }

    #[test]
    fn what_could_not_be_kept_is_kept_the_next_time() {
        let dir = tempfile::tempdir().unwrap();
        let (state, record) = session(dir.path());
        let ranges = [DamagedRange { offset: 0, len: 1 << 17, reason: "its CRC".into() }];
        let mut keeper = DamageKeeper::new(&state);
        std::fs::remove_dir(state.path()).unwrap();
        keeper.keep(&status(&record, &ranges));
        state.create().unwrap();
        keeper.keep(&status(&record, &ranges));
        assert_eq!(kept_damage(&state, &record).damaged, ranges);
    }

    #[test]
    fn the_damage_of_another_session_and_what_is_no_record_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let (state, mut record) = session(dir.path());
        let ranges = [DamagedRange { offset: 0, len: 1 << 17, reason: "its CRC".into() }];
        DamageKeeper::new(&state).keep(&status(&record, &ranges));
        record.session = "cd".repeat(16);
        assert_eq!(kept_damage(&state, &record), KeptDamage::default());
        std::fs::write(state.file(FILE), "{").unwrap();
        assert_eq!(kept_damage(&state, &record), KeptDamage::default());
    }
}
