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

/// One of QEMU's tools, of a version that speaks extended headers (8.2 or newer): the installed one if it is, else that which
/// `scripts/newer_qemu.sh` fetched. `None` where there is neither.
///
/// # Errors
/// It is there, and does not run.
pub fn newer_qemu(name: &str) -> Result<Option<Command>> {
    let fetched = target_dir()?.join("newer-qemu/usr/bin").join(name);
    for program in [PathBuf::from(name), fetched] {
        let mut asked = Command::new(&program);
        match asked.arg("--version").output() {
            Ok(said) if speaks_extended_headers(&String::from_utf8_lossy(&said.stdout)) => {
                return Ok(Some(Command::new(program)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("{} --version", program.display())),
        }
    }
    Ok(None)
}

/// Whether the version that a tool of QEMU's tells asks for extended headers.
fn speaks_extended_headers(said: &str) -> bool {
    let version = said.split_whitespace().skip_while(|word| *word != "version").nth(1).unwrap_or_default();
    let mut numbers = version.split('.').map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(8), Some(2))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_speaks_extended_headers_since_8_2() {
        for (said, does) in [
            ("qemu-io version 10.0.2 (Debian 1:10.0.2)", true),
            ("qemu-img version 8.2.0", true),
            ("qemu-img version 7.2.22 (Debian 1:7.2)", false),
            ("qemu-io version 8.1.5", false),
            ("", false),
        ] {
            assert_eq!(speaks_extended_headers(said), does, "{said}");
        }
    }
}
