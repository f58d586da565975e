//! `lifeboot-bench`: Lifeboot side by side with what people use today, on the same data, in one run.
//!
//! Every workload gives its contenders turns in rotated order, round by round, and prints medians, spreads and the
//! ratios of ours to theirs; see benches/README.md.

mod child;
mod client;
mod contest;
mod endpoint;
mod fio;
mod no_disk;
mod ours;
mod peers;
mod plot;
mod qmp;
mod report;
mod stats;
mod table;
mod trace;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use workload::Common;

#[derive(Debug, Parser)]
#[command(name = "lifeboot-bench", version, about = "Measures Lifeboot beside what people use today")]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Debug, Subcommand)]
enum Workload {
    /// Serve a raw file over NBD under fio
    Serve(workload::serve::Options),
    /// Put runs of `serve` together that were made with --json: their table, and with --svg their picture
    Served {
        /// The documents; of a cell that is in several the last counts
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// What an operation costs a server: system calls and instructions
    Costs(workload::costs::Options),
    /// Capture a disk into a repository
    Capture(workload::capture::Options),
    /// Boot from a slow source, by replaying what a guest asked for
    Boot(workload::boot::Options),
    /// Kill live-restore with -9 under verified writes, again and again
    Kill(workload::kill::Options),
    /// Boot a real guest from a slow source, until it says that it is up
    Machine(workload::boot::machine::Options),
    /// Guests and the background beside each other
    Guests(workload::guests::Options),
    /// Serve one client beside hostile ones
    Hostile(workload::hostile::Options),
    /// Kill a live-restore of 1 TiB under random writes, and start it again
    Tebibyte(workload::tebibyte::Options),
    /// What each chunk size costs
    ChunkSize(workload::chunk_size::Options),
    /// Everything that was promised, in one table
    Figures(workload::figures::Options),
    /// Bring a disk back, offline and live
    Restore(workload::restore::Options),
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let common = &cli.common;
    let report = match &cli.workload {
        Workload::Serve(options) => workload::serve::run(common, options)?,
        Workload::Served { files } => workload::serve::merge(files)?,
        Workload::Costs(options) => workload::costs::run(common, options)?,
        Workload::Capture(options) => workload::capture::run(common, options)?,
        Workload::Boot(options) => workload::boot::run(common, options)?,
        Workload::Kill(options) => workload::kill::run(common, options)?,
        Workload::Machine(options) => workload::boot::machine::run(common, options)?,
        Workload::Guests(options) => workload::guests::run(common, options)?,
        Workload::Hostile(options) => workload::hostile::run(common, options)?,
        Workload::Tebibyte(options) => workload::tebibyte::run(common, options)?,
        Workload::ChunkSize(options) => workload::chunk_size::run(common, options)?,
        Workload::Figures(options) => workload::figures::run(common, options)?,
        Workload::Restore(options) => workload::restore::run(common, options)?,
    };
    print!("{}", table::render(&report));
    if let Some(path) = &common.json {
        let document = serde_json::to_string_pretty(&report).context("a report is always JSON")?;
        std::fs::write(path, document + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &common.svg {
        match cli.workload {
            Workload::Served { .. } => workload::serve::draw(&report, path)?,
            _ => plot::write(&report, path)?,
        }
    }
    Ok(())
}
