//! A disk that was captured, and where to bring it home to.

use std::path::PathBuf;

use anyhow::Result;

use crate::disk;
use crate::lifeboot::{LiveRestore, Repository};
use crate::work_dir::WorkDir;

/// A disk of noise and holes, captured as the group `vm`, with a place for a live restore of it.
#[derive(Debug)]
pub struct Captured {
    /// Where all of it is; removed when it is dropped.
    pub work: WorkDir,
    /// The repository that it was captured into.
    pub repository: Repository,
    /// The disk.
    pub disk: PathBuf,
    /// A target that does not exist yet.
    pub target: PathBuf,
    /// A socket to listen on.
    pub socket: PathBuf,
}

impl Captured {
    /// Makes a disk of `bytes` from `seed`, and captures it.
    ///
    /// # Errors
    /// Where there is no room, or a program of ours fails.
    pub fn new(name: &str, bytes: u64, seed: u64) -> Result<Self> {
        let work = WorkDir::new(name)?;
        let disk = work.file("disk.raw");
        disk::make(&disk, bytes, seed)?;
        let repository = Repository::init(work.file("repository"))?;
        repository.capture("vm", &disk)?;
        let (target, socket) = (work.file("target.raw"), work.socket("live"));
        Ok(Self { work, repository, disk, target, socket })
    }

    /// Starts to restore its newest snapshot to the target.
    ///
    /// # Errors
    /// Where it does not become ready.
    pub fn start(&self, further: &[&str]) -> Result<LiveRestore> {
        LiveRestore::start(&self.repository, "vm@latest", &self.target, &self.socket, further)
    }
}
