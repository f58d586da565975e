//! Who holds a lock on a file, from `/proc/locks`: QEMU locks its images in a way that `flock` does not see.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

/// Who else holds a lock on `file`, in words; `None` where nobody does, or the system does not tell.
///
/// `flock` locks are left out: whoever wants to know of those tries to take one.
pub(super) fn holder(file: &File) -> io::Result<Option<String>> {
    let metadata = file.metadata()?;
    let key = file_key(metadata.dev(), metadata.ino());
    match std::fs::read_to_string("/proc/locks") {
        Ok(locks) => Ok(locks.lines().find_map(|line| holder_in(line, &key))),
        Err(error) => {
            tracing::debug!(%error, "/proc/locks cannot be read");
            Ok(None)
        }
    }
}

/// The process that holds the lock of `file` that we take, where it is a lifeboot as this one; `None` too where the system does not
/// tell.
pub(super) fn other_lifeboot(file: &File) -> Option<u32> {
    let metadata = file.metadata().ok()?;
    let key = file_key(metadata.dev(), metadata.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| flock_holder_in(line, &key)).filter(|pid| is_like_this(*pid))
}

/// Whether the process runs the program of this name. Who may not be asked more tells this.
fn is_like_this(pid: u32) -> bool {
    let name_of = |process: &str| std::fs::read(format!("/proc/{process}/comm")).ok();
    let name = name_of(&pid.to_string());
    name.is_some() && name == name_of("self")
}

/// The process that holds a `flock` on the file `key`, as a line of `/proc/locks` says; not one that waits for it.
fn flock_holder_in(line: &str, key: &str) -> Option<u32> {
    let mut words = line.split_whitespace().skip(1);
    let kind = words.next()?;
    let pid = words.nth(2)?;
    let is_it = kind == "FLOCK" && words.next()? == key;
    pid.parse().ok().filter(|pid| is_it && *pid > 0)
}

/// How `/proc/locks` names a file: `fe:00:1234`, the device's numbers in hexadecimal.
fn file_key(device: u64, inode: u64) -> String {
    format!("{:02x}:{:02x}:{inode}", libc::major(device), libc::minor(device))
}

/// What a line such as `1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101` says about the file `key`.
fn holder_in(line: &str, key: &str) -> Option<String> {
    let mut words = line.split_whitespace().skip(1);
    let kind = words.next()?;
    let pid = words.nth(2)?;
    if words.next()? != key || !matches!(kind, "OFDLCK" | "POSIX") {
        return None;
    }
    Some(match pid.parse::<u32>() {
        Ok(pid) if pid > 0 => format!("process {pid} holds a lock on it"),
        _ => "a program holds a lock on it, as QEMU does on its images".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_by_its_programs_name() {
        assert!(is_like_this(std::process::id()));
        assert!(!is_like_this(1), "the first process");
        let file = tempfile::tempfile().unwrap();
        assert_eq!(other_lifeboot(&file), None);
        file.lock().unwrap();
        assert_eq!(other_lifeboot(&file), Some(std::process::id()));
    }

    #[test]
    fn locks_of_the_file_are_told_from_others() {
        let qemu = "1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101";
        assert!(holder_in(qemu, "fe:00:1234").is_some_and(|who| who.contains("QEMU")));
        assert_eq!(holder_in(qemu, "fe:00:123"), None);
        assert_eq!(holder_in("2: FLOCK  ADVISORY  WRITE 77 fe:00:1234 0 EOF", "fe:00:1234"), None);
        assert_eq!(
            holder_in("3: POSIX  ADVISORY  WRITE 77 fe:00:1234 0 EOF", "fe:00:1234").as_deref(),
            Some("process 77 holds a lock on it")
        );
        assert_eq!(holder_in("3: -> POSIX", "fe:00:1234"), None);
        let flock = |line| flock_holder_in(line, "fe:00:1234");
        assert_eq!(flock("2: FLOCK  ADVISORY  WRITE 77 fe:00:1234 0 EOF"), Some(77));
        assert_eq!(flock("2: -> FLOCK  ADVISORY  WRITE 78 fe:00:1234 0 EOF"), None);
        assert_eq!(flock("2: FLOCK  ADVISORY  WRITE 0 fe:00:1234 0 EOF"), None, "of another namespace");
        assert_eq!(flock("2: FLOCK  ADVISORY  WRITE 77 fe:00:123 0 EOF"), None);
        assert_eq!(flock(qemu), None);
        assert_eq!(file_key(libc::makedev(0xfe, 0), 1234), "fe:00:1234");
    }
}
