//! Where the machine of a session is that is marked as handed over: QEMU is asked before the session is served again, or instead of
//! an agent.

use std::cell::Cell;

use anyhow::Context as _;
use block::Engine;
use nbd_server::ListenAddress;

use super::handover::{HandedOver, mark};
use super::moved;
use super::open::forget_pointer;
use super::over;
use super::record::SessionRecord;
use super::rest::{lock_target, locked_record};
use super::state_dir::StateDir;
use crate::cli::{Failure, Interrupt};
use crate::in_use;
use crate::pivot::{self, Drive, Home, Monitor as _, Moved, Qmp, QmpError, Trouble, Whereabouts};

/// Whom to ask about the disks of a command, and what the command is.
pub(super) struct Inquiry<'a> {
    /// The machine's QEMU.
    pub(super) drive: &'a Drive,
    /// Where the disks are to be served.
    pub(super) addresses: &'a [ListenAddress],
    /// It takes the place of an agent that serves them: the marks are his.
    pub(super) takes_over: bool,
    /// The targets were copied or moved as a whole, together with their sessions.
    pub(super) moved: bool,
    /// Some disk of the command is not known to be moved: a QEMU that says nothing may wait for that.
    pub(super) may_be_waited_for: bool,
    pub(super) interrupt: &'a Interrupt,
    /// It was asked of one disk, and said nothing: a guest that waits is not made to wait for it once more.
    pub(super) is_silent: Cell<bool>,
}

/// What QEMU said of a session, or what is known of it.
#[derive(Debug)]
pub(super) enum Settled {
    /// It may be served: the machine is on the export, or waits for it.
    ToServe,
    /// The machine runs from the target.
    Moved(HandedOver),
    /// The same, as was noted before; QEMU says nothing, and may wait for another disk.
    MovedBefore,
}

impl Inquiry<'_> {
    /// Looks at a session that may be marked as handed over, before it is served again: whether QEMU still is on the export is for QEMU
    /// to say. See `crate::pivot` for what is decided, and why.
    ///
    /// # Errors
    /// Where it cannot be told, or nobody can be asked; where the target is not the session's.
    pub(super) fn settle(&self, state: &StateDir, is_default: bool) -> anyhow::Result<Settled> {
        let Some(record) = state.record()?.filter(|record| record.handed_over) else {
            return Ok(Settled::ToServe);
        };
        if !self.moved {
            state.check_its_target(&record)?;
        }
        let home = home_of(state, &record, self.addresses, is_default)?;
        let settled = self.look(state, &record, &home)?;
        if let Settled::Moved(_) = settled {
            moved::end(state, &record, &self.drive.qmp);
        }
        if !matches!(settled, Settled::ToServe) {
            // The agent that did it was killed before it came to that.
            forget_pointer(&record);
        }
        Ok(settled)
    }

    fn look(&self, state: &StateDir, record: &SessionRecord, home: &Home<'_>) -> anyhow::Result<Settled> {
        let target = home.target.display();
        let asked = if self.is_silent.get() {
            Err(QmpError::Silent(self.drive.qmp.clone()))
        } else {
            ask(self.drive, home, &|| self.interrupt.is_raised())
        };
        self.is_silent.set(matches!(asked, Err(QmpError::Silent(_))));
        // Who was not waited for is not silent.
        self.interrupt.check()?;
        let is_moved = state.is_moved(record);
        let answer = match asked {
            Ok(answer) => answer,
            // It needs nothing of ours for this disk any more, and whatever else would write to its export ruined it.
            Err(QmpError::Silent(_)) if is_moved && self.may_be_waited_for => {
                return Ok(Settled::MovedBefore);
            }
            Err(error @ QmpError::Silent(_)) if is_moved => {
                return Err(over::silent(state, record, error).into());
            }
            // QEMU answers nothing while it waits for its requests: to be moved it needs us. Serving is safe whatever it does
            // next: a machine that is on the target asks us for nothing, and ours writes only what it is asked to. The mark stays
            // until QEMU says where it is.
            Err(QmpError::Silent(_)) => return Ok(Settled::ToServe),
            Err(error @ (QmpError::NotQmp { .. } | QmpError::Refused { .. })) => {
                return Err(Failure::from(error).into());
            }
            Err(error) => return Err(over::cannot_be_asked(state, record, error).into()),
        };
        match answer.whereabouts {
            Whereabouts::Target => {
                let moved = answer.moved.context("QEMU says no more of it")??;
                Ok(Settled::Moved(handed_over(record, home, moved)))
            }
            Whereabouts::Export | Whereabouts::Both if is_moved => {
                Err(over::on_the_export(state, record).into())
            }
            Whereabouts::Export if answer.is_anothers => Err(Failure::new(
                format!(
                    "a machine runs from {target} itself, or was about to be moved there; the QEMU that was named is another one, whose \
                     drive is on the export"
                ),
                "name the QMP socket of the machine that uses the target; two machines cannot have one disk: end the other one",
            )
            .into()),
            // A node that an attempt left in this QEMU may hold a lock: the next one removes it.
            Whereabouts::Export if self.takes_over || in_use::is_locked(home.target) => Ok(Settled::ToServe),
            Whereabouts::Export => take_mark_back(state, record).map(|()| Settled::ToServe),
            // The drive needs us; the mark stays as long as something else of this QEMU uses the target.
            Whereabouts::Both => Ok(Settled::ToServe),
            Whereabouts::Neither => Err(over::nowhere(state, record).into()),
        }
    }
}

/// Takes the mark of a session back that nobody serves, nor has since its record was read.
fn take_mark_back(state: &StateDir, record: &SessionRecord) -> anyhow::Result<()> {
    let _lock = lock_target(state, state.target(record), Engine::THREADS, &Interrupt::default())?;
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
    target: &std::path::Path,
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
    state.check_its_target(&record)?;
    let (addresses, is_default) = state.left_export(&record);
    let home = home_of(state, &record, &addresses, is_default)?;
    let is_moved = state.is_moved(&record);
    let failure = match ask(drive, &home, &|| false) {
        Ok(Answer { moved: Some(moved), .. }) => {
            let moved = moved?;
            moved::end(state, &record, &drive.qmp);
            return Ok(handed_over(&record, &home, moved));
        }
        Ok(Answer { whereabouts: Whereabouts::Export | Whereabouts::Both, .. }) if is_moved => {
            return Err(over::on_the_export(state, &record).into());
        }
        Ok(_) if is_moved => return Err(over::nowhere(state, &record).into()),
        Ok(_) => no_agent(),
        Err(error @ QmpError::Silent(_)) if is_moved => {
            return Err(over::silent(state, &record, error).into());
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

/// The disk of a session that nobody serves, whose target was looked at.
fn home_of<'a>(
    state: &'a StateDir,
    record: &'a SessionRecord,
    addresses: &'a [ListenAddress],
    is_default: bool,
) -> anyhow::Result<Home<'a>> {
    let target = state.target(record);
    let file = std::fs::metadata(target);
    Ok(Home {
        target,
        file: file.with_context(|| format!("cannot look at the target {}", target.display()))?,
        held: None,
        size: record.size,
        addresses,
        export: &record.disk,
        epoch: record.epoch,
        is_default,
        session: &record.session,
    })
}

fn handed_over(record: &SessionRecord, home: &Home<'_>, moved: Moved) -> HandedOver {
    HandedOver { disk: record.disk.clone(), target: home.target.to_owned(), moved }
}

/// What a QEMU says of a drive.
pub(super) struct Answer {
    pub(super) whereabouts: Whereabouts,
    /// Where it is on what QEMU calls the target: how, or why that is not the target.
    moved: Option<anyhow::Result<Moved>>,
    /// Another program than this QEMU has locked the target.
    pub(super) is_anothers: bool,
}

pub(super) fn ask(drive: &Drive, home: &Home<'_>, gives_up: &dyn Fn() -> bool) -> Result<Answer, QmpError> {
    let mut qmp = Qmp::connect(&drive.qmp, gives_up)?;
    let whereabouts = pivot::whereabouts(&mut qmp, home, drive.device.as_deref())?;
    let moved = match whereabouts {
        Whereabouts::Target => Some(match pivot::at_home(&mut qmp, home) {
            Ok(moved) => Ok(moved),
            Err(Trouble::Unknown(error)) => return Err(error),
            Err(Trouble::OnExport(error) | Trouble::Elsewhere(error)) => Err(error),
        }),
        _ => None,
    };
    Ok(Answer { whereabouts, moved, is_anothers: in_use::is_locked_by_another(home.target, qmp.process()) })
}
