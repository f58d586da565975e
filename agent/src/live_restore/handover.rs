//! Hands a disk that is home over to the machine that runs from it: has QEMU use the target itself (`crate::pivot`, with
//! the order and its reasons), and keeps in the session's record that it does.

use std::fmt;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use block::Engine;
use parking_lot::MutexGuard;
use serde::{Deserialize, Serialize};

use super::moved;
use super::open::forget_pointer;
use super::record::SessionRecord;
use super::rest::{lock_target, locked_record};
use super::service::{ServedDisk, Service};
use super::state_dir::StateDir;
use crate::cli::{Failure, Interrupt};
use crate::in_use;
use crate::live::Phase;
use crate::pivot::{self, Drive, Home, Monitor as _, Moved, Qmp, QmpError, Trouble, Whereabouts};

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
    let home =
        Home { is_default: disk == 0, ..home_of(&served.record, &served.addresses, &served.record.disk)? };
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

fn home_of<'a>(
    record: &'a SessionRecord,
    addresses: &'a [nbd_server::ListenAddress],
    export: &'a str,
) -> anyhow::Result<Home<'a>> {
    let metadata = std::fs::metadata(&record.target)
        .with_context(|| format!("cannot look at the target {}", record.target.display()))?;
    Ok(Home {
        target: &record.target,
        is_device: metadata.file_type().is_block_device(),
        size: record.size,
        addresses,
        export,
        epoch: record.epoch,
        is_default: false,
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

/// Looks at the sessions that were marked as handed over, before they are served again: whether QEMU still is on the
/// export is for QEMU to say. Returns what runs from its target already. See `crate::pivot` for what is decided, and why. While
/// somebody serves it whose place is taken over, the mark is his.
///
/// # Errors
/// Where it cannot be told, or nobody can be asked.
pub(super) fn settle(
    state: &StateDir,
    addresses: &[nbd_server::ListenAddress],
    is_default: bool,
    drive: &Drive,
    takes_over: bool,
    interrupt: &Interrupt,
) -> anyhow::Result<Option<HandedOver>> {
    let Some(record) = state.record()?.filter(|record| record.handed_over) else { return Ok(None) };
    let home = Home { is_default, ..home_of(&record, addresses, &record.disk)? };
    let moved = look(state, &record, &home, drive, takes_over, interrupt)?;
    if moved.is_some() {
        moved::end(state, &record, &drive.qmp);
        // The agent that did it was killed before it came to that.
        forget_pointer(&record);
    }
    Ok(moved.map(|moved| HandedOver { disk: record.disk.clone(), target: record.target.clone(), moved }))
}

/// How it runs from the target; `None` where the session may be served: the machine is on the export, or waits for it.
fn look(
    state: &StateDir,
    record: &SessionRecord,
    home: &Home<'_>,
    drive: &Drive,
    takes_over: bool,
    interrupt: &Interrupt,
) -> anyhow::Result<Option<Moved>> {
    let target = record.target.display();
    let asked = ask(drive, home, &|| interrupt.is_raised());
    // Who was not waited for is not silent.
    interrupt.check()?;
    let answer = match asked {
        Ok(answer) => answer,
        // Not to wait for us: it needs nothing of ours any more, and whatever else would write to the export ruined its disk.
        Err(error @ QmpError::Silent(_)) if state.is_moved(record) => {
            return Err(was_moved(state, record, error).into());
        }
        // QEMU answers nothing while it waits for its requests: to be moved it needs us. Serving is safe whatever it does
        // next: a machine that is on the target asks us for nothing, and ours writes only what it is asked to. The mark stays
        // until QEMU says where it is.
        Err(QmpError::Silent(_)) => return Ok(None),
        Err(error @ (QmpError::NotQmp { .. } | QmpError::Refused { .. })) => {
            return Err(Failure::from(error).into());
        }
        Err(error) => return Err(cannot_be_asked(home.target, error)),
    };
    match answer.whereabouts {
        Whereabouts::Target => Ok(answer.moved),
        Whereabouts::Export if answer.is_anothers => Err(Failure::new(
            format!(
                "a machine runs from {target} itself, or was about to be moved there; the QEMU that was named is another one, whose \
                 drive is on the export"
            ),
            "name the QMP socket of the machine that uses the target; two machines cannot have one disk: end the other one",
        )
        .into()),
        // A node that an attempt left in this QEMU may hold a lock: the next one removes it.
        Whereabouts::Export if takes_over || in_use::is_locked(home.target) => Ok(None),
        Whereabouts::Export => take_mark_back(state, record).map(|()| None),
        // The drive needs us; the mark stays as long as something else of this QEMU uses the target.
        Whereabouts::Both => Ok(None),
        Whereabouts::Neither => Err(Failure::new(
            format!("the machine was moved onto {target}, or was about to be; this QEMU has it neither there nor on the export"),
            format!(
                "name the QMP socket of the machine's QEMU; if it has ended, start it from {target}, which holds the whole disk"
            ),
        )
        .into()),
    }
}

/// That a machine runs from its target, and its QEMU does not say how.
fn was_moved(state: &StateDir, record: &SessionRecord, error: QmpError) -> Failure {
    let path = state.target(record);
    let (target, discard) = (path.display(), state.command("discard", path));
    Failure::new(
        format!("a running machine was moved onto {target}, and runs from it itself; its QEMU's monitor is busy"),
        format!(
            "there is nothing left to restore: let the machine run, and start it from {target} from now on; `{discard}` removes the \
             session and leaves the disk"
        ),
    )
    .because(error)
}

/// That the QEMU of a machine which may run from `target` cannot be asked.
fn cannot_be_asked(target: &Path, error: QmpError) -> anyhow::Error {
    let (is_locked, target) = (in_use::is_locked(target), target.display());
    Failure::new(
        if is_locked {
            format!("a machine runs from {target} itself, and the QEMU that was named cannot be asked")
        } else {
            format!("the machine was moved onto {target}, or was about to be, and its QEMU cannot be asked which")
        },
        format!("if its QEMU has ended, start it from {target}, which holds the whole disk; if it runs, name its QMP socket"),
    )
    .because(error)
    .into()
}

/// Takes the mark of a session back that nobody serves, nor has since its record was read.
fn take_mark_back(state: &StateDir, record: &SessionRecord) -> anyhow::Result<()> {
    let _lock = lock_target(state, &record.target, Engine::THREADS, &Interrupt::default())?;
    if locked_record(state, record)? != *record {
        return Err(Failure::new(
            format!("somebody went on with the session in {} just now", state.path().display()),
            "run the same command again",
        )
        .into());
    }
    mark(state, record, false)
}

/// Says where the machine of a session is that no agent serves.
///
/// # Errors
/// Where nothing can be done without an agent, and where QEMU does not say.
pub(crate) fn ask_without_agent(
    state: &StateDir,
    target: &Path,
    drive: &Drive,
) -> anyhow::Result<HandedOver> {
    let Some(record) = state.record()? else {
        return Err(Failure::new(
            format!("no live-restore to {} is known", target.display()),
            format!("its session would be kept in {}", state.path().display()),
        )
        .into());
    };
    let no_agent = || {
        Failure::new(
            format!("no agent serves {}", target.display()),
            format!(
                "if a machine waits on its export, run the same live-restore command with --qmp {}: it serves the machine, and moves \
                 it home when all is there; if none does, there is nothing to move",
                drive.qmp.display()
            ),
        )
    };
    if !record.handed_over {
        return Err(no_agent().into());
    }
    let (addresses, is_default) = state.left_export(&record);
    let home = Home { is_default, ..home_of(&record, &addresses, &record.disk)? };
    let failure = match ask(drive, &home, &|| false) {
        Ok(Answer { moved: Some(moved), .. }) => {
            moved::end(state, &record, &drive.qmp);
            return Ok(HandedOver { disk: record.disk.clone(), target: record.target.clone(), moved });
        }
        Ok(_) => no_agent(),
        Err(error @ QmpError::Silent(_)) if state.is_moved(&record) => {
            return Err(was_moved(state, &record, error).into());
        }
        // Not because somebody else talks to it: QEMU answers nobody while its main loop waits for us.
        Err(error @ QmpError::Silent(_)) => Failure::new(
            format!(
                "{error}, and no agent serves {}: the machine may wait on its export, as the agent ended while it was to be moved",
                target.display()
            ),
            state.serving_again(&record),
        ),
        Err(error) => return Err(Failure::from(error).into()),
    };
    // That of `boot` is gone on with by a command that is known whole.
    crate::boot::check_no_machine(target)?;
    Err(failure.into())
}

/// That a session which is marked as handed over cannot be saved: its target is, or may be, the machine's own disk.
pub(crate) fn no_session_any_more(state: &StateDir, record: &SessionRecord, target: &Path) -> Failure {
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

/// What a QEMU says of a drive.
struct Answer {
    whereabouts: Whereabouts,
    /// How it is on the target, where it is.
    moved: Option<Moved>,
    /// Another program than this QEMU has locked the target.
    is_anothers: bool,
}

fn ask(drive: &Drive, home: &Home<'_>, gives_up: &dyn Fn() -> bool) -> Result<Answer, QmpError> {
    let mut qmp = Qmp::connect(&drive.qmp, gives_up)?;
    let whereabouts = pivot::whereabouts(&mut qmp, home, drive.device.as_deref())?;
    let is_home = whereabouts == Whereabouts::Target;
    let moved = is_home.then(|| pivot::at_home(&mut qmp, home)).transpose()?;
    Ok(Answer { whereabouts, moved, is_anothers: in_use::is_locked_by_another(home.target, qmp.process()) })
}
