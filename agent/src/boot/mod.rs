//! `lifeboot boot`: starts a machine from its backup, and moves it onto its own disks when they are home.
//!
//! | state | comes from | what is done |
//! |---|---|---|
//! | checked | | QEMU is there, and no machine of an earlier run still uses the sockets; a failure costs nothing |
//! | serving | the disks are found, opened and served, as by `live-restore` | QEMU starts, as our child |
//! | running | QEMU runs | disks come home behind it; each that is home is moved (`crate::pivot`) |
//! | home | every disk was moved | the service ends; we stay as QEMU's parent |
//! | asked to end | Ctrl-C, SIGTERM, SIGHUP | the guest is asked to power down; after `--shutdown-timeout`, or when asked again, QEMU is told to quit; then, or when asked a third time, it is killed |
//! | ended | QEMU ended | what is not home is parked; the same command goes on |
//!
//! Stdin, stdout and the terminal are QEMU's: nothing of ours is read or drawn there. What we say goes to stderr, in lines.
//! QEMU has a process group of its own, so that a Ctrl-C or the hangup of a terminal reaches us alone; unless it reads from the
//! terminal (`machine::needs_terminal`), which only whoever is in front of it may.
//! The sockets stand where the next run, or `live-restore` after a `kill -9` of this one, finds them again: a machine whose
//! agent died waits there for another.

mod machine;
mod note;
mod qemu;
mod sockets;
mod watch;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nbd_server::args::parse_time;
use nbd_server::{LateRequests, ListenAddress, ServerOptions};
use repository::Repository;

use crate::cli::{Context, Failure, Interrupt, Outcome, UsageError, Verb};
use crate::live_restore::{SessionArgs, SessionRecord, StateDir, Until, ask_status, paths, start};
use crate::pivot::Aio;
use machine::Machine;
use note::{Origin, Sought};
pub(crate) use sockets::NOTE as MACHINE_NOTE;
use sockets::Sockets;
use watch::BootWatcher;

/// Start a machine from its backup at once, and move it onto its own disks when they are home
///
/// Does what live-restore does, and runs QEMU with the drives: the machine boots at once from the backup, its disks are
/// copied home while it runs, and then QEMU is moved onto the targets themselves, without the guest's noticing. Lifeboot
/// stays until QEMU ends. What follows -- is given to QEMU: memory, processors, network, display, anything but these disks.
///
/// Where QEMU ends before all is home, the session is parked: the same command goes on. Ctrl-C and SIGTERM ask the guest
/// to power down, once more (a second later, or more) tells QEMU to quit, and a third time kills it. A QEMU that reads from the terminal takes its Ctrl-C
/// itself: with -nographic it is the guest's; with -serial stdio it ends QEMU at once, unless the chardev has signal=off. Once the machine was moved, start it from the targets like any other.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "\
lifeboot boot [OPTIONS] <SNAPSHOT> <[DISK=]TARGET>...
                     [-- <QEMU ARGUMENTS>...]",
    after_help = "\
Examples:
  lifeboot boot -r /backup web01@latest /var/lib/vm/web01.raw \\
      -- -m 4G -smp 2 -nic user -nographic
  lifeboot boot -r /backup db@latest \\
      root=/dev/vg/db-root data=/dev/vg/db-data -- -m 16G -display none"
)]
pub struct Args {
    /// What to restore: GROUP@TIME[/DISK] or GROUP@latest[/DISK]
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,

    /// Where to: a raw file, or a block device. With several, one for each disk; the machine has them in the snapshot's order
    #[arg(value_name = "[DISK=]TARGET", required = true)]
    targets: Vec<PathBuf>,

    /// QEMU's program; qemu-system-ARCH of this machine if not given
    #[arg(long, value_name = "PROGRAM", default_value = qemu::default_program())]
    qemu: PathBuf,

    /// The device of each disk, with its properties; `none` leaves the devices to QEMU's arguments, which use the drives
    /// `lifeboot`, or `lifeboot0`, `lifeboot1` and so on
    #[arg(long, value_name = "MODEL", default_value = "virtio-blk-pci")]
    device_model: String,

    /// How QEMU does the I/O of the targets, once it was moved there
    #[arg(long, value_name = "WAY")]
    aio: Option<Aio>,

    /// How long a guest that was asked to power down may take
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    shutdown_timeout: Duration,

    /// QEMU's arguments
    #[arg(last = true, value_name = "QEMU ARGUMENTS")]
    arguments: Vec<OsString>,

    // Last: its last heading is over all that follows.
    #[command(flatten)]
    session: SessionArgs,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let Self { snapshot, targets, qemu, device_model, aio, shutdown_timeout, session, arguments } = self;
        if let Some(argument) = qemu::argument_that_cannot_be(&arguments) {
            return Err(UsageError::new(format!(
                "QEMU's argument {argument} cannot be given here: lifeboot stays as QEMU's parent"
            ))
            .into());
        }
        let paths = paths(&targets)?;
        for path in &paths {
            let state = session.state_of(path)?;
            let record = state.record();
            let session = record.as_ref().ok().and_then(|record| Some(&*record.as_ref()?.session));
            check_no_machine_of(path, session, state.path())?;
            check_nobody_waits(&state, record?.filter(SessionRecord::was_begun).as_ref(), path)?;
        }
        let program = qemu::check(&qemu)?;
        let sockets = Sockets::of(paths[0])?;
        let accelerator = qemu::accelerator(&program, &arguments, sockets.dir());
        let interrupt = context.interrupt()?;
        // A session that is wholly home does without it.
        let path = context.repository_path()?;
        let repository = Repository::open(&path);
        let listen = vec![ListenAddress::Unix(sockets.nbd())];
        let server = ServerOptions { late_requests: LateRequests::Leave, ..ServerOptions::default() };
        let order = session.order(snapshot, targets, listen, server, true)?;
        // A signal is for the guest first: the service ends when QEMU has.
        let running = start(&order, repository, context, &Interrupt::default())?;
        let origin = Origin::of(&path, order.state.as_deref(), &order.fallbacks);
        let machine = Machine::new(program, accelerator, device_model, arguments, sockets, origin);
        let mut watcher = BootWatcher::new(context.output(), machine, interrupt, aio, shutdown_timeout);
        let ended = running.tell(Until::Told, &mut watcher)?;
        watcher.outlive(&ended)
    }
}

/// Fails where a machine of `boot` one of whose targets is `target`, or was, still runs, and waits for an agent if it has none.
///
/// # Errors
/// A [`Failure`] that says how it is gone on with.
pub(crate) fn check_no_machine(target: &Path) -> anyhow::Result<()> {
    check_none_has(&Sought::at(target)?)
}

/// The same of a machine that has the session in `dir`, too, wherever its target is.
///
/// # Errors
/// As there.
pub(crate) fn check_no_machine_of(target: &Path, session: Option<&str>, dir: &Path) -> anyhow::Result<()> {
    check_none_has(&Sought::at(target)?.with_session(session, dir))
}

fn check_none_has(sought: &Sought) -> anyhow::Result<()> {
    sockets::of_machines_with(sought).iter().try_for_each(|sockets| sockets.check_unused(sought))
}

/// Fails where another machine than one of `boot` may wait for an agent. Where there is an agent, it is refused by that.
fn check_nobody_waits(state: &StateDir, record: Option<&SessionRecord>, target: &Path) -> anyhow::Result<()> {
    match record.filter(|_| !matches!(ask_status(state.path()), Ok(Some(_)))) {
        Some(record) => state.check_nobody_waits(record, target, "boot it"),
        None => Ok(()),
    }
}

/// What to say where QEMU cannot be started.
fn cannot_start(program: &Path, error: impl Into<anyhow::Error>) -> Failure {
    Failure::new(
        format!("cannot start QEMU ({})", program.display()),
        "install QEMU's system emulator for this machine, or name one with --qemu",
    )
    .because(error)
}
