//! The workloads, a file each, and what they have in common.

pub(crate) mod boot;
pub(crate) mod capture;
pub(crate) mod chunk_size;
pub(crate) mod costs;
pub(crate) mod figures;
pub(crate) mod guests;
pub(crate) mod hostile;
pub(crate) mod kill;
pub(crate) mod restore;
pub(crate) mod serve;
pub(crate) mod tebibyte;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::contest::Contest;
use crate::ours::Programs;
use crate::report::Report;

/// What every workload takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Common {
    /// Rounds that count
    #[arg(long, global = true, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Run no warm-up round before them
    #[arg(long, global = true)]
    no_warm_up: bool,
    /// Where copies, repositories and sockets are put, and removed at the end; without it, the system's
    #[arg(long, global = true, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Write the report as a JSON document
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Draw the report as an SVG
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// Where our programs are
    #[command(flatten)]
    pub(crate) programs: Programs,
}

impl Common {
    /// The turns that everyone has.
    pub(crate) fn contest(&self) -> Contest {
        Contest { rounds: self.rounds as usize, warm_up: !self.no_warm_up }
    }

    /// An empty report.
    pub(crate) fn report(&self, workload: &str) -> Report {
        Report::new(workload, self.rounds as usize, !self.no_warm_up)
    }

    /// A directory that goes when it is dropped.
    pub(crate) fn scratch(&self) -> Result<tempfile::TempDir> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("lifeboot-bench-");
        match &self.scratch {
            Some(dir) => std::path::absolute(dir).and_then(|dir| builder.tempdir_in(dir)),
            None => builder.tempdir(),
        }
        .context("cannot make a scratch directory")
    }
}

/// Waits until nothing is left to be written back, so that nobody pays for what was written before its turn.
pub(crate) fn settle() {
    rustix::fs::sync();
}

/// The bytes of all files under `path` together, by their lengths.
pub(crate) fn bytes_under(path: &Path) -> Result<u64> {
    let metadata =
        std::fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    let mut total = 0;
    for entry in std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))? {
        total += bytes_under(&entry?.path())?;
    }
    Ok(total)
}

/// Removes a file or a directory and all that is in it, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(_) => return Ok(()),
    };
    removed.with_context(|| format!("cannot remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_tree_are_those_of_its_files() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("a"), [0; 100]).unwrap();
        std::fs::write(dir.path().join("sub/b"), [0; 23]).unwrap();
        assert_eq!(bytes_under(dir.path()).unwrap(), 123);
        remove(&dir.path().join("sub")).unwrap();
        remove(&dir.path().join("not there")).unwrap();
        assert_eq!(bytes_under(dir.path()).unwrap(), 100);
    }
}
