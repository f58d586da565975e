//! What a discard loses, in words.

use std::path::Path;

use crate::live_restore::SessionRecord;
use crate::output::{Output, human_size};
use crate::status::{Phase, Status};

/// What is known of the session that is to be discarded.
pub(super) struct Found<'a> {
    pub(super) record: Option<&'a SessionRecord>,
    /// QEMU has said that the machine runs from the target.
    pub(super) is_moved: bool,
    pub(super) status: Option<&'a Status>,
    /// Why more may have been written to the target than the session knows of: a machine may have run from it.
    pub(super) written_past: Option<String>,
    /// Why something of it cannot be told.
    pub(super) damage: Option<&'a anyhow::Error>,
    /// Why the target is not the session's.
    pub(super) is_another: Option<&'a anyhow::Error>,
    /// Where the session is, of which this is a copy on the same target.
    pub(super) original: Option<&'a Path>,
    /// Whether `save` takes what is known of it.
    pub(super) can_be_saved: CanBeSaved,
}

/// Whether what the guest wrote can be saved, where it wrote anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CanBeSaved {
    /// As it is.
    Now,
    /// With another target than what stands there, or with what stood there: what the guest wrote is in that.
    WithItsTarget,
    /// With a whole copy of the target, which was cut off.
    WithWholeTarget,
    Never,
}

impl Found<'_> {
    /// Says what would be lost of the session of the target at `path`, and with that where it is removed too.
    pub(super) fn tell(&self, output: &Output, path: &Path, remove_target: bool) -> anyhow::Result<()> {
        if let Some(record) = self.record {
            let target = match self.is_another {
                Some(_) => record.identity.to_string(),
                None => path.display().to_string(),
            };
            output.forewarn(format_args!(
                "the session restores {}/{} to {target}",
                record.snapshot, record.disk
            ))?;
        }
        if let Some(original) = self.original {
            output.forewarn(format_args!(
                "this is a copy of the session, which is kept in {} and stays",
                original.display()
            ))?;
        }
        match self.lost(path, remove_target) {
            Some(lost) => output.forewarn(lost)?,
            // Why is said below.
            None => output.warn("what would be lost cannot be told: the session's files are damaged"),
        }
        if let Some(error) = self.damage {
            output.warn(format_args!("{error:#}"));
        }
        if let Some(error) = self.is_another {
            output.warn(format_args!("{error:#}; it is left alone"));
        }
        if remove_target && path.exists() {
            output.forewarn(format_args!("{} will be removed", path.display()))?;
        }
        Ok(())
    }

    /// What to say of saving what the guest wrote; nothing where it wrote nothing, or it is not to be had.
    pub(super) fn saving(&self) -> Option<&'static str> {
        let wrote_nothing =
            self.written_past.is_none() && self.status.is_some_and(|status| status.guest_bytes == 0);
        match self.can_be_saved {
            _ if wrote_nothing => None,
            CanBeSaved::Now => Some("`lifeboot save` keeps what the guest wrote before"),
            CanBeSaved::WithItsTarget => Some(
                "what the guest wrote is in the session's own target: only where that is brought back before, `lifeboot save` keeps it",
            ),
            CanBeSaved::WithWholeTarget => Some(
                "the target was cut off: only where a whole copy of it is put back before, `lifeboot save` keeps what the guest wrote",
            ),
            CanBeSaved::Never => None,
        }
    }

    /// What is lost where the target is, or may be, a machine's own disk, which needs no session.
    fn of_a_machine(&self, record: &SessionRecord, path: &Path) -> String {
        let its = &record.identity;
        let stands = match path.exists() {
            true if self.is_another.is_none() => return self.of_a_machine_on_the_target().to_owned(),
            true => format!("{} is another one", path.display()),
            false => format!("nothing stands at {} any more", path.display()),
        };
        if self.is_moved {
            format!(
                "nothing is lost with the session: a running machine was moved onto the session's own target ({its}), which is a disk of \
                 its own, whatever it is called now; {stands}"
            )
        } else {
            format!(
                "nothing is lost with the session: all of the disk is home, on the session's own target ({its}), whatever it is called \
                 now, and a machine was moved onto that, or was about to be when the agent ended; {stands}"
            )
        }
    }

    const fn of_a_machine_on_the_target(&self) -> &'static str {
        if self.is_moved {
            "nothing is lost: a running machine was moved onto the target, which is a disk of its own"
        } else {
            "nothing is lost: all of the disk is home; a machine was moved onto the target, or was about to be when the agent ended, and \
             no program is seen to have the target open"
        }
    }

    /// What would be lost, where that can be told.
    fn lost(&self, path: &Path, remove_target: bool) -> Option<String> {
        let is_there = path.exists();
        if self.original.is_some() {
            return Some("nothing is lost but what only the copy knows of".to_owned());
        }
        if let Some(record) = self.record.filter(|record| record.handed_over) {
            return Some(self.of_a_machine(record, path));
        }
        let status = self.status?;
        let written = human_size(status.guest_bytes);
        let home = format!("{:.1} % of {} is home", status.percent(), human_size(status.size));
        Some(if status.phase == Phase::Complete && is_there && !remove_target {
            format!(
                "nothing is lost but that the next capture reads the whole disk: all of it is home, {written} written by the guest"
            )
        } else if let Some(why) = &self.written_past {
            format!(
                "lost with the target is all that a machine wrote to it, unless it was saved; how much is not known: {why}"
            )
        } else if status.guest_bytes == 0 {
            format!("nothing is lost: the guest wrote nothing, as far as is known; {home}")
        } else if !is_there {
            format!(
                "the target does not exist: lost with it is all that the guest wrote, up to {written}, unless it was saved"
            )
        } else if remove_target {
            format!("lost with the target is all that the guest wrote: up to {written}, unless it was saved")
        } else {
            format!("lost is what the guest wrote: up to {written}, unless it was saved; {home}")
        })
    }
}
