//! Makes a session, or finds the one that is there and goes on with it.
//!
//! # Order, and why
//! A first start: the target's lock; the session's directory; `session.json` with no `boot`; the live file; the room
//! of the journal; the target's emptying; the journal; `session.json` with `boot`; only then is anything served. Each is on stable
//! storage before the next (but the live file, which never is). So:
//! - a record without `boot` proves that nothing was ever served, and that start may be made anew, whatever its
//!   journal is. With `boot`, a journal that is missing or empty was lost: it may have spoken of what a guest wrote, and is
//!   never made anew, `--force` or not;
//! - the target is changed only when all that can run out of room or place was had.
//!
//! A further start: the target's lock; what the target is against the record; what it holds against the journal
//! (`live::fingerprint`); the journal and the live file; `session.json` with this boot and with where the target is
//! now; then it is served. The live file is in use before the record names this boot: so a record of this boot
//! with no live file to believe means that it was lost, and not that the host went down in between.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use block::{Engine, FileDisk, OpenDevice};
use repository::{DiskEntry, GroupName, Repository, Snapshot, SnapshotName};

use super::copied;
use super::distrust;
use super::fetching::{Fetching, SharedPool};
use super::identity::TargetIdentity;
use super::made::Made;
use super::original::check_not_anothers;
use super::parts::{Parts, id_text, make_journal, new_id, open_journal, parse_id};
use super::pointer;
use super::record::SessionRecord;
use super::rest::locked_record;
use super::stamp;
use super::state_dir::{JOURNAL, StateDir};
use super::stopped::{stopped_status, unusable_journal};
use super::take_over;
use super::target::{self, Candidate, Contents};
use super::target_lock;
use super::wanted;
use crate::cli::{Failure, Interrupt};
use crate::live::{ErrorKind, Phase, Resumed, Session, SessionId, SessionOptions, WrittenPast};
use crate::source::Fallbacks;
use crate::status;

/// A session that is ready to be served.
pub(super) struct Opened {
    pub(super) session: Arc<Session>,
    pub(super) target: FileDisk,
    pub(super) journal: FileDisk,
    pub(super) record: SessionRecord,
    /// What fetches; nothing does for a session that does without its repository.
    pub(super) fetching: Option<Fetching>,
    /// How it was found; `None` where it is new.
    pub(super) resumed: Option<Resumed>,
    /// Takes a new session back where it cannot be served.
    pub(super) made: Option<Made>,
}

/// What somebody asked for.
pub(super) struct Wish<'a> {
    /// The repository, or why it cannot be had.
    pub(super) repository: &'a repository::Result<Repository>,
    /// Copies of it.
    pub(super) fallbacks: &'a Fallbacks,
    /// `GROUP@TIME[/DISK]`
    pub(super) spec: &'a str,
    pub(super) target: &'a Path,
    pub(super) force: bool,
    /// The target was copied or moved as a whole, together with its session.
    pub(super) moved: bool,
    /// Sessions that say that they were handed over were looked at: the machine is not on the target.
    pub(super) is_settled: bool,
    /// Whoever serves it now is going to end.
    pub(super) takes_over: bool,
    pub(super) engine: Engine,
    pub(super) pool: &'a SharedPool,
    pub(super) options: SessionOptions,
    /// Whether the boot trace of the group is used, and one recorded.
    pub(super) uses_trace: bool,
}

impl Wish<'_> {
    pub(super) fn repository(&self) -> repository::Result<&Repository> {
        self.repository.as_ref().map_err(Clone::clone)
    }
}

/// What there is to be opened: nothing was touched yet.
pub(super) struct Found<'a> {
    pub(super) wish: &'a Wish<'a>,
    pub(super) state: &'a StateDir,
    /// The target's absolute path.
    pub(super) path: PathBuf,
    pub(super) restored: Restored,
}

/// What is restored.
pub(super) enum Restored {
    /// This disk, by a session that is new.
    New(Snapshot, DiskEntry),
    /// What the session that is there was begun with. Without its disk in the repository where that cannot be had and
    /// the session is wholly home.
    Begun(Box<SessionRecord>, Option<DiskEntry>),
}

/// Finds the session of the target, or the disk that a new one is to restore.
pub(super) fn find<'a>(wish: &'a Wish<'a>, state: &'a StateDir) -> anyhow::Result<Found<'a>> {
    let path = super::state_dir::absolute(wish.target)?;
    if !wish.takes_over {
        target_lock::check_unserved(&path, state.path())?;
    }
    let begun = state.record()?.filter(SessionRecord::was_begun);
    if wish.moved && begun.is_none() {
        return Err(no_copy_found(&path, state));
    }
    let restored = match begun {
        Some(record) => {
            // Before the target is opened: an agent may serve it from there.
            state.check_stands_alone(&record, &path)?;
            if !wish.is_settled {
                record.check_not_handed_over(state)?;
            }
            wanted::check_asked(wish, &record)?;
            let disk = needed(wanted::of_record(wish, state, &record), state, &record)?;
            if let (true, Some(disk)) = (wish.takes_over, &disk) {
                take_over::check_repository(wish, disk)?;
            }
            Restored::Begun(Box::new(record), disk)
        }
        None => {
            let (snapshot, disk) = wanted::asked_for(wish)?;
            Restored::New(snapshot, disk)
        }
    };
    let found = Found { wish, state, path, restored };
    // Before whoever serves it now is told to end.
    target::check_file_limit(&found.path, found.size())?;
    Ok(found)
}

fn no_copy_found(path: &Path, state: &StateDir) -> anyhow::Error {
    let is_beside = state.path() == pointer::beside(path);
    let (place, copied) = if is_beside {
        let copied = format!(
            "copy its session to {} as well, the directory as a whole; where that is kept elsewhere, copy the state directory and name \
             the copy with --state",
            state.path().display()
        );
        (state.path(), copied)
    } else {
        let copied = "copy the state directory of the original, or the session's own directory in it, and name the copy with --state";
        (state.path().parent().unwrap_or_else(|| state.path()), copied.to_owned())
    };
    Failure::new(
        format!("no session of {} was found in {}", path.display(), place.display()),
        format!("{copied}; or leave out --moved to begin a new session, which takes --force where the target holds data"),
    )
    .into()
}

/// What comes from the repository; `None` where that cannot be had, and the session is wholly home and needs none of it.
fn needed<T>(had: anyhow::Result<T>, state: &StateDir, record: &SessionRecord) -> anyhow::Result<Option<T>> {
    let error = match had {
        Ok(had) => return Ok(Some(had)),
        Err(error) => error,
    };
    let is_of_repository = error.chain().any(|cause| cause.is::<repository::Error>());
    let is_complete =
        || stopped_status(state, record).is_ok_and(|status| status.phase == status::Phase::Complete);
    if !is_of_repository || !is_complete() {
        return Err(error);
    }
    tracing::info!(
        error = format_args!("{error:#}"),
        "the repository cannot be had, and is not needed: the disk is wholly home"
    );
    Ok(None)
}

impl Found<'_> {
    /// The session: resumed if there is one, new otherwise.
    pub(super) fn open(self, interrupt: &Interrupt) -> anyhow::Result<Opened> {
        match &self.restored {
            Restored::Begun(record, disk) => {
                let parts = match disk {
                    Some(disk) => needed(Parts::new(self.wish, &self.group()?, disk), self.state, record)?,
                    None => None,
                };
                let parts = match parts {
                    Some(parts) => parts,
                    None => Parts::without_repository(self.wish, record)?,
                };
                self.resume(record, parts, interrupt)
            }
            Restored::New(snapshot, disk) => {
                let parts = Parts::new(self.wish, snapshot.name().group(), disk)?;
                self.create(snapshot, disk, parts, interrupt)
            }
        }
    }

    const fn size(&self) -> u64 {
        match &self.restored {
            Restored::Begun(record, _) => record.size,
            Restored::New(_, disk) => disk.size,
        }
    }

    fn group(&self) -> anyhow::Result<GroupName> {
        let (snapshot, _) = self.names();
        let name: SnapshotName = snapshot.parse()?;
        Ok(name.group().clone())
    }

    /// The full name of the snapshot, and the name of its disk.
    pub(super) fn names(&self) -> (String, String) {
        match &self.restored {
            Restored::Begun(record, _) => (record.snapshot.clone(), record.disk.clone()),
            Restored::New(snapshot, disk) => (snapshot.name().to_string(), disk.name.to_string()),
        }
    }

    fn resume(&self, found: &SessionRecord, parts: Parts, interrupt: &Interrupt) -> anyhow::Result<Opened> {
        let Self { wish, state, path, .. } = self;
        self.check_there(found)?;
        let look = stamp::Look::at(state, found, path, wish.moved);
        let target = target::reopen(path, state.path(), wish.engine, interrupt)?;
        // Until the record names this target.
        let _taking = wish.moved.then(|| copied::lock(state)).transpose()?;
        // Until now somebody else may have served it, moved a machine onto it, or given it up.
        let mut record = locked_record(state, found)?;
        if wish.moved {
            copied::check_not_taken(state, found, &record)?;
        }
        let written_past = look.under_lock(state, &record);
        if !wish.is_settled {
            record.check_not_handed_over(state)?;
        }
        let identity = self.check_is_its_target(&target, &record, parts.check.is_some())?;
        let journal = self.open_its_journal()?;
        let words = distrust::open_live(state, &record, parts.layout)?;
        let (parts, fetching, boot) = parts.into_session(&record, words, written_past);
        let id = SessionId(parse_id(&record.session)?);
        let raise_epoch = |resumed: Resumed| {
            if !resumed.is_from_journal_alone() {
                return Ok(());
            }
            record.epoch += 1;
            state.keep(&record).map_err(|error| block::Error::io("a new epoch", io::Error::other(error)))
        };
        let resumed = wish.engine.run(async {
            let (target, journal) = (target.open()?, journal.open()?);
            anyhow::Ok(Session::resume_telling(parts, id, &*target, &*journal, raise_epoch).await)
        })?;
        let (session, resumed) = resumed.map_err(|error| cannot_resume(state, error))?;
        anyhow::ensure!(
            fetching.is_some() || session.phase() == Phase::Complete,
            "the session in {} was taken for complete, and is not",
            state.path().display()
        );
        stamp::tell(path, written_past, resumed, session.phase() == Phase::Complete);
        if resumed.is_from_journal_alone() {
            // A sync may have failed: what the kernel kept of it in memory is not to be served.
            target.forget_clean_pages()?;
        }
        // Before anything is served: what parked.json says is of an earlier start from here on.
        record.starts += 1;
        record.target.clone_from(path);
        record.identity = identity;
        record.boot = Some(boot.to_string());
        state.keep(&record)?;
        state.keep_place(&record)?;
        distrust::forget(&record);
        // One that is complete is found from beside its target, too, as long as it is served.
        if let Err(error) = state.keep_pointer(&record) {
            // It was said when the session began.
            tracing::warn!("{:#}", error);
        }
        Ok(Opened { session, target, journal, record, fetching, resumed: Some(resumed), made: None })
    }

    /// Fails where nothing stands at the target's path.
    pub(super) fn check_there(&self, record: &SessionRecord) -> anyhow::Result<()> {
        let Self { state, path, .. } = self;
        if path.exists() {
            return Ok(());
        }
        check_not_anothers(state, record, path)?;
        let dir = state.path().display();
        Err(Failure::new(
            format!("the target {} of the session in {dir} is gone", path.display()),
            format!("put it back; or {}, and then the same command begins anew", state.giving_up()),
        )
        .into())
    }

    /// What the target is, where it is the session's. `has_check` says that its contents will be compared, too.
    pub(super) fn check_is_its_target(
        &self,
        target: &FileDisk,
        record: &SessionRecord,
        has_check: bool,
    ) -> anyhow::Result<TargetIdentity> {
        let identity = identity_of(target)?;
        if !self.wish.moved && !identity.is_same(&record.identity) {
            return Err(self.another_target(record, &identity));
        }
        target::check_not_cut_off(target, self.state, record)?;
        let is_named = identity.name.is_some() && identity.is_same(&record.identity);
        if !has_check && !is_named {
            // Complete or not: nothing tells that this is the session's target.
            return Err(Failure::new(
                format!(
                    "the target {} has another name than the session's, or none, and without the repository its contents \
                     cannot be checked",
                    self.path.display()
                ),
                "run the same command when the repository can be reached",
            )
            .into());
        }
        Ok(identity)
    }

    pub(super) fn open_its_journal(&self) -> anyhow::Result<FileDisk> {
        let (state, path) = (self.state, self.state.file(JOURNAL));
        if !path.exists() {
            let what = format!("the journal {} is missing", path.display());
            return Err(unusable_journal(state, what).into());
        }
        open_journal(&path, self.wish.engine)
    }

    fn another_target(&self, record: &SessionRecord, identity: &TargetIdentity) -> anyhow::Error {
        let (path, dir) = (self.path.display(), self.state.path().display());
        Failure::new(
            format!(
                "the session in {dir} restores to {}, and {path} is another target now: {identity}",
                record.identity
            ),
            format!(
                "name the target that the session belongs to (it was {}); if {path} is a copy of it as a whole, or it was \
                 moved there, give --moved; or {}",
                record.target.display(),
                self.state.naming_directory().giving_up()
            ),
        )
        .into()
    }

    fn create(
        &self,
        snapshot: &Snapshot,
        disk: &DiskEntry,
        parts: Parts,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Opened> {
        let Self { wish, state, path, .. } = self;
        let candidate = Candidate {
            path,
            state: state.path(),
            size: disk.size,
            force: wish.force,
            engine: wish.engine,
            interrupt,
        };
        let (taken, mut made) = candidate.take()?;
        let identity = TargetIdentity::of(taken.file()).context("cannot tell what the target is")?;
        let id = new_id();
        let mut record = SessionRecord {
            version: SessionRecord::version(),
            session: id_text(id),
            snapshot: snapshot.name().to_string(),
            disk: disk.name.to_string(),
            size: disk.size,
            chunk_size: disk.chunk_size,
            map: wanted::map_name(disk),
            target: path.clone(),
            identity,
            boot: None,
            epoch: 1,
            handed_over: false,
            starts: 1,
        };
        made.create_dir(state)?;
        state.keep(&record)?;
        // Before the target is changed: from then on it is no disk until all of it is home.
        if let Some(pointer) = state.keep_pointer(&record)? {
            made.add(pointer);
        }
        let words = distrust::open_live(state, &record, parts.layout)?;
        let is_zero = taken.contents() == Contents::Zeroes;
        let layout = Session::journal_layout(&*parts.source, is_zero);
        let journal = make_journal(&state.file(JOURNAL), layout, wish.engine)?;
        let target = taken.prepare()?;
        record.identity = identity_of(&target)?;
        let (parts, fetching, boot) = parts.into_session(&record, words, WrittenPast::No);
        let session = wish.engine.run(async {
            let (target, journal) = (target.open()?, journal.open()?);
            anyhow::Ok(Session::create(parts, SessionId(id), is_zero, &*target, &*journal).await?)
        })?;
        record.boot = Some(boot.to_string());
        state.keep(&record)?;
        state.keep_place(&record)?;
        Ok(Opened { session, target, journal, record, fetching, resumed: None, made: Some(made) })
    }
}

/// Removes what says beside the target where its session is kept.
pub(super) fn forget_pointer(record: &SessionRecord) {
    if let Err(error) = pointer::remove(&record.target, &record.session) {
        tracing::warn!("{:#}", error);
    }
}

pub(super) fn identity_of(target: &FileDisk) -> anyhow::Result<TargetIdentity> {
    TargetIdentity::of(target)
        .with_context(|| format!("cannot tell what the target {} is", target.path().display()))
}

/// What to say of a session that is there and cannot be gone on with.
pub(super) fn cannot_resume(state: &StateDir, error: crate::live::Error) -> anyhow::Error {
    let dir = state.path().display();
    let what = format!("cannot go on with the session in {dir}");
    let giving_up = state.naming_directory().giving_up();
    let advice = match error.kind() {
        ErrorKind::NewerFormat => "use the version of lifeboot that wrote it, or a newer one".to_owned(),
        ErrorKind::OlderFormat => {
            format!("go on with the lifeboot that began it, until it is complete; or {giving_up}")
        }
        ErrorKind::Elsewhere => {
            format!("use the target and the snapshot that {dir} belongs to; or {giving_up}")
        }
        ErrorKind::WrongTarget => format!(
            "name the target that the session belongs to, or put back what it held; if something else was allowed to \
             write to it (a guest that runs from it without lifeboot), the session is over: {giving_up}"
        ),
        ErrorKind::Damaged | ErrorKind::NotAJournal => {
            return unusable_journal(state, what).because(error).into();
        }
        _ => format!("the session is kept in {dir}; the same command tries again"),
    };
    Failure::new(what, advice).because(error).into()
}
