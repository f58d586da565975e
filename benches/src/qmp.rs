//! Just enough of QMP to start a job in qemu-storage-daemon.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// A QMP connection that is past its greeting.
#[derive(Debug)]
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects, and leaves negotiation behind.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("no QMP at {}", socket.display()))?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        let greeting = qmp.next()?;
        ensure!(greeting.get("QMP").is_some(), "this is not QMP: {greeting}");
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and waits for what it returns; events in between are passed over.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.next()?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    fn next(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.reader.read_line(&mut line)? > 0, "QMP hung up");
        serde_json::from_str(&line).context("QMP speaks in lines of JSON")
    }
}
