//! Who has a target: its lock, and the agent that answers for it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::fs::FlockOperation;

use super::control;
use super::state_dir::absolute;
use crate::cli::{Failure, Interrupt};
use crate::in_use;
use crate::status::Status;

/// How long a successor waits for the operations that a killed agent left in flight.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(30);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Refuses where an agent serves this session: there is no need to try anything then.
pub(super) fn check_unserved(path: &Path, state: &Path) -> anyhow::Result<()> {
    match control::ask_status(state) {
        Ok(Some(by)) => Err(served_by(path, &by)),
        _ => Ok(()),
    }
}

/// A target is in use by this agent.
fn served_by(path: &Path, by: &Status) -> anyhow::Error {
    Failure::new(
        format!(
            "the target {} is in use by the agent with the process id {}, which restores {}",
            path.display(),
            by.pid.unwrap_or_default(),
            by.snapshot
        ),
        "`lifeboot status TARGET` shows how far it is; end it (SIGTERM parks it) before another one begins",
    )
    .into()
}

/// A target is locked, and no agent answers for it.
fn locked(path: &Path, target: impl AsFd) -> anyhow::Error {
    let file = target.as_fd().try_clone_to_owned().map(File::from);
    file.ok().and_then(|file| locked_by_lifeboot(path, &file)).unwrap_or_else(|| {
        Failure::new(
            format!("the target {} is in use: another program has locked it", path.display()),
            "end that program (`lslocks` names it), or name another target",
        )
        .into()
    })
}

fn locked_by_lifeboot(path: &Path, target: &File) -> Option<anyhow::Error> {
    let pid = in_use::other_lifeboot(target)?;
    let path = path.display();
    let failure = Failure::new(
        format!(
            "the target {path} is in use by another lifeboot, the process {pid}, which does not serve it, or not yet"
        ),
        format!(
            "if that is just starting, `lifeboot status {path}` shows in a moment how far it is; if it does something else with the \
             target, run this command again when it has ended"
        ),
    );
    Some(failure.into())
}

/// That another lifeboot serves this target or has locked it, where that can be told.
pub(super) fn in_use_by_another(path: &Path, state: &Path) -> Option<anyhow::Error> {
    let path = absolute(path).ok()?;
    if let Ok(Some(by)) = control::ask_status(state) {
        return Some(served_by(&path, &by));
    }
    // A FIFO in its place must not block us.
    let target = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).ok()?;
    locked_by_lifeboot(&path, &target)
}

/// Takes the lock. An agent that is alive is told of at once; what a dead one left in flight is waited for.
pub(super) fn lock(
    target: impl AsFd,
    path: &Path,
    state: &Path,
    patience: Duration,
    interrupt: &Interrupt,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut said = false;
    loop {
        match rustix::fs::flock(&target, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(errno) => {
                return Err(io::Error::from(errno))
                    .with_context(|| format!("cannot lock the target {}", path.display()));
            }
        }
        let by = control::ask_status(state).ok().flatten();
        if let Some(by) = by {
            return Err(served_by(path, &by));
        }
        if begun.elapsed() >= patience {
            return Err(locked(path, &target));
        }
        if !said {
            said = true;
            tracing::info!(target = %path.display(), "waiting for the target's lock: operations of an agent that ended are still in flight");
        }
        interrupt.check()?;
        std::thread::sleep(LOCK_RETRY);
    }
}
