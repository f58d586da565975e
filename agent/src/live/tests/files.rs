//! The engine on files and threads, as production has it.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use block::sim::Rng;
use block::{
    AlignedBuf, BLOCK_SIZE, BlockDevice, Durability, Engine, FileDisk, FileOptions, IoEngine, OpenDevice,
};

use super::{Rig, TestSource};
use crate::live::clock::TokioClock;
use crate::live::journal::{JournalLayout, SessionId};
use crate::live::live_file::{BootId, LiveWords};
use crate::live::parts::{Resumed, SessionOptions, SessionParts, WrittenPast};
use crate::live::session::Session;
use crate::live::source::{ChunkSource, DiskLayout};
use crate::live::stats::Phase;

const DISK: DiskLayout = DiskLayout { size: (32 << 20) + 512, chunk_size: 65536 };
const SHARDS: u64 = 2;
/// Each shard's guest writes blocks of its own parity.
const WRITES: u64 = 300;

fn parts(dir: &Path, source: &Arc<TestSource>) -> SessionParts {
    SessionParts {
        identity: Rig::new().identity,
        source: Arc::clone(source) as Arc<dyn ChunkSource>,
        clock: Arc::new(TokioClock::new()),
        live: LiveWords::open(&dir.join("live"), DISK).unwrap(),
        boot: BootId::current().unwrap(),
        last_boot: None,
        check: Some(Arc::clone(source) as _),
        written_past: WrittenPast::No,
        plan: Vec::new(),
        trace: Vec::new(),
        options: SessionOptions::default(),
    }
}

/// Writes random blocks, each full of a byte that follows from its number, and reads some.
async fn guest(device: crate::live::LiveDevice, shard: u64, source: Arc<TestSource>) {
    let mut rng = Rng::new(shard);
    let blocks = DISK.size / BLOCK_SIZE;
    for number in 0..WRITES {
        let block = (rng.below(blocks / SHARDS) * SHARDS + shard).min(blocks - 1);
        let buf = AlignedBuf::from_slice(&[byte_of(block); BLOCK_SIZE as usize]);
        let durability = if number % 50 == 0 { Durability::Stable } else { Durability::Volatile };
        device.write(block * BLOCK_SIZE, buf, durability).await.0.unwrap();
        let buf = AlignedBuf::zeroed(BLOCK_SIZE as usize);
        let (result, buf) = device.read(block * BLOCK_SIZE, buf).await;
        result.unwrap();
        assert!(buf.iter().all(|&byte| byte == byte_of(block)));
        let other = rng.below(blocks);
        let (result, buf) = device.read(other * BLOCK_SIZE, buf).await;
        result.unwrap();
        let backup = source.bytes(other * BLOCK_SIZE / u64::from(DISK.chunk_size))[0];
        let byte = buf[0];
        assert!(byte == backup || byte == byte_of(other), "block {other} holds {byte}");
    }
}

const fn byte_of(block: u64) -> u8 {
    (block % 100) as u8 + 100
}

#[test]
fn guests_on_two_shards_write_while_everything_comes_home_to_a_file() {
    for wish in [IoEngine::Auto, IoEngine::Threads] {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::choose(wish).unwrap();
        let source = TestSource::new(DISK);
        let options = FileOptions::new(engine);
        let target = FileDisk::create(dir.path().join("disk"), DISK.size, options).unwrap();
        let layout = JournalLayout::for_disk(DISK);
        let journal = FileDisk::create(dir.path().join("journal"), layout.len_bytes(), options).unwrap();
        let session = engine
            .run(async {
                let (target, journal) = (target.open().unwrap(), journal.open().unwrap());
                let id = SessionId([3; 16]);
                Session::create(parts(dir.path(), &source), id, true, &*target, &*journal).await
            })
            .unwrap();
        std::thread::scope(|scope| {
            for shard in 0..SHARDS {
                let (session, source) = (Arc::clone(&session), Arc::clone(&source));
                let (target, journal) = (&target, &journal);
                scope.spawn(move || {
                    engine.run(async {
                        let device = session.device(target.open().unwrap(), journal.open().unwrap()).unwrap();
                        let workers: Vec<_> =
                            (0..3).map(|_| tokio::task::spawn_local(device.clone().fill_worker())).collect();
                        guest(device.clone(), shard, source).await;
                        for worker in workers {
                            worker.await.unwrap();
                        }
                        device.commit().await.unwrap();
                    });
                });
            }
        });
        assert_eq!(session.phase(), Phase::Complete);
        drop(session);
        let blocks_changed = Rc::new(Cell::new(0));
        let (session, resumed) = engine
            .run(async {
                let (target, journal) = (target.open().unwrap(), journal.open().unwrap());
                Session::resume(parts(dir.path(), &source), SessionId([3; 16]), &*target, &*journal).await
            })
            .unwrap();
        assert_eq!((resumed, session.phase()), (Resumed::AgentDied, Phase::Complete));
        let bytes = std::fs::read(dir.path().join("disk")).unwrap();
        for (number, block) in bytes.chunks(BLOCK_SIZE as usize).enumerate() {
            let number = number as u64;
            let backup = source.bytes(number * BLOCK_SIZE / u64::from(DISK.chunk_size))[0];
            let is_guests = session.map.g().contains(number);
            let expected = if is_guests { byte_of(number) } else { backup };
            blocks_changed.set(blocks_changed.get() + u64::from(is_guests));
            assert!(block.iter().all(|&byte| byte == expected), "block {number}");
        }
        assert!(blocks_changed.get() > WRITES);
    }
}
