//! Moves a running QEMU's drive from our NBD export onto the target itself, without the guest's noticing. Then nothing of
//! ours is in its path any more.
//!
//! | module | what lives there |
//! |---|---|
//! | `qmp` | QEMU's monitor: lines of JSON on a unix socket |
//! | `export` | whether an NBD node points to our export |
//! | `graph` | QEMU's block nodes: which drive it is, and where it is |
//! | `opened` | whether it is the very target that stands at its path, and that QEMU has open |
//! | `moving` | the move itself, and how it is undone |
//!
//! # Two ways
//! - Where a raw node with a name stands above the NBD node (QEMU's arguments as `live-restore` prints them): `blockdev-reopen`
//!   gives that node another child, in one step.
//! - Elsewhere (`-drive file=nbd:…`, whose nodes QEMU names by itself and does not reopen; a device right on the NBD node): a
//!   `blockdev-mirror` that copies nothing (`sync=none`), since both ends are one file. While it runs each
//!   write of the guest goes to both, one after the other, and its end puts the target in the place of the old nodes.
//!
//! # Order, and why
//! 1. The session is complete: every block is on the target, synced, and noted. Nothing but guests' writes changes it.
//! 2. The target's path leads to the very file that we have open: QEMU opens it by that. That a move was begun, on stable storage. Then QEMU
//!    opens the target; it is the same file that we have open, and large enough; nobody uses that node yet. Where that fails the note goes,
//!    once QEMU does not have the target open.
//! 3. `handed_over` in the session's record, on stable storage. Only from now on may QEMU write
//!    past us; a session that is marked is never believed about what the guest wrote, nor checked against the snapshot.
//! 4. QEMU moves the drive. It waits for the requests that are under way, so we go on answering them.
//! 5. QEMU says that the drive is on the target, and the NBD node, whose connection is cut first, is gone: that is noted (`live_restore::moved`). Nothing of ours
//!    writes to the target after that: a last sync, the journal's last checkpoint, the end.
//!
//! | ends in between | where the machine is | what the next start does |
//! |---|---|---|
//! | before 3 | on the export, and waits: from 2 on nobody gives the session up while QEMU has the target open | goes on as ever; a node that QEMU opened in vain is removed by the next attempt |
//! | after 3, before QEMU has done 4 | on the export, and waits | with `--qmp`: asks QEMU, takes the mark back, goes on; not where another program has locked the target, whose machine it is then. Without: refuses, and says so |
//! | while QEMU does 4 | QEMU waits for its requests to be answered, and does not answer us | with `--qmp`: serves with the mark; QEMU then ends 4, and says so |
//! | after 4 | on the target | with `--qmp`: removes the NBD node, and says that it is done. Without: refuses |
//!
//! The mark is taken back only when QEMU says that the drive is on the export. While it says nothing, it is asked again,
//! and we go on serving: both ways lead to the same bytes on the target, and a drive that was moved asks us nothing.
//!
//! The node that QEMU has on the target is known by its name, and that is the session's. So a drive that is on it is taken to be on
//! the target only while QEMU's process has that very file open: a copy of a session has the name too.

mod export;
mod graph;
mod moving;
mod opened;
mod qmp;
#[cfg(test)]
mod tests;

use std::fs::Metadata;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use nbd_server::ListenAddress;

pub use moving::{Moved, Notes, Trouble, at_home, carry_home, whereabouts};
pub use qmp::{Monitor, Qmp, QmpError, is_there};

/// Which drive of which QEMU.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Drive {
    /// The QMP socket: a unix socket's path, absolute.
    pub qmp: PathBuf,
    /// The device's id, its QOM path, the drive's name, or a node's name; `None` for the one on our export.
    pub device: Option<String>,
    /// How QEMU is to do the target's I/O; its own default where nothing is said.
    pub aio: Option<Aio>,
}

/// QEMU's ways of doing a file's I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Aio {
    /// A pool of threads
    Threads,
    /// Linux's older interface; needs a drive that goes around the page cache
    Native,
    /// io_uring
    IoUring,
}

/// What is moved home: one disk of ours.
#[derive(Clone, Debug)]
pub struct Home<'a> {
    /// The target's absolute path.
    pub target: &'a Path,
    /// The very file or device that is the target: its path may have become another's.
    pub file: Metadata,
    /// By which path below `/proc` an agent has it open that serves it; `None` where none does.
    pub held: Option<PathBuf>,
    /// The disk's size in bytes.
    pub size: u64,
    /// Where it is served.
    pub addresses: &'a [ListenAddress],
    /// The name of its export, without the epoch.
    pub export: &'a str,
    /// The session's epoch: `NAME@EPOCH` names the export too. A drive of an older epoch is not on it.
    pub epoch: u64,
    /// Whether the empty name means this export.
    pub is_default: bool,
    /// The session's id: names QEMU's new nodes.
    pub session: &'a str,
}

/// Where a drive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// On our export.
    Export,
    /// On the target.
    Target,
    /// On our export, while something else of this QEMU uses the target: another drive, or a job that was cut short.
    Both,
    /// This QEMU has no such drive.
    Neither,
}

/// Of the session's id so much stands in the names of nodes, which have 31 characters at most.
const TAG_CHARS: usize = 12;

impl Home<'_> {
    fn is_device(&self) -> bool {
        self.file.file_type().is_block_device()
    }

    fn node(&self, kind: &str) -> String {
        let tag: String = self.session.chars().take(TAG_CHARS).collect();
        format!("lifeboot-{kind}-{tag}")
    }

    /// The name of QEMU's node on the target.
    fn file_node(&self) -> String {
        self.node("home")
    }

    /// The name of the raw node above it, where the old one cannot be reopened.
    fn raw_node(&self) -> String {
        self.node("raw")
    }

    /// The name of the job.
    fn job(&self) -> String {
        self.node("move")
    }
}
