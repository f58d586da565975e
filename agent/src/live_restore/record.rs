//! What a session is, in words that a person can read with `cat`: `session.json`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::identity::TargetIdentity;
use super::state_dir::StateDir;
use crate::cli::Failure;
use crate::in_use;
use crate::live::{BootId, DiskLayout};

const VERSION: u32 = 2;

/// The record of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionRecord {
    /// The version of this record.
    pub version: u32,
    /// The session's id: 32 hexadecimal digits.
    pub session: String,
    /// The snapshot's full name, `group@time`.
    pub snapshot: String,
    /// The disk's name within the snapshot.
    pub disk: String,
    /// The disk's size in bytes.
    pub size: u64,
    /// The disk's chunk size in bytes.
    pub chunk_size: u32,
    /// The root of the disk's map, as text: what the snapshot's name stood for when the session began.
    pub map: String,
    /// The target, as an absolute path: where it was when the session was last started.
    pub target: PathBuf,
    /// What the target is, wherever it is.
    pub identity: TargetIdentity,
    /// The boot id of the kernel that the session was last served under. `None` until its first start has made
    /// everything: then nothing of it was ever served.
    #[serde(deserialize_with = "Option::deserialize")]
    pub boot: Option<String>,
    /// From 1; one more each time that writes which a living guest may believe in were lost.
    pub epoch: u64,
    /// A running machine was moved onto the target itself, and writes to it past us: what the journal says of
    /// the guest's writes, and what the snapshot says of the contents, is the truth no longer.
    pub handed_over: bool,
    /// How often an agent began to serve it, since that is counted.
    pub starts: u64,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecordError {
    #[error("it was written by a newer version of lifeboot: its version is {0}")]
    Newer(u32),
    #[error(transparent)]
    Damaged(#[from] serde_json::Error),
}

impl SessionRecord {
    /// A record of this version.
    #[must_use]
    pub const fn version() -> u32 {
        VERSION
    }

    /// The layout of the disk.
    #[must_use]
    pub const fn layout(&self) -> DiskLayout {
        DiskLayout { size: self.size, chunk_size: self.chunk_size }
    }

    /// The boot that the session was last served under.
    pub(super) fn last_boot(&self) -> Option<BootId> {
        self.boot.as_ref().and_then(|boot| boot.parse().ok())
    }

    /// Whether it may have been served. If not, its first start was cut short, and may be made anew.
    #[must_use]
    pub const fn was_begun(&self) -> bool {
        self.boot.is_some()
    }

    /// The record that these bytes are: of this version afterwards, whatever it was.
    pub(super) fn parse(text: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        #[derive(Deserialize)]
        struct Before {
            epoch: Option<serde::de::IgnoredAny>,
            handed_over: Option<serde::de::IgnoredAny>,
        }
        let Version { version } = serde_json::from_slice(text)?;
        match version {
            VERSION => Ok(serde_json::from_slice(text)?),
            1 => {
                let Before { epoch: None, handed_over: None } = serde_json::from_slice(text)? else {
                    return Err(damaged("a record of version 1 has no epoch").into());
                };
                let mut value: serde_json::Value = serde_json::from_slice(text)?;
                value["version"] = VERSION.into();
                value["epoch"] = 1.into();
                value["handed_over"] = false.into();
                value["starts"] = 1.into();
                Ok(serde_json::from_value(value)?)
            }
            0 => Err(damaged("there is no version 0").into()),
            newer => Err(RecordError::Newer(newer)),
        }
    }

    /// Fails where the target is a disk of its own by now: to serve it from here, beside the machine that
    /// runs from it, would ruin it.
    pub(super) fn check_not_handed_over(&self, state: &StateDir) -> Result<(), Failure> {
        if !self.handed_over {
            return Ok(());
        }
        state.check_its_target(self)?;
        let path = state.target(self);
        let (target, dir) = (path.display(), state.path().display());
        let discard = state.command("discard", path);
        if in_use::is_locked(path) {
            return Err(Failure::new(
                format!(
                    "a machine runs from {target} itself, and holds a lock on it: it was moved onto it, which is a disk of its own now, \
                     and the session in {dir} is over"
                ),
                format!(
                    "let it run, there is nothing left to restore, and start it from {target} from now on; should it hang, waiting on \
                     the export because its agent was killed during the move, give this command --qmp SOCKET, which asks its QEMU and \
                     goes on; `{discard}` removes the session and leaves the disk"
                ),
            ));
        }
        if state.is_moved(self) {
            return Err(Failure::new(
                format!(
                    "the session in {dir} is over: a running machine was moved onto {target}, which is a disk of its own now"
                ),
                format!(
                    "start the machine from {target} itself; `{discard}` removes the session and leaves the disk"
                ),
            ));
        }
        Err(Failure::new(
            format!(
                "the session in {dir} is over: a running machine was moved onto {target}, which is a disk of its own now, or was \
                 about to be when the agent ended"
            ),
            format!(
                "start the machine from {target} itself; if it still runs and waits on the export, give this command --qmp \
                 SOCKET, which asks its QEMU and goes on; `{discard}` removes the session and leaves the disk"
            ),
        ))
    }
}

fn damaged(why: &str) -> serde_json::Error {
    serde::de::Error::custom(why)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn record() -> SessionRecord {
        SessionRecord {
            version: VERSION,
            session: "00".repeat(16),
            snapshot: "web01@2026-11-21T00:33:12Z".into(),
            disk: "disk0".into(),
            size: 1 << 30,
            chunk_size: 1 << 17,
            map: "none".into(),
            target: "/x/t.raw".into(),
            identity: TargetIdentity { name: Some("disk naa.1".into()), size: 1 << 30 },
            boot: Some("12".repeat(16)),
            epoch: 3,
            handed_over: false,
            starts: 1,
        }
    }

    fn text_of(value: &serde_json::Value) -> Vec<u8> {
        serde_json::to_vec(value).unwrap()
    }

    #[test]
    fn a_record_of_version_1_has_the_first_epoch_and_was_not_handed_over() {
        let mut value = serde_json::to_value(record()).unwrap();
        value["version"] = 1.into();
        assert!(SessionRecord::parse(&text_of(&value)).is_err(), "members that version 1 did not have");
        value.as_object_mut().unwrap().remove("epoch");
        assert!(SessionRecord::parse(&text_of(&value)).is_err());
        value.as_object_mut().unwrap().remove("handed_over");
        let parsed = SessionRecord::parse(&text_of(&value)).unwrap();
        assert_eq!(parsed, SessionRecord { epoch: 1, ..record() });
        value["version"] = 2.into();
        assert!(SessionRecord::parse(&text_of(&value)).is_err(), "members that version 2 must have");
    }

    #[test]
    fn a_member_that_is_missing_or_unknown_makes_a_record_damaged() {
        let whole = serde_json::to_value(record()).unwrap();
        assert_eq!(SessionRecord::parse(&text_of(&whole)).unwrap(), record());
        for name in whole.as_object().unwrap().keys() {
            let mut value = whole.clone();
            value.as_object_mut().unwrap().remove(name);
            assert!(SessionRecord::parse(&text_of(&value)).is_err(), "without {name}");
        }
        let mut value = whole;
        value["more"] = 1.into();
        assert!(SessionRecord::parse(&text_of(&value)).is_err());
    }

    #[test]
    fn a_session_that_was_handed_over_says_what_removes_it() {
        let dir = &StateDir::at("/x/t.raw.lifeboot".into());
        record().check_not_handed_over(dir).unwrap();
        let target = tempfile::NamedTempFile::new().unwrap();
        let refused = |over: SessionRecord| {
            format!("{:#}", anyhow::Error::from(over.check_not_handed_over(dir).unwrap_err()))
        };
        let over = over(target.path());
        assert!(refused(over.clone()).contains("a disk of its own"), "{}", refused(over));
        // Of another file at its path, or of none, that is not said.
        std::fs::remove_file(target.path()).unwrap();
        assert!(refused(over.clone()).contains("nothing stands at"), "{}", refused(over));
        std::fs::write(target.path(), "another").unwrap();
        assert!(refused(over.clone()).contains("is another one"), "{}", refused(over));
    }

    /// A session that was handed over, with its target.
    fn over(target: &std::path::Path) -> SessionRecord {
        let identity = TargetIdentity::at(target).unwrap().unwrap();
        SessionRecord { handed_over: true, target: target.to_owned(), identity, ..record() }
    }

    #[test]
    fn a_machine_that_runs_from_its_target_is_not_told_to_be_started() {
        let target = tempfile::NamedTempFile::new().unwrap();
        let over = over(target.path());
        let refused = || {
            let failure = over.check_not_handed_over(&StateDir::at("/x".into())).unwrap_err();
            let (what, advice) = crate::cli::told(&failure.into());
            (what, advice.unwrap())
        };
        let (what, advice) = refused();
        assert!(what.contains("is over") && advice.contains("start the machine from"), "{what}: {advice}");
        // It lives until this process closes the file, as looking at it does.
        rustix::fs::fcntl_lock(target.as_file(), rustix::fs::FlockOperation::LockExclusive).unwrap();
        let (what, advice) = refused();
        assert!(what.contains("a machine runs from") && advice.contains("let it run"), "{what}: {advice}");
        assert!(!advice.contains("start the machine"), "{advice}");
    }
}
