//! What a target is called for ever: a name that stays when its path or its device number does not.
//!
//! | target | name |
//! |---|---|
//! | file | inode number, and time of birth where the file system has one |
//! | device mapper (LVM, LUKS, multipath) | `dm/uuid`, else `dm/name` |
//! | loop device | the backing file's path, and where in it the device begins |
//! | MD array | `md/uuid` |
//! | disk | `wwid`, else `serial`, as its driver tells them |
//! | partition | its disk's name, and the sector where it begins |
//!
//! All of a device's are read below `/sys/dev/block/MAJOR:MINOR`. A device with none of them is known by its size
//! alone: then its contents must tell (`live::fingerprint`).

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};
use serde::{Deserialize, Serialize};

const SYS_BLOCK: &str = "/sys/dev/block";
/// The unit of sizes and starts in sysfs, whatever the device's own.
const SECTOR_BYTES: u64 = 512;

/// What a target is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetIdentity {
    /// What no other target is called, where there is such a name.
    pub name: Option<String>,
    /// Its size in bytes.
    pub size: u64,
}

impl TargetIdentity {
    /// Of what is open.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn of(file: impl AsFd) -> io::Result<Self> {
        let flags = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let statx = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, flags)?;
        Ok(if FileType::from_raw_mode(statx.stx_mode.into()) == FileType::BlockDevice {
            of_device(Path::new(SYS_BLOCK), statx.stx_rdev_major, statx.stx_rdev_minor)
        } else {
            of_file(&statx)
        })
    }

    /// Of what stands at `path`, without opening it for anything; `None` where nothing does.
    ///
    /// # Errors
    /// What the operating system says.
    pub(crate) fn at(path: &Path) -> io::Result<Option<Self>> {
        match rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => Self::of(file).map(Some),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether it is this target that stands at `path`; `None` where nothing does, or nobody can tell.
    pub(crate) fn is_at(&self, path: &Path) -> Option<bool> {
        let there = Self::at(path).ok().flatten()?;
        Some(there.is_same(self))
    }

    /// Whether both are of one target, as far as names tell. A named one may have grown since.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (&self.name, &other.name) {
            (Some(ours), Some(theirs)) => ours == theirs,
            (None, None) => self.size == other.size,
            _ => false,
        }
    }
}

impl fmt::Display for TargetIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} ({} bytes)", self.size),
            None => write!(f, "a device without a name of its own ({} bytes)", self.size),
        }
    }
}

/// What a directory is, by whatever name: a copy of it is another.
pub(crate) fn name_of_directory(path: &Path) -> Option<String> {
    TargetIdentity::at(path).ok().flatten()?.name
}

fn of_file(statx: &Statx) -> TargetIdentity {
    let mut name = format!("inode {}", statx.stx_ino);
    if StatxFlags::from_bits_retain(statx.stx_mask).contains(StatxFlags::BTIME) {
        let born = statx.stx_btime;
        name.push_str(&match jiff::Timestamp::new(born.tv_sec, born.tv_nsec as i32) {
            Ok(time) => format!(" born {time}"),
            Err(_) => format!(" born {}.{:09}", born.tv_sec, born.tv_nsec),
        });
    }
    TargetIdentity { name: Some(name), size: statx.stx_size }
}

fn of_device(sys: &Path, major: u32, minor: u32) -> TargetIdentity {
    // A link into the tree of devices, where a partition stands below its disk.
    let link = sys.join(format!("{major}:{minor}"));
    let dir = link.canonicalize().unwrap_or(link);
    let sectors: u64 = attribute(&dir, "size").and_then(|text| text.parse().ok()).unwrap_or(0);
    TargetIdentity { name: device_name(&dir), size: sectors * SECTOR_BYTES }
}

fn device_name(dir: &Path) -> Option<String> {
    if attribute(dir, "partition").is_some() {
        let disk = device_name(dir.parent()?)?;
        return Some(format!("partition from sector {} of {disk}", attribute(dir, "start")?));
    }
    if let Some(file) = attribute(dir, "loop/backing_file") {
        let start = attribute(dir, "loop/offset").filter(|offset| offset != "0");
        let start = start.map_or_else(String::new, |offset| format!(" from byte {offset}"));
        return Some(format!("loop device on {file}{start}"));
    }
    let named = |kind: &str, names: &[&str]| {
        names.iter().find_map(|name| attribute(dir, name)).map(|name| format!("{kind} {name}"))
    };
    named("device mapper", &["dm/uuid", "dm/name"])
        .or_else(|| named("array", &["md/uuid"]))
        .or_else(|| named("disk", &["wwid", "device/wwid"]))
        .or_else(|| named("disk with the serial number", &["serial", "device/serial"]))
}

/// The text of an attribute; `None` where it is missing or empty.
fn attribute(dir: &Path, name: &str) -> Option<String> {
    let text = std::fs::read(dir.join(name)).ok()?;
    let text = String::from_utf8_lossy(&text);
    // Some drivers pad with spaces, some with NUL.
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a device's directory in a tree like sysfs, and the link to it.
    fn device(sys: &Path, number: &str, path: &str, attributes: &[(&str, &str)]) {
        let dir = sys.join(path);
        for (name, text) in attributes {
            let file = dir.join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        std::os::unix::fs::symlink(&dir, sys.join(number)).unwrap();
    }

    #[test]
    fn each_kind_of_device_has_the_name_that_outlives_its_number() {
        let sys = tempfile::tempdir().unwrap();
        let sys = sys.path();
        device(sys, "8:0", "sda", &[("size", "2048\n"), ("device/wwid", "naa.5000c500a1\n")]);
        device(sys, "8:1", "sda/sda1", &[("size", "1024\n"), ("partition", "1\n"), ("start", "34\n")]);
        device(sys, "254:0", "vda", &[("size", "8\n"), ("serial", "disk-7\0\0")]);
        device(sys, "254:16", "vdb", &[("size", "8\n"), ("serial", "\n")]);
        device(sys, "254:17", "vdb/vdb1", &[("size", "8\n"), ("partition", "1\n"), ("start", "34\n")]);
        device(sys, "253:0", "dm-0", &[("dm/uuid", "LVM-abc\n"), ("dm/name", "vg-db\n")]);
        device(sys, "253:1", "dm-1", &[("dm/uuid", "\n"), ("dm/name", "plain\n")]);
        device(sys, "7:0", "loop0", &[("loop/backing_file", "/x/d.img\n"), ("loop/offset", "0\n")]);
        device(sys, "7:1", "loop1", &[("loop/backing_file", "/x/d.img\n"), ("loop/offset", "512\n")]);
        device(sys, "9:0", "md0", &[("md/uuid", "a1b2\n")]);
        let name = |major, minor| of_device(sys, major, minor).name;
        assert_eq!(of_device(sys, 8, 0).size, 1 << 20);
        assert_eq!(name(8, 0).unwrap(), "disk naa.5000c500a1");
        assert_eq!(name(8, 1).unwrap(), "partition from sector 34 of disk naa.5000c500a1");
        assert_eq!(name(254, 0).unwrap(), "disk with the serial number disk-7");
        assert_eq!(name(254, 16), None, "an empty serial number is none");
        assert_eq!(name(254, 17), None, "nor has a partition a name that its disk has not");
        assert_eq!(name(253, 0).unwrap(), "device mapper LVM-abc");
        assert_eq!(name(253, 1).unwrap(), "device mapper plain");
        assert_eq!(name(7, 0).unwrap(), "loop device on /x/d.img");
        assert_eq!(name(7, 1).unwrap(), "loop device on /x/d.img from byte 512");
        assert_eq!(name(9, 0).unwrap(), "array a1b2");
        assert_eq!(name(1, 1), None);
    }

    #[test]
    fn a_file_keeps_its_name_when_it_is_renamed_and_not_when_it_is_made_anew_or_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, "x").unwrap();
        let first = TargetIdentity::at(&a).unwrap().unwrap();
        assert_eq!(TargetIdentity::of(std::fs::File::open(&a).unwrap()).unwrap(), first);
        std::fs::rename(&a, &b).unwrap();
        assert_eq!(TargetIdentity::at(&a).unwrap(), None);
        assert!(TargetIdentity::at(&b).unwrap().unwrap().is_same(&first));
        std::fs::copy(&b, &a).unwrap();
        assert!(!TargetIdentity::at(&a).unwrap().unwrap().is_same(&first));
    }

    #[test]
    fn without_names_sizes_are_compared_and_one_name_is_not_none() {
        let identity = |name: Option<&str>, size| TargetIdentity { name: name.map(str::to_owned), size };
        assert!(identity(Some("a"), 1).is_same(&identity(Some("a"), 2)), "it may have grown");
        assert!(!identity(Some("a"), 1).is_same(&identity(Some("b"), 1)));
        assert!(identity(None, 1).is_same(&identity(None, 1)));
        assert!(!identity(None, 1).is_same(&identity(None, 2)));
        assert!(!identity(None, 1).is_same(&identity(Some("a"), 1)));
    }
}
