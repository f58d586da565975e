//! Keeps what a guest reads while it starts, with the group in the repository, for the next start.
//!
//! A trace is kept once the guests of a session that is new have settled; of one that ends before, only where the group
//! has none yet. What reads most of a disk is no start (a copy, a check), and what reads next to nothing tells nothing:
//! neither takes the place of what is there. By hand all of that can be overruled: `lifeboot trace`.

use std::sync::mpsc;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use repository::{DiskName, GroupName, Repository, SnapshotName, Trace};
use serde::{Deserialize, Serialize};

use crate::live::{DiskLayout, Recorded, Session};

/// Fewer chunks tell nothing.
const FEWEST_CHUNKS: usize = 8;
/// How long the end waits for traces to be kept.
const LAST_PATIENCE: Duration = Duration::from_secs(3);

/// Keeps the trace of one disk.
pub(crate) struct TraceKeeper {
    repository: Repository,
    group: GroupName,
    disk: DiskName,
    snapshot: Timestamp,
    layout: DiskLayout,
    data_chunks: u64,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guests' start is being recorded.
    Recording,
    /// Somebody asked for a recording.
    ByHand,
    /// There is nothing more to do.
    Done,
}

/// What a trace was kept of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptTrace {
    /// The group that it is kept with.
    pub group: String,
    /// The disk.
    pub disk: String,
    /// How many chunks were asked for.
    pub chunks: usize,
    /// From the first read to the last, in milliseconds.
    pub millis: u64,
}

/// Has traces kept as the end begins. A repository that does not answer holds that up for a moment only: then `look` is left
/// behind on its thread.
pub(crate) fn look_for_the_last_time(look: impl FnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel::<()>();
    let look = move || {
        look();
        drop(done);
    };
    let thread = std::thread::Builder::new().name("traces".to_owned()).spawn(look);
    match thread.map(|_| is_done.recv_timeout(LAST_PATIENCE)) {
        Ok(Err(mpsc::RecvTimeoutError::Timeout)) => {
            tracing::warn!("the repository does not answer: the boot trace may not be kept");
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "no thread can be had: the boot trace is not kept"),
    }
}

impl TraceKeeper {
    /// For a disk of `snapshot` of whose chunks `data_chunks` are not zeroes. Where the guests have `started` before, as those
    /// of a session that was resumed have, nothing is recorded of them unless somebody asks.
    pub(crate) fn new(
        repository: Repository,
        snapshot: &SnapshotName,
        disk: DiskName,
        layout: DiskLayout,
        data_chunks: u64,
        started: bool,
    ) -> Self {
        let state = if started { State::Done } else { State::Recording };
        Self {
            repository,
            group: snapshot.group().clone(),
            disk,
            snapshot: snapshot.time(),
            layout,
            data_chunks,
            state: Mutex::new(state),
        }
    }

    /// Keeps the trace once the guests have settled, or the session is ending. It may wait for the repository: for a
    /// thread that may.
    pub(crate) fn look(&self, session: &Session, is_ending: bool) {
        let mut state = self.state.lock();
        if *state != State::Recording {
            return;
        }
        let recorded = session.recorded();
        if recorded.is_settled || is_ending {
            *state = State::Done;
            self.keep_if_useful(&recorded);
        }
    }

    /// Begins to record anew, for somebody who asked.
    pub(crate) fn begin(&self, session: &Session) {
        *self.state.lock() = State::ByHand;
        session.begin_recording();
    }

    /// Ends the recording and keeps it, for somebody who asked.
    ///
    /// # Errors
    /// Where nothing was read, or the repository cannot be written.
    pub(crate) fn take(&self, session: &Session) -> anyhow::Result<KeptTrace> {
        // One that has nothing yet goes on.
        anyhow::ensure!(
            !session.recorded().chunks.is_empty(),
            "no guest has read anything of the disk since the recording began"
        );
        session.end_recording();
        let recorded = session.recorded();
        *self.state.lock() = State::Done;
        self.keep(&recorded)
    }

    fn keep_if_useful(&self, recorded: &Recorded) {
        let count = recorded.chunks.len();
        let is_most = count as u64 > self.data_chunks / 2;
        if count < FEWEST_CHUNKS || is_most {
            tracing::debug!(count, self.data_chunks, "what was read is no start: no trace is kept");
            return;
        }
        let has_one = || self.repository.trace(&self.group, &self.disk).is_ok_and(|trace| trace.is_some());
        if !recorded.is_settled && has_one() {
            return;
        }
        match self.keep(recorded) {
            Ok(kept) => {
                tracing::info!(kept.chunks, kept.millis, "what the guest read while it started is kept")
            }
            // A repository that may only be read, say.
            Err(error) => tracing::info!(error = format_args!("{error:#}"), "the boot trace cannot be kept"),
        }
    }

    fn keep(&self, recorded: &Recorded) -> anyhow::Result<KeptTrace> {
        let millis = u64::try_from(recorded.time.as_millis()).unwrap_or(u64::MAX);
        let (disk, chunks) = (self.disk.clone(), recorded.chunks.iter().copied());
        let trace = Trace::new(disk, self.layout.size, self.snapshot, millis, self.layout.chunk_size, chunks);
        self.repository.keep_trace(&self.group, &trace)?;
        Ok(KeptTrace {
            group: self.group.to_string(),
            disk: self.disk.to_string(),
            chunks: recorded.chunks.len(),
            millis,
        })
    }
}
