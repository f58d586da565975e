//! Ten thousand connections that say nothing. Alone in its process, so that its descriptors can be counted.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

mod common;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{Client, MemoryDisk, Served, connect_patiently, descriptors, more_descriptors, wish};
use nbd_server::{Limits, ServerOptions, Stats};
use proto::wire::ReplyStyle;

const FLOOD: usize = 10_000;
const NOTHING: Stats = Stats { connections: 0, half_open: 0, operations: 0, memory_bytes: 0 };

/// A client that connects again where it is refused, as it is while the places are full of others.
fn insist(served: &Served) -> Client {
    loop {
        if let Ok(client) = Client::connect(&served.path, wish("disk0", ReplyStyle::Structured)) {
            return client;
        }
    }
}

/// Waits until the server has come to the end of those who wait to be accepted.
///
/// That nobody is connected does not say so: thousands may wait that were never looked at, and have the places of whoever comes
/// behind them. Whoever comes behind them and is let in does.
fn wait_until_all_were_accepted(served: &Served) {
    insist(served).disconnect();
    served.wait_for(|stats| stats == NOTHING);
}

#[test]
fn half_open_connections_held_or_dropped_cost_their_places_and_no_more() {
    // Nothing but a newcomer makes them go.
    let limits = Limits { handshake_timeout: Duration::from_secs(3600), ..Limits::default() };
    let places = limits.half_open;
    let served = Served::new(MemoryDisk::new(1 << 20), ServerOptions { limits, ..ServerOptions::default() });
    let mut established = served.client();
    // Once it is served, the server has looked at what it looks at once, and in files: how many processors there are.
    assert_eq!(established.read(0, 4096).result, Ok(()));
    let before = descriptors();
    let flood = FLOOD.min(more_descriptors() - before - 2 * places);

    // Gone at once: the server finds them closed when it comes to them.
    for _ in 0..FLOOD {
        drop(connect_patiently(&served.path));
    }
    assert_eq!(established.read(0, 4096).result, Ok(()));

    // Held, all of them at once, though most are refused.
    let held: Vec<UnixStream> = (0..flood).map(|_| connect_patiently(&served.path)).collect();
    assert_eq!(established.read(0, 4096).result, Ok(()), "who was there first is served all the while");
    assert!(served.handle.stats().half_open <= places);
    let mut newcomer = insist(&served);
    assert_eq!(newcomer.read(0, 4096).result, Ok(()));
    // What was refused is closed, as is soon who gave its place away.
    while descriptors() > before + flood + places + 2 {
        std::thread::yield_now();
    }

    newcomer.disconnect();
    established.disconnect();
    drop(held);
    wait_until_all_were_accepted(&served);
    served.check_health();
    // The two ends of the established one are closed as well.
    assert_eq!(descriptors(), before - 2, "descriptors are left over");
    served.end();
}
