//! A target that does not stand at its path any more while it is served: the agent goes on with the file that it has open, and
//! whoever looks by the path sees another one, or none.
//!
//! Nothing of it is wrong as long as the agent runs. After that a file that was removed is gone, and the path leads to what is not
//! the guest's disk.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::path::Path;

use crate::in_use::{self, Held};

/// What is to be known of a target that is open, where it does not stand at `path`, and what to do. `None` where it does, or where
/// nobody can tell.
pub(super) fn found(target: BorrowedFd<'_>, path: &Path) -> Option<String> {
    let process = std::process::id();
    let Strayed { there, held, by } = look(target, path)?;
    let shown = path.display();
    let stands = format!("{there} at {shown}, which is not what this agent (process {process}) serves");
    Some(match by {
        Some(Held::Removed(_)) => format!(
            "{stands}: the target was removed, and is gone once the agent ends; until then `lifeboot save {shown}` keeps what the guest \
             wrote, and `cp {held} FILE` the disk as far as it is home"
        ),
        Some(Held::Unnamed(_)) | None => {
            format!("{stands}: that has another name now, which `ls -l {held}` may show")
        }
        Some(by) => whereabouts(&stands, path, &by),
    })
}

/// The same at the end of the agent, which nobody can ask any more.
pub(super) fn left(target: BorrowedFd<'_>, path: &Path) -> Option<String> {
    let Strayed { there, by, .. } = look(target, path)?;
    let stands = format!("{there} at {}, which is not what was served", path.display());
    Some(match by {
        Some(Held::Removed(_)) => format!("{stands}: the target was removed meanwhile, and is gone"),
        Some(Held::Unnamed(_)) | None => format!("{stands}: that has another name now"),
        Some(by) => whereabouts(&stands, path, &by),
    })
}

fn whereabouts(stands: &str, path: &Path, by: &Held) -> String {
    match by {
        Held::Called(called) => format!("{stands}: that is {} now", called.display()),
        _ => format!("{stands}: have {} lead to the device again", path.display()),
    }
}

/// A target that does not stand at its path.
struct Strayed {
    there: &'static str,
    /// Where this process has it.
    held: String,
    by: Option<Held>,
}

fn look(target: BorrowedFd<'_>, path: &Path) -> Option<Strayed> {
    let ours = in_use::metadata_of(target).ok()?;
    let there = match fs::metadata(path) {
        Ok(there) if in_use::is_same(&there, &ours) => return None,
        Ok(_) => "another file stands",
        Err(error) if error.kind() == io::ErrorKind::NotFound => "nothing stands",
        Err(_) => return None,
    };
    let held = format!("/proc/{}/fd/{}", std::process::id(), target.as_raw_fd());
    let by = Held::of(Path::new(&held), &ours);
    Some(Strayed { there, held, by })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_target_that_stands_at_its_path_is_nothing_to_tell_of() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("t"), dir.path().join("link"));
        let file = File::create(&path).unwrap();
        assert_eq!(found(file.as_fd(), &path), None);
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(found(file.as_fd(), &link), None);
        fs::hard_link(&path, dir.path().join("hard")).unwrap();
        assert_eq!(found(file.as_fd(), &dir.path().join("hard")), None);
    }

    #[test]
    fn one_that_was_renamed_replaced_or_removed_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("t"), dir.path().join("o"));
        let file = File::create(&path).unwrap();
        fs::rename(&path, &other).unwrap();
        let renamed = found(file.as_fd(), &path).unwrap();
        assert!(renamed.starts_with("nothing stands at "), "{renamed}");
        assert!(renamed.ends_with(&format!("that is {} now", other.display())), "{renamed}");
        File::create(&path).unwrap();
        let replaced = found(file.as_fd(), &path).unwrap();
        assert!(replaced.starts_with("another file stands at "), "{replaced}");
        fs::remove_file(&other).unwrap();
        let removed = found(file.as_fd(), &path).unwrap();
        let held = format!("cp /proc/{}/fd/{} FILE", std::process::id(), file.as_raw_fd());
        assert!(removed.contains("was removed") && removed.contains(&held), "{removed}");
        let left = left(file.as_fd(), &path).unwrap();
        assert!(left.starts_with("another file stands at ") && left.ends_with(", and is gone"), "{left}");
    }
}
