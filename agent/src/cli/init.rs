//! `lifeboot init`: makes an empty repository.

use super::{Context, Outcome, Verb};

/// Make an empty repository
///
/// The directory is made where it does not exist; one that holds anything is refused.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let path = context.repository_path()?;
        anyhow::bail!("cannot make a repository at {} yet", path.display())
    }
}
