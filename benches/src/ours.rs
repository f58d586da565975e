//! Our own programs: where they are, how they are called, what they say in JSON.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

/// Where our programs are.
#[derive(Args, Clone, Debug)]
pub(crate) struct Programs {
    /// The directory of `lifeboot` and `lifeboot-nbd`; without it, that of this program
    #[arg(long, global = true, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

impl Programs {
    /// The path of one of our programs.
    pub(crate) fn path(&self, program: &str) -> Result<PathBuf> {
        let dir = match &self.bin_dir {
            Some(dir) => dir.clone(),
            None => {
                let own = std::env::current_exe().context("cannot tell where this program is")?;
                own.parent().context("a program is in a directory")?.to_owned()
            }
        };
        let path = dir.join(program);
        ensure!(
            path.is_file(),
            "{} does not exist; build it with `cargo build --release`, or say --bin-dir",
            path.display()
        );
        Ok(path)
    }

    /// The `lifeboot` program.
    pub(crate) fn lifeboot(&self) -> Result<Command> {
        Ok(Command::new(self.path("lifeboot")?))
    }

    /// `lifeboot init`.
    pub(crate) fn init(&self, repo: &Path) -> Result<Command> {
        let mut command = self.lifeboot()?;
        command.arg("init").arg("-q").arg("-r").arg(repo);
        Ok(command)
    }

    /// `lifeboot capture` of one disk into the group `bench`.
    pub(crate) fn capture(&self, repo: &Path, image: &Path, chunk_size: Option<u32>) -> Result<Command> {
        let mut command = self.lifeboot()?;
        command.arg("capture").arg("-q").arg("-r").arg(repo);
        if let Some(size) = chunk_size {
            command.arg(format!("--chunk-size={size}"));
        }
        let mut source = std::ffi::OsString::from("disk0=");
        source.push(image);
        command.arg(GROUP).arg(source);
        Ok(command)
    }

    /// `lifeboot restore` of that disk to a new file.
    pub(crate) fn restore(&self, repo: &Path, target: &Path) -> Result<Command> {
        let mut command = self.lifeboot()?;
        command.arg("restore").arg("-q").arg("-r").arg(repo).arg(DISK).arg(target);
        Ok(command)
    }

    /// `lifeboot live-restore` of that disk, listening on a unix socket.
    pub(crate) fn live_restore(&self, repo: &Path, target: &Path, socket: &Path) -> Result<Command> {
        let mut command = self.lifeboot()?;
        command.arg("live-restore").arg("--json").arg("-r").arg(repo).arg(DISK).arg(target);
        command.arg("--listen").arg(format!("unix:{}", socket.display()));
        Ok(command)
    }
}

/// The group that the harness captures into.
pub(crate) const GROUP: &str = "bench";
/// The one disk in it.
pub(crate) const DISK: &str = "bench@latest/disk0";
/// The export of a live-restore: its only one.
pub(crate) const EXPORT: &str = "";

/// The documents of a stream of JSON lines that tell of this `event`, in order.
pub(crate) fn events(lines: &str, event: &str) -> Vec<serde_json::Value> {
    let documents = lines.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    documents.filter(|document| document["event"] == event).collect()
}

/// The last document of a stream of JSON lines that has this field.
pub(crate) fn last_with(lines: &str, field: &str) -> Option<serde_json::Value> {
    let documents =
        lines.lines().rev().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    documents.into_iter().find(|document| document.get(field).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_picked_from_the_stream_and_other_lines_passed_over() {
        let stream = "{\"event\":\"ready\",\"size\":1}\nnoise\n{\"event\":\"progress\"}\n{\"event\":\"ready\",\"size\":2}\n";
        let ready = events(stream, "ready");
        assert_eq!(ready.len(), 2);
        assert_eq!(ready[1]["size"], 2);
    }
}
