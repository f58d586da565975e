//! In which order chunks are brought home, and what is recorded of what guests ask for.

use std::time::Duration;

use block::BlockDevice as _;

use super::{CHUNK, Rig, chunk, range};
use crate::live::stats::Phase;

#[test]
fn the_boot_trace_comes_before_the_sweep_in_its_order() {
    let mut rig = Rig::new();
    rig.trace = vec![12, 7, 15, 3, 1];
    let device = rig.create();
    rig.executor.spawn(device.clone().fill_worker());
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    // Chunk 3 is zero: it is home from the start.
    assert_eq!(rig.source.state.lock().fetched, [12, 7, 15, 1, 0, 2, 5, 6, 8, 10, 11, 13, 14]);
    assert_eq!(device.session().stats().trace_left, 0);
}

#[test]
fn without_a_background_a_trace_brings_nothing_home() {
    let mut rig = Rig::new();
    rig.trace = vec![12, 7];
    rig.options.background = false;
    let device = rig.create();
    rig.executor.spawn(device.clone().fill_worker());
    assert_eq!(rig.read(&device, chunk(1)).unwrap(), vec![2; CHUNK as usize]);
    for _ in 0..10_000 {
        rig.executor.step();
    }
    assert_eq!(rig.source.state.lock().fetched, [1]);
}

#[test]
fn what_lies_near_a_read_comes_before_the_sweep() {
    let mut rig = Rig::new();
    let device = rig.create();
    assert_eq!(rig.read(&device, chunk(13)).unwrap(), vec![14; CHUNK as usize]);
    rig.executor.spawn(device.clone().fill_worker());
    assert!(rig.run_until(&device, |device| device.session().phase() == Phase::Complete));
    assert_eq!(rig.source.state.lock().fetched[..3], [13, 14, 15], "what follows first");
}

#[test]
fn each_client_has_streams_of_its_own() {
    let mut rig = Rig::new();
    rig.options.background = false;
    let device = rig.create();
    rig.executor.spawn(device.clone().fill_worker());
    let clients = [device.for_client().unwrap(), device.for_client().unwrap()];
    // Together these are no stream; each alone is one from the third step on.
    for step in 0..3 {
        for (client, at) in clients.iter().zip([5 + step, 12 - step]) {
            let client = std::rc::Rc::clone(client);
            let range = range(at * CHUNK, 4096);
            rig.run(async move {
                let buf = block::AlignedBuf::zeroed(4096);
                client.read(range.start(), buf).await.0.unwrap();
            });
        }
    }
    for _ in 0..10_000 {
        rig.executor.step();
    }
    let before = rig.source.fetched();
    for (client, at) in clients.iter().zip([8, 9]) {
        let client = std::rc::Rc::clone(client);
        rig.run(async move {
            client.read(at * CHUNK, block::AlignedBuf::zeroed(4096)).await.0.unwrap();
        });
    }
    for _ in 0..10_000 {
        rig.executor.step();
    }
    assert!(rig.source.fetched() > before, "what lies ahead of them is fetched unasked");
}

#[test]
fn what_guests_ask_for_is_recorded_until_they_settle_whether_it_is_home_or_not() {
    let mut rig = Rig::new();
    rig.options.background = false;
    let device = rig.create();
    rig.write(&device, chunk(6), 0xaa).unwrap();
    for at in [8, 6, 2, 8] {
        rig.read(&device, range(at * CHUNK, 4096)).unwrap();
    }
    let recorded = device.session().recorded();
    assert_eq!((recorded.chunks, recorded.is_settled), (vec![8, 6, 2], false));
    rig.run({
        let clock = std::sync::Arc::clone(&rig.clock);
        async move { crate::live::clock::Clock::sleep(&*clock, Duration::from_secs(60)).await }
    });
    rig.read(&device, range(11 * CHUNK, 4096)).unwrap();
    let recorded = device.session().recorded();
    assert_eq!((recorded.chunks, recorded.is_settled), (vec![8, 6, 2], true));
}
