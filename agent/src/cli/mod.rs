//! The command line: what every verb shares, and the list of verbs.
//!
//! A verb is a struct of arguments that implements [`Verb`]. It is added by one line in `Command`
//! and one in `Command::run`; the help, the completions and the man pages follow from it.

mod context;
mod failure;
mod generate;
mod init;
mod interrupt;
mod latest;
mod limit;
mod pivot;
mod show;
mod snapshots;
mod units;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use context::{Context, Global};
pub use failure::{Failure, Outcome, UsageError};
pub(crate) use failure::{READ_ONLY_ADVICE, told};
pub use interrupt::{Interrupt, Interrupted};
pub(crate) use latest::not_latest;
pub use units::{Rate, Size};

/// One verb of the command line.
pub trait Verb {
    /// Does what the verb is for.
    ///
    /// # Errors
    /// Whatever kept it from being done: shown with its causes and advice, exit code 1 (2 for a [`UsageError`]).
    fn run(self, context: &Context) -> anyhow::Result<Outcome>;
}

/// Boots a machine from its backup at once, and copies the disk home while the machine runs.
///
/// Disks are captured into a repository (`init`, `capture`), and brought back offline (`restore`) or
/// while the machine already runs from the backup (`live-restore`).
#[derive(Debug, Parser)]
#[command(name = "lifeboot", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but something is damaged
(named on stderr); 130 interrupted by Ctrl-C, 143 by SIGTERM.";

#[derive(Debug, Subcommand)]
enum Command {
    Init(init::Args),
    Capture(crate::capture::Args),
    Boot(crate::boot::Args),
    Snapshots(snapshots::Args),
    Show(show::Args),
    Restore(crate::restore::Args),
    LiveRestore(crate::live_restore::Args),
    Status(crate::status::Args),
    Limit(limit::Args),
    Trace(crate::trace::Args),
    Save(crate::save::Args),
    Discard(crate::discard::Args),
    Pivot(pivot::Args),
    Serve(crate::serve::Args),
    Verify(verify::Args),
    Completions(generate::CompletionsArgs),
    Man(generate::ManArgs),
}

impl Command {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        match self {
            Self::Init(args) => args.run(context),
            Self::Capture(args) => args.run(context),
            Self::Boot(args) => args.run(context),
            Self::Snapshots(args) => args.run(context),
            Self::Show(args) => args.run(context),
            Self::Restore(args) => args.run(context),
            Self::LiveRestore(args) => args.run(context),
            Self::Status(args) => args.run(context),
            Self::Limit(args) => args.run(context),
            Self::Trace(args) => args.run(context),
            Self::Save(args) => args.run(context),
            Self::Discard(args) => args.run(context),
            Self::Pivot(args) => args.run(context),
            Self::Serve(args) => args.run(context),
            Self::Verify(args) => args.run(context),
            Self::Completions(args) => args.run(context),
            Self::Man(args) => args.run(context),
        }
    }
}

/// So many files a verb that serves nothing has open at most, beside those of an event loop: event loops of other threads, sources, packs.
const OTHER_FILES: usize = 48;

/// Reads the arguments, runs the verb, and says how it went.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Prints help to stdout (exit code 0) or what is wrong to stderr (exit code 2).
        Err(error) => error.exit(),
    };
    let context = Context::new(cli.global);
    context.output().say_panics();
    // Before anything is begun that would fail in the middle.
    let enough_files = block::Engine::check_open_files(1, OTHER_FILES);
    let result = enough_files.map_err(Into::into).and_then(|()| cli.command.run(&context));
    let code = failure::conclude(context.output(), result);
    context.output().settle_stderr();
    code
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn examples_and_notes_stand_on_lines_that_no_terminal_breaks() {
        fn check(command: &clap::Command) {
            for line in command.get_after_help().map(ToString::to_string).unwrap_or_default().lines() {
                let len = line.chars().count();
                assert!(len <= 79, "{}: {len} columns: {line}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
