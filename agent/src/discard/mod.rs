//! `lifeboot discard`: gives a live-restore's session up.
//!
//! # Order, and why
//! The target's lock; then `session.json` is replaced by one that says that nothing was ever served: from then on there is no session,
//! whatever happens. Then the journal, the live file and the rest; `session.json` last, as it says what the others are; the
//! directory; with `--remove-target` the target, while its lock is held. So a kill leaves the session as it was, or none with
//! files that the same command removes, and that a new live-restore passes over.
//!
//! A session whose `session.json` cannot be understood cannot be replaced like that: its journal goes first, then the record.
//!
//! | the session | what is done |
//! |---|---|
//! | none | nothing: exit code 0 |
//! | served by an agent | refused |
//! | a machine of `lifeboot boot` waits for an agent to serve it | refused, by whatever name the target is known now, unless it is known to be moved onto the target |
//! | a move was begun, the machine is not known to be moved, and a program has the target open | refused: the machine may wait for an agent |
//! | a program holds a lock on the target, as QEMU does | refused, unless all is home or it was handed over, and the target stays |
//! | its files may not be read | refused: that is no damage |
//! | its file system is read-only | refused |
//! | is not where the file beside the target says that it is kept | that file is removed (`left_behind`) |
//! | the target is gone | the session's files are removed |
//! | the target is another, as its path leads elsewhere now | the session's files are removed, the target is left alone; with `--yes` refused unless the session's directory is named |
//! | any other | as above |

mod left_behind;
mod lost;
mod question;
mod report;

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use block::{Engine, FileDisk};
use rustix::fs::Access;
use rustix::io::Errno;

use crate::cli::{Context, Failure, Interrupt, Outcome, READ_ONLY_ADVICE, UsageError, Verb};
use crate::in_use;
use crate::live_restore::{self, LeftBehind, SessionRecord, StateDir};
use crate::output::Output;
use crate::status::{Phase, Status};
use lost::{CanBeSaved, Found};
use report::{Owner, Report};

/// Give up a live-restore: remove its session
///
/// What the guest wrote and nobody saved is lost with it, unless the whole disk is home: so it says what that is,
/// and asks. `lifeboot save` keeps it before. TARGET itself stays as it is, unless --remove-target is given. A session that
/// an agent serves is refused: end the agent first.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot save -r /backup /var/lib/vm/web01.raw
  lifeboot discard /var/lib/vm/web01.raw

Where there is no session, nothing is done, and the exit code is 0. What is
left of a discard that was killed is removed by the same command.")]
pub struct Args {
    /// The target of the live-restore
    #[arg(value_name = "TARGET")]
    target: PathBuf,

    /// Do it without asking
    #[arg(long)]
    yes: bool,

    /// Remove the target as well, where it is a file
    #[arg(long)]
    remove_target: bool,

    /// Where sessions are kept, if not beside the target; or the session's own directory, which must be named where
    /// TARGET leads to another disk by now
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let output = context.output();
        let path = live_restore::absolute(&self.target)?;
        if self.state.is_none()
            && let Some(left) = LeftBehind::find(&path)?
        {
            return self.remove_left_behind(context, &path, &left);
        }
        let state = StateDir::of_target_or_named(&self.target, self.state.as_deref())?;
        if let Some(status) = live_restore::ask_status(state.path())? {
            return Err(served(&state, &path, &status));
        }
        if matches!(state.record(), Ok(None)) {
            return self.nothing(output, &path, &state);
        }
        let interrupt = context.interrupt()?;
        // Nobody begins to serve it meanwhile.
        let locked = path
            .exists()
            .then(|| live_restore::lock_target(&state, &path, Engine::THREADS, &interrupt))
            .transpose()?;
        // Under the lock: before, an agent may have gone on with it, or handed it over. One that cannot be understood is given
        // up all the same.
        let (record, damage) = match state.record() {
            Ok(record) => (record, None),
            Err(error) if is_unreadable(&error) => return Err(error),
            Err(error) => (None, Some(error)),
        };
        if record.is_none() && damage.is_none() {
            return self.nothing(output, &path, &state);
        }
        let is_begun = record.as_ref().is_none_or(SessionRecord::was_begun);
        if let Some(record) = record.as_ref().filter(|record| record.was_begun()) {
            live_restore::check_not_anothers(&state, record, &path)?;
        }
        let is_another = locked
            .as_ref()
            .zip(record.as_ref().filter(|record| record.was_begun()))
            .and_then(|(disk, record)| live_restore::check_identity(&state, record, disk).err());
        let target = locked.as_ref().filter(|_| is_another.is_none() && record.is_some());
        let original = record.as_ref().filter(|_| is_another.is_none());
        let original = original.and_then(|record| state.original_beside(record, &path));
        if self.remove_target {
            if let Some(original) = &original {
                return Err(Failure::new(
                    format!(
                        "{} is the target of the session in {}, of which this is a copy: it is not removed",
                        path.display(),
                        original.display()
                    ),
                    "leave --remove-target out: the copy alone is discarded",
                )
                .into());
            }
            if record.as_ref().is_some_and(|record| record.handed_over) {
                return Err(Failure::new(
                    format!(
                        "a machine was moved onto {}, or was about to be, and may run from it: it is not removed",
                        path.display()
                    ),
                    "leave --remove-target out; remove the file by hand once that machine is gone for good",
                )
                .into());
            }
            self.check_removable(target, &path)?;
        }
        let status = record.as_ref().map(|record| live_restore::stopped_status(&state, record));
        let (status, damage) = match status {
            Some(Err(error)) if is_unreadable(&error) => return Err(error),
            Some(Err(error)) => (None, Some(error)),
            Some(Ok(status)) => (Some(status), damage),
            None => (None, damage),
        };
        let known = status.as_ref();
        let is_moved = record.as_ref().is_some_and(|record| state.is_moved(record));
        if !is_moved {
            let session = record.as_ref().map(|record| &*record.session);
            crate::boot::check_no_machine_of(&path, session, state.path())?;
        }
        if let Some(why) = &is_another {
            self.check_named(&state, &path, why)?;
        } else {
            self.check_unused(&state, record.as_ref(), known, &path)?;
        }
        self.check_may_change(&state.changed_by_discard(&path), &path)?;
        if is_begun {
            let record = record.as_ref();
            let whole = record.filter(|_| known.is_some_and(|status| status.phase == Phase::Complete));
            let found = Found {
                record,
                is_moved,
                status: known,
                written_past: whole
                    .filter(|_| path.exists())
                    .and_then(|record| live_restore::changed_since_parked(&state, record, &path)),
                damage: damage.as_ref(),
                is_another: is_another.as_ref(),
                original: original.as_deref(),
                can_be_saved: can_be_saved(
                    &state,
                    record,
                    known,
                    locked.as_ref(),
                    is_another.is_some(),
                    original.is_some(),
                ),
            };
            let told = found.tell(output, &path, self.remove_target);
            told.map_err(|error| {
                let what = "nothing was discarded: what would be lost cannot be said";
                Failure::new(what, "give it a stdout that can be written, then run the same command")
                    .because(error)
            })?;
            let advice = self.saying_yes(&state, &path, &found);
            self.ask(output, &interrupt, &advice)?;
            check_still(&state, record, &path)?;
        }
        interrupt.check()?;
        state.discard(record.as_ref())?;
        let removed = match target {
            Some(target) if self.remove_target => remove(target, &path)?,
            _ => false,
        };
        let report = Report {
            discarded: is_begun,
            session: record.as_ref().map(|record| record.session.as_str()),
            snapshot: record.as_ref().map(|record| record.snapshot.as_str()),
            target: &path,
            target_removed: removed,
            guest_bytes: known.map(|status| status.guest_bytes),
            home_bytes: known.map(|status| status.home_bytes),
            size_bytes: known.map(|status| status.size),
            complete: known.is_some_and(|status| status.phase == Phase::Complete),
        };
        report.tell(
            output,
            match &original {
                _ if is_another.is_some() => Owner::Another,
                Some(dir) => Owner::Original(dir),
                None => Owner::Nobody,
            },
        )
    }
}

impl Args {
    fn nothing(&self, output: &Output, path: &Path, state: &StateDir) -> anyhow::Result<Outcome> {
        // A directory that a discard was about to remove.
        state.remove_if_empty();
        output.document(&Report::of_nothing(path))?;
        output.line(format_args!(
            "no live-restore to {} is known: there is nothing to discard",
            path.display()
        ))?;
        if self.remove_target && path.exists() {
            output.warn(format_args!("{} stays: nothing tells that a live-restore made it", path.display()));
        }
        Ok(Outcome::Done)
    }

    /// Asks, unless told not to.
    fn ask(&self, output: &Output, interrupt: &Interrupt, without_terminal: &str) -> anyhow::Result<()> {
        if self.yes { Ok(()) } else { question::ask(output, interrupt, without_terminal) }
    }

    /// What to do without a terminal.
    fn saying_yes(&self, state: &StateDir, path: &Path, found: &Found<'_>) -> String {
        let yes = if found.is_another.is_some() && state.is_found_by_path(self.state.as_deref()) {
            format!("`{} --yes` gives that session up", state.naming_directory().command("discard", path))
        } else {
            "give --yes".to_owned()
        };
        found.saving().map_or_else(|| yes.clone(), |saving| format!("{yes}; {saving}"))
    }

    /// Fails where nobody is asked, and the session of another disk than the one that stands at `path` was only found by that path: it
    /// may be that nobody thinks of it.
    fn check_named(&self, state: &StateDir, path: &Path, why: &anyhow::Error) -> anyhow::Result<()> {
        if !self.yes || !state.is_found_by_path(self.state.as_deref()) {
            return Ok(());
        }
        Err(Failure::new(
            format!("nothing was discarded: {why:#}"),
            format!(
                "to give up the session of that other disk, name its directory: `{} --yes`; {} is not changed by that",
                state.naming_directory().command("discard", path),
                path.display()
            ),
        )
        .into())
    }

    /// Fails where a machine needs the session, or what it would leave of the target.
    fn check_unused(
        &self,
        state: &StateDir,
        record: Option<&SessionRecord>,
        status: Option<&Status>,
        path: &Path,
    ) -> anyhow::Result<()> {
        if let Some(record) = record {
            state.check_nobody_waits(record, path, "discard the session")?;
        }
        let is_handed_over = record.is_some_and(|record| record.handed_over);
        let is_whole = is_handed_over || status.is_some_and(|status| status.phase == Phase::Complete);
        if in_use::is_locked(path) && (self.remove_target || !is_whole) {
            return Err(Failure::new(
                format!(
                    "{} is in use: a program holds a lock on it, as QEMU does on its images",
                    path.display()
                ),
                "end the machine first, then discard the session",
            )
            .into());
        }
        Ok(())
    }

    /// Fails where one of these directories, or that of a target that is to be removed, cannot be changed.
    fn check_may_change(&self, dirs: &[PathBuf], target: &Path) -> anyhow::Result<()> {
        let of_target = target.parent().filter(|_| self.remove_target);
        let mut dirs = dirs.iter().map(PathBuf::as_path).chain(of_target);
        let Some(dir) = dirs.find(|dir| rustix::fs::access(*dir, Access::WRITE_OK) == Err(Errno::ROFS))
        else {
            return Ok(());
        };
        Err(Failure::new(
            format!("nothing was discarded: the file system of {} is read-only", dir.display()),
            READ_ONLY_ADVICE,
        )
        .into())
    }

    fn check_removable(&self, target: Option<&FileDisk>, path: &Path) -> anyhow::Result<()> {
        match target {
            Some(target) if target.is_block_device() => Err(UsageError::new(format_args!(
                "{} is a block device: --remove-target is for files",
                path.display()
            ))
            .into()),
            None if path.exists() => Err(Failure::new(
                format!("{} cannot be told to be the session's target, and is not removed", path.display()),
                "leave out --remove-target, and remove it yourself if that is what you want",
            )
            .into()),
            _ => Ok(()),
        }
    }
}

/// Whether `save` takes what is known of the session, whose target is `locked` where anything stands at its path.
fn can_be_saved(
    state: &StateDir,
    record: Option<&SessionRecord>,
    status: Option<&Status>,
    locked: Option<&FileDisk>,
    is_another: bool,
    is_copy: bool,
) -> CanBeSaved {
    let Some(record) = record.filter(|record| !record.handed_over) else { return CanBeSaved::Never };
    let has_live_file = || live_restore::has_believable_live_file(state, record).unwrap_or(false);
    if status.is_none() && !has_live_file() {
        return CanBeSaved::Never;
    }
    match locked {
        Some(_) if is_another => CanBeSaved::WithItsTarget,
        Some(target) if target.size() < record.size => CanBeSaved::WithWholeTarget,
        Some(_) if is_copy => CanBeSaved::Never,
        Some(_) => CanBeSaved::Now,
        None => CanBeSaved::WithItsTarget,
    }
}

/// Whether an error says that we may not read something, and so nothing of whether it is damaged.
fn is_unreadable(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let of_system = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        let of_engine = cause.downcast_ref::<block::Error>().map(block::Error::kind);
        of_system == Some(io::ErrorKind::PermissionDenied)
            || of_engine == Some(block::ErrorKind::NotPermitted)
    })
}

/// Fails where the session is not what was told before it was asked: there is no lock on a target that did not exist.
fn check_still(state: &StateDir, record: Option<&SessionRecord>, path: &Path) -> anyhow::Result<()> {
    if let Some(status) = live_restore::ask_status(state.path())? {
        return Err(served(state, path, &status));
    }
    if record.is_some_and(|record| state.record().ok().flatten().as_ref() != Some(record)) {
        return Err(Failure::new(
            format!(
                "nothing was discarded: the session of {} has changed while this was asked",
                path.display()
            ),
            "run the same command again: it says what would be lost now",
        )
        .into());
    }
    Ok(())
}

fn served(state: &StateDir, path: &Path, status: &Status) -> anyhow::Error {
    let target = status.target.display();
    // By its directory, or a new name of its target.
    let what = if status.target == path {
        target.to_string()
    } else {
        format!("the session in {}, which restores to {target},", state.path().display())
    };
    Failure::new(
        format!("{what} is served by the agent with the process id {}", status.pid.unwrap_or_default()),
        "end it first (SIGTERM parks it), when no guest uses the disk any more",
    )
    .into()
}

/// Removes the target that is locked, unless something else stands under its name by now.
fn remove(target: &FileDisk, path: &Path) -> anyhow::Result<bool> {
    let removing = || format!("cannot remove the target {}", path.display());
    let ours = rustix::fs::fstat(target).map_err(io::Error::from).with_context(removing)?;
    let there = std::fs::symlink_metadata(path).with_context(removing)?;
    if (ours.st_dev, ours.st_ino) != (there.dev(), there.ino()) {
        return Ok(false);
    }
    std::fs::remove_file(path).with_context(removing)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_not_be_read_is_told_from_what_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::of(&dir.path().join("t.raw"), None).unwrap();
        state.create().unwrap();
        std::fs::write(state.file("session.json"), "{").unwrap();
        assert!(!is_unreadable(&state.record().unwrap_err()));
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        assert!(is_unreadable(&anyhow::Error::from(denied()).context("cannot read session.json")));
        // As the journal's opening says it.
        assert!(is_unreadable(
            &anyhow::Error::from(block::Error::io("open", denied())).context("the journal")
        ));
    }
}
