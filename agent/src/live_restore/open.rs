//! Makes a session, or finds the one that is there and goes on with it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use block::{DirectIo, Engine, FileDisk, FileOptions, OpenDevice};
use repository::{DiskEntry, Repository, Snapshot};

use super::state_dir::{SessionRecord, StateDir};
use super::target::{self, Contents};
use crate::cli::{Failure, Interrupt};
use crate::live::{
    BootId, ChunkSource, DiskLayout, ErrorKind, Identity, JournalLayout, LiveWords, Resumed, Session,
    SessionId, SessionOptions, SessionParts, TokioClock, peek,
};
use crate::source::{DiskSource, FetchPool, PoolOptions, RepositoryStore, pack_order, zero_chunks};
use crate::status::{Phase, Status};

const JOURNAL: &str = "journal";
const LIVE_FILE: &str = "live";
/// The first sector of a journal is written last of all when it is made.
const FIRST_SECTOR_BYTES: u64 = 512;

/// A session that is ready to be served.
pub(super) struct Opened {
    pub(super) session: Arc<Session>,
    pub(super) target: FileDisk,
    pub(super) journal: FileDisk,
    pub(super) record: SessionRecord,
    pub(super) pool: Arc<FetchPool<RepositoryStore>>,
    /// How it was found; `None` where it is new.
    pub(super) resumed: Option<Resumed>,
    /// Whether the target was made for it.
    made_target: bool,
}

impl Opened {
    /// Takes back a session that was made and never served. One that was resumed stays as it is.
    pub(super) fn take_back(self, state: &StateDir) {
        if self.resumed.is_some() {
            return;
        }
        let target = self.made_target.then(|| self.target.path().to_owned());
        drop(self);
        // What cannot be removed is found by the next run, which goes on with it.
        let _ = std::fs::remove_dir_all(state.path());
        if let Some(target) = target {
            let _ = std::fs::remove_file(target);
        }
    }
}

/// What somebody asked for.
pub(super) struct Wish<'a> {
    pub(super) repository: &'a Repository,
    /// `GROUP@TIME[/DISK]`
    pub(super) spec: &'a str,
    pub(super) target: &'a Path,
    pub(super) force: bool,
    pub(super) engine: Engine,
    pub(super) pool: PoolOptions,
    pub(super) options: SessionOptions,
}

/// The session of the target: resumed if there is one, new otherwise.
pub(super) fn open(wish: &Wish<'_>, state: &StateDir, interrupt: &Interrupt) -> anyhow::Result<Opened> {
    let known = state.record()?;
    let (snapshot, disk) = match &known {
        Some(record) => of_record(wish, record)?,
        None => asked_for(wish)?,
    };
    let layout = DiskLayout { size: disk.size, chunk_size: disk.chunk_size };
    let (pool, source, plan) = open_source(wish, &disk, layout)?;
    let path = super::state_dir::absolute(wish.target)?;
    let record = known.clone().unwrap_or_else(|| record_of(&snapshot, &disk, path.clone()));
    let parts = |live: LiveWords| -> anyhow::Result<SessionParts> {
        Ok(SessionParts {
            identity: Identity {
                snapshot: format!("{}/{} {}", record.snapshot, record.disk, record.map),
                target: record.target.display().to_string(),
            },
            source: source.clone(),
            clock: Arc::new(TokioClock::new()),
            live,
            boot: BootId::current().context("cannot read the kernel's boot id")?,
            plan: plan.clone(),
            options: wish.options,
        })
    };
    if known.is_some() && path.exists() && state.file(JOURNAL).exists() {
        let target = target::reopen(&path, state.path(), wish.engine, interrupt)?;
        let journal = open_journal(&state.file(JOURNAL), wish.engine)?;
        let parts = parts(LiveWords::open(&state.file(LIVE_FILE), layout)?)?;
        let resumed = wish.engine.run(async {
            let (target, journal) = (target.open()?, journal.open()?);
            anyhow::Ok(Session::resume(parts, &*target, &*journal).await)
        })?;
        match resumed {
            Ok((session, resumed)) => {
                if resumed == Resumed::FromJournal {
                    // A sync may have failed: what the kernel kept of it in memory is not to be served.
                    target.forget_clean_pages()?;
                }
                let resumed = Some(resumed);
                return Ok(Opened { session, target, journal, record, pool, resumed, made_target: false });
            }
            // The first start was cut short before anything was served: begin again.
            Err(error) if error.kind() == ErrorKind::NotAJournal && is_unwritten(&state.file(JOURNAL))? => {}
            Err(error) => return Err(cannot_resume(state, error)),
        }
    }
    if known.is_some() && !path.exists() && state.file(JOURNAL).exists() {
        return Err(Failure::new(
            format!("the target {} of the session in {} is gone", path.display(), state.path().display()),
            format!(
                "put it back; or remove {} to give the session up and begin anew",
                state.path().display()
            ),
        )
        .into());
    }
    let made_target = known.is_none() && !path.exists();
    let (target, contents) =
        target::take(&path, state.path(), layout.size, wish.force, wish.engine, interrupt)?;
    state.create()?;
    state.keep(&record)?;
    let words = LiveWords::open(&state.file(LIVE_FILE), layout)?;
    let journal = make_journal(&state.file(JOURNAL), layout, wish.engine)?;
    let id = SessionId(parse_id(&record.session)?);
    let parts = parts(words)?;
    let session = wish.engine.run(async {
        let (target, journal) = (target.open()?, journal.open()?);
        let zeroes = contents == Contents::Zeroes;
        anyhow::Ok(Session::create(parts, id, zeroes, &*target, &*journal).await?)
    })?;
    Ok(Opened { session, target, journal, record, pool, resumed: None, made_target })
}

fn cannot_resume(state: &StateDir, error: crate::live::Error) -> anyhow::Error {
    let dir = state.path().display();
    let advice = match error.kind() {
        ErrorKind::NewerFormat => "use the version of lifeboot that wrote it, or a newer one".to_owned(),
        ErrorKind::Elsewhere => format!(
            "use the target and the snapshot that {dir} belongs to; or remove that directory to give the session up"
        ),
        ErrorKind::Damaged | ErrorKind::NotAJournal => format!(
            "the target may hold what a guest wrote: keep a copy of it; to give the session up, remove {dir} and begin anew with --force"
        ),
        _ => format!("the session is kept in {dir}; the same command tries again"),
    };
    Failure::new(format!("cannot go on with the session in {dir}"), advice).because(error).into()
}

/// The snapshot and the disk that a session restores, checked against what was asked for.
fn of_record(wish: &Wish<'_>, record: &SessionRecord) -> anyhow::Result<(Snapshot, DiskEntry)> {
    let gone = |error: repository::Error| {
        Failure::new(
            format!(
                "the session of {} restores {}, which cannot be had",
                wish.target.display(),
                record.snapshot
            ),
            "name the repository that the session was begun with",
        )
        .because(error)
    };
    let name = record.snapshot.parse().map_err(gone)?;
    let snapshot = wish.repository.snapshot(&name).map_err(gone)?;
    let disk = snapshot.manifest().disks.iter().find(|disk| {
        disk.name.as_str() == record.disk && map_name(disk) == record.map && disk.size == record.size
    });
    let Some(disk) = disk.cloned() else {
        return Err(Failure::new(
            format!(
                "the session of {} restores disk {} of {}, which is another disk in this repository",
                wish.target.display(),
                record.disk,
                record.snapshot
            ),
            "name the repository that the session was begun with",
        )
        .into());
    };
    let spec: repository::SnapshotSpec = wish.spec.parse()?;
    let of_group =
        spec.group == *name.group() && spec.disk.as_ref().is_none_or(|wanted| *wanted == disk.name);
    let same = match spec.when {
        // What was the newest when the session began need not be the newest now.
        repository::When::Latest => of_group,
        repository::When::At(time) => of_group && time == name.time(),
    };
    if !same {
        return Err(Failure::new(
            format!(
                "the target {} belongs to a session that restores {}/{}, not {}",
                wish.target.display(),
                record.snapshot,
                record.disk,
                wish.spec
            ),
            "name that snapshot to go on with it, or another target",
        )
        .into());
    }
    Ok((snapshot, disk))
}

fn asked_for(wish: &Wish<'_>) -> anyhow::Result<(Snapshot, DiskEntry)> {
    let (snapshot, disk) = wish.repository.resolve(wish.spec)?;
    if let Some(disk) = disk {
        return Ok((snapshot, disk));
    }
    match snapshot.manifest().disks.as_slice() {
        [disk] => {
            let disk = disk.clone();
            Ok((snapshot, disk))
        }
        disks => {
            let names: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
            Err(Failure::new(
                format!("{} has {} disks: {}", wish.spec, disks.len(), names.join(", ")),
                format!("say which one, as in {}/{}", wish.spec, names.first().unwrap_or(&"disk0")),
            )
            .into())
        }
    }
}

type Source = (Arc<FetchPool<RepositoryStore>>, Arc<dyn ChunkSource>, Vec<std::ops::Range<u64>>);

fn open_source(wish: &Wish<'_>, disk: &DiskEntry, layout: DiskLayout) -> anyhow::Result<Source> {
    let map = wish.repository.disk_map(disk)?;
    let zero = zero_chunks(&map).context("cannot read the map of the snapshot's disk")?;
    let plan = pack_order(wish.repository, &map)?;
    let store = RepositoryStore::new(wish.repository.clone());
    let number = store.add(map);
    let pool = FetchPool::start(store, wish.pool).context("cannot start the fetching threads")?;
    let pool = Arc::new(pool);
    let source = Arc::new(DiskSource::new(Arc::clone(&pool), number, layout, zero));
    Ok((pool, source, plan))
}

fn record_of(snapshot: &Snapshot, disk: &DiskEntry, target: PathBuf) -> SessionRecord {
    let id: [u8; 16] = new_id();
    SessionRecord {
        version: SessionRecord::version(),
        session: id.iter().map(|byte| format!("{byte:02x}")).collect(),
        snapshot: snapshot.name().to_string(),
        disk: disk.name.to_string(),
        size: disk.size,
        chunk_size: disk.chunk_size,
        map: map_name(disk),
        target,
    }
}

fn map_name(disk: &DiskEntry) -> String {
    disk.map.map_or_else(|| "zeroes".to_owned(), |root| root.to_string())
}

fn new_id() -> [u8; 16] {
    let mut id = [0; 16];
    getrandom::fill(&mut id).expect("the kernel's random numbers do not fail once it has booted");
    id
}

fn parse_id(text: &str) -> anyhow::Result<[u8; 16]> {
    let number = u128::from_str_radix(text, 16).with_context(|| format!("{text:?} is no session's id"))?;
    Ok(number.to_be_bytes())
}

/// Makes a file whose room is taken beforehand: a full disk is an error now, not in the middle.
fn make_file(path: &Path, len: u64) -> anyhow::Result<File> {
    let make = || -> io::Result<File> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len)?;
        file.sync_all()?;
        Ok(file)
    };
    make().map_err(|error| {
        Failure::new(
            format!("cannot take {len} bytes for {}", path.display()),
            "make room there, or name another directory with --state",
        )
        .because(error)
        .into()
    })
}

/// Whether the journal was made and never written: a first start that was cut short.
fn is_unwritten(path: &Path) -> anyhow::Result<bool> {
    let mut sector = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FIRST_SECTOR_BYTES).read_to_end(&mut sector))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(repository::is_zero(&sector))
}

fn open_journal(path: &Path, engine: Engine) -> anyhow::Result<FileDisk> {
    Ok(FileDisk::open(path, FileOptions::new(engine).direct(DirectIo::Off))?)
}

/// What is known of a session that no agent serves.
///
/// # Errors
/// Where its journal cannot be read, or is damaged.
pub fn stopped_status(state: &StateDir, record: &SessionRecord) -> anyhow::Result<Status> {
    let mut status = Status::at_rest(record, Phase::Stopped);
    let path = state.file(JOURNAL);
    if !path.exists() || is_unwritten(&path)? {
        // The first start was cut short before anything was served.
        return Ok(status);
    }
    let layout = DiskLayout { size: record.size, chunk_size: record.chunk_size };
    let live = state.file(LIVE_FILE);
    let is_whole = live.metadata().is_ok_and(|live| live.len() == LiveWords::count_for(layout) as u64 * 8);
    let live = if is_whole { Some(LiveWords::open(&live, layout)?) } else { None };
    let boot = BootId::current().context("cannot read the kernel's boot id")?;
    let engine = Engine::THREADS;
    let options = FileOptions::new(engine).direct(DirectIo::Off).read_only(true);
    let journal = FileDisk::open(&path, options)?;
    let peek = engine.run(async {
        let journal = journal.open()?;
        anyhow::Ok(peek(&*journal, live, boot).await?)
    })?;
    status.home_bytes = peek.home_bytes;
    status.guest_bytes = peek.guest_bytes;
    if peek.complete {
        status.phase = Phase::Complete;
    }
    Ok(status)
}

fn make_journal(path: &Path, layout: DiskLayout, engine: Engine) -> anyhow::Result<FileDisk> {
    make_file(path, JournalLayout::for_disk(layout).len_bytes())?;
    open_journal(path, engine)
}
