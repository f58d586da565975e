//! A frozen view is the disk at one moment, whatever guests and fills do meanwhile.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use block::sim::{Faults, Rng, SimDisk, SimOptions, Spawner, yield_now};
use block::{
    AlignedBuf, Attempt, BLOCK_SIZE, BlockDevice, ByteRange, Durability, ErrorKind, OpenDevice, Result,
    ZeroMode,
};

use super::{CHUNK, DISK, Rig, STEPS, chunk, range};
use crate::live::LiveWords;
use crate::live::clock::Clock;
use crate::live::device::LiveDevice;
use crate::live::frozen::{AtRest, Frozen, FrozenOptions, FrozenReader, RestParts};
use crate::live::journal::JournalLayout;
use crate::live::mistakes::{Making, Mistake};
use crate::live::parts::WrittenPast;
use crate::live::source::ChunkSource;
use crate::live::stats::Phase;

/// A simulated disk as a spill device.
struct Spill(SimDisk);

impl OpenDevice for Spill {
    fn open(&self) -> Result<Rc<dyn BlockDevice>> {
        Ok(Rc::new(self.0.clone()))
    }
}

fn options(memory_bytes: u64, spill_bytes: u64) -> FrozenOptions {
    let spill = Arc::new(Spill(SimDisk::new(SimOptions::new(spill_bytes, 9))));
    FrozenOptions { memory_bytes, spill: (spill_bytes > 0).then_some(spill as Arc<dyn OpenDevice>) }
}

const ROOMY: FrozenOptions = FrozenOptions { memory_bytes: 1 << 30, spill: None };

fn freeze(rig: &mut Rig, device: &LiveDevice, options: FrozenOptions) -> Frozen {
    let session = Arc::clone(device.session());
    rig.run(async move { session.hold_still().await.unwrap().freeze(options).unwrap() })
}

/// The whole disk as a view shows it: its own chunks over the backup's.
async fn shown(frozen: &Frozen, reader: &FrozenReader, backup: Vec<u8>, most: u64) -> Result<Vec<u8>> {
    let mut bytes = backup;
    for places in frozen.runs(most) {
        let first = DISK.chunk_range(frozen.chunks()[places.start]).start() as usize;
        let buf = AlignedBuf::zeroed(most.max(CHUNK) as usize);
        let (taken, buf) = reader.take(places, buf).await;
        assert!(taken?.damaged.is_empty());
        bytes[first..first + buf.len()].copy_from_slice(&buf);
    }
    Ok(bytes)
}

/// What the disk must hold. Blocks are only ever written by one task.
struct Model {
    bytes: Vec<u8>,
    /// Trimmed since they were written: they hold anything, which does not change.
    is_anything: Vec<bool>,
}

impl Model {
    fn of(bytes: Vec<u8>) -> Self {
        let is_anything = vec![false; bytes.len()];
        Self { bytes, is_anything }
    }

    fn wrote(&mut self, range: ByteRange, byte: u8) {
        let range = range.start() as usize..range.end() as usize;
        self.bytes[range.clone()].fill(byte);
        self.is_anything[range].fill(false);
    }

    fn trimmed(&mut self, range: ByteRange) {
        self.is_anything[range.start() as usize..range.end() as usize].fill(true);
    }

    /// Finds the first byte that the disk cannot hold, given what its target does: where it was trimmed, or is being
    /// trimmed, what was there and what is there now are both right.
    fn checker(&self, target: Vec<u8>) -> impl Fn(&[u8]) -> Option<usize> + use<> {
        let (bytes, is_anything) = (self.bytes.clone(), self.is_anything.clone());
        move |shown| {
            shown
                .iter()
                .enumerate()
                .position(|(at, byte)| *byte != bytes[at] && !(is_anything[at] && *byte == target[at]))
        }
    }
}

/// A guest that works at random.
struct Guest {
    device: LiveDevice,
    model: Rc<RefCell<Model>>,
    blocks: std::ops::Range<u64>,
    seed: u64,
    stop: Rc<Cell<bool>>,
}

impl Guest {
    async fn work(self) {
        let mut rng = Rng::new(self.seed);
        while !self.stop.get() {
            let block = self.blocks.start + rng.below(self.blocks.end - self.blocks.start);
            let count = 1 + rng.below((self.blocks.end - block).min(6));
            let whole = range(block * BLOCK_SIZE, count * BLOCK_SIZE);
            let byte = 0x80 | rng.below(0x7f) as u8;
            let (range, byte) = match rng.below(7) {
                0 => (whole, 0),
                6 => {
                    self.model.borrow_mut().trimmed(whole);
                    self.device.trim(whole, Durability::Volatile).await.unwrap();
                    yield_now().await;
                    continue;
                }
                // Part of a block at either end.
                1 => (range(whole.start() + 100, whole.len() - 200), byte),
                _ => (whole, byte),
            };
            if byte == 0 {
                self.device.write_zeroes(whole, ZeroMode::UNMAP, Durability::Volatile).await.unwrap();
            } else {
                let data = vec![byte; range.len() as usize];
                // What a server does: try, and wait where it must.
                if self.device.try_write(range.start(), &data).unwrap() == Attempt::WouldWait {
                    let buf = AlignedBuf::from_slice(&data);
                    self.device.write(range.start(), buf, Durability::Volatile).await.0.unwrap();
                }
            }
            self.model.borrow_mut().wrote(range, byte);
            yield_now().await;
        }
    }
}

/// Guests at work on a session, each in its own stripes; returns when all have stopped.
fn guests(spawner: &Spawner, device: &LiveDevice, model: &Rc<RefCell<Model>>, seed: u64) -> Rc<Cell<bool>> {
    let stop = Rc::new(Cell::new(false));
    // Stripes end in the middle of chunks, so that guests meet in them.
    for (index, blocks) in [(0, 0..22), (1, 22..41), (2, 41..DISK.size / BLOCK_SIZE)] {
        let guest = Guest {
            device: device.clone(),
            model: Rc::clone(model),
            blocks,
            seed: seed * 10 + index,
            stop: Rc::clone(&stop),
        };
        spawner.spawn(guest.work());
    }
    stop
}

/// Freezes under random work, lets guests and fills go on, and compares what the view shows with the model.
fn a_view_under_work(seed: u64, mistake: Option<Mistake>) {
    let mut rig = Rig::new();
    rig.executor = block::sim::Executor::new(seed);
    let _making = Making::new(mistake);
    let device = rig.create();
    let model = Rc::new(RefCell::new(Model::of(rig.source.all())));
    let spawner = rig.executor.spawner();
    if !seed.is_multiple_of(3) {
        rig.executor.spawn(device.clone().fill_worker());
    }
    let stop = guests(&spawner, &device, &model, seed);
    let backup = rig.source.all();
    let (worker, mine, target) = (device.clone(), Rc::clone(&model), rig.target.clone());
    let has_ended = Rc::new(Cell::new(false));
    let ended = Rc::clone(&has_ended);
    let saved = rig.executor.spawn(async move {
        let mut rng = Rng::new(seed);
        for round in 0..3 {
            for _ in 0..rng.below(300) {
                yield_now().await;
            }
            // Small memory, so that copies are spilled as well.
            let options = options(rng.below(4) * 20_000, 64 << 20);
            let still = worker.session().hold_still().await.unwrap();
            let wrong = mine.borrow().checker(target.view());
            let frozen = still.freeze(options).unwrap();
            drop(still);
            for _ in 0..rng.below(200) {
                yield_now().await;
            }
            let reader = frozen.reader(worker.clone());
            let most = CHUNK * (1 + rng.below(4));
            let shown = shown(&frozen, &reader, backup.clone(), most).await.unwrap();
            assert_eq!(wrong(&shown), None, "seed {seed} round {round}: the byte where the view differs");
        }
        ended.set(true);
    });
    for _ in 0..STEPS {
        if has_ended.get() || !rig.executor.step() {
            break;
        }
    }
    assert!(saved.take().is_some(), "seed {seed}: the view was not read to its end");
    stop.set(true);
    rig.executor.run(100_000);
    // The guests' own view went on.
    let now = rig.read(&device, range(0, DISK.size)).unwrap();
    assert_eq!(
        model.borrow().checker(rig.target.view())(&now),
        None,
        "seed {seed}: a guest's write was lost"
    );
}

#[test]
fn a_view_is_the_disk_at_the_freeze_whatever_guests_and_fills_do() {
    for seed in 0..150 {
        a_view_under_work(seed, None);
    }
}

#[test]
fn each_mistake_that_a_view_could_make_is_caught() {
    for mistake in [Mistake::OverwrittenInView, Mistake::FrozenUnderWrites, Mistake::CopiesTakenFirst] {
        let is_caught = |seed| std::panic::catch_unwind(|| a_view_under_work(seed, Some(mistake))).is_err();
        assert!((0..150).any(is_caught), "{mistake:?}");
    }
}

#[test]
fn a_view_holds_the_guests_chunks_and_writes_elsewhere_copy_nothing() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, range(CHUNK + 4096, 4096), 0x11).unwrap();
    rig.write(&device, chunk(5), 0x22).unwrap();
    let frozen = freeze(&mut rig, &device, ROOMY);
    assert_eq!((frozen.chunks(), frozen.bytes()), (&[1, 5][..], 2 * CHUNK));
    rig.write(&device, chunk(7), 0x33).unwrap();
    // A block that was absent when the view began is the backup's in it.
    rig.write(&device, range(CHUNK, 4096), 0x44).unwrap();
    assert_eq!(frozen.copied_bytes(), 0);
    rig.write(&device, range(5 * CHUNK, 4096), 0x55).unwrap();
    rig.write(&device, range(5 * CHUNK, 4096), 0x66).unwrap();
    assert_eq!(frozen.copied_bytes(), 4096);
    let (reader, backup) = (frozen.reader(device.clone()), rig.source.all());
    let mut expected = backup.clone();
    expected[CHUNK as usize + 4096..CHUNK as usize + 8192].fill(0x11);
    expected[5 * CHUNK as usize..6 * CHUNK as usize].fill(0x22);
    let seen = rig.run(async move { shown(&frozen, &reader, backup, CHUNK).await.unwrap() });
    assert!(seen == expected);
    // It is over: nothing is copied any more, and there may be another.
    assert_eq!(freeze(&mut rig, &device, ROOMY).chunks(), [1, 5, 7]);
}

#[test]
fn without_room_for_copies_the_view_fails_and_the_guests_write_does_not() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, range(0, 2 * CHUNK), 0x11).unwrap();
    let frozen = freeze(&mut rig, &device, options(4096, 8192));
    for block in 0..4 {
        rig.write(&device, range(block * BLOCK_SIZE, BLOCK_SIZE), 0x22).unwrap();
    }
    assert_eq!(frozen.failure().unwrap().kind(), ErrorKind::NoSpace);
    let (reader, device_2) = (frozen.reader(device.clone()), device.clone());
    let failed = rig.run(async move {
        let (taken, _) = reader.take(0..1, AlignedBuf::zeroed(CHUNK as usize)).await;
        drop(frozen);
        taken.unwrap_err().kind()
    });
    assert_eq!(failed, ErrorKind::NoSpace);
    assert_eq!(rig.read(&device_2, range(0, 4 * BLOCK_SIZE)).unwrap(), vec![0x22; 4 * BLOCK_SIZE as usize]);
}

#[test]
fn a_target_that_cannot_be_read_fails_the_view_and_not_the_guests_write() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, chunk(0), 0x11).unwrap();
    let frozen = freeze(&mut rig, &device, ROOMY);
    rig.target.set_faults(Faults { read: 1000, ..Faults::default() });
    rig.write(&device, chunk(0), 0x22).unwrap();
    rig.target.set_faults(Faults::default());
    assert!(frozen.failure().is_some());
    assert_eq!(rig.read(&device, chunk(0)).unwrap(), vec![0x22; CHUNK as usize]);
}

#[test]
fn a_chunk_whose_rest_is_damaged_is_named_unless_it_is_whole() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, range(0, 4096), 0x11).unwrap();
    rig.write(&device, chunk(1), 0x22).unwrap();
    rig.source.state.lock().damaged.extend([0, 1]);
    let frozen = freeze(&mut rig, &device, ROOMY);
    let reader = frozen.reader(device.clone());
    let (taken, buf) =
        rig.run(async move { reader.take(0..2, AlignedBuf::zeroed(2 * CHUNK as usize)).await });
    let damaged = taken.unwrap().damaged;
    assert_eq!(damaged.iter().map(|(chunk, _)| *chunk).collect::<Vec<_>>(), [0]);
    assert!(damaged[0].1.contains("damaged"), "{damaged:?}");
    assert!(buf[CHUNK as usize..].iter().all(|byte| *byte == 0x22));
    drop(frozen);
}

#[test]
fn a_second_view_and_a_view_of_a_parked_session_are_refused() {
    let mut rig = Rig::new();
    let device = rig.create();
    let frozen = freeze(&mut rig, &device, ROOMY);
    let session = Arc::clone(device.session());
    let second = rig.run(async move { session.hold_still().await.unwrap().freeze(ROOMY).map(drop) });
    assert!(second.is_err());
    drop(frozen);
    let session = Arc::clone(device.session());
    rig.run(async move { device.park().await.unwrap() });
    assert_eq!(
        rig.run(async move { session.hold_still().await.map(drop) }).unwrap_err().kind(),
        ErrorKind::Shutdown
    );
}

#[test]
fn while_a_session_is_held_still_nothing_changes_and_then_all_goes_on() {
    let mut rig = Rig::new();
    let device = rig.create();
    let session = Arc::clone(device.session());
    let still = rig.run(async move { session.hold_still().await.unwrap() });
    assert_eq!(device.try_write(3 * CHUNK, &[1; 4096]).unwrap(), Attempt::WouldWait);
    let writer = device.clone();
    let written = rig.executor.spawn(async move {
        writer.write(0, AlignedBuf::from_slice(&[1; CHUNK as usize]), Durability::Volatile).await.0
    });
    rig.executor.run(10_000);
    assert!(written.take().is_none());
    assert_eq!(device.session().stats().guest_bytes, 0);
    drop(still);
    rig.executor.run(10_000);
    written.take().unwrap().unwrap();
}

/// What the disk must hold of a session that has ended, and the view of it at rest.
fn at_rest(rig: &mut Rig) -> crate::live::Result<(AtRest, Vec<u8>)> {
    let parts = RestParts {
        identity: rig.identity.clone(),
        session: rig.id,
        source: Arc::clone(&rig.source) as Arc<dyn ChunkSource>,
        clock: Arc::clone(&rig.clock) as Arc<dyn Clock>,
        source_timeout: rig.options.source_timeout,
        live: Some(rig.live.clone()),
        boot: rig.boot,
        last_boot: rig.last_boot,
        check: Some(Arc::clone(&rig.source) as _),
        written_past: WrittenPast::No,
    };
    let (target, journal, backup) = (rig.target.clone(), rig.journal.clone(), rig.source.all());
    rig.run(async move {
        let rest = AtRest::open(parts, &target, Some(&journal)).await?;
        let reader = rest.reader(Rc::new(target));
        let bytes = shown(rest.frozen(), &reader, backup, 2 * CHUNK).await?;
        Ok((rest, bytes))
    })
}

#[test]
fn a_session_at_rest_shows_what_a_resumed_one_would_and_nothing_is_changed() {
    for how in ["killed", "parked", "host", "poisoned", "no live file", "journal"] {
        let mut rig = Rig::new();
        let device = rig.create();
        rig.read(&device, chunk(2)).unwrap();
        rig.write(&device, range(CHUNK + 100, 9000), 0x11).unwrap();
        rig.write(&device, chunk(5), 0x22).unwrap();
        rig.flush(&device).unwrap();
        rig.write(&device, chunk(6), 0x33).unwrap();
        match how {
            "parked" => {
                let device = device.clone();
                rig.run(async move { device.park().await.unwrap() });
            }
            "poisoned" => {
                rig.target.set_faults(Faults { sync: 1000, ..Faults::default() });
                rig.flush(&device).unwrap_err();
                rig.target.set_faults(Faults::default());
                assert_eq!(device.session().phase(), Phase::Poisoned);
                rig.target.drop_clean_cache();
            }
            "host" => {
                rig.reboot();
                rig.target.power_cut(&mut Rng::new(3));
                rig.journal.power_cut(&mut Rng::new(4));
            }
            "no live file" => rig.live = LiveWords::in_memory(DISK),
            "journal" => {
                // Both places of checkpoints.
                let pages = 2 * JournalLayout::for_disk(DISK).slot_pages as usize;
                rig.journal.poke(4096, &vec![0xee; 4096 * pages]);
            }
            _ => {}
        }
        drop(device);
        let before = (rig.target.stats().writes, rig.journal.stats().writes);
        let (rest, bytes) = at_rest(&mut rig).unwrap();
        assert_eq!((rig.target.stats().writes, rig.journal.stats().writes), before, "{how}");
        assert_eq!(rest.journal_is_lost(), how == "journal");
        if how == "journal" {
            let mut expected = rig.source.all();
            expected[CHUNK as usize + 100..CHUNK as usize + 9100].fill(0x11);
            expected[5 * CHUNK as usize..6 * CHUNK as usize].fill(0x22);
            expected[6 * CHUNK as usize..7 * CHUNK as usize].fill(0x33);
            assert!(bytes == expected);
            continue;
        }
        let (device, resumed) = rig.resume();
        assert_eq!(rest.ended(), resumed, "{how}");
        assert!(bytes == rig.read(&device, range(0, DISK.size)).unwrap(), "{how}");
    }
}

#[test]
fn the_view_at_rest_of_another_target_is_refused() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.read(&device, chunk(2)).unwrap();
    rig.write(&device, chunk(5), 0x22).unwrap();
    rig.run(async move { device.park().await.unwrap() });
    rig.target.poke(0, &vec![0xee; DISK.size as usize]);
    assert_eq!(at_rest(&mut rig).map(drop).unwrap_err().kind(), crate::live::ErrorKind::WrongTarget);
}
