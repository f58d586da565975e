//! `lifeboot limit`: changes the limit of a live-restore that runs.

use std::num::NonZeroU64;
use std::path::PathBuf;

use super::{Context, Failure, Outcome, Rate, Verb};
use crate::live_restore::{LimitChanged, Request, ask};
use crate::status::session_of;

/// Change how fast a running live-restore copies home
///
/// It holds at once, for all disks of that agent together, until it ends: the next start takes its own --limit. What
/// guests wait for is never limited.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lifeboot limit /var/lib/vm/web01.raw 20MiB
  lifeboot limit /var/lib/vm/web01.raw 0")]
pub(super) struct Args {
    /// The target of the live-restore; of several, any of them
    #[arg(value_name = "TARGET")]
    target: PathBuf,

    /// Bytes a second (like 20MiB); 0 is no limit
    #[arg(value_name = "RATE")]
    rate: Rate,

    /// Where sessions are kept, if not beside the target
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let (state, _) = session_of(&self.target, self.state.as_deref())?;
        let rate = self.rate.limit().map_or(0, NonZeroU64::get);
        let Some(changed) = ask::<LimitChanged>(state.path(), &Request::Limit { rate })? else {
            return Err(Failure::new(
                format!("no agent serves the live-restore to {}", self.target.display()),
                "give --limit to the live-restore command when it goes on",
            )
            .into());
        };
        let output = context.output();
        let (old, new) = (Rate::per_second(changed.old), Rate::per_second(changed.new));
        let told =
            output.document(&changed).and_then(|()| output.line(format_args!("limit: {new} (it was {old})")));
        Outcome::Done.once_told(
            told,
            format_args!("the limit was changed to {new}"),
            "`lifeboot status` tells how far the live-restore is",
        )
    }
}
