//! What a guest gets of blocks that are home, and of those that are not.

use std::sync::Arc;
use std::time::Duration;

use block::{BLOCK_SIZE, BlockDevice, Durability, ErrorKind, ExtentState, ZeroMode};
use parking_lot::Mutex;

use super::{CHUNK, CHUNKS, DISK, Rig, ZERO, chunk, range};
use crate::live::clock::Clock;

#[test]
fn an_absent_chunk_is_fetched_once_and_is_home_afterwards() {
    let mut rig = Rig::new();
    let device = rig.create();
    assert_eq!(rig.read(&device, range(100, 5000)).unwrap(), vec![1; 5000]);
    assert_eq!(rig.read(&device, range(0, CHUNK)).unwrap(), vec![1; CHUNK as usize]);
    assert_eq!(rig.source.state.lock().fetched, [0]);
    assert!(device.session().map.is_whole(0));
}

#[test]
fn zero_chunks_of_a_fresh_target_are_home_at_once() {
    let mut rig = Rig::new();
    let device = rig.create();
    assert_eq!(device.session().stats().stable_bytes, ZERO.len() as u64 * CHUNK);
    rig.target_is_zero = false;
    let device = rig.create();
    assert_eq!(device.session().stats().home_bytes, 0);
    assert_eq!(rig.read(&device, chunk(3)).unwrap(), vec![0; CHUNK as usize]);
    assert_eq!(rig.source.fetched(), 0);
}

#[test]
fn a_read_across_everything_is_what_the_backup_holds_with_the_guests_writes() {
    let mut rig = Rig::new();
    let device = rig.create();
    let mut expected = rig.source.all();
    for (start, len) in [(5000, 100), (CHUNK - 1, 2), (3 * CHUNK + 4096, 4096), (15 * CHUNK, CHUNK)] {
        rig.write(&device, range(start, len), 0xcc).unwrap();
        expected[start as usize..(start + len) as usize].fill(0xcc);
    }
    assert!(rig.read(&device, range(0, DISK.size)).unwrap() == expected);
}

#[test]
fn trims_and_zeroes_of_whole_absent_chunks_fetch_nothing() {
    let mut rig = Rig::new();
    rig.target_is_zero = false;
    rig.target.poke(0, &vec![0xee; DISK.size as usize]);
    let device = rig.create();
    let (trims, zeroes) = (range(0, 2 * CHUNK), range(2 * CHUNK, 3 * CHUNK));
    let worker = device.clone();
    rig.run(async move {
        worker.trim(trims, Durability::Volatile).await.unwrap();
        worker.write_zeroes(zeroes, ZeroMode::ALLOCATE, Durability::Volatile).await.unwrap();
    });
    assert_eq!(rig.read(&device, range(0, 5 * CHUNK)).unwrap(), vec![0; 5 * CHUNK as usize]);
    assert_eq!(rig.source.fetched(), 0);
}

#[test]
fn a_trim_leaves_what_it_covers_in_part() {
    let mut rig = Rig::new();
    let device = rig.create();
    let worker = device.clone();
    rig.run(async move { worker.trim(range(100, 2 * BLOCK_SIZE), Durability::Volatile).await.unwrap() });
    let bytes = rig.read(&device, range(0, CHUNK)).unwrap();
    let zero = BLOCK_SIZE as usize..2 * BLOCK_SIZE as usize;
    assert!(bytes[zero.clone()].iter().all(|&byte| byte == 0));
    assert!(bytes[..zero.start].iter().chain(&bytes[zero.end..]).all(|&byte| byte == 1));
}

#[test]
fn a_write_of_whole_blocks_never_waits_for_the_source() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.source.state.lock().away = u64::MAX;
    rig.write(&device, range(BLOCK_SIZE, BLOCK_SIZE), 7).unwrap();
    assert_eq!(rig.read(&device, range(BLOCK_SIZE, BLOCK_SIZE)).unwrap(), vec![7; BLOCK_SIZE as usize]);
}

#[test]
fn reads_of_absent_blocks_wait_for_the_source_up_to_the_limit() {
    let mut rig = Rig::new();
    rig.options.source_timeout = Duration::from_secs(10);
    let device = rig.create();
    rig.source.state.lock().away = 4;
    assert_eq!(rig.read(&device, range(0, 10)).unwrap(), vec![1; 10]);
    assert!(device.session().stats().source_away.is_none());
    rig.source.state.lock().away = u64::MAX;
    let before = rig.clock.now();
    assert_eq!(rig.read(&device, range(CHUNK, 10)).unwrap_err().kind(), ErrorKind::Io);
    assert!(rig.clock.now() - before >= Duration::from_secs(10));
    assert!(device.session().stats().source_away.is_some());
    // A write to part of an absent block is the one that waits as well.
    assert_eq!(rig.write(&device, range(CHUNK + 1, 1), 9).unwrap_err().kind(), ErrorKind::Io);
    rig.source.state.lock().away = 0;
    assert_eq!(rig.read(&device, range(CHUNK, 10)).unwrap(), vec![2; 10]);
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What is logged with `-v` while `run` runs.
fn logged(run: impl FnOnce()) -> String {
    let log = Log::default();
    let to = log.clone();
    let level = tracing::level_filters::LevelFilter::INFO;
    let logging = tracing_subscriber::fmt().with_max_level(level).with_writer(move || to.clone()).finish();
    tracing::subscriber::with_default(logging, run);
    String::from_utf8(std::mem::take(&mut log.0.lock())).unwrap()
}

#[test]
fn a_source_that_goes_and_comes_with_every_read_does_not_fill_the_log() {
    let log = logged(|| {
        let mut rig = Rig::new();
        let device = rig.create();
        for number in (0..CHUNKS).filter(|number| !ZERO.contains(number)) {
            rig.source.state.lock().away = 1;
            assert_eq!(rig.read(&device, chunk(number)).unwrap(), rig.source.bytes(number));
        }
    });
    assert_eq!(log.matches("the source is out of reach").count(), 1, "{log}");
    assert_eq!(log.matches("the source is back").count(), 1, "{log}");
}

#[test]
fn a_source_that_goes_for_long_soon_after_it_came_back_is_told_of() {
    let mut rig = Rig::new();
    rig.options.source_timeout = Duration::from_secs(30);
    let device = rig.create();
    let log = logged(|| {
        rig.source.state.lock().away = 1;
        rig.read(&device, range(CHUNK, 10)).unwrap();
        rig.source.state.lock().away = u64::MAX;
        rig.read(&device, range(2 * CHUNK, 10)).unwrap_err();
    });
    assert_eq!(log.matches("the source is out of reach").count(), 2, "{log}");
    assert_eq!(log.matches("the source is back").count(), 1, "{log}");
}

#[test]
fn a_damaged_chunk_is_an_error_for_its_own_range_until_it_is_overwritten() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.source.state.lock().damaged.insert(5);
    let error = rig.read(&device, range(4 * CHUNK, 3 * CHUNK)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert_eq!(rig.read(&device, chunk(6)).unwrap(), vec![7; CHUNK as usize]);
    rig.write(&device, range(5 * CHUNK, BLOCK_SIZE), 1).unwrap();
    assert_eq!(rig.read(&device, range(5 * CHUNK, BLOCK_SIZE)).unwrap(), vec![1; BLOCK_SIZE as usize]);
    let stats = device.session().stats();
    assert_eq!((stats.damaged.len(), stats.damaged[0].chunks.clone()), (1, 5..6));
    assert_eq!(stats.damaged_bytes, CHUNK - BLOCK_SIZE);
    rig.write(&device, chunk(5), 2).unwrap();
    assert_eq!(rig.read(&device, chunk(5)).unwrap(), vec![2; CHUNK as usize]);
    assert!(device.session().stats().damaged.is_empty());
}

#[test]
fn a_missing_chunk_is_an_error_until_it_is_put_back_and_no_longer() {
    let mut rig = Rig::new();
    rig.options.background = false;
    let device = rig.create();
    rig.source.state.lock().missing.extend([5, 6]);
    assert_eq!(rig.read(&device, chunk(5)).unwrap_err().kind(), ErrorKind::Damaged);
    assert_eq!(rig.read(&device, chunk(6)).unwrap_err().kind(), ErrorKind::Damaged);
    assert_eq!(device.session().stats().damaged_bytes, 2 * CHUNK);
    rig.source.state.lock().missing.clear();
    assert_eq!(rig.read(&device, chunk(5)).unwrap(), vec![6; CHUNK as usize]);
    assert_eq!(device.session().stats().damaged[0].chunks, 6..7);
    // The background asks for the other at once, since one was put back.
    device.session().set_background(true);
    rig.executor.spawn(device.clone().fill_worker());
    assert!(rig.run_until(&device, |device| device.session().map.is_whole(6)));
    assert_eq!(device.session().stats().damaged_bytes, 0);
}

#[test]
fn extents_tell_what_is_home_what_is_zero_and_what_the_guest_wrote() {
    let mut rig = Rig::new();
    rig.target_is_zero = false;
    let device = rig.create();
    rig.write(&device, chunk(1), 0xab).unwrap();
    let worker = device.clone();
    let extents = rig.run(async move { worker.extents(range(0, 4 * CHUNK), 10).await.unwrap() });
    let state = |depth, zero, dirty| ExtentState { hole: zero, zero, depth, dirty };
    let told: Vec<_> = extents.iter().map(|extent| (extent.range, extent.state)).collect();
    assert_eq!(
        told,
        [
            (chunk(0), state(2, false, false)),
            (chunk(1), state(1, false, true)),
            (chunk(2), state(2, false, false)),
            (chunk(3), state(2, true, false)),
        ]
    );
    assert_eq!(rig.source.fetched(), 0);
}

#[test]
fn a_prefetch_brings_its_chunks_home() {
    let mut rig = Rig::new();
    let device = rig.create();
    let worker = device.clone();
    rig.run(async move { worker.prefetch(range(CHUNK + 1, CHUNK)).await.unwrap() });
    assert!(device.session().map.is_whole(1) && device.session().map.is_whole(2));
    assert_eq!(rig.source.fetched(), 2);
}

#[test]
fn what_lies_outside_the_disk_is_refused_although_the_target_is_larger() {
    let mut rig = Rig::new();
    rig.target = block::sim::SimDisk::new(block::sim::SimOptions::new(DISK.size + CHUNK, 2));
    let device = rig.create();
    let end = CHUNKS * CHUNK;
    assert_eq!(rig.read(&device, range(end - 1, 2)).unwrap_err().kind(), ErrorKind::InvalidRange);
    assert_eq!(rig.write(&device, range(end, 1), 1).unwrap_err().kind(), ErrorKind::InvalidRange);
    assert_eq!(device.geometry().size, end);
}
