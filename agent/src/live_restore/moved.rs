//! How far the move of a machine came that a session is marked for: `move.json`.
//!
//! The mark (`handed_over` in `session.json`) stands before QEMU may write to the target past us. So it alone does not tell whether
//! the machine runs from the target, or waits on the export for another agent. This does:
//!
//! | step | what is on stable storage | a kill after it |
//! |---|---|---|
//! | 1 | `move.json`: begun, at which monitor, from which export, and by which start | the session is not marked, and goes on as ever; the machine may wait |
//! | 2 | – (QEMU opens the target) | likewise |
//! | 3 | the mark | the machine may wait |
//! | 4 | – (QEMU moves the drive) | likewise, for all that is known; whoever asks its QEMU goes on with 5 |
//! | 5 | `move.json`: moved | the machine runs from the target |
//!
//! Nothing is moved without 1 and 3, in this order: so what an earlier move left behind never says of a machine that waits that it
//! was moved. Where the mark is taken back, the file goes after it; where it cannot be set, or QEMU cannot use the target, once QEMU
//! does not have that open. After a kill between 1 and 3 it stays, and means nothing any more once another start has counted
//! itself: what that one leaves is as good as what any start leaves.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nbd_server::ListenAddress;
use serde::{Deserialize, Serialize};

use super::advice::shell_line;
use super::record::SessionRecord;
use super::state_dir::StateDir;
use crate::cli::Failure;
use crate::in_use;

pub(super) const FILE: &str = "move.json";
const VERSION: u32 = 3;
/// It had not where the disk is served.
const WITHOUT_ADDRESSES: u32 = 2;

/// Where a disk is served.
pub(super) struct Served<'a> {
    pub(super) addresses: &'a [ListenAddress],
    /// Whether the empty name means its export there.
    pub(super) is_default: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Move {
    version: u32,
    session: String,
    /// The start of the session that moves it, by its number.
    starts: u64,
    /// QEMU's monitor.
    qmp: PathBuf,
    /// Where the disk is served: the machine's QEMU is on the export there, or was.
    #[serde(default)]
    addresses: Vec<String>,
    /// Whether the empty name means its export there.
    #[serde(default)]
    is_default: bool,
    /// QEMU has said that the drive is on the target.
    moved: bool,
}

/// Notes that the machine is about to be moved off the export of `served`: before QEMU opens the target.
pub(super) fn begin(
    state: &StateDir,
    record: &SessionRecord,
    qmp: &Path,
    served: &Served<'_>,
) -> anyhow::Result<()> {
    let addresses = served.addresses.iter().map(ListenAddress::to_string).collect();
    let begun = Move { addresses, is_default: served.is_default, moved: false, ..Move::of(record, qmp) };
    write(state, &begun).with_context(|| format!("cannot write {}", state.file(FILE).display()))
}

/// Notes that QEMU has said that the machine runs from the target. Where that cannot be written, it is asked again.
pub(super) fn end(state: &StateDir, record: &SessionRecord, qmp: &Path) {
    let begun = state.noted_move(record).unwrap_or_default();
    let ended = Move {
        addresses: begun.addresses,
        is_default: begun.is_default,
        moved: true,
        ..Move::of(record, qmp)
    };
    if let Err(error) = write(state, &ended) {
        tracing::warn!(%error, path = %state.file(FILE).display(), "that the machine was moved cannot be noted");
    }
}

/// Forgets a move that came to nothing: there is no mark.
pub(super) fn forget(state: &StateDir) {
    // Until it is gone the machine is taken for one that may wait.
    if let Err(error) = std::fs::remove_file(state.file(FILE)).or_else(not_found) {
        tracing::warn!(%error, path = %state.file(FILE).display(), "it stays, and cannot be removed");
    }
}

fn not_found(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

impl Move {
    fn of(record: &SessionRecord, qmp: &Path) -> Self {
        let (session, starts) = (record.session.clone(), record.starts);
        Self { version: VERSION, session, starts, qmp: qmp.to_owned(), ..Self::default() }
    }
}

fn write(state: &StateDir, noted: &Move) -> io::Result<()> {
    state.replace(FILE, noted)?;
    File::open(state.path())?.sync_all()
}

impl StateDir {
    /// Whether the machine of a session that is marked is known to run from the target. If not, it was moved, or waits on the
    /// export.
    pub(crate) fn is_moved(&self, record: &SessionRecord) -> bool {
        record.handed_over && self.noted_move(record).is_some_and(|noted| noted.moved)
    }

    /// Whether a machine may wait on the export for an agent that ended while it was to be moved: from step 1 on, after which QEMU
    /// opens the target.
    fn may_be_waited_for(&self, record: &SessionRecord) -> bool {
        let was_begun = || self.noted_move(record).is_some_and(|noted| noted.starts == record.starts);
        !self.is_moved(record) && (record.handed_over || was_begun())
    }

    /// Fails where a machine may wait for an agent that ended while it was to be moved. QEMU opens the target when a move was
    /// begun, and has closed it when that is forgotten: where nobody has it open, that machine has ended. `then` says what can be
    /// done when none waits any more.
    pub(crate) fn check_nobody_waits(
        &self,
        record: &SessionRecord,
        target: &Path,
        then: &str,
    ) -> anyhow::Result<()> {
        let Some(opener) = in_use::opener(target).filter(|_| self.may_be_waited_for(record)) else {
            return Ok(());
        };
        Err(Failure::new(
            format!(
                "a machine was about to be moved onto {} when the agent ended, and may still wait on its export: {opener} has the \
                 target open",
                target.display()
            ),
            format!("{}; {then} then, or when the machine has ended", self.serving_again(record)),
        )
        .into())
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

    /// Where the disk was served when its machine was moved off it; nowhere where that is not noted.
    pub(super) fn left_export(&self, record: &SessionRecord) -> (Vec<ListenAddress>, bool) {
        let noted = self.noted_move(record).unwrap_or_default();
        (noted.addresses.iter().filter_map(|address| address.parse().ok()).collect(), noted.is_default)
    }

    fn noted_move(&self, record: &SessionRecord) -> Option<Move> {
        let noted: Move = serde_json::from_slice(&std::fs::read(self.file(FILE)).ok()?).ok()?;
        let is_known = matches!(noted.version, WITHOUT_ADDRESSES | VERSION);
        (is_known && noted.session == record.session).then_some(noted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_restore::record::tests::record;

    const NOWHERE: Served<'_> = Served { addresses: &[], is_default: false };

    #[test]
    fn the_export_that_a_machine_was_moved_off_is_known_after_the_move_too() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::of(&dir.path().join("t.raw"), None).unwrap();
        state.create().unwrap();
        let marked = SessionRecord { handed_over: true, ..record() };
        assert_eq!(state.left_export(&marked), (Vec::new(), false));
        let addresses =
            [ListenAddress::Unix("/run/a b".into()), ListenAddress::Tcp { host: "::1".into(), port: 7 }];
        let served = Served { addresses: &addresses, is_default: true };
        begin(&state, &marked, Path::new("/run/q"), &served).unwrap();
        assert_eq!(state.left_export(&marked), (addresses.to_vec(), true));
        end(&state, &marked, Path::new("/run/q"));
        assert_eq!(state.left_export(&marked), (addresses.to_vec(), true));
        // As it was before that was noted.
        let mut noted: serde_json::Value =
            serde_json::from_slice(&std::fs::read(state.file(FILE)).unwrap()).unwrap();
        noted.as_object_mut().unwrap().retain(|name, _| name != "addresses" && name != "is_default");
        noted["version"] = WITHOUT_ADDRESSES.into();
        std::fs::write(state.file(FILE), noted.to_string()).unwrap();
        assert!(state.is_moved(&marked));
        assert_eq!(state.left_export(&marked), (Vec::new(), false));
    }

    #[test]
    fn a_machine_is_known_to_be_moved_once_that_is_noted_of_this_session_and_this_move() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::of(&dir.path().join("t.raw"), None).unwrap();
        state.create().unwrap();
        let marked = SessionRecord { handed_over: true, ..record() };
        assert!(!state.is_moved(&marked), "a mark alone tells nothing");
        assert!(state.may_be_waited_for(&marked) && !state.may_be_waited_for(&record()));
        assert!(state.serving_again(&marked).contains("--qmp SOCKET"));
        begin(&state, &marked, Path::new("/run/a b"), &NOWHERE).unwrap();
        assert!(!state.is_moved(&marked));
        assert!(state.may_be_waited_for(&record()), "killed before the mark");
        let gone_on_with = SessionRecord { starts: record().starts + 1, ..record() };
        assert!(
            !state.may_be_waited_for(&gone_on_with),
            "what a later start leaves is as good as what any leaves"
        );
        assert!(state.may_be_waited_for(&SessionRecord { handed_over: true, ..gone_on_with }));
        assert!(state.serving_again(&marked).contains("--qmp '/run/a b'"));
        end(&state, &marked, Path::new("/run/q"));
        assert!(state.is_moved(&marked) && !state.may_be_waited_for(&marked));
        assert!(!state.is_moved(&record()), "the mark was taken back");
        assert!(!state.is_moved(&SessionRecord { session: "11".repeat(16), ..marked.clone() }));
        begin(&state, &marked, Path::new("/run/q"), &NOWHERE).unwrap();
        assert!(!state.is_moved(&marked), "it is moved once more");
        forget(&state);
        assert!(!state.may_be_waited_for(&record()), "the mark was taken back");
        forget(&state);
    }
}
