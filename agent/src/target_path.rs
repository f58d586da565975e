//! What a target's path tells by itself: said before anything else is done. And how a target is named: `[DISK=]PATH`.

use std::fmt::Display;
use std::io;
use std::path::Path;

use anyhow::Context as _;

use crate::cli::{Failure, UsageError};
use crate::live_restore::absolute;

/// What stands before the first `=` is a disk's name, unless it has a slash: `./a=b` is a path.
///
/// # Errors
/// A [`UsageError`] where either has nothing in it.
pub(crate) fn split(target: &Path) -> Result<(Option<&str>, &Path), UsageError> {
    let Some((name, path)) = target.to_str().and_then(|text| text.split_once('=')) else {
        return Ok((None, target));
    };
    if name.contains('/') {
        return Ok((None, target));
    }
    if name.is_empty() || path.is_empty() {
        return Err(UsageError::new(format!(
            "{} is not DISK=TARGET; to name a file with = in its name, write ./{0}",
            target.display()
        )));
    }
    Ok((Some(name), Path::new(path)))
}

/// That a target was named for another disk than these.
pub(crate) fn no_such_disk(snapshot: impl Display, name: &str, disks: &[impl Display]) -> Failure {
    let disks: Vec<String> = disks.iter().map(ToString::to_string).collect();
    Failure::new(
        format_args!("{snapshot} has no disk {name}; it has {}", disks.join(", ")),
        "name one of these before the =; or write ./NAME for a file with = in its name",
    )
}

/// Fails where the path is a symbolic link that leads to nothing.
///
/// # Errors
/// A [`Failure`].
pub(crate) fn refuse_dangling(path: &Path) -> anyhow::Result<()> {
    let leads_nowhere = std::fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    match std::fs::read_link(path) {
        Ok(to) if leads_nowhere => Err(Failure::new(
            format_args!(
                "the target {} is a symbolic link to {}, which does not exist",
                path.display(),
                to.display()
            ),
            "bring back what it leads to (is its file system mounted, its volume active?), or make an empty file there; or \
             remove the link, or name another target",
        )
        .into()),
        _ => Ok(()),
    }
}

/// Fails where a path cannot stand in a session's files, which are text.
///
/// # Errors
/// A [`Failure`]; where the working directory cannot be told.
pub(crate) fn refuse_unwritable_name(what: &str, path: &Path) -> anyhow::Result<()> {
    // Links are followed: the session is that of what they lead to.
    let whole = absolute(path).or_else(|_| std::path::absolute(path));
    let whole = whole.with_context(|| format!("cannot tell where {} is", path.display()))?;
    if path.to_str().is_some() && whole.to_str().is_some() {
        return Ok(());
    }
    Err(Failure::new(
        format_args!(
            "the path of {what}, {}, is not UTF-8, and cannot be written down in a session's files",
            whole.display()
        ),
        "name one whose whole path is UTF-8: rename it, or the directory that it is in",
    )
    .into())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    #[test]
    fn a_disks_name_stands_before_the_first_equals_sign_unless_it_has_a_slash() {
        let parts = |text: &'static str| split(Path::new(text)).ok();
        assert_eq!(parts("t.raw"), Some((None, Path::new("t.raw"))));
        assert_eq!(parts("root=/x/t=1.raw"), Some((Some("root"), Path::new("/x/t=1.raw"))));
        assert_eq!(parts("./a=b"), Some((None, Path::new("./a=b"))));
        assert_eq!(parts("/x/a=b"), Some((None, Path::new("/x/a=b"))));
        assert_eq!(parts("=b"), None);
        assert_eq!(parts("root="), None);
    }

    #[test]
    fn a_name_must_be_text_where_it_stands_and_where_it_leads() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join(OsStr::from_bytes(b"odd-\xff"));
        let refused = |path: &Path| refuse_unwritable_name("the target", path).is_err();
        assert!(refused(&odd) && refused(&odd.join("t.raw")));
        std::fs::create_dir(&odd).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&odd, &link).unwrap();
        assert!(refused(&odd.join("t.raw")) && refused(&link.join("t.raw")));
        assert!(!refused(&dir.path().join("t.raw")));
    }
}
