//! `lifeboot verify`: whether everything can still be brought back.

use repository::{Repository, VerifyOptions, VerifyReport};

use super::{Context, Outcome, Verb};
use crate::output::{human_count, human_size};

/// Check that every chunk, index, map and snapshot of the repository is as it was written
///
/// Reads and hashes everything. Nothing is changed, and captures and restores may run meanwhile.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit code 3 where something is damaged: what, and which part of which snapshot
needs it, is on stderr.")]
pub(super) struct Args {
    /// Check tables, indexes, maps and manifests only, not the chunks of the disks
    #[arg(long)]
    quick: bool,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let repository = Repository::open(context.repository_path()?)?;
        let output = context.output();
        let progress = output.progress("verifying", None);
        let options = VerifyOptions { read_data: !self.quick, ..VerifyOptions::default() };
        let report = repository.verify(options, |at| {
            progress.set_total(at.total_bytes);
            progress.set(at.done_bytes);
        })?;
        drop(progress);
        for damage in &report.damages {
            output.damaged(damage);
        }
        if report.more_damages > 0 {
            output.damaged(format_args!("{} more are not named", report.more_damages));
        }
        output.document(&report)?;
        output.line(summary(&report))?;
        Ok(if report.is_clean() { Outcome::Done } else { Outcome::Damaged })
    }
}

fn summary(report: &VerifyReport) -> String {
    let checked = format!(
        "{}, {}, {} ({}) in {}",
        human_count(report.snapshots, "snapshot", "snapshots"),
        human_count(report.disks, "disk", "disks"),
        human_count(report.chunks, "chunk", "chunks"),
        human_size(report.stored_bytes),
        human_count(report.packs, "pack", "packs"),
    );
    let damages = report.damages.len() as u64 + report.more_damages;
    let mut text = match damages {
        0 => format!("all is well: {checked}"),
        damages => format!("{} found in {checked}", human_count(damages, "damage", "damages")),
    };
    if report.unnamed_packs > 0 {
        let packs = human_count(report.unnamed_packs, "pack", "packs");
        text.push_str(&format!("; {packs} left by captures that did not end, which do no harm"));
    }
    text
}
