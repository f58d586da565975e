//! NBD exports, as others' clients see them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::{run, run_json};

/// An export on a unix socket.
#[derive(Debug, Clone)]
pub struct Export {
    /// The server's socket.
    pub socket: PathBuf,
    /// Its name; the empty one means the server's first.
    pub name: String,
}

/// A run of bytes that have one state in a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its first byte.
    pub offset: u64,
    /// Its length.
    pub len_bytes: u64,
    /// The context's flags: what they mean is the context's affair.
    pub flags: u64,
}

impl Export {
    /// The export `name` of the server that listens at `socket`.
    pub fn new(socket: impl Into<PathBuf>, name: &str) -> Self {
        Self { socket: socket.into(), name: name.to_owned() }
    }

    /// The server's first export.
    pub fn first(socket: impl Into<PathBuf>) -> Self {
        Self::new(socket, "")
    }

    /// Its address, as NBD's URIs have it.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.name, self.socket.display())
    }

    /// `nbdinfo --json`: the server and its export.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn info(&self) -> Result<Value> {
        run_json(Command::new("nbdinfo").args(["--json", &self.uri()]))
    }

    /// The state of all of the export in `context`, by `nbdinfo --map`.
    ///
    /// # Errors
    /// The server does not answer, or has no such context.
    pub fn map(&self, context: &str) -> Result<Vec<Extent>> {
        let map = format!("--map={context}");
        let extents = run_json(Command::new("nbdinfo").args(["--json", &map, &self.uri()]))?;
        let extents = extents.as_array().with_context(|| format!("the map of {context} is an array"))?;
        extents.iter().map(|extent| Extent::parse(extent).context("an extent of nbdinfo")).collect()
    }

    /// Writes all of it to the raw file `path`, by qemu-img.
    ///
    /// # Errors
    /// Anything that qemu-img says.
    pub fn convert_to(&self, path: &Path) -> Result<()> {
        let mut convert = Command::new("qemu-img");
        run(convert.args(["convert", "-f", "raw", "-O", "raw", &self.uri()]).arg(path)).map(|_| ())
    }

    /// Demands that it has the bytes of the raw file `path`, by qemu-img.
    ///
    /// # Errors
    /// It has not.
    pub fn ensure_same(&self, path: &Path) -> Result<()> {
        let mut compare = Command::new("qemu-img");
        run(compare.args(["compare", "-f", "raw", "-F", "raw", &self.uri()]).arg(path)).map(|_| ())
    }

    /// Runs qemu-io's commands on it, one after another, and returns what it printed.
    ///
    /// # Errors
    /// One of them failed.
    pub fn qemu_io(&self, commands: &[&str]) -> Result<String> {
        self.qemu_io_by(Command::new("qemu-io"), commands)
    }

    /// The same by this `qemu-io`.
    ///
    /// # Errors
    /// One of them failed.
    pub fn qemu_io_by(&self, mut qemu_io: Command, commands: &[&str]) -> Result<String> {
        qemu_io.args(["-f", "raw"]);
        for command in commands {
            qemu_io.args(["-c", command]);
        }
        let output = run(qemu_io.arg(self.uri()))?;
        // It tells of a pattern that is not there, or of a failed request, and still ends with 0.
        let lowered = output.to_lowercase();
        anyhow::ensure!(!lowered.contains("failed") && !lowered.contains("error"), "qemu-io: {output}");
        Ok(output)
    }

    /// Runs `script` under nbdsh, connected to the export as `h`, with `setup` run before it connects.
    ///
    /// # Errors
    /// The script raised something.
    pub fn nbdsh(&self, setup: &str, script: &str) -> Result<String> {
        // Debian's own Python: another one that comes first in the path does not know libnbd.
        let program = format!(
            "import nbd\nh = nbd.NBD()\n{setup}\nh.connect_uri('{}')\n{script}\nh.shutdown()\n",
            self.uri()
        );
        run(Command::new("/usr/bin/python3").args(["-c", &program]))
    }
}

impl Extent {
    fn parse(extent: &Value) -> Option<Self> {
        Some(Self {
            offset: extent["offset"].as_u64()?,
            len_bytes: extent["length"].as_u64()?,
            flags: extent["type"].as_u64()?,
        })
    }

    /// The numbers of the blocks that it touches.
    pub fn blocks(&self) -> std::ops::Range<u64> {
        let block = crate::disk::BLOCK_BYTES;
        self.offset / block..(self.offset + self.len_bytes).div_ceil(block)
    }
}
