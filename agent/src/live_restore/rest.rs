//! A session that no agent serves, opened to be read: for `save`, `discard` and `capture`.
//!
//! The target's lock is taken, so that no agent begins meanwhile. The target is opened for reading, and nothing of the session
//! is changed: it is afterwards what it was before, whatever its state.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use block::{DirectIo, Engine, FileDisk, FileOptions, OpenDevice as _};
use repository::{DiskEntry, Repository};

use super::damage::kept_damage;
use super::identity::TargetIdentity;
use super::open::cannot_resume;
use super::over::no_session_any_more;
use super::parts::{MapCheck, journal_identity, parse_id};
use super::record::SessionRecord;
use super::state_dir::{JOURNAL, StateDir};
use super::{distrust, stamp, target, target_lock, wanted};
use crate::cli::{Failure, Interrupt};
use crate::live::{
    AtRest, BootId, ChunkCheck, ChunkSource, DiskLayout, Frozen, FrozenReader, RestParts, SessionId,
    TokioClock,
};
use crate::source::{DiskSource, FetchPool, PoolOptions, RepositoryStore, zero_chunks};
use crate::status::DamagedRange;

/// How long a repository that is out of reach is waited for.
const SOURCE_PATIENCE: Duration = Duration::from_secs(30);

/// A session at rest. Its target is locked as long as this lives.
pub(crate) struct Rest {
    pub(crate) view: AtRest,
    /// The disk that it restores, in the repository.
    pub(crate) base: DiskEntry,
    /// What its last agent could not bring home.
    pub(crate) damaged: Vec<DamagedRange>,
    target: FileDisk,
    _pool: Arc<FetchPool<RepositoryStore>>,
}

impl Rest {
    /// Opens the session in `state`, whose target stands at `path`.
    ///
    /// # Errors
    /// Where the target is in use, is gone, or is not the session's (unless it was `moved`); where the session is a copy of that target's; where the repository does not have
    /// what the session restores; where neither the journal nor the live file can be used.
    pub(crate) fn open(
        state: &StateDir,
        record: &SessionRecord,
        path: &Path,
        repository: &Repository,
        engine: Engine,
        moved: bool,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        // An agent of the other one may have the lock.
        state.check_stands_alone(record, path)?;
        let target = lock_target(state, path, engine, interrupt)?;
        // Before, an agent may have gone on with the session, or handed it over.
        let record = &locked_record_at_rest(state, record, path)?;
        if !moved {
            check_identity(state, record, &target)?;
        }
        target::check_not_cut_off(&target, state, record)?;
        let base = wanted::base_of(repository, state, record)?;
        let map = repository.disk_map(&base)?;
        let layout = DiskLayout { size: base.size, chunk_size: base.chunk_size };
        let zero = zero_chunks(&map).context("cannot read the map of the snapshot's disk")?;
        let store = RepositoryStore::new(repository.clone());
        let number = store.add(map.clone());
        let pool = FetchPool::start(store, PoolOptions::default());
        let pool = Arc::new(pool.context("cannot start the fetching threads")?);
        let parts = RestParts {
            identity: journal_identity(record),
            session: SessionId(parse_id(&record.session)?),
            source: Arc::new(DiskSource::new(Arc::clone(&pool), number, layout, zero))
                as Arc<dyn ChunkSource>,
            clock: Arc::new(TokioClock::new()),
            source_timeout: SOURCE_PATIENCE,
            live: distrust::look_at_live(state, record)?,
            boot: BootId::current().context("cannot read the kernel's boot id")?,
            last_boot: record.last_boot(),
            check: Some(Arc::new(MapCheck(map)) as Arc<dyn ChunkCheck>),
            written_past: stamp::written_past(state, record, path, moved),
        };
        let journal = state.file(JOURNAL);
        let options = FileOptions::new(engine).direct(DirectIo::Off).read_only(true);
        let journal = journal.exists().then(|| FileDisk::open(&journal, options)).transpose()?;
        let opened = engine.run(async {
            let journal = journal.as_ref().map(|journal| journal.open()).transpose()?;
            let target = target.open()?;
            anyhow::Ok(AtRest::open(parts, &*target, journal.as_deref()).await)
        })?;
        let view = opened.map_err(|error| cannot_resume(state, error))?;
        if view.ended().is_from_journal_alone() {
            // A sync may have failed: what the kernel kept of it in memory is not to be believed.
            target.forget_clean_pages()?;
        }
        let damaged = kept_damage(state, record).damaged;
        Ok(Self { view, base, damaged, target, _pool: pool })
    }

    /// What of the disk was changed.
    pub(crate) const fn frozen(&self) -> &Frozen {
        self.view.frozen()
    }

    /// What reads it on the calling thread.
    pub(crate) fn reader(&self) -> anyhow::Result<FrozenReader> {
        Ok(self.view.reader(self.target.open()?))
    }
}

/// The record as it is now that the target is locked, of the session that was found before.
///
/// # Errors
/// Where it is not there any more.
pub(super) fn locked_record(state: &StateDir, found: &SessionRecord) -> anyhow::Result<SessionRecord> {
    let now = state.record()?.filter(SessionRecord::was_begun);
    let now = now.filter(|now| now.session == found.session).ok_or_else(|| {
        Failure::new(
            format!("the session in {} was discarded or begun anew just now", state.path().display()),
            "run the same command again",
        )
    })?;
    Ok(now)
}

/// The same for a session that is to be read: a machine that runs from the target writes there past it.
fn locked_record_at_rest(
    state: &StateDir,
    found: &SessionRecord,
    path: &Path,
) -> anyhow::Result<SessionRecord> {
    let now = locked_record(state, found)?;
    if now.handed_over {
        return Err(no_session_any_more(state, &now, path).into());
    }
    Ok(now)
}

/// Opens the target of the session in `state` for reading, and locks it.
///
/// # Errors
/// Where it is gone, or in use.
pub(crate) fn lock_target(
    state: &StateDir,
    path: &Path,
    engine: Engine,
    interrupt: &Interrupt,
) -> anyhow::Result<FileDisk> {
    if !path.exists() {
        return Err(target::gone(state, path).into());
    }
    lock_target_within(state, path, engine, target_lock::LOCK_PATIENCE, interrupt)
}

/// The same of a target that is there; what a dead agent left in flight is waited for so long.
pub(super) fn lock_target_within(
    state: &StateDir,
    path: &Path,
    engine: Engine,
    patience: Duration,
    interrupt: &Interrupt,
) -> anyhow::Result<FileDisk> {
    let disk = FileDisk::open(path, FileOptions::new(engine).read_only(true))?;
    target_lock::lock(&disk, path, state.path(), patience, interrupt)?;
    Ok(disk)
}

/// Fails where `disk` is not the target that the session's record names.
///
/// # Errors
/// A [`Failure`].
pub(crate) fn check_identity(
    state: &StateDir,
    record: &SessionRecord,
    disk: &FileDisk,
) -> anyhow::Result<()> {
    let path = disk.path().display();
    let identity =
        TargetIdentity::of(disk).with_context(|| format!("cannot tell what the target {path} is"))?;
    if identity.is_same(&record.identity) {
        return Ok(());
    }
    Err(Failure::new(
        format!(
            "the session in {} restores to {}, and {path} is another target now: {identity}",
            state.path().display(),
            record.identity,
        ),
        "name the target that the session belongs to; or give --moved where it was copied or moved as a whole, together \
         with its session",
    )
    .into())
}
