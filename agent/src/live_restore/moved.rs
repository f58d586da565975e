//! How far the move of a machine came that a session is marked for: `move.json`.
//!
//! The mark (`handed_over` in `session.json`) stands before QEMU may write to the target past us. So it alone does not tell whether
//! the machine runs from the target, or waits on the export for another agent. This does:
//!
//! | step | what is on stable storage | a kill after it |
//! |---|---|---|
//! | 1 | `move.json`: begun, and at which monitor | the session is not marked, and goes on as ever |
//! | 2 | the mark | the machine may wait |
//! | 3 | – (QEMU moves the drive) | likewise, for all that is known; whoever asks its QEMU goes on with 4 |
//! | 4 | `move.json`: moved | the machine runs from the target |
//!
//! Nothing is moved without 1 and 2, in this order: so what an earlier move left behind never says of a machine that waits that it
//! was moved. Where the mark is taken back the file stays, and means nothing.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::advice::shell_line;
use super::record::SessionRecord;
use super::state_dir::StateDir;

pub(super) const FILE: &str = "move.json";
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Move {
    version: u32,
    session: String,
    /// QEMU's monitor.
    qmp: PathBuf,
    /// QEMU has said that the drive is on the target.
    moved: bool,
}

/// Notes that the machine is about to be moved: before the session is marked.
pub(super) fn begin(state: &StateDir, record: &SessionRecord, qmp: &Path) -> anyhow::Result<()> {
    write(state, record, qmp, false).with_context(|| format!("cannot write {}", state.file(FILE).display()))
}

/// Notes that QEMU has said that the machine runs from the target. Where that cannot be written, it is asked again.
pub(super) fn end(state: &StateDir, record: &SessionRecord, qmp: &Path) {
    if let Err(error) = write(state, record, qmp, true) {
        tracing::warn!(%error, path = %state.file(FILE).display(), "that the machine was moved cannot be noted");
    }
}

fn write(state: &StateDir, record: &SessionRecord, qmp: &Path, moved: bool) -> io::Result<()> {
    let session = record.session.clone();
    state.replace(FILE, &Move { version: VERSION, session, qmp: qmp.to_owned(), moved })?;
    File::open(state.path())?.sync_all()
}

impl StateDir {
    /// Whether the machine of a session that is marked is known to run from the target. If not, it was moved, or waits on the
    /// export.
    pub(crate) fn is_moved(&self, record: &SessionRecord) -> bool {
        record.handed_over && self.noted_move(record).is_some_and(|noted| noted.moved)
    }

    /// Whether a machine may wait on the export for an agent that ended while it was to be moved: from step 1 on, at which QEMU has the
    /// target open.
    pub(crate) fn may_be_waited_for(&self, record: &SessionRecord) -> bool {
        !self.is_moved(record) && (record.handed_over || self.noted_move(record).is_some())
    }

    /// What serves a machine again that may wait for its export, as the beginning of an advice.
    pub(crate) fn serving_again(&self, record: &SessionRecord) -> String {
        let qmp = self
            .noted_move(record)
            .map_or_else(|| "SOCKET".to_owned(), |noted| shell_line(&[noted.qmp.display().to_string()]));
        format!(
            "run the same `lifeboot live-restore …` command as before, with `--qmp {qmp}`: it asks the machine's QEMU, and serves the \
             machine again and moves it home, or says that it was moved"
        )
    }

    fn noted_move(&self, record: &SessionRecord) -> Option<Move> {
        let noted: Move = serde_json::from_slice(&std::fs::read(self.file(FILE)).ok()?).ok()?;
        (noted.version == VERSION && noted.session == record.session).then_some(noted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_restore::record::tests::record;

    #[test]
    fn a_machine_is_known_to_be_moved_once_that_is_noted_of_this_session_and_this_move() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::of(&dir.path().join("t.raw"), None).unwrap();
        state.create().unwrap();
        let marked = SessionRecord { handed_over: true, ..record() };
        assert!(!state.is_moved(&marked), "a mark alone tells nothing");
        assert!(state.may_be_waited_for(&marked) && !state.may_be_waited_for(&record()));
        assert!(state.serving_again(&marked).contains("--qmp SOCKET"));
        begin(&state, &marked, Path::new("/run/a b")).unwrap();
        assert!(!state.is_moved(&marked));
        assert!(state.may_be_waited_for(&record()), "killed before the mark");
        assert!(state.serving_again(&marked).contains("--qmp '/run/a b'"));
        end(&state, &marked, Path::new("/run/q"));
        assert!(state.is_moved(&marked) && !state.may_be_waited_for(&marked));
        assert!(!state.is_moved(&record()), "the mark was taken back");
        assert!(!state.is_moved(&SessionRecord { session: "11".repeat(16), ..marked.clone() }));
        begin(&state, &marked, Path::new("/run/q")).unwrap();
        assert!(!state.is_moved(&marked), "it is moved once more");
    }
}
