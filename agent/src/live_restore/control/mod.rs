//! What a running agent is asked from another terminal: one unix socket, `control.sock`, in each session's directory.
//!
//! Whoever connects sends one line of JSON, a [`Request`], and is answered with lines of JSON, each a [`Reply`]; the last one
//! is `done` or `failed`, and the connection is closed. docs/session.md has both for other programs.
//!
//! | module | what lives there |
//! |---|---|
//! | `request` | the types on the wire |
//! | `listen` | the socket, what bounds a peer, and what happens to one who goes away |
//! | `handlers` | what is done for each request |
//! | `ask` | the other end, for our own verbs |
//!
//! # Adding a request
//! 1. A variant of [`Request`], with what it needs to be told.
//! 2. An arm in `handlers::answer` that calls an `async fn(…, &Asked) -> anyhow::Result<T>` in the module of its subject; `T` is
//!    what `done` carries. [`Asked`] gives the disk that was asked about ([`Asked::disk`]: session, engine handles,
//!    record, state directory, fetching threads), and the whole agent ([`Asked::service`]: all disks, the I/O engine,
//!    whether it ends).
//! 3. The verb calls [`ask()`], or [`ask_telling`] where it shows progress, or `ask_unless_interrupted` where its handler gives up when it is
//!    not wanted any more. An error that carries a [`crate::cli::Failure`] reaches
//!    the other end with its advice.
//!
//! # What a handler may rely on
//! - It runs as a task of its own on the control's one thread: **it must not block**. Work on disks or the repository goes
//!   through [`Asked::blocking`]; what needs a `LiveDevice` makes one there, inside `service.engine.run`.
//! - It runs to its end though its requester has gone away. One that is worth nothing then waits for
//!   [`Asked::abandoned`] and leaves.
//! - The agent's end waits for it, before the sessions are parked. So it looks at `asked.service().check_ending()`
//!   between steps, and gives up in an orderly way. A repository that is dead lets nothing give up: work that needs one, and
//!   may be cut off at any point, goes through [`Asked::blocking_on_repository`], and is left behind after a while.
//! - [`Asked::progress`] never waits: a requester who does not read misses some.

mod ask;
mod handlers;
mod listen;
mod request;

pub(crate) use ask::ask_unless_interrupted;
pub use ask::{ask, ask_status, ask_telling};
pub(super) use ask::{connect, is_gone, silent};
pub(crate) use listen::Asked;
pub(super) use listen::{Control, Tasks, patiently};
pub(super) use request::TakeOver;
pub use request::{LimitChanged, PivotProgress, Reply, Request, Strip};

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

pub(super) const SOCKET: &str = "control.sock";

/// The path of the socket through a descriptor of its directory: a unix socket's address holds 108
/// bytes, and a target's path may be longer.
fn short_path(dir: &Path) -> io::Result<(File, PathBuf)> {
    let dir = File::open(dir)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()));
    Ok((dir, path))
}
