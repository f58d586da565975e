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
mod control;
mod damage;
mod identity;
mod late;
mod made;
mod open;
mod record;
mod report;
mod serve;
mod service;
mod state_dir;
mod stopped;
mod target;
mod wanted;

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block::{Engine, IoEngine};
use nbd_server::ListenAddress;
use repository::Repository;

use crate::cli::{Context, Outcome, Rate, Verb};
use crate::in_use::Claim;
use crate::live::SessionOptions;
use crate::source::{SourceArgs, parse_time};
use late::LateDisk;

pub use control::{Reply, Request, ask, ask_status, ask_telling};
pub use damage::{KeptDamage, kept_damage};
pub use identity::TargetIdentity;
pub use record::SessionRecord;
pub use state_dir::{DEFAULT_STATE_ROOT, StateDir, absolute};
pub use stopped::stopped_status;

/// The name of the bitmap of what the guest wrote: `qemu:dirty-bitmap:lifeboot`.
pub const DIRTY_BITMAP: &str = "lifeboot";

/// Boot a machine from its backup at once, and copy the disk home while it runs
///
/// The disk is served over NBD as soon as the command says that it is ready: point QEMU at it with the
/// arguments that are printed. What the guest reads comes from the target where it is home already, else
/// from the repository; what it writes goes to the target and is never lost: the same command goes on after
/// a kill or a power cut. TARGET is a raw file, made if it does not exist, or a block device. SIGTERM or
/// Ctrl-C parks the session.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example: lifeboot live-restore -r /backup web01@latest /var/lib/vm/web01.raw --listen unix:/run/web01.sock
         lifeboot status /var/lib/vm/web01.raw")]
pub struct Args {
    /// What to restore: GROUP@TIME[/DISK] or GROUP@latest[/DISK]
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,

    /// Where to: a raw file, or a block device
    #[arg(value_name = "TARGET")]
    target: PathBuf,

    /// Where to serve the disk: unix:PATH or tcp:HOST:PORT; may be given several times
    #[arg(short, long, required = true, value_name = "ADDRESS")]
    listen: Vec<ListenAddress>,

    /// Copy home no faster than this, in bytes a second (like 20MiB); 0 is no limit. It is kept over seconds:
    /// the least that is copied at once is a chunk (128 KiB if not chosen otherwise). Guests are not limited
    #[arg(long, value_name = "RATE", default_value = "0")]
    limit: Rate,

    /// End when the whole disk is home, or all of it but what is damaged, and no client is connected
    #[arg(long)]
    exit_when_done: bool,

    /// Bring home only what guests ask for
    #[arg(long, conflicts_with = "exit_when_done")]
    no_background: bool,

    /// Overwrite a target that holds data and has no session. Without it a file must hold no data, and of a block
    /// device the first and last MiB and 256 samples between them must be zeroes
    #[arg(long)]
    force: bool,

    /// The target was copied or moved as a whole, together with its session: go on with it here. What it holds is
    /// checked all the same
    #[arg(long)]
    moved: bool,

    /// Keep sessions in this directory rather than beside a file target
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// How long a guest's read waits for a repository that is out of reach
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time)]
    source_timeout: Duration,

    /// How disks are read and written: auto, uring or threads
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    io_engine: IoEngine,

    #[command(flatten)]
    source: SourceArgs,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        // A session that is wholly home does without it.
        let repository = Repository::open(context.repository_path()?);
        let interrupt = context.interrupt()?;
        let engine = Engine::choose(self.io_engine)?;
        let state = StateDir::of(&self.target, self.state.as_deref())?;
        let _claim = claim(&self.target, &state)?;
        let options = SessionOptions {
            source_timeout: self.source_timeout,
            limit: self.limit.limit().map_or(0, NonZeroU64::get),
            background: !self.no_background,
            ..SessionOptions::default()
        };
        let wish = open::Wish {
            repository: &repository,
            spec: &self.snapshot,
            target: &self.target,
            force: self.force,
            moved: self.moved,
            engine,
            pool: self.source.pool_options(),
            options,
        };
        let found = open::find(&wish, &state)?;
        let late = Arc::new(LateDisk::default());
        let server = serve::bind(&found, &late, &self.listen)?;
        let opened = found.open(&interrupt)?;
        let repository = repository.ok();
        let plan =
            serve::Plan { server, late, exit_when_done: self.exit_when_done, engine, state, repository };
        serve::serve(opened, plan, context, &interrupt)
    }
}

/// Keeps others from the target until the session ends. An agent that serves it already is named.
fn claim(target: &Path, state: &StateDir) -> anyhow::Result<Claim> {
    crate::in_use::claim(target).map_err(|error| match ask_status(state.path()) {
        Ok(Some(_)) => target::in_use(target, state.path()),
        _ => error,
    })
}
