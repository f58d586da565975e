//! `lifeboot pivot`: moves a running machine from its live-restore onto the target.

use std::path::PathBuf;

use anyhow::Context as _;

use super::{Context, Outcome, Verb};
use crate::live_restore::{HandedOver, PivotProgress, Request, ask_telling, ask_without_agent};
use crate::pivot::{Aio, Drive};
use crate::status::session_of;

/// Move a running machine from its live-restore onto the target itself
///
/// Asks the agent that serves TARGET, once all of the disk is home: it waits for a save, or another move, that is under way; then QEMU uses the target without
/// Lifeboot, and the guest does not notice. An agent whose disks were all moved ends by itself, and the session is over: start the
/// machine from TARGET from now on. Whatever goes wrong, the machine goes on where it was.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example, with QEMU started with -qmp unix:/run/web01.qmp,server=on,wait=off:
  lifeboot pivot /var/lib/vm/web01.raw --qmp /run/web01.qmp")]
pub(super) struct Args {
    /// The target of the live-restore
    #[arg(value_name = "TARGET")]
    target: PathBuf,

    #[command(flatten)]
    drive: DriveArgs,

    /// Where sessions are kept, if not beside the target
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

/// Which drive of which QEMU.
#[derive(Debug, clap::Args)]
struct DriveArgs {
    /// QEMU's QMP socket, as given to its option -qmp; nobody else may be connected to it
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,

    /// The device (its id or QOM path), the drive or the node to be moved; the one on the export if none is named
    #[arg(long, value_name = "NAME")]
    device: Option<String>,

    /// How QEMU does the target's I/O from then on; its own default (threads) if not given
    #[arg(long, value_name = "WAY")]
    aio: Option<Aio>,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let (state, _) = session_of(&self.target, self.state.as_deref())?;
        let DriveArgs { qmp, device, aio } = self.drive;
        // The agent has another working directory.
        let qmp = std::path::absolute(qmp).context("cannot tell where the QMP socket is")?;
        let drive = Drive { qmp, device, aio };
        let output = context.output();
        let tell = |progress: Option<serde_json::Value>| {
            if let Some(progress) = progress {
                let PivotProgress { waiting } = serde_json::from_value(progress)?;
                output.warn(waiting);
            }
            Ok(())
        };
        let request = Request::Pivot { drive: drive.clone() };
        let home = match ask_telling::<HandedOver>(state.path(), &request, tell)? {
            Some(home) => home,
            None => ask_without_agent(&state, &self.target, &drive)?,
        };
        let told = output.document(&home).and_then(|()| output.line(&home));
        let target = home.target.display();
        Outcome::Done.once_told(
            told,
            format_args!("the machine was moved onto {target}"),
            format_args!("start it from {target} from now on"),
        )
    }
}
