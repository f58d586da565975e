//! The lease of a live-restore: while it needs its snapshot, the repository says so, and nobody removes it.
//!
//! A lease is left when a session begins to be served, or goes on, renewed once a day, and removed when the disk is home or the session
//! is discarded. A parked session's lease stays, and ends by itself a week after it was renewed last. Where it stands is kept
//! beside the session (`lease.json`), for `discard`, which is told of no repository.
//!
//! A session may be copied, with its target: then two need the snapshot, and neither gives up the other's lease. So the note also says
//! what directory it was made in. One that was copied along names another's lease: that one is left alone, and the copy leaves one
//! under an id of its own.
//!
//! A repository may only be read, or be away: that is said once, and everything goes on. So all of it is done by a thread of its own,
//! which no guest waits for.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::{SignedDuration, Timestamp};
use parking_lot::{Condvar, Mutex};
use repository::{Lease, Repository, SnapshotName};
use serde::{Deserialize, Serialize};

use super::identity::name_of_directory;
use super::parts::{id_text, new_id};
use super::service::ServedDisk;
use super::state_dir;
use crate::live::{Phase, Session};

/// Where the lease stands, beside the session.
pub(super) const FILE: &str = "lease.json";
const VERSION: u32 = 2;
/// How old a lease is when it is renewed: well below a third of its span, for hosts that are down over a weekend.
const RENEWED_AFTER: SignedDuration = SignedDuration::from_hours(24);
/// How soon one that could not be written is tried again.
const TRIED_AFTER: Duration = Duration::from_secs(600);
/// How long the end waits for a lease that is being written or removed.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked whether a disk is home.
const LOOKED_AFTER: Duration = Duration::from_secs(1);

/// Where a session has left its lease.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    version: u32,
    /// The id that the lease is left under: the session's, or a copy's own.
    session: String,
    repository: PathBuf,
    /// What the session's directory is, where it was left.
    directory: Option<String>,
}

/// Leaves, renews and removes the leases of an agent's disks, until it is dropped.
pub(super) struct LeaseKeeper(Arc<(Mutex<State>, Condvar)>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Tending,
    Ending,
    Ended,
}

impl LeaseKeeper {
    /// For the disks that are not home yet.
    ///
    /// # Errors
    /// Where no thread can be had.
    pub(super) fn start(repository: &Repository, disks: &[ServedDisk]) -> anyhow::Result<Self> {
        let mut leased: Vec<Leased> = disks.iter().filter_map(|disk| Leased::of(repository, disk)).collect();
        let state = Arc::new((Mutex::new(State::Tending), Condvar::new()));
        let shared = Arc::clone(&state);
        let tend = move || {
            loop {
                leased.retain_mut(Leased::tend);
                let mut state = shared.0.lock();
                if leased.is_empty() || *state == State::Ending {
                    *state = State::Ended;
                    shared.1.notify_all();
                    return;
                }
                shared.1.wait_for(&mut state, LOOKED_AFTER);
            }
        };
        let thread = std::thread::Builder::new().name("leases".to_owned()).spawn(tend);
        thread.context("cannot start a thread for the leases")?;
        Ok(Self(state))
    }
}

impl Drop for LeaseKeeper {
    fn drop(&mut self) {
        let mut state = self.0.0.lock();
        if *state == State::Tending {
            *state = State::Ending;
            self.0.1.notify_all();
        }
        let deadline = Instant::now() + END_PATIENCE;
        // A repository that hangs does not hold up the end.
        while *state != State::Ended && !self.0.1.wait_until(&mut state, deadline).timed_out() {}
    }
}

/// A disk that has a lease, or should have.
struct Leased {
    repository: Repository,
    session: Arc<Session>,
    /// The session's directory.
    state: PathBuf,
    lease: Lease,
    is_left: bool,
    /// When one that could not be written was tried last.
    tried: Option<Instant>,
    has_warned: bool,
}

impl Leased {
    fn of(repository: &Repository, disk: &ServedDisk) -> Option<Self> {
        let record = &disk.record;
        let (snapshot, name): (SnapshotName, _) = (record.snapshot.parse().ok()?, record.disk.parse().ok()?);
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let id = lease_id(disk.state.path(), &record.session);
        let lease = Lease::new(&id, &snapshot, name, &host, Timestamp::now());
        Some(Self {
            repository: repository.clone(),
            session: Arc::clone(disk.session()),
            state: disk.state.path().to_owned(),
            lease,
            is_left: false,
            tried: None,
            has_warned: false,
        })
    }

    /// Does what is due; false when nothing is any more.
    fn tend(&mut self) -> bool {
        match self.session.phase() {
            Phase::Filling => {
                self.renew();
                true
            }
            // It may be gone on with. While it is being parked, what is home may become stable yet.
            Phase::Parked if !self.session.is_all_stable() => true,
            // An agent that ends as soon as the disk is home parks before anybody looks again.
            Phase::Complete | Phase::Parked => {
                release(&self.state);
                false
            }
            Phase::Poisoned => false,
        }
    }

    fn renew(&mut self) {
        let now = Timestamp::now();
        let is_due = !self.is_left || now.duration_since(self.lease.renewed) >= RENEWED_AFTER;
        if !is_due || self.tried.is_some_and(|tried| tried.elapsed() < TRIED_AFTER) {
            return;
        }
        let lease = self.lease.renewed(now);
        match self.leave(&lease) {
            Ok(()) => {
                (self.lease, self.is_left, self.tried) = (lease, true, None);
            }
            Err(error) => {
                self.tried = Some(Instant::now());
                if !self.has_warned {
                    self.has_warned = true;
                    tracing::warn!(
                        error = format_args!("{error:#}"),
                        "the repository cannot be told that {} is needed: let nobody remove it until the restore is complete",
                        lease.snapshot
                    );
                }
            }
        }
    }

    fn leave(&self, lease: &Lease) -> anyhow::Result<()> {
        // First where it stands: what is left in the repository can then be found again.
        let repository = std::path::absolute(self.repository.path())?;
        let session = lease.session.clone();
        let kept = Kept { version: VERSION, session, repository, directory: name_of_directory(&self.state) };
        keep(&self.state, &kept).context("cannot note where the lease is left")?;
        Ok(self.repository.keep_lease(lease)?)
    }
}

fn keep(state: &Path, kept: &Kept) -> io::Result<()> {
    if read(state).is_some_and(|there| there == *kept) {
        return Ok(());
    }
    state_dir::replace(&state.join(FILE), kept)
}

/// What is noted in a session's directory; nothing where that is not understood.
fn read(state: &Path) -> Option<Kept> {
    let kept: Kept = serde_json::from_slice(&std::fs::read(state.join(FILE)).ok()?).ok()?;
    (kept.version == VERSION).then_some(kept)
}

impl Kept {
    /// Whether it was noted in this directory, and not in one that this is a copy of.
    fn is_of(&self, state: &Path) -> bool {
        self.directory.is_some() && self.directory == name_of_directory(state)
    }
}

/// The id under which the session that is kept in this directory leaves its lease.
fn lease_id(state: &Path, session: &str) -> String {
    match read(state) {
        Some(kept) if kept.is_of(state) => kept.session,
        Some(_) => id_text(new_id()),
        None => session.to_owned(),
    }
}

/// Removes the lease of the session that is kept in this directory, and the note of where it stands. Where that cannot be done the
/// lease ends by itself; so does one that was left from elsewhere.
pub(super) fn release(state: &Path) {
    let Some(kept) = read(state) else { return };
    if kept.is_of(state) {
        let removed =
            Repository::open(&kept.repository).and_then(|repository| repository.remove_lease(&kept.session));
        if let Err(error) = removed {
            tracing::warn!(%error, "the session's lease stays in the repository, and ends by itself within a week or so");
        }
    }
    let _ = std::fs::remove_file(state.join(FILE));
}
