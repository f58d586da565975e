//! What a successor looks at while another agent still serves, which ends for it only where it can go on.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::Context as _;
use block::{FileDisk, OpenDevice as _};

use super::distrust;
use super::identity::TargetIdentity;
use super::open::{Found, Restored, cannot_resume, identity_of};
use super::parts::{journal_identity, parse_id};
use super::record::SessionRecord;
use super::rest::locked_record;
use super::state_dir::{LIVE_FILE, RECORD, StateDir};
use super::target;
use crate::cli::Failure;
use crate::live::{SessionId, check_header};

impl Found<'_> {
    /// Looks at what opening the session is going to look at, and changes nothing.
    ///
    /// # Errors
    /// Where opening it would fail, as far as that can be known now, or would go on with something else than the agent serves.
    pub(super) fn look_ahead(&self) -> anyhow::Result<()> {
        let Self { wish, state, path, .. } = self;
        let Restored::Begun(found, disk) = &self.restored else {
            return Err(begun_meanwhile(state));
        };
        self.check_there(found)?;
        let target = target::open_to_look(path, wish.engine)?;
        let record = locked_record(state, found)?;
        check_is_served(&target, path, &record)?;
        self.check_is_its_target(&target, &record, disk.is_some())?;
        check_writable(state)?;
        distrust::look_at_live(state, &record)?;
        let journal = self.open_its_journal()?;
        let id = SessionId(parse_id(&record.session)?);
        let looked = wish.engine.run(async {
            let journal = journal.open()?;
            anyhow::Ok(check_header(&*journal, id, &journal_identity(&record), record.layout()).await)
        })?;
        looked.map_err(|error| cannot_resume(state, error))
    }
}

/// What was found at the start holds no more: a new session would go over what the agent serves.
fn begun_meanwhile(state: &StateDir) -> anyhow::Error {
    Failure::new(
        format!(
            "no session was in {} when this command looked for it, and an agent serves one from there",
            state.path().display()
        ),
        "run the same command again",
    )
    .into()
}

/// Fails where the agent has another file open than the one that stands at `path`, also if that was moved: it is not what its guests see.
fn check_is_served(target: &FileDisk, path: &Path, record: &SessionRecord) -> anyhow::Result<()> {
    let identity: TargetIdentity = identity_of(target)?;
    if identity.is_same(&record.identity) {
        return Ok(());
    }
    let path = path.display();
    Err(Failure::new(
        format!(
            "{path} is another target now ({identity}) than the one that the agent serves ({})",
            record.identity
        ),
        format!(
            "put the one that is served back at {path}; to go on with a copy instead, end the agent first"
        ),
    )
    .into())
}

/// Fails where a file of the session cannot be written, or replaced, though its directory can.
fn check_writable(state: &StateDir) -> anyhow::Result<()> {
    let dir = state.path();
    rustix::fs::access(dir, rustix::fs::Access::WRITE_OK)
        .map_err(io::Error::from)
        .with_context(|| format!("cannot write to the session's directory {}", dir.display()))?;
    let open = |name| {
        let path = state.file(name);
        let opened = File::options().read(true).write(true).open(&path);
        (opened.map(drop), path)
    };
    let (live, path) = open(LIVE_FILE);
    match live {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot write to {}", path.display()));
        }
        _ => {}
    }
    // It is replaced as a whole, which only its attributes can forbid.
    let (record, path) = open(RECORD);
    match record {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            Err(error).with_context(|| format!("cannot replace {}", path.display()))
        }
        _ => Ok(()),
    }
}
