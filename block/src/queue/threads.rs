//! Operations on a pool of threads that the whole process shares: for kernels that lack or forbid
//! `io_uring`, and for the few calls that have no entry in a ring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Semaphore, oneshot};

use super::inline::{perform_control, perform_transfer};
use super::{Control, Queue, Transfer};
use crate::AlignedBuf;

/// The most threads: how deep a disk's queue gets.
const THREADS_MAX: usize = 32;
/// The most operations that wait for a thread; more than this wait before they are queued.
const QUEUED_MAX: usize = 1024;
/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(10);

/// The pool of threads.
pub(crate) struct Threads;

impl Queue for Threads {
    async fn transfer(
        &self,
        file: &Arc<OwnedFd>,
        transfer: Transfer,
        buf: AlignedBuf,
    ) -> (io::Result<usize>, AlignedBuf) {
        let file = Arc::clone(file);
        // The job owns the buffer and the descriptor: if nobody waits any more they are dropped when it ends.
        run_on_a_thread(move || {
            let mut buf = buf;
            let result = perform_transfer(file.as_fd(), &transfer, &mut buf);
            (result, buf)
        })
        .await
    }

    async fn control(&self, file: &Arc<OwnedFd>, control: Control) -> io::Result<()> {
        let file = Arc::clone(file);
        run_on_a_thread(move || perform_control(file.as_fd(), control)).await
    }
}

/// Runs `job` on a thread of the pool.
pub(crate) async fn run_on_a_thread<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    let permit = QUEUED.acquire().await.expect("the semaphore is never closed");
    let (reply, answer) = oneshot::channel();
    POOL.push(Box::new(move || {
        // Nobody waiting is no failure: the future was dropped.
        let _ = reply.send(job());
    }));
    let result = answer.await.expect("a job on the pool does not panic");
    drop(permit);
    result
}

type Job = Box<dyn FnOnce() + Send>;

struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

static POOL: Pool =
    Pool { state: Mutex::new(State { jobs: VecDeque::new(), threads: 0, idle: 0 }), work: Condvar::new() };
static QUEUED: Semaphore = Semaphore::const_new(QUEUED_MAX);

impl Pool {
    fn push(&'static self, job: Job) {
        let mut state = self.state.lock();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            self.work.notify_one();
            return;
        }
        if state.threads == THREADS_MAX {
            return; // Whoever is done first takes it.
        }
        let spawned = std::thread::Builder::new().name("block-io".into()).spawn(|| self.work());
        match spawned {
            Ok(_) => state.threads += 1,
            Err(error) if state.threads > 0 => tracing::debug!(%error, "no further thread for I/O"),
            Err(error) => {
                tracing::warn!(%error, "no thread for I/O; the caller blocks instead");
                let job = state.jobs.pop_back().expect("the job was pushed above, under this lock");
                drop(state);
                job();
            }
        }
    }

    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                parking_lot::MutexGuard::unlocked(&mut state, job);
                continue;
            }
            state.idle += 1;
            let timed_out = self.work.wait_for(&mut state, IDLE).timed_out();
            state.idle -= 1;
            if timed_out && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}
