//! Names: of groups (`web01`), of snapshots (`web01@2026-11-21T00:33:12Z`), of disks, and what a user types to mean one of them.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;

use crate::error::{Error, Result};
use crate::id::as_text;

const LONGEST_NAME: usize = 128;

/// The name of a group: the snapshots of one machine.
///
/// 1 to 128 letters, digits, `.`, `_`, `-` of ASCII, the first a letter or a digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GroupName(String);

/// The name of a disk or an attachment inside a snapshot; the same rules as for a [`GroupName`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DiskName(String);

macro_rules! plain_name {
    ($name:ident, $what:literal) => {
        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                let fine = text.len() <= LONGEST_NAME
                    && text.starts_with(|c: char| c.is_ascii_alphanumeric())
                    && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
                if fine {
                    return Ok(Self(text.to_owned()));
                }
                Err(Error::invalid(format!(concat!("{:?} cannot be ", $what), text)).hint(
                    "a name has 1 to 128 letters, digits, dots, underscores and dashes, and begins with a letter or digit",
                ))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        as_text!($name);
    };
}
plain_name!(GroupName, "the name of a group");
plain_name!(DiskName, "the name of a disk or attachment");

/// The name of one snapshot: its group and its time to the second, of which a group has each only once.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SnapshotName {
    group: GroupName,
    time: Timestamp,
}

impl SnapshotName {
    /// A name; of `time` only whole seconds are kept.
    pub fn new(group: GroupName, time: Timestamp) -> Self {
        let time = Timestamp::from_second(time.as_second()).unwrap_or(time);
        Self { group, time }
    }

    /// The group.
    pub fn group(&self) -> &GroupName {
        &self.group
    }

    /// The time, whole seconds.
    pub fn time(&self) -> Timestamp {
        self.time
    }

    /// The same group, one second later: where to go when the name is taken.
    pub(crate) fn next(&self) -> Result<Self> {
        let time = Timestamp::from_second(self.time.as_second() + 1)
            .map_err(|error| Error::invalid("the clock is beyond the year 9999").because(error))?;
        Ok(Self { group: self.group.clone(), time })
    }

    /// The manifest's file in the group's directory.
    pub(crate) fn file_name(&self) -> String {
        format!("{}{MANIFEST_SUFFIX}", self.time.strftime(FILE_TIME))
    }

    /// The name that belongs to such a file; none if it is not a manifest's.
    pub(crate) fn from_file_name(group: &GroupName, file: &str) -> Option<Self> {
        let stem = file.strip_suffix(MANIFEST_SUFFIX)?;
        let time = jiff::civil::DateTime::strptime(FILE_TIME, stem).ok()?;
        let name = Self::new(group.clone(), time.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp());
        (name.file_name() == file).then_some(name)
    }
}

const MANIFEST_SUFFIX: &str = ".manifest";
const FILE_TIME: &str = "%Y%m%dT%H%M%SZ";

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.group, self.time)
    }
}

impl FromStr for SnapshotName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.parse()? {
            SnapshotSpec { group, when: When::At(time), disk: None } => Ok(Self::new(group, time)),
            _ => Err(Error::invalid(format!("{text:?} is not the full name of one snapshot"))),
        }
    }
}

/// Which snapshot of a group is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// The newest.
    Latest,
    /// The one of this second.
    At(Timestamp),
}

/// What a user types: `web01@latest`, `web01@2026-11-21T00:33:12Z/disk0`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotSpec {
    /// The group.
    pub group: GroupName,
    /// Which of its snapshots.
    pub when: When,
    /// One of its disks.
    pub disk: Option<DiskName>,
}

impl SnapshotSpec {
    /// Whether it may mean this snapshot: `latest` may mean any of its group, since what is the newest changes.
    #[must_use]
    pub fn may_mean(&self, name: &SnapshotName) -> bool {
        let is_then = match self.when {
            When::Latest => true,
            When::At(time) => time == name.time(),
        };
        is_then && *name.group() == self.group
    }
}

impl FromStr for SnapshotSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (snapshot, disk) = match text.split_once('/') {
            Some((snapshot, disk)) => (snapshot, Some(disk.parse()?)),
            None => (text, None),
        };
        let Some((group, when)) = snapshot.split_once('@') else {
            return Err(Error::invalid(format!("{text:?} does not say which snapshot"))
                .hint(format!("{snapshot}@latest is the newest one of a group")));
        };
        let group = group.parse()?;
        let when = match when {
            "latest" => When::Latest,
            // The time library's reasons are left out: they are about its grammar, not about snapshots.
            time => When::At(time.parse().map_err(|_: jiff::Error| {
                Error::invalid(format!("{time:?} is not a snapshot's time")).hint(
                    "times are written like 2026-11-21T00:33:12Z, and the newest snapshot is called latest",
                )
            })?),
        };
        Ok(Self { group, when, disk })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "-x", ".x", "a b", "a@b", "ä", &"x".repeat(129)] {
            assert!(bad.parse::<GroupName>().is_err(), "{bad:?}");
        }
        for good in ["web01", "A.b-c_d", "0", &"x".repeat(128)] {
            assert_eq!(good.parse::<GroupName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_snapshots_name_survives_text_and_file_name() {
        let name: SnapshotName = "web01@2026-11-21T00:33:12Z".parse().unwrap();
        assert_eq!(name.to_string(), "web01@2026-11-21T00:33:12Z");
        assert_eq!(name.file_name(), "20261121T003312Z.manifest");
        assert_eq!(SnapshotName::from_file_name(name.group(), &name.file_name()), Some(name.clone()));
        for bad in
            ["20261121T003312Z", "20261121T003312Z.manifest~", "x.manifest", "20261321T003312Z.manifest"]
        {
            assert_eq!(SnapshotName::from_file_name(name.group(), bad), None, "{bad}");
        }
        assert_eq!(name.next().unwrap().to_string(), "web01@2026-11-21T00:33:13Z");
    }

    #[test]
    fn a_spec_names_group_time_and_disk() {
        let spec: SnapshotSpec = "web01@latest/disk0".parse().unwrap();
        assert_eq!((spec.group.as_str(), spec.when), ("web01", When::Latest));
        assert_eq!(spec.disk.unwrap().as_str(), "disk0");
        for bad in ["web01", "web01@", "@latest", "web01@yesterday", "web01@latest/", "web01@latest/a/b"] {
            assert!(bad.parse::<SnapshotSpec>().is_err(), "{bad}");
        }
        assert!("web01".parse::<SnapshotSpec>().unwrap_err().to_string().contains("web01@latest"));
        assert_eq!(
            "web01@lates".parse::<SnapshotSpec>().unwrap_err().to_string(),
            "\"lates\" is not a snapshot's time; \
             times are written like 2026-11-21T00:33:12Z, and the newest snapshot is called latest"
        );
    }
}
