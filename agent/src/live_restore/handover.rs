//! Hands a disk that is home over to the machine that runs from it: has QEMU use the target itself (`crate::pivot`, with
//! the order and its reasons), and keeps in the session's record that it does.

use std::fmt;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::MutexGuard;
use serde::{Deserialize, Serialize};

use super::moved;
use super::record::SessionRecord;
use super::service::{ServedDisk, Service};
use super::settle::{Answer, ask};
use super::state_dir::StateDir;
use crate::cli::Failure;
use crate::in_use;
use crate::live::Phase;
use crate::pivot::{self, Drive, Home, Moved, Qmp, Trouble, Whereabouts};

/// How long it waits before it asks again a QEMU that did not say where its drive is.
const PAUSE: Duration = Duration::from_secs(1);
/// How often whoever waits for another move looks whether it still is to wait.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A disk that was handed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOver {
    /// The disk's name in the snapshot.
    pub disk: String,
    /// The target, which is the machine's own now.
    pub target: PathBuf,
    /// QEMU's nodes.
    #[serde(flatten)]
    pub moved: Moved,
}

impl fmt::Display for HandedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (target, node) = (self.target.display(), &self.moved.node);
        write!(
            f,
            "handed over: the machine runs from {target} itself (QEMU's node {node}); start it from there from now on"
        )?;
        if self.moved.direct_refused {
            f.write_str("; QEMU uses the page cache, which this target cannot do without")?;
        }
        Ok(())
    }
}

/// Moves the machine's drive from this disk's export onto its target. It blocks, for as long as QEMU needs, and while the
/// disk is being saved, or moved for somebody else: `tell` is told then what it waits for.
///
/// # Errors
/// Where the drive is on the export as before: what failed, and what to do. Where QEMU does not say where it is and the agent
/// ends: then the session is marked, and the next start asks.
pub(crate) fn hand_over(
    service: &Arc<Service>,
    disk: usize,
    drive: &Drive,
    tell: &dyn Fn(&str),
) -> anyhow::Result<HandedOver> {
    let served = &service.disks()[disk];
    let _turn = take_turn(service, served, tell)?;
    if let Some(done) = served.handed_over() {
        return Ok(done.clone());
    }
    let target = served.record.target.display();
    match served.session().phase() {
        Phase::Complete => {}
        Phase::Filling => {
            return Err(Failure::new(
                format!("the disk is not wholly home yet: it cannot be moved onto {target}"),
                "`lifeboot status` shows how far it is; ask again when it is complete, or give live-restore --qmp",
            )
            .into());
        }
        Phase::Parked | Phase::Poisoned => {
            return Err(Failure::new(
                format!("the session of {target} has ended"),
                "start it again, then ask again",
            )
            .into());
        }
    }
    // The first disk is what the empty name means.
    let home = home_served(served, disk == 0)?;
    let is_ending = || service.check_ending().is_err();
    let mut last_said = String::new();
    let mut moving = None;
    loop {
        let is_marked = served.is_marked();
        let connected = Qmp::connect(&drive.qmp, &is_ending);
        if connected.is_err() && !is_marked {
            service.check_ending()?;
        }
        let attempt = connected.map_err(|error| {
            if is_marked { Trouble::Unknown(error) } else { Trouble::OnExport(Failure::from(error).into()) }
        });
        // Not before QEMU is there: a QEMU that cannot be asked must not keep anybody from saving.
        if attempt.is_ok() && moving.is_none() {
            let waits =
                || tell(&format!("{target} is being saved: the machine is moved when that has ended"));
            moving = Some(served.handover.saves.begin_move(waits, || service.check_ending())?);
        }
        let carried = attempt.and_then(|mut qmp| {
            let mut notes = Notes { served, qmp: &drive.qmp, is_default: home.is_default };
            pivot::carry_home(&mut qmp, &home, drive, &mut notes)
        });
        let is_marked = served.is_marked();
        match carried {
            Ok(moved) => {
                let (disk, target) = (served.record.disk.clone(), served.record.target.clone());
                served.note_moved(&drive.qmp);
                return Ok(served.handover.done.get_or_init(|| HandedOver { disk, target, moved }).clone());
            }
            Err(Trouble::OnExport(error)) if !is_marked => return Err(error),
            // A refusal to look is no answer: only where the drive is said to be on the export the mark goes.
            Err(Trouble::OnExport(error)) => match ask(drive, &home, &is_ending) {
                Ok(Answer { whereabouts: Whereabouts::Export, is_anothers: false, .. }) => {
                    served.mark(false)?;
                    return Err(error);
                }
                // Something else writes to the target past us.
                Ok(Answer { whereabouts: Whereabouts::Export | Whereabouts::Both, .. }) => return Err(error),
                _ => say_unknown(&mut last_said, &error),
            },
            Err(Trouble::Unknown(error)) => say_unknown(&mut last_said, &error.into()),
            Err(Trouble::Elsewhere(error)) => return Err(error),
        }
        service.check_ending().with_context(|| {
            format!(
                "whether QEMU's drive is on {target} or on the export is not known: give the next live-restore --qmp {}",
                drive.qmp.display()
            )
        })?;
        std::thread::sleep(PAUSE);
    }
}

/// Keeps how far the move of a disk is in its session.
struct Notes<'a> {
    served: &'a ServedDisk,
    qmp: &'a Path,
    is_default: bool,
}

impl pivot::Notes for Notes<'_> {
    fn begin(&mut self) -> anyhow::Result<()> {
        self.served.note_begun(self.qmp, self.is_default)
    }

    fn mark(&mut self) -> anyhow::Result<()> {
        self.served.mark(true)
    }

    fn forget(&mut self) {
        self.served.forget_begun();
    }
}

/// Waits for a move of the same disk that is under way; `tell` is told so.
fn take_turn<'a>(
    service: &Service,
    served: &'a ServedDisk,
    tell: &dyn Fn(&str),
) -> anyhow::Result<MutexGuard<'a, ()>> {
    let turn = &served.handover.turn;
    if let Some(ours) = turn.try_lock() {
        return Ok(ours);
    }
    let target = served.record.target.display();
    tell(&format!("a machine is being moved onto {target} already: this waits until that has ended"));
    loop {
        if let Some(ours) = turn.try_lock_for(LOOK_INTERVAL) {
            return Ok(ours);
        }
        service.check_ending()?;
    }
}

/// Says once what keeps QEMU from telling.
fn say_unknown(last: &mut String, error: &anyhow::Error) {
    let said = format!("{error:#}");
    if said != *last {
        tracing::warn!("QEMU does not say where its drive is, and is asked again: {said}");
        *last = said;
    }
}

/// What an agent serves.
fn home_served(served: &ServedDisk, is_default: bool) -> anyhow::Result<Home<'_>> {
    let ServedDisk { record, target, addresses, .. } = served;
    let cannot = || format!("cannot tell what the target {} is", record.target.display());
    // Of what is open: another file may have taken its path.
    let file = in_use::metadata_of(target);
    Ok(Home {
        target: &record.target,
        file: file.with_context(cannot)?,
        held: Some(format!("/proc/{}/fd/{}", std::process::id(), target.as_fd().as_raw_fd()).into()),
        size: record.size,
        addresses,
        export: &record.disk,
        epoch: record.epoch,
        is_default,
        session: &record.session,
    })
}

/// Keeps in the record whether QEMU may write to the target past us: on stable storage when it returns.
pub(super) fn mark(state: &StateDir, record: &SessionRecord, is_marked: bool) -> anyhow::Result<()> {
    state.keep(&SessionRecord { handed_over: is_marked, ..record.clone() })?;
    if !is_marked {
        moved::forget(state);
    }
    Ok(())
}
