//! Which way of doing I/O this process uses, chosen once at its start, and the runtime that each
//! thread of the data plane runs on.

mod local;
mod probe;

use std::fmt;
use std::future::Future;
use std::str::FromStr;

pub(crate) use local::{
    InFlight, closing, has_ring, register_pool, registered_pool, thread_pool_of_buffers,
    thread_pool_of_buffers_if_any,
};

use crate::{Error, ErrorKind, Result, open_files::check_open_files};

/// So many files a thread's runtime has open at most, ring included.
const RUNTIME_FILES: usize = 6;
/// With fewer than that, for one runtime and what it is to work on, nothing is begun.
const LEAST_FILES: usize = 2 * RUNTIME_FILES;

/// The way of doing I/O that somebody asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum IoEngine {
    /// `io_uring` where the kernel allows it, threads otherwise.
    #[default]
    Auto,
    /// `io_uring`, or an error.
    Uring,
    /// A pool of threads with blocking system calls.
    Threads,
}

impl FromStr for IoEngine {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "uring" => Ok(Self::Uring),
            "threads" => Ok(Self::Threads),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                format_args!("there is no I/O engine {name:?}: there are auto, uring and threads"),
            )),
        }
    }
}

impl fmt::Display for IoEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Threads => "threads",
        })
    }
}

/// The way of doing I/O that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Engine(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Uring(probe::Setup),
    Threads,
}

impl Engine {
    /// The pool of threads, which needs nothing of the kernel.
    pub const THREADS: Self = Self(Kind::Threads);

    /// Chooses the engine: for `uring` and `auto` a ring is made and a read is done on it, because a ring may
    /// be forbidden by `kernel.io_uring_disabled` or a seccomp filter, or lack what we need.
    ///
    /// # Errors
    /// `Unsupported` where `io_uring` was asked for by name and the kernel refuses it. `auto` warns instead,
    /// and falls back to threads. Where this process may not open the files that even one event loop needs.
    pub fn choose(wish: IoEngine) -> Result<Self> {
        check_open_files(LEAST_FILES)?;
        if wish == IoEngine::Threads {
            return Ok(Self::THREADS);
        }
        match probe::probe() {
            Ok(setup) => Ok(Self(Kind::Uring(setup))),
            Err(source) if wish == IoEngine::Uring => {
                Err(Error::io("io_uring cannot be used here", source).with_kind(ErrorKind::Unsupported))
            }
            Err(error) => {
                tracing::warn!(%error, "io_uring cannot be used here; a pool of threads does the I/O, more slowly");
                Ok(Self::THREADS)
            }
        }
    }

    /// Fails where this process may not open the files that so many threads that [run](Self::run) at once need, and `others` files
    /// beside.
    ///
    /// # Errors
    /// One that names the limit.
    pub fn check_open_files(threads: usize, others: usize) -> Result<()> {
        check_open_files(threads.saturating_mul(RUNTIME_FILES).saturating_add(others))
    }

    /// `uring` or `threads`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self.0 {
            Kind::Uring(_) => "uring",
            Kind::Threads => "threads",
        }
    }

    /// Whether operations go through a ring.
    #[must_use]
    pub const fn is_uring(&self) -> bool {
        matches!(self.0, Kind::Uring(_))
    }

    /// Runs `future` on the calling thread until it is done. `tokio::task::spawn_local` and tokio's sockets
    /// and timers work inside.
    ///
    /// What is asked of the ring is handed to the kernel whenever the thread has nothing else to do: a loop of
    /// `yield_now`, or long computing, holds all of it up.
    ///
    /// Before it returns, operations still in flight on this thread's ring are waited for, and new ones are
    /// refused ([`ErrorKind::Shutdown`]), so that no task left behind can have its buffer freed under the
    /// kernel. Tasks that are then still running are dropped.
    ///
    /// # Panics
    /// Inside another runtime, or where the system has no descriptors left for one: [`Engine::try_run`] fails there.
    pub fn run<F: Future>(&self, future: F) -> F::Output {
        self.try_run(future).expect("the system has descriptors for one more event loop")
    }

    /// [Runs](Self::run) `future` where many files are open already.
    ///
    /// # Errors
    /// Where this process may not open the files that an event loop needs: nothing of `future` was run.
    ///
    /// # Panics
    /// Inside another runtime.
    pub fn try_run<F: Future>(&self, future: F) -> Result<F::Output> {
        check_open_files(RUNTIME_FILES)?;
        if let Kind::Uring(setup) = self.0 {
            match setup.runtime() {
                Ok(runtime) => {
                    // Declared after the runtime, so that it ends first, also when `future` panics.
                    let ring = local::RingScope::enter();
                    return Ok(runtime.block_on(async {
                        let output = future.await;
                        ring.drain().await;
                        output
                    }));
                }
                Err(error) => {
                    tracing::error!(%error, "no ring for this thread; a pool of threads does its I/O");
                }
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::io("an event loop cannot be had", error))?;
        let _scope = local::PoolScope;
        Ok(tokio::task::LocalSet::new().block_on(&runtime, future))
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
