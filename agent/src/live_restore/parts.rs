//! What a session is put together of: what comes from the repository, what this machine adds, its names and its journal's file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use block::{DirectIo, Engine, FileDisk, FileOptions};
use repository::{ChunkId, DiskEntry, DiskMap, GroupName, MapEntry, Repository};

use super::fetching::Fetching;
use super::open::Wish;
use super::record::SessionRecord;
use crate::cli::Failure;
use crate::live::{
    BootId, ChunkCheck, ChunkSource, DiskLayout, Identity, JournalLayout, LiveWords, SessionOptions,
    SessionParts, TokioClock, WrittenPast,
};
use crate::source::{DiskSource, NoSource, pack_order, zero_chunks};

/// Of what the target is so much stands in the journal's header, for people.
const TARGET_NAME_CHARS: usize = 256;

/// What of a session comes from the repository and from this machine.
pub(super) struct Parts {
    pub(super) layout: DiskLayout,
    fetching: Option<Fetching>,
    pub(super) source: Arc<dyn ChunkSource>,
    /// Compares what the target holds with the disk map, where there is one.
    pub(super) check: Option<Arc<dyn ChunkCheck>>,
    plan: Vec<std::ops::Range<u64>>,
    trace: Vec<u64>,
    options: SessionOptions,
    boot: BootId,
}

impl Parts {
    pub(super) fn new(wish: &Wish<'_>, group: &GroupName, disk: &DiskEntry) -> anyhow::Result<Self> {
        let layout = DiskLayout { size: disk.size, chunk_size: disk.chunk_size };
        let repository = wish.repository()?;
        let map = repository.disk_map(disk)?;
        let trace = if wish.uses_trace { trace_of(repository, group, disk) } else { Vec::new() };
        let copies = wish.fallbacks;
        let zero = zero_chunks(&map);
        let zero = zero.or_else(|error| copies.or_else(error, |copy| zero_chunks(&map.through(copy))));
        let zero = zero.context("cannot read the map of the snapshot's disk")?;
        let plan = pack_order(repository, &map);
        let plan =
            plan.or_else(|error| copies.or_else(error, |copy| pack_order(copy, &map.through(copy))))?;
        let fetching = wish.pool.add(repository, map.clone())?;
        let check: Arc<dyn ChunkCheck> = Arc::new(MapCheck(map));
        let source = Arc::new(DiskSource::new(Arc::clone(&fetching.pool), fetching.disk, layout, zero));
        let boot = BootId::current().context("cannot read the kernel's boot id")?;
        let (fetching, check) = (Some(fetching), Some(check));
        Ok(Self { layout, fetching, source, check, plan, trace, options: wish.options, boot })
    }

    /// For a session that is wholly home.
    pub(super) fn without_repository(wish: &Wish<'_>, record: &SessionRecord) -> anyhow::Result<Self> {
        let layout = record.layout();
        let source = Arc::new(NoSource::new(layout));
        let boot = BootId::current().context("cannot read the kernel's boot id")?;
        let (plan, trace) = (Vec::new(), Vec::new());
        Ok(Self { layout, fetching: None, source, check: None, plan, trace, options: wish.options, boot })
    }

    pub(super) fn into_session(
        self,
        record: &SessionRecord,
        live: LiveWords,
        written_past: WrittenPast,
    ) -> (SessionParts, Option<Fetching>, BootId) {
        let parts = SessionParts {
            identity: journal_identity(record),
            source: self.source,
            clock: Arc::new(TokioClock::new()),
            live,
            boot: self.boot,
            last_boot: record.last_boot(),
            check: self.check,
            written_past,
            plan: self.plan,
            trace: self.trace,
            options: self.options,
        };
        (parts, self.fetching, self.boot)
    }
}

/// What guests of this group read of the disk when they started before. It is advice: without it all goes on.
fn trace_of(repository: &Repository, group: &GroupName, disk: &DiskEntry) -> Vec<u64> {
    match repository.trace(group, &disk.name) {
        Ok(Some(trace)) => trace.chunks(disk.chunk_size, disk.size),
        Ok(None) => Vec::new(),
        Err(error) => {
            tracing::warn!(%error, "the boot trace cannot be used");
            Vec::new()
        }
    }
}

/// Tells chunks by their ids in the disk map.
pub(super) struct MapCheck(pub(super) DiskMap);

impl ChunkCheck for MapCheck {
    fn is_chunk(&self, chunk: u64, bytes: &[u8]) -> Option<bool> {
        match self.0.entry(chunk) {
            Ok(MapEntry::Chunk(id)) => Some(ChunkId::of(bytes) == id),
            // It is home only where the guest wrote it.
            Ok(MapEntry::Lost) => None,
            Ok(MapEntry::Zero) => Some(repository::is_zero(bytes)),
            Err(error) => {
                tracing::warn!(%error, chunk, "part of the disk map cannot be read: a chunk of the target was not checked");
                None
            }
        }
    }
}

/// What a session's journal says that it is of.
pub(super) fn journal_identity(record: &SessionRecord) -> Identity {
    Identity {
        snapshot: format!("{}/{} {}", record.snapshot, record.disk, record.map),
        target: record.identity.to_string().chars().take(TARGET_NAME_CHARS).collect(),
    }
}

pub(super) fn new_id() -> [u8; 16] {
    let mut id = [0; 16];
    getrandom::fill(&mut id).expect("the kernel's random numbers do not fail once it has booted");
    id
}

/// An id as records have it: 32 hexadecimal digits.
pub(super) fn id_text(id: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(id))
}

pub(super) fn parse_id(text: &str) -> anyhow::Result<[u8; 16]> {
    let number = u128::from_str_radix(text, 16).with_context(|| format!("{text:?} is no session's id"))?;
    Ok(number.to_be_bytes())
}

/// Makes a journal's file, whose room is taken beforehand: a full disk is an error now, not in the middle.
pub(super) fn make_journal(path: &Path, layout: JournalLayout, engine: Engine) -> anyhow::Result<FileDisk> {
    let len = layout.len_bytes();
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
    })?;
    open_journal(path, engine)
}

pub(super) fn open_journal(path: &Path, engine: Engine) -> anyhow::Result<FileDisk> {
    Ok(FileDisk::open(path, FileOptions::new(engine).direct(DirectIo::Off))?)
}
