//! How chunks come home behind the guest.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{BLOCK_SIZE, Error, ErrorKind};

use super::{CHUNK, CHUNKS, DISK, Rig, ZERO, chunk, range};
use crate::live::clock::Clock;
use crate::live::stats::Phase;

const DATA_CHUNKS: u64 = CHUNKS - ZERO.len() as u64;

#[test]
fn workers_bring_everything_home_each_chunk_once_and_in_large_pieces() {
    let mut rig = Rig::new();
    rig.options.piece_bytes = 4 * CHUNK;
    let device = rig.create();
    rig.write(&device, range(CHUNK, BLOCK_SIZE), 0xcc).unwrap();
    let before = rig.target.stats().writes;
    for _ in 0..3 {
        rig.executor.spawn(device.clone().fill_worker());
    }
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    let mut expected = rig.source.all();
    expected[CHUNK as usize..(CHUNK + BLOCK_SIZE) as usize].fill(0xcc);
    assert!(rig.target.view() == expected);
    let mut fetched = rig.source.state.lock().fetched.clone();
    fetched.sort_unstable();
    let data: Vec<u64> = (0..CHUNKS).filter(|chunk| !ZERO.contains(chunk)).collect();
    assert_eq!(fetched, data);
    let writes = rig.target.stats().writes - before;
    assert!(writes < DATA_CHUNKS, "{writes} writes for {DATA_CHUNKS} chunks");
    let stats = device.session().stats();
    assert_eq!((stats.home_bytes, stats.stable_bytes, stats.guest_bytes), (DISK.size, DISK.size, BLOCK_SIZE));
}

#[test]
fn a_target_that_is_not_known_to_be_zero_is_made_zero_where_the_backup_is() {
    let mut rig = Rig::new();
    rig.target_is_zero = false;
    rig.target.poke(0, &vec![0xee; DISK.size as usize]);
    let device = rig.create();
    rig.executor.spawn(device.clone().fill_worker());
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    assert!(rig.target.view() == rig.source.all());
    assert_eq!(rig.source.fetched() as u64, DATA_CHUNKS);
}

#[test]
fn a_full_target_is_an_error_for_the_guest_and_a_pause_for_the_background() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.write(&device, chunk(0), 0xaa).unwrap();
    rig.target.set_full(true);
    for _ in 0..2 {
        rig.executor.spawn(device.clone().fill_worker());
    }
    assert!(rig.run_until(&device, |device| device.session().stats().target_full));
    assert_eq!(rig.write(&device, chunk(1), 0xbb).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(rig.read(&device, chunk(0)).unwrap(), vec![0xaa; CHUNK as usize]);
    assert_eq!(rig.read(&device, chunk(7)).unwrap(), vec![8; CHUNK as usize]);
    assert_eq!(device.session().phase(), Phase::Filling);
    rig.target.set_full(false);
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    assert!(!device.session().stats().target_full);
    let mut expected = rig.source.all();
    expected[..CHUNK as usize].fill(0xaa);
    assert!(rig.target.view() == expected);
}

#[test]
fn while_nothing_can_be_written_one_chunk_at_a_time_is_fetched_to_try() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.target.set_full(true);
    for _ in 0..3 {
        rig.executor.spawn(device.clone().fill_worker());
    }
    assert!(rig.run_until(&device, |device| device.session().stats().target_full));
    let (clock, began) = (Arc::clone(&rig.clock), rig.clock.now());
    assert!(rig.run_until(&device, |_| clock.now() > began + Duration::from_secs(5)));
    let (fetched, began) = (rig.source.fetched() as u64, rig.clock.now());
    assert!(rig.run_until(&device, |_| clock.now() > began + Duration::from_secs(600)));
    let tried = rig.source.fetched() as u64 - fetched;
    assert!((1..=600 / 10 + 1).contains(&tried), "{tried} fetches in ten minutes");
}

#[test]
fn a_target_on_which_some_writes_find_room_and_others_do_not_is_full_once() {
    let mut rig = Rig::new();
    let device = rig.create();
    let session = device.session();
    let full = || Err(Error::new(ErrorKind::NoSpace, "no room"));
    let later = |seconds: u64| rig.clock.0.fetch_add(seconds * 1_000_000, Ordering::Relaxed);
    for _ in 0..3 {
        session.after_fill(full());
        session.after_fill(Ok(()));
        later(1);
    }
    session.after_fill(full());
    session.after_fill(Ok(()));
    let stats = session.stats();
    assert_eq!((stats.target_full, stats.target_full_episodes), (true, 1));
    later(60);
    session.after_fill(Ok(()));
    assert!(!session.stats().target_full, "nothing has found it full for long");
    session.after_fill(full());
    assert_eq!(session.stats().target_full_episodes, 2);
}

#[test]
fn the_background_goes_on_when_the_source_is_back() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.source.state.lock().away = 40;
    rig.executor.spawn(device.clone().fill_worker());
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    assert!(rig.target.view() == rig.source.all());
}

#[test]
fn a_damaged_chunk_is_left_out_and_everything_else_comes_home() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.source.state.lock().damaged.insert(6);
    rig.executor.spawn(device.clone().fill_worker());
    let rest = DISK.size - CHUNK;
    assert!(rig.run_until(&device, |device| device.session().stats().home_bytes == rest));
    let stats = device.session().stats();
    assert_eq!((stats.damaged[0].chunks.clone(), stats.damaged_bytes), (6..7, CHUNK));
    assert!(stats.is_settled());
    assert_eq!(device.session().phase(), Phase::Filling);
    rig.write(&device, chunk(6), 0x66).unwrap();
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
}

#[test]
fn a_missing_chunk_that_is_put_back_comes_home_by_itself() {
    let mut rig = Rig::new();
    let device = rig.create();
    rig.source.state.lock().missing.extend([5, 6, 7]);
    rig.executor.spawn(device.clone().fill_worker());
    assert!(rig.run_until(&device, |device| device.session().stats().is_settled()));
    let stats = device.session().stats();
    assert_eq!((stats.damaged.len(), stats.damaged[0].chunks.clone()), (1, 5..8), "one run");
    rig.source.state.lock().missing.clear();
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    assert!(rig.target.view() == rig.source.all());
    assert_eq!(device.session().stats().damaged_bytes, 0);
}

#[test]
fn what_a_former_agent_could_not_have_is_damaged_until_it_comes_home() {
    let mut rig = Rig::new();
    let device = rig.create();
    device.session().recall_damage(5..7, "its pack is gone");
    let stats = device.session().stats();
    assert_eq!((stats.damaged[0].chunks.clone(), stats.damaged_bytes), (5..7, 2 * CHUNK));
    rig.source.state.lock().missing.insert(6);
    rig.executor.spawn(device.clone().fill_worker());
    assert!(rig.run_until(&device, |device| device.session().stats().is_settled()));
    let stats = device.session().stats();
    assert_eq!((stats.damaged.len(), stats.damaged[0].chunks.clone()), (1, 6..7));
    assert_eq!(stats.home_bytes, DISK.size - CHUNK, "not before it was asked for again");
}

#[test]
fn the_background_takes_no_more_than_its_rate() {
    let mut rig = Rig::new();
    rig.options.piece_bytes = CHUNK;
    rig.options.limit = CHUNK;
    let device = rig.create();
    for _ in 0..2 {
        rig.executor.spawn(device.clone().fill_worker());
    }
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    let (now, least) = (rig.clock.now(), Duration::from_secs(DATA_CHUNKS - 2));
    assert!(now >= least, "{DATA_CHUNKS} chunks at one a second took {now:?}");
}

#[test]
fn a_background_slower_than_a_chunk_a_second_begins_with_one_chunk() {
    let mut rig = Rig::new();
    rig.options.piece_bytes = 4 * CHUNK;
    rig.options.limit = 20;
    let device = rig.create();
    for _ in 0..2 {
        rig.executor.spawn(device.clone().fill_worker());
    }
    let source = Arc::clone(&rig.source);
    assert!(rig.run_until(&device, |_| source.fetched() > 0));
    rig.executor.run(200);
    assert_eq!(source.fetched(), 1);
    let enough_for_another = Duration::from_secs(CHUNK / 20);
    assert!(rig.clock.now() < enough_for_another);
}

/// Three workers that have asked for six chunks, of which the source has begun three and goes no further.
fn asked_for_six(rig: &mut Rig) -> crate::live::device::LiveDevice {
    rig.options.piece_bytes = 2 * CHUNK;
    rig.source.state.lock().room = Some(3);
    let device = rig.create();
    for _ in 0..3 {
        rig.executor.spawn(device.clone().fill_worker());
    }
    rig.executor.run(200);
    assert_eq!(rig.source.fetched(), 3);
    assert_eq!(device.session().fills.lock().plan.fetching(), 6);
    device
}

#[test]
fn a_lower_limit_holds_for_what_was_asked_for_and_has_not_begun() {
    let mut rig = Rig::new();
    let device = asked_for_six(&mut rig);
    device.session().set_limit(20);
    rig.source.state.lock().room = None;
    rig.executor.run(200);
    assert_eq!(rig.source.fetched(), 4, "one in advance, at the new rate");
    // The workers are there for guests: what one asks for comes home at once.
    rig.read(&device, chunk(15)).unwrap();
    assert!(rig.run_until(&device, |device| device.session().map.is_whole(15)));
    assert_eq!(rig.source.fetched(), 5);
    let enough_for_another = Duration::from_secs(CHUNK / 20);
    assert!(rig.clock.now() < enough_for_another);
    device.session().set_limit(0);
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    assert!(rig.target.view() == rig.source.all());
    assert_eq!(rig.source.fetched() as u64, DATA_CHUNKS, "each once");
}

#[test]
fn a_higher_limit_takes_nothing_back() {
    let mut rig = Rig::new();
    rig.options.limit = 1 << 40;
    let device = asked_for_six(&mut rig);
    device.session().set_limit(1 << 41);
    device.session().set_limit(0);
    assert_eq!(rig.source.state.lock().withdrawals, 0);
}

#[test]
fn guests_who_want_the_background_slower_have_that_though_all_workers_wait() {
    let mut rig = Rig::new();
    rig.options.guest_p99 = Some(Duration::from_millis(1));
    let device = asked_for_six(&mut rig);
    assert_eq!(rig.source.state.lock().withdrawals, 0, "nobody has minded");
    (0..100).for_each(|_| device.session().pace.took(Duration::from_secs(1)));
    let source = Arc::clone(&rig.source);
    assert!(rig.run_until(&device, |_| source.state.lock().withdrawals > 0));
    assert!(device.session().stats().paced_to > 0);
    rig.source.state.lock().room = None;
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    assert!(rig.target.view() == rig.source.all());
    assert_eq!(rig.source.fetched() as u64, DATA_CHUNKS, "each once");
}

#[test]
fn without_a_background_only_what_was_asked_for_comes_home() {
    let mut rig = Rig::new();
    rig.options.background = false;
    let device = rig.create();
    rig.executor.spawn(device.clone().fill_worker());
    rig.executor.run(100);
    rig.read(&device, range(8 * CHUNK, 512)).unwrap();
    assert!(rig.run_until(&device, |device| device.session().map.is_whole(8)));
    rig.executor.run(10_000);
    assert_eq!(rig.source.state.lock().fetched, [8]);
    assert!(device.session().decoded.lock().is_empty());
    device.session().set_background(true);
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    assert_eq!(rig.source.fetched() as u64, DATA_CHUNKS);
}

#[test]
fn workers_end_when_they_are_told_to() {
    let mut rig = Rig::new();
    rig.options.piece_bytes = CHUNK;
    let device = rig.create();
    let worker = rig.executor.spawn(device.clone().fill_worker());
    let committer = rig.executor.spawn(device.clone().commit_worker());
    rig.executor.run(30);
    device.session().stop_workers();
    assert_eq!(rig.executor.run(100_000), block::sim::Stop::Finished);
    assert!(worker.take().is_some() && committer.take().is_some());
    assert_eq!(device.session().phase(), Phase::Filling);
}
