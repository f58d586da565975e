//! What every verb is given: the repository that was named, the output, and the interrupt.

use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::Context as _;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use tracing::level_filters::LevelFilter;

use super::{Interrupt, UsageError};
use crate::output::Output;

/// The options that every verb takes.
#[derive(Debug, clap::Args)]
pub struct Global {
    /// The repository: a directory
    #[arg(
        short,
        long,
        global = true,
        env = "LIFEBOOT_REPO",
        // An empty one is none: a variable that was set to nothing is not in the way of --repo.
        value_parser = OsStringValueParser::new().map(PathBuf::from),
        value_name = "REPO",
        help_heading = "Global options"
    )]
    pub repo: Option<PathBuf>,

    /// Print one JSON document on stdout, and progress as JSON lines on stderr
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,

    /// Say more about what is done (-v, -vv, -vvv)
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    pub verbose: u8,

    /// Say nothing but errors
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub quiet: bool,
}

/// What a verb works with.
#[derive(Debug)]
pub struct Context {
    repo: Option<PathBuf>,
    output: Output,
    interrupt: OnceLock<Interrupt>,
}

impl Context {
    /// Starts logging, and decides how to talk from the options and from whether somebody watches.
    #[must_use]
    pub fn new(global: Global) -> Self {
        let output = Output::new(global.json, global.quiet);
        start_logging(&global, &output);
        Self { repo: global.repo, output, interrupt: OnceLock::new() }
    }

    /// Where the repository is, as given by `--repo` or `LIFEBOOT_REPO`.
    ///
    /// # Errors
    /// [`UsageError`] where neither was given.
    pub fn repository_path(&self) -> anyhow::Result<PathBuf> {
        let Some(path) = self.repo.as_ref().filter(|path| !path.as_os_str().is_empty()) else {
            return Err(
                UsageError::new("no repository was named: give --repo REPO, or set LIFEBOOT_REPO").into()
            );
        };
        if path.as_os_str().as_encoded_bytes().starts_with(b"s3://") {
            return Err(UsageError::new("object stores are not supported yet: name a directory").into());
        }
        Ok(path.clone())
    }

    /// How to talk to the user.
    pub fn output(&self) -> &Output {
        &self.output
    }

    /// The interrupt of this run. From the first call on, Ctrl-C, SIGTERM and SIGHUP no longer kill the
    /// program: its loops must ask [`Interrupt::check`]. Another signal a second later or more ends it at once.
    ///
    /// # Errors
    /// Where the signals cannot be watched.
    pub fn interrupt(&self) -> anyhow::Result<Interrupt> {
        if let Some(interrupt) = self.interrupt.get() {
            return Ok(interrupt.clone());
        }
        let interrupt = Interrupt::watch().context("cannot watch for signals")?;
        Ok(self.interrupt.get_or_init(|| interrupt).clone())
    }
}

fn start_logging(global: &Global, output: &Output) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::WARN,
        (false, 1) => LevelFilter::INFO,
        (false, 2) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    let logging = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(output.log())
        .with_ansi(output.has_colours())
        .log_internal_errors(false);
    // Fails only where a test in the same process has started logging before.
    let _ = if global.json {
        logging.json().flatten_event(true).try_init()
    } else {
        logging.without_time().with_target(global.verbose > 1).try_init()
    };
}
