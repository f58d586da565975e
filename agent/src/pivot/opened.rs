//! Whether it is the very target that stands at its path, and that QEMU has open: the path may have become another file's, or mean
//! another one to QEMU (another mount namespace, another host behind a forwarded socket), and a machine that is moved onto the
//! wrong disk is lost.

use std::io;
use std::os::unix::fs::MetadataExt as _;

use super::Home;
use crate::cli::Failure;
use crate::in_use::{self, Held};
use crate::live_restore::shell_line;

/// Fails unless the target's path leads to the file that is served: QEMU is about to open it by that.
pub(super) fn check_stands_at_its_path(home: &Home<'_>) -> anyhow::Result<()> {
    let target = home.target.display();
    let another = match std::fs::metadata(home.target) {
        Ok(there) if in_use::is_same(&there, &home.file) => return Ok(()),
        Ok(there) if there.is_dir() => "a directory stands there now",
        Ok(_) => "another file stands there now",
        Err(error) if error.kind() == io::ErrorKind::NotFound => "nothing stands there now",
        Err(error) => {
            return Err(Failure::new(
                format!("cannot look at the target {target}, by whose path QEMU would open it"),
                "let lifeboot look at it, then run `lifeboot pivot`; the machine goes on through the agent",
            )
            .because(error)
            .into());
        }
    };
    // It may be another disk's, and a new name is given over it, or inside it.
    let clear = match std::fs::symlink_metadata(home.target) {
        Ok(_) => format!("move what stands at {target} away first, then "),
        Err(_) => String::new(),
    };
    Err(match home.held.as_ref().and_then(|held| Held::of(held, &home.file)) {
        Some(Held::Device) => Failure::new(
            format!("{target}, by which QEMU would open the target, is not that device any more: {another}"),
            format!(
                "the machine goes on through the agent, which has the device open: {clear}make it again (`{}`, as root), then run \
                 `lifeboot pivot`",
                making_node(home)
            ),
        ),
        Some(Held::Called(now)) => Failure::new(
            format!("the target is not at {target} any more, by which QEMU would open it: {another}; it is called {} now", now.display()),
            format!(
                "the machine goes on through the agent, which has it open: {clear}rename {} back to {target}, and run \
                 `lifeboot pivot`",
                now.display()
            ),
        ),
        Some(Held::Removed(held) | Held::Unnamed(held)) => Failure::new(
            format!("the target was removed from {target}, by which QEMU would open it: {another}"),
            format!(
                "the machine goes on through the agent, which alone still has it: do not end that before `lifeboot save {target}` has \
                 saved what the machine wrote; or shut the machine down, and copy {} to a new file while the agent runs",
                held.display()
            ),
        ),
        None => Failure::new(
            format!("the target is not at {target} any more, by which QEMU would open it: {another}"),
            format!("the machine goes on where it was: {clear}put the target back at {target}, and run `lifeboot pivot`"),
        ),
    }
    .into())
}

/// The command that makes a device's node anew.
fn making_node(home: &Home<'_>) -> String {
    let number = home.file.rdev();
    let [major, minor] = [rustix::fs::major(number), rustix::fs::minor(number)].map(|part| part.to_string());
    let words = ["mknod".to_owned(), home.target.display().to_string(), "b".to_owned(), major, minor];
    shell_line(&words)
}

/// Fails unless the process, which was told to open the target, has opened that.
pub(super) fn check_opened(process: Option<u32>, home: &Home<'_>) -> anyhow::Result<()> {
    if has_open(process, home)? {
        return Ok(());
    }
    // It may have been put there while QEMU opened it.
    check_stands_at_its_path(home)?;
    Err(Failure::new(
        format!(
            "to QEMU{} the path {} is another file than the one that is restored here",
            in_words(process),
            home.target.display()
        ),
        "QEMU sees other directories (a container, a chroot, another machine): mount the target there under the same path",
    )
    .into())
}

/// Fails unless the process, whose drive is on what it calls the target, has that very target open.
pub(super) fn check_runs_from(process: Option<u32>, home: &Home<'_>) -> anyhow::Result<()> {
    if has_open(process, home)? {
        return Ok(());
    }
    let target = home.target.display();
    let files = process.map_or_else(String::new, |process| format!(" (`ls -l /proc/{process}/fd` shows it)"));
    Err(Failure::new(
        format!("the machine of QEMU{} was moved, but not onto {target}: it runs from another file", in_words(process)),
        format!(
            "leave it the file from which it runs{files}, and start it from that one, not from {target}, which may be a copy, or have \
             taken its name"
        ),
    )
    .into())
}

fn in_words(process: Option<u32>) -> String {
    process.map_or_else(String::new, |process| format!(" (process {process})"))
}

/// Whether the process has the target open, for reading and writing or not.
fn has_open(process: Option<u32>, home: &Home<'_>) -> Result<bool, Failure> {
    let Some(process) = process else { return Err(cannot_tell(home, "its process cannot be told")) };
    in_use::has_open(process, &home.file)
        .map_err(|error| cannot_tell(home, &format!("its process {process}: {error}")))
}

fn cannot_tell(home: &Home<'_>, why: &str) -> Failure {
    Failure::new(
        format!("cannot tell whether QEMU means the same file by {}: {why}", home.target.display()),
        "let lifeboot see QEMU's process: run it as root or as QEMU's user, in the same PID namespace, at QEMU's own socket",
    )
}
