//! What to say of a session whose machine was moved onto its target, or was about to be: the target is, or may be, the machine's own
//! disk, and nobody else's.

use std::path::Path;

use super::identity::TargetIdentity;
use super::record::SessionRecord;
use super::state_dir::StateDir;
use crate::cli::Failure;
use crate::in_use;
use crate::pivot::QmpError;

impl StateDir {
    /// Fails where another target stands than the one that the machine of this session was moved onto, or was about to be: what is true of
    /// that one is not true of this.
    ///
    /// # Errors
    /// A [`Failure`]; the same where the target is gone or cannot be looked at.
    pub(crate) fn check_its_target(&self, record: &SessionRecord) -> Result<(), Failure> {
        let target = self.target(record);
        let path = target.display();
        let stands = match TargetIdentity::at(target) {
            Ok(Some(there)) if there.is_same(&record.identity) => return Ok(()),
            Ok(Some(_)) => format!("{path} is another one"),
            Ok(None) => format!("nothing stands at {path} any more"),
            Err(error) => {
                return Err(Failure::new(
                    format!("cannot look at the target {path}"),
                    "its session was handed over to a machine: let lifeboot look at it, then run the same command again",
                )
                .because(error));
            }
        };
        let (dir, its) = (self.path().display(), &record.target);
        let or_not = if self.is_moved(record) { "" } else { ", or was about to be when the agent ended" };
        let what = format!(
            "a running machine was moved onto the target of the session in {dir} ({}){or_not}; {stands}",
            record.identity
        );
        let discard = self.command("discard", target);
        let is_there = its != target && record.identity.is_at(its) == Some(true);
        Err(if is_there {
            Failure::new(what, format!("name {}, which is that target", its.display()))
        } else if self.is_moved(record) {
            Failure::new(
                what,
                format!(
                    "start the machine from the file from which it runs, whatever that is called now (`ls -l /proc/PID/fd`, of its QEMU, \
                     shows it), not from {path}; `{discard}` removes the session"
                ),
            )
        } else {
            Failure::new(
                what,
                format!(
                    "put that target back at {path}, and run the same command again; give live-restore --moved where it was moved as a \
                     whole, together with its session"
                ),
            )
        })
    }
}

/// That a session which is marked as handed over cannot be saved: its target is, or may be, the machine's own disk.
pub(crate) fn no_session_any_more(state: &StateDir, record: &SessionRecord, target: &Path) -> Failure {
    if let Err(strayed) = state.check_its_target(record) {
        return strayed;
    }
    let path = target.display();
    if state.is_moved(record) {
        return Failure::new(
            format!("a running machine was moved onto {path}: it is a disk of its own now, not a session's"),
            format!("`lifeboot capture GROUP {path}` takes a snapshot of it"),
        );
    }
    Failure::new(
        format!(
            "a running machine was moved onto {path}, or was about to be when the agent ended: what it writes there the session does \
             not know"
        ),
        format!(
            "`lifeboot capture GROUP {path}` takes a snapshot of that disk; should the machine hang, {}",
            state.serving_again(record)
        ),
    )
}

/// That a machine runs from its target, and its QEMU does not say how.
pub(super) fn silent(state: &StateDir, record: &SessionRecord, error: QmpError) -> Failure {
    let path = state.target(record);
    let (target, discard) = (path.display(), state.command("discard", path));
    Failure::new(
        format!("a running machine was moved onto {target}, and runs from it itself; its QEMU's monitor is busy"),
        format!(
            "there is nothing left to restore of this disk: let the machine run, and start it from {target} from now on; `{discard}` \
             removes the session and leaves the disk; should the machine hang, as another disk of it waits for an agent that ended, name \
             all its disks: {} (for a machine of `lifeboot boot` the same boot command tells it whole)",
            state.serving_again(record)
        ),
    )
    .because(error)
}

/// That the QEMU of a machine which may run from its target cannot be asked.
pub(super) fn cannot_be_asked(state: &StateDir, record: &SessionRecord, error: QmpError) -> Failure {
    let target = state.target(record);
    let is_locked = in_use::is_locked(target);
    if !is_locked && state.is_moved(record) {
        return is_over(state, record, "the QEMU that was named cannot be asked").because(error);
    }
    let target = target.display();
    Failure::new(
        if is_locked {
            format!("a machine runs from {target} itself, and the QEMU that was named cannot be asked")
        } else {
            format!("the machine was moved onto {target}, or was about to be, and its QEMU cannot be asked which")
        },
        format!("if its QEMU has ended, start it from {target}, which holds the whole disk; if it runs, name its QMP socket"),
    )
    .because(error)
}

/// That a QEMU has the disk neither on the target nor on the export.
pub(super) fn nowhere(state: &StateDir, record: &SessionRecord) -> Failure {
    if state.is_moved(record) {
        let what = "the QEMU that was named has it neither there, as it was moved, nor on the export";
        return is_over(state, record, what);
    }
    let target = state.target(record).display();
    Failure::new(
        format!(
            "the machine was moved onto {target}, or was about to be; this QEMU has it neither there nor on the export"
        ),
        format!(
            "name the QMP socket of the machine's QEMU; if it has ended, start it from {target}, which holds the whole disk"
        ),
    )
}

/// That a QEMU waits on the export whose machine is another one than that which is known to have been moved.
pub(super) fn on_the_export(state: &StateDir, record: &SessionRecord) -> Failure {
    let path = state.target(record);
    let (target, discard) = (path.display(), state.command("discard", path));
    Failure::new(
        format!(
            "a running machine was moved onto {target}, which is its own disk since; the QEMU that was named is not that machine: its \
             drive is on the export, and it knows the disk as it was before"
        ),
        format!(
            "end that QEMU: served again, it would write over what the other machine wrote; start the machine from {target}, if it does \
             not run; `{discard}` removes the session and leaves the disk"
        ),
    )
}

fn is_over(state: &StateDir, record: &SessionRecord, what: &str) -> Failure {
    let path = state.target(record);
    let (target, dir, discard) = (path.display(), state.path().display(), state.command("discard", path));
    Failure::new(
        format!(
            "the session in {dir} is over: a running machine was moved onto {target}, which is a disk of its own now; {what}"
        ),
        format!(
            "there is nothing left to restore of this disk: let the machine run if it does, else start it from {target}; `{discard}` \
             removes the session and leaves the disk; a disk that is not home is gone on with by a command of its own"
        ),
    )
}
