//! Where our own programs and scripts are.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A command that runs one of the workspace's binaries, built beside the running test.
///
/// # Errors
/// It was not built: `cargo test -p tests` does not build the binaries of other packages.
pub fn ours(name: &str) -> Result<Command> {
    let path = binary_dir()?.join(name);
    ensure!(
        path.is_file(),
        "{} is not built: run `cargo build --workspace --bins` first, or scripts/test.sh, which does",
        path.display()
    );
    Ok(Command::new(path))
}

/// The directory of the binaries of the running test's profile, such as `target/debug`.
///
/// # Errors
/// The running program does not say where it is.
pub fn binary_dir() -> Result<PathBuf> {
    let program = std::env::current_exe().context("where is this program?")?;
    let directory = program.parent().context("a program is in a directory")?;
    let is_test = directory.file_name().is_some_and(|name| name == "deps");
    Ok(if is_test { directory.parent().context("deps is in a directory")? } else { directory }.to_owned())
}

/// Cargo's target directory.
///
/// # Errors
/// As for [`binary_dir`].
pub fn target_dir() -> Result<PathBuf> {
    Ok(binary_dir()?.parent().context("a profile is in the target directory")?.to_owned())
}

/// The top of the source tree.
pub fn project_dir() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}
