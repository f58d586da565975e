//! Sources that are the targets of live-restores: what of them must be read.
//!
//! A session knows which chunks its guest wrote (`G`). All others are as in the snapshot that it restores, so the first backup
//! after a restore reads the chunks of `G` alone and takes the rest from that snapshot's map. The result is the very same as that
//! of a full scan, as long as `G` leaves nothing out:
//!
//! | the session | what is read |
//! |---|---|
//! | none, or the source is an NBD export | the whole source; refused where somebody holds a lock on it like an agent's |
//! | served by an agent | the chunks of `G`, by the agent, of a frozen view |
//! | any whose target is not what stands at the path now, and that is wholly home | as without a session, and why is said |
//! | any other whose target is not what stands at the path now | refused: it may be a copy of that target, of which not all is home |
//! | parked, and nobody has written to the target since (`parked.json`) | the chunks of `G`; of those that are not wholly home, the rest comes from the repository |
//! | any other that is wholly home: its agent was killed, the target was written to, its snapshot is in another repository | the whole source, and why is said |
//! | any other that is not | refused: its target is no disk; `save` takes what the guest wrote on its own responsibility |
//! | handed over to QEMU | the whole source |
//!
//! `--full` reads the whole source where all of it is home, and is refused where it is not.
//!
//! Nothing tells a copy of a target, made by `cp` or moved as a whole with its session, from a file that has nothing to do with it and took
//! its path, wherever the target itself is now. So whoever knows that it is a whole disk says so by a path at which no session is found.

use std::fs::TryLockError;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use block::Engine;
use repository::Repository;

use super::source::Source;
use crate::cli::{Failure, Interrupt};
use crate::live::Resumed;
use crate::live_restore::{self, Rest, SessionRecord, StateDir, changed_since_parked};
use crate::status::{Phase, Status};

/// What of a source is read.
pub(super) enum Scan {
    /// All of it; `why`, where there is a session and yet not only what its guest wrote.
    Whole { why: Option<String> },
    /// What differs from the disk that was restored. The target is locked meanwhile.
    Changed(Box<Rest>),
    /// The same, by the agent that serves it: the session's directory and id.
    Served { dir: PathBuf, session: String },
}

/// What a capture wants of all its sources.
pub(super) struct Wish<'a> {
    pub(super) repository: &'a Repository,
    /// Where sessions are kept, if not beside their targets.
    pub(super) state: Option<&'a Path>,
    pub(super) full: bool,
    pub(super) chunk_size: Option<u32>,
    pub(super) engine: Engine,
    pub(super) interrupt: &'a Interrupt,
}

/// Finds the session of a source.
///
/// # Errors
/// Where what must be read cannot be had, or it is not known.
pub(super) fn scan(source: &Source, wish: &Wish<'_>) -> anyhow::Result<Scan> {
    let Some(path) = source.path() else { return Ok(Scan::Whole { why: None }) };
    let state = StateDir::of(path, wish.state)?;
    let unknown = || {
        format!(
            "it is not known whether the live-restore in {} has filled the source {}",
            state.path().display(),
            path.display()
        )
    };
    let record = state.record().with_context(unknown)?.filter(SessionRecord::was_begun);
    let Some(record) = record else {
        check_unlocked(path)?;
        return Ok(Scan::Whole { why: None });
    };
    let is_its = record.identity.is_at(path) != Some(false);
    if record.handed_over && is_its {
        let why = if state.is_moved(&record) {
            "a running machine was moved onto it, and writes to it itself"
        } else {
            "a running machine was moved onto it, or was about to be, and may write to it itself"
        };
        return Ok(Scan::Whole { why: Some(why.into()) });
    }
    if record.handed_over {
        return another(&state, &record, path);
    }
    let asked = live_restore::ask_status(state.path()).with_context(unknown)?;
    let is_served = asked.is_some();
    let status = match asked {
        Some(status) => status,
        None => live_restore::stopped_status(&state, &record).with_context(unknown)?,
    };
    if !is_its && status.phase == Phase::Complete {
        return another(&state, &record, path);
    }
    let session = Session { source, path, state: &state, record: &record, status: &status };
    if !is_its {
        return Err(session.may_be_a_copy(wish, is_served)?.into());
    }
    if wish.full {
        return session.whole(None);
    }
    if let Some(why) = session.unfit(wish) {
        return session.whole(Some(why));
    }
    if is_served {
        return Ok(Scan::Served { dir: state.path().to_owned(), session: record.session });
    }
    match session.changed(wish)? {
        Ok(rest) => Ok(Scan::Changed(Box::new(rest))),
        Err(why) => session.whole(Some(why)),
    }
}

/// Fails where somebody holds the lock that an agent holds on the target of its session. That session is known by another name
/// of the source, or kept elsewhere: what of the source is home is not known here.
fn check_unlocked(path: &Path) -> anyhow::Result<()> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot read the source {}", path.display()))?;
    let path = path.display();
    match file.try_lock_shared() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Failure::new(
            format_args!(
                "the source {path} is locked by another program, as lifeboot locks the target of a live-restore: what of it is \
                 home yet is not known"
            ),
            "name where its session is kept with --state DIR, or the name that its live-restore was given; if it is another \
             program's lock, end that program",
        )
        .into()),
        // A file system without locks has no agent either.
        Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// What is read of a source that is not the target of the session at its path, all of which is home: so it is no copy of a part.
fn another(state: &StateDir, record: &SessionRecord, path: &Path) -> anyhow::Result<Scan> {
    check_unlocked(path)?;
    let dir = state.path().display();
    let its = if record.target == live_restore::absolute(path)? {
        "which stood at its path before".to_owned()
    } else {
        format!("which is, or was, {}", record.target.display())
    };
    Ok(Scan::Whole { why: Some(format!("it is not the target of the session in {dir}, {its}")) })
}

struct Session<'a> {
    source: &'a Source,
    path: &'a Path,
    state: &'a StateDir,
    record: &'a SessionRecord,
    status: &'a Status,
}

impl Session<'_> {
    /// Why its disk cannot be the base of what is wanted.
    fn unfit(&self, wish: &Wish<'_>) -> Option<String> {
        if wish.chunk_size.is_some_and(|chunk_size| chunk_size != self.record.chunk_size) {
            return Some(format!(
                "the disk that was restored has chunks of {} bytes",
                self.record.chunk_size
            ));
        }
        if self.source.size != self.record.size {
            return Some(format!(
                "it has {} bytes, and the disk that was restored {}",
                self.source.size, self.record.size
            ));
        }
        live_restore::base_of(wish.repository, self.state, self.record)
            .err()
            .map(|error| format!("{error:#}"))
    }

    /// The session at rest, where `G` leaves nothing out; else why it may.
    fn changed(&self, wish: &Wish<'_>) -> anyhow::Result<Result<Rest, String>> {
        let path = live_restore::absolute(self.path)?;
        let rest =
            Rest::open(self.state, self.record, &path, wish.repository, wish.engine, false, wish.interrupt);
        let rest = match rest {
            Ok(rest) => rest,
            Err(error) => {
                wish.interrupt.check()?;
                return Ok(Err(format!("{error:#}")));
            }
        };
        if rest.view.ended() != Resumed::Parked {
            return Ok(Err("its agent was killed, or the host went down, before it was parked".to_owned()));
        }
        Ok(match changed_since_parked(self.state, self.record, &path) {
            Some(why) => Err(why),
            None => Ok(rest),
        })
    }

    /// Why a source that is not the session's target is not read while that is not wholly home.
    fn may_be_a_copy(&self, wish: &Wish<'_>, is_served: bool) -> anyhow::Result<Failure> {
        let Self { state, record, status, .. } = self;
        let path = live_restore::absolute(self.path)?;
        let is_file = path.is_file();
        let (path, dir) = (path.display(), state.path().display());
        let what = format!(
            "the source {path} is not the target that the session in {dir} restores to ({}), of which {:.1} % of {}/{} is home: it may \
             be a copy of that, and no whole disk",
            record.identity,
            status.percent(),
            status.snapshot,
            status.disk,
        );
        let apart = match (is_file, wish.state) {
            (true, None) => "move it to another name, and capture it by that",
            (true, Some(_)) => "move it to another name, and capture it by that, without --state",
            (false, _) => "name an empty directory with --state, where no session is found",
        };
        let its_own = if record.identity.is_at(&record.target) == Some(true) {
            format!("name {}", record.target.display())
        } else {
            format!(
                "move what stands at {path} away first, put that back there, and run the same command again"
            )
        };
        let as_copy = if is_served {
            String::new()
        } else {
            format!(
                "; only if it is that target, copied or moved as a whole together with its session, run its live-restore with --moved \
                 until all is home, or take what its guest wrote: `{}`",
                state.saving(record)
            )
        };
        Ok(Failure::new(
            what,
            format!(
                "if it is a disk of its own, all of it, {apart}; if the session's target is meant, {its_own}{as_copy}"
            ),
        ))
    }

    /// Reads all of it, which takes that all is home.
    fn whole(&self, why: Option<String>) -> anyhow::Result<Scan> {
        if self.status.phase == Phase::Complete {
            return Ok(Scan::Whole { why });
        }
        let Self { path, state, record, status, .. } = self;
        let path = path.display();
        let why = why.map_or_else(String::new, |why| {
            format!(", and what its guest wrote is not known for certain: {why}")
        });
        Err(Failure::new(
            format_args!(
                "the source {path} is the target of a live-restore that is not complete: session {} ({}) has brought {:.1} % \
                 of {}/{} home{why}",
                status.session,
                state.path().display(),
                status.percent(),
                status.snapshot,
                status.disk,
            ),
            format_args!(
                "run its live-restore again until `{}` says that it is complete; or `{}` takes what is known of the guest's writes \
                 on top of {}",
                state.command("status", self.path),
                state.saving(record),
                status.snapshot,
            ),
        )
        .into())
    }
}

/// The chunks of a session as runs of neighbours.
pub(super) fn runs(rest: &Rest) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for &chunk in rest.frozen().chunks() {
        match runs.last_mut() {
            Some(run) if run.end == chunk => run.end += 1,
            _ => runs.push(chunk..chunk + 1),
        }
    }
    runs
}
