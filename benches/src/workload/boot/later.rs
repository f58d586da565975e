//! The disk as a later snapshot has it: the same but for small changes, as a day of use makes them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::child;

/// One in so many blocks of data is changed.
const CHANGED: u64 = 200;
const BLOCK: u64 = 4096;

/// Copies `image` to `to`, and changes one in [`CHANGED`] of the blocks that hold data: its last byte, so that a replay,
/// which does not look into what it reads, takes the same way.
pub(super) fn make(image: &Path, to: &Path) -> Result<()> {
    let mut copy = Command::new("cp");
    copy.args(["--sparse=always", "--reflink=auto", "--no-preserve=mode"]).arg(image).arg(to);
    child::run(&mut copy)?;
    let file = File::options().read(true).write(true).open(to);
    let file = file.with_context(|| format!("cannot open {}", to.display()))?;
    let mut number = 0;
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start))?;
        for block in start / BLOCK..end / BLOCK {
            number += 1;
            // Never the first blocks: who begins to read a disk looks there for what it is.
            if number % CHANGED == 0 {
                let mut byte = [0];
                let last = block * BLOCK + BLOCK - 1;
                file.read_exact_at(&mut byte, last)?;
                file.write_all_at(&[!byte[0]], last)?;
            }
        }
        at = end;
    }
    Ok(())
}
