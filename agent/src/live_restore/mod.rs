//! `lifeboot live-restore`: serves a snapshot's disk at once, and copies it home behind the guest.
//!
//! The first run makes the session; the same command again goes on with it, whatever ended the agent.
//!
//! | state | comes from | what is done |
//! |---|---|---|
//! | found | a session of the target, or none | the addresses are bound: one that cannot be had costs nothing |
//! | new | no session of the target | what `open` does, in its order; a failure takes back what was made; then serve |
//! | resumed | a session that was parked or killed | lock, wait for what a killed agent left in flight; check whose target it is; then serve |
//! | ready | the server listens | `ready` on stdout, systemd is told |
//! | complete | every block is home and synced | `complete`; it goes on serving, unless told to exit |
//! | settled | every block is home but what is damaged, no client is connected, and it was to exit when done | as parked; exit code 3 |
//! | complete, and the repository cannot be had | as resumed | served from the target alone, which is not checked against the disk map |
//! | parked | SIGTERM, Ctrl-C | nothing more is accepted; what is in flight ends; flush; checkpoint |

mod advice;
mod bound;
mod carrier;
mod control;
mod copied;
mod damage;
mod discarded;
mod distrust;
mod epoch;
mod fetching;
mod handover;
mod identity;
mod late;
mod lease;
mod look_ahead;
mod made;
mod metrics;
mod moved;
mod mover;
mod narrate;
mod open;
mod order;
mod original;
mod over;
mod parts;
mod pointer;
mod record;
mod remedy;
mod report;
mod rest;
mod room;
mod scrape;
pub(crate) mod serve;
pub(crate) mod service;
mod settle;
mod stamp;
mod state_dir;
mod stopped;
mod story;
mod stray;
mod take_over;
mod target;
mod target_lock;
mod turns;
mod wanted;
mod workers;

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use block::{Engine, IoEngine};
use nbd_server::args::{ListenArgs, parse_time};
use nbd_server::{LateRequests, ListenAddress, ServerOptions};
use repository::Repository;

use crate::cli::{Context, Outcome, Rate, UsageError, Verb};
use crate::live::SessionOptions;
use crate::pivot::{Aio, Drive};
use crate::source::SourceArgs;
use mover::Mover;
use narrate::Narrator;

pub(crate) use advice::shell_line;
pub(crate) use carrier::Carrier;
pub(crate) use control::Asked;
pub(crate) use control::ask_unless_interrupted;
pub use control::{LimitChanged, PivotProgress, Reply, Request, Strip, ask, ask_status, ask_telling};
pub use damage::{KeptDamage, kept_damage};
pub use handover::HandedOver;
pub use identity::TargetIdentity;
pub(crate) use identity::name_of_directory;
pub(crate) use narrate::qemu_arguments;
pub(crate) use order::{Order, paths};
pub(crate) use original::check_not_anothers;
pub(crate) use over::no_session_any_more;
pub(crate) use pointer::LeftBehind;
pub use record::SessionRecord;
#[cfg(test)]
pub(crate) use record::tests::record as a_record;
pub(crate) use report::damaged_ranges;
pub(crate) use rest::{Rest, check_identity, lock_target};
pub(crate) use serve::{Ended, Until, Watcher, start};
pub(crate) use service::{ServedDisk, Service};
pub(crate) use settle::ask_without_agent;
pub(crate) use stamp::changed_since_parked;
pub(crate) use state_dir::replace;
pub use state_dir::{DEFAULT_STATE_ROOT, StateDir, absolute};
pub(crate) use stopped::has_believable_live_file;
pub use stopped::stopped_status;
pub(crate) use wanted::base_of;

/// The name of the bitmap of what the guest wrote: `qemu:dirty-bitmap:lifeboot`.
pub const DIRTY_BITMAP: &str = "lifeboot";

/// Boot a machine from its backup at once, and copy its disks home while it runs
///
/// The disks are served over NBD as soon as the command says that it is ready: point QEMU at them with the
/// arguments that are printed. What the guest reads comes from the target where it is home already, else
/// from the repository; what it writes goes to the target and is never lost: the same command goes on after
/// a kill or a power cut. A TARGET is a raw file, made if it does not exist, or a block device. SIGTERM or
/// Ctrl-C parks the session.
///
/// A snapshot of several disks takes a TARGET for each, in its order or as DISK=TARGET; all of them are begun, or
/// none; with one disk DISK= may be left out, and a file with = in its name is ./NAME. Each disk is an export by its name (the first one by the empty name too), and a session with its own state.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot live-restore -r /backup web01@latest /var/lib/vm/web01.raw \\
      --listen unix:/run/web01.sock
  lifeboot live-restore -r /backup db@latest \\
      root=/dev/vg/db-root data=/dev/vg/db-data --listen unix:/run/db.sock
  lifeboot status /var/lib/vm/web01.raw
  lifeboot limit /var/lib/vm/web01.raw 20MiB")]
pub struct Args {
    /// What to restore: GROUP@TIME[/DISK] or GROUP@latest[/DISK]
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,

    /// Where to: a raw file, or a block device. With several, one for each disk
    #[arg(value_name = "[DISK=]TARGET", required = true)]
    targets: Vec<PathBuf>,

    /// Take the place of the agent that serves these targets, if there is one: its sockets and its sessions, with no error for
    /// guests whose QEMU has reconnect-delay. For a new version of lifeboot, or other options: the same command, and
    /// this. The other agent goes on where this one cannot take over
    #[arg(long)]
    take_over: bool,

    /// End when all disks are home, or all but what is damaged, and no client is connected
    #[arg(long)]
    exit_when_done: bool,

    /// Bring home only what guests ask for
    #[arg(long, conflicts_with = "exit_when_done")]
    no_background: bool,

    /// Move the machine home when all is there: QEMU, asked over this QMP socket, then uses the targets themselves, without
    /// the guest's noticing, and this command ends. Start QEMU with -qmp unix:SOCKET,server=on,wait=off
    #[arg(long, value_name = "SOCKET", conflicts_with = "exit_when_done")]
    qmp: Option<PathBuf>,

    /// With --qmp and one disk: the device (its id or QOM path), the drive or the node to be moved; the one on the export
    /// if none is named
    #[arg(long, value_name = "NAME", requires = "qmp")]
    device: Option<String>,

    /// With --qmp: how QEMU does the targets' I/O from then on
    #[arg(long, value_name = "WAY", requires = "qmp")]
    aio: Option<Aio>,

    #[command(flatten)]
    session: SessionArgs,

    // Last: its heading is over all that follows.
    #[command(flatten)]
    listen: ListenArgs,
}

/// The options of every verb that makes sessions and serves them.
#[derive(Debug, clap::Args)]
pub(crate) struct SessionArgs {
    /// Copy home no faster than this, in bytes a second (like 20MiB), all disks together; 0 is no limit. It is kept
    /// over seconds: the least that is copied at once is a chunk (128 KiB if not chosen otherwise). Guests are not
    /// limited. `lifeboot limit` changes it meanwhile
    #[arg(long, value_name = "RATE", default_value = "0")]
    limit: Rate,

    /// Overwrite a target that holds data and has no session. Without it a file must hold no data, and of a block
    /// device the first and last MiB and 256 samples between them must be zeroes
    #[arg(long)]
    force: bool,

    /// The target was copied or moved as a whole, together with its session: go on with it here. What it holds is
    /// checked all the same. Where sessions are kept with --state, copy that directory too and name the copy: the only session
    /// there that fits the target is taken for its own. Of several, name the directory of the one
    #[arg(long)]
    moved: bool,

    /// Keep sessions in this directory rather than beside a file target
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// Tell Prometheus how it goes, at unix:PATH or tcp:HOST:PORT: GET /metrics
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<ListenAddress>,

    /// How long a guest's read waits for a repository that is out of reach
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time)]
    source_timeout: Duration,

    /// How disks are read and written: auto, uring or threads
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    io_engine: IoEngine,

    /// Neither use the boot trace that is kept with the group nor record one
    #[arg(long)]
    no_trace: bool,

    /// Hold the background back so that 99 of 100 requests of guests that need nothing of the repository stay within
    /// this time, like 5ms; without it nothing holds it back for them
    #[arg(long, value_name = "TIME", value_parser = parse_latency)]
    guest_p99: Option<Duration>,
    /// A copy of the repository: a chunk that is damaged or missing, or all of them while the repository cannot be
    /// had, are fetched from it, and verified. May be given several times
    #[arg(long, value_name = "REPO")]
    fallback: Vec<PathBuf>,

    #[command(flatten)]
    source: SourceArgs,
}

/// What requests are to stay within: none takes no time at all.
fn parse_latency(text: &str) -> Result<Duration, String> {
    match parse_time(text)? {
        Duration::ZERO => Err("no request takes no time: leave it out to have nothing held back".to_owned()),
        time => Ok(time),
    }
}

impl SessionArgs {
    /// Where the session of `target` is kept.
    ///
    /// # Errors
    /// As for [`StateDir::of_moved`].
    pub(crate) fn state_of(&self, target: &Path) -> anyhow::Result<StateDir> {
        StateDir::of_moved(target, self.state.as_deref(), self.moved)
    }

    /// An order of these disks with these options.
    ///
    /// # Errors
    /// Where the I/O engine that was asked for cannot be had.
    pub(crate) fn order(
        self,
        snapshot: String,
        targets: Vec<PathBuf>,
        listen: Vec<ListenAddress>,
        server: ServerOptions,
        background: bool,
    ) -> anyhow::Result<Order> {
        let options = SessionOptions {
            source_timeout: self.source_timeout,
            limit: self.limit.limit().map_or(0, NonZeroU64::get),
            background,
            guest_p99: self.guest_p99,
            decoded_bytes: self.source.cache_bytes(),
            ..SessionOptions::default()
        };
        Ok(Order {
            snapshot,
            targets,
            listen,
            server,
            takes_over: false,
            may_be_succeeded: false,
            metrics: self.metrics,
            force: self.force,
            moved: self.moved,
            state: self.state,
            engine: Engine::choose(self.io_engine)?,
            pool: self.source.pool_options(),
            uses_trace: !self.no_trace,
            drive: None,
            handed_over: Vec::new(),
            fallbacks: self.fallback,
            options,
        })
    }
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        // A session that is wholly home does without it.
        let repository = Repository::open(context.repository_path()?);
        let interrupt = context.interrupt()?;
        let Self {
            snapshot,
            targets,
            listen,
            take_over,
            exit_when_done,
            no_background,
            qmp,
            device,
            aio,
            session,
        } = self;
        if device.is_some() && targets.len() > 1 {
            return Err(UsageError::new(
                "--device names one drive, and there are several disks: leave it out",
            )
            .into());
        }
        let addresses = listen.addresses().map_err(UsageError::new)?;
        // A guest's client reconnects and asks again: it must not hear of our end.
        let server = listen.options(LateRequests::Leave)?;
        if let Some(tls) = server.tls.clone() {
            interrupt.on_hangup(move || tls.reload_and_say());
        }
        let mut order = session.order(snapshot, targets, addresses, server, !no_background)?;
        order.takes_over = take_over;
        order.may_be_succeeded = true;
        if let Some(qmp) = qmp {
            let qmp = std::path::absolute(qmp).context("cannot tell where the QMP socket is")?;
            order.drive = Some(Drive { qmp, device, aio });
        }
        let settlement = order.settle(&repository, &interrupt)?;
        let output = context.output().for_service();
        for home in &settlement.homes {
            Narrator::say(mover::say_home(&output, home));
        }
        for target in &settlement.before {
            output.warn(format_args!(
                "a running machine was moved onto {} already; its QEMU does not answer, and may wait for what is served here",
                target.display()
            ));
        }
        if settlement.left == 0 {
            Narrator::say(output.settle());
            return Ok(Outcome::Done);
        }
        let running = start(&order, repository, context, &interrupt)?;
        let until = if exit_when_done { Until::Done } else { Until::Told };
        let narrator = Narrator::new(&output, exit_when_done || order.drive.is_some());
        let mut mover = Mover::new(&output, narrator, order.drive.clone());
        let ended = running.tell(until, &mut mover)?;
        mover.conclude(&ended)
    }
}
