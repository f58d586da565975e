//! Power cuts of real I/O: a recorder below the real target and the real journal, and every cut replayed.
//!
//! A session in production's parts (files, their engine, shards, workers, the NBD server) serves guests that are NBD
//! clients. Between it and its two files stands a recorder: one log, in one order, of every write, zeroing and sync of both
//! files, when each began and when it ended, and of what the guests asked for and were answered. Afterwards the power is cut at
//! many places of the log: images are made of what must be on the disks then, and of some of what may be; the
//! session is resumed on them; and each sector is compared with what the guests had been promised.
//!
//! `LIFEBOOT_POWER_CUTS` sets how many cuts a test makes, `LIFEBOOT_POWER_CUT_SEED` their choice.

mod guest;
mod recorder;
mod replay;

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{DirectIo, Engine, FileDisk, FileOptions, IoEngine, OpenDevice};
use nbd_server::{Export, ListenAddress, Server, ServerOptions, ShardTask};

use guest::Guest;
use recorder::{Log, Place, Recorded, Recording};

use crate::live::clock::TokioClock;
use crate::live::disk::LiveDisk;
use crate::live::journal::{JournalLayout, SessionId};
use crate::live::live_file::{BootId, LiveWords};
use crate::live::parts::{Identity, SessionOptions, SessionParts, WrittenPast};
use crate::live::session::Session;
use crate::live::source::{ChunkData, ChunkSource, DiskLayout, FetchFuture, SourceError, Urgency};

const DISK: DiskLayout = DiskLayout { size: (4 << 20) + 512, chunk_size: 65536 };
const ID: SessionId = SessionId([9; 16]);
const LOG_PAGES: u32 = 24;
const SHARDS: usize = 2;
const GUESTS: u64 = 3;
/// Requests of one guest.
const REQUESTS: u64 = 350;
const CUTS: u64 = 100;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// A repository's disk: each sector holds its own number.
struct Backup(Vec<u8>);

impl Backup {
    fn new() -> Self {
        let mut bytes = Vec::new();
        for sector in 0..DISK.size / block::sim::SECTOR {
            let value =
                if Self::is_zero_chunk(sector * 512 / u64::from(DISK.chunk_size)) { 0 } else { sector };
            bytes.extend(replay::stamp(value, 512));
        }
        Self(bytes)
    }

    const fn is_zero_chunk(chunk: u64) -> bool {
        chunk % 5 == 3
    }
}

impl ChunkSource for Backup {
    fn layout(&self) -> DiskLayout {
        DISK
    }

    fn is_zero(&self, chunk: u64) -> bool {
        Self::is_zero_chunk(chunk)
    }

    fn fetch(&self, chunk: u64, _urgency: Urgency) -> FetchFuture<'_, Result<ChunkData, SourceError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            let range = DISK.chunk_range(chunk);
            let bytes = &self.0[range.start() as usize..range.end() as usize];
            Ok(ChunkData::new(block::AlignedBuf::from_slice(bytes)))
        })
    }
}

fn parts(backup: &Arc<Backup>, live: LiveWords, boot: BootId) -> SessionParts {
    SessionParts {
        identity: Identity { snapshot: "vm@now/disk0".to_owned(), target: "disk.raw".to_owned() },
        source: Arc::clone(backup) as Arc<dyn ChunkSource>,
        clock: Arc::new(TokioClock::new()),
        live,
        boot,
        last_boot: None,
        check: None,
        written_past: WrittenPast::No,
        plan: Vec::new(),
        trace: Vec::new(),
        options: SessionOptions {
            piece_bytes: 2 * u64::from(DISK.chunk_size),
            commit_bytes: 512 << 10,
            commit_interval: Duration::from_millis(5),
            limit: 24 << 20,
            log_pages: Some(LOG_PAGES),
            ..SessionOptions::default()
        },
    }
}

fn workers(disk: &Arc<LiveDisk>) -> ShardTask {
    let disk = Arc::clone(disk);
    Arc::new(move |shard| {
        let disk = Arc::clone(&disk);
        Box::pin(async move {
            let device = disk.device().expect("the files are there");
            let mut tasks = tokio::task::JoinSet::new();
            tasks.spawn_local(device.clone().fill_worker());
            tasks.spawn_local(device.clone().fill_worker());
            if shard.index() == 0 {
                tasks.spawn_local(device.commit_worker());
            }
            shard.stopping().await;
            disk.session().stop_workers();
            while let Some(ended) = tasks.join_next().await {
                ended.expect("a worker does not panic");
            }
        })
    })
}

/// Guests on a served session, in `dir`; everything that was done to its files, and promised to them.
fn record(dir: &Path, engine: Engine, direct: DirectIo) -> (Recorded, Arc<Backup>) {
    let backup = Arc::new(Backup::new());
    let log = Log::default();
    let options = FileOptions::new(engine).direct(direct);
    let layout = JournalLayout { log_pages: LOG_PAGES, ..JournalLayout::for_disk(DISK) };
    let open = |name: &str, size, place| {
        let file = FileDisk::create(dir.join(name), size, options).expect("there is room");
        Arc::new(Recording::new(file, place, log.clone()))
    };
    let target = open("disk.raw", DISK.size, Place::Target);
    let journal = open("journal", layout.len_bytes(), Place::Journal);
    let live = LiveWords::open(&dir.join("live"), DISK).expect("there is room");
    let boot = BootId::current().expect("there is a boot id");
    let session = engine
        .run(async {
            let (target, journal) = (target.open().expect("it is open"), journal.open().expect("it is open"));
            Session::create(parts(&backup, live, boot), ID, true, &*target, &*journal).await
        })
        .expect("nothing fails");
    log.begin();
    let disk = Arc::new(LiveDisk::new(Arc::clone(&session), target, journal));
    let socket = dir.join("nbd");
    let exports = vec![Export::new("disk", Arc::clone(&disk) as Arc<dyn OpenDevice>)];
    let server = Server::bind(&[ListenAddress::Unix(socket.clone())], exports, ServerOptions::default());
    let server = server.expect("the socket is free").on_shard_start(workers(&disk));
    let handle = server.run(SHARDS, engine).expect("there are threads");
    std::thread::scope(|scope| {
        for number in 0..GUESTS {
            let guest = Guest::connect(&socket, number, log.clone());
            scope.spawn(|| guest.work(REQUESTS));
        }
    });
    handle.shutdown();
    handle.join().expect("a shard does not panic");
    drop(disk);
    engine
        .run(async {
            let path = |name: &str| dir.join(name);
            let open = |name: &str, place| {
                let file = FileDisk::open(path(name), options).expect("it is there");
                Recording::new(file, place, log.clone()).open().expect("it is open")
            };
            let device = session.device(open("disk.raw", Place::Target), open("journal", Place::Journal));
            device.expect("the files are fit").park().await
        })
        .expect("nothing fails");
    (log.take(), backup)
}

fn survives_power_cuts(wish: IoEngine, direct: DirectIo) {
    let dir = tempfile::tempdir().expect("there is room");
    let engine = Engine::choose(wish).expect("one that works");
    let (recorded, backup) = record(dir.path(), engine, direct);
    let (cuts, seed) = (number("LIFEBOOT_POWER_CUTS", CUTS), number("LIFEBOOT_POWER_CUT_SEED", 1));
    let seen = replay::cut(&recorded, &backup, cuts, seed);
    println!("{engine:?}, {direct:?}: {} events, {seen:?}", recorded.events.len());
    // All of it must have been about something.
    assert!(recorded.syncs() > 20, "{} syncs", recorded.syncs());
    assert!(seen.promised_blocks > 0 && seen.lost_writes > 0 && seen.kept_unsynced > 0, "{seen:?}");
}

#[test]
fn nothing_promised_is_lost_at_any_power_cut_of_the_best_engine() {
    survives_power_cuts(IoEngine::Auto, DirectIo::Auto);
}

#[test]
fn nothing_promised_is_lost_at_any_power_cut_of_threads_and_page_cache() {
    survives_power_cuts(IoEngine::Threads, DirectIo::Off);
}

/// The recorder sees what it is there for: without the syncs of the target some cut loses what was promised.
#[test]
fn a_target_that_is_never_synced_does_not_survive_power_cuts() {
    let dir = tempfile::tempdir().expect("there is room");
    let (mut recorded, backup) = record(dir.path(), Engine::THREADS, DirectIo::Off);
    recorded.forget_syncs_of(Place::Target);
    let cut = std::panic::AssertUnwindSafe(|| replay::cut(&recorded, &backup, CUTS, 1));
    assert!(std::panic::catch_unwind(cut).is_err(), "nobody noticed that the target was never synced");
}

/// A handle as one thread has it.
type Handle = Rc<dyn block::BlockDevice>;
