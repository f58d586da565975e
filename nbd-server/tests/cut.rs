//! A long valid conversation, cut after every byte of it: the server still serves, and nothing is left over.
//! Alone in its process, so that its descriptors can be counted. Under TLS: `cut_tls.rs`.

mod common;

use common::{MemoryDisk, STYLES, Served, conversation, descriptors, other_endings, talk};
use nbd_server::ServerOptions;

#[test]
fn a_connection_that_dies_after_any_byte_costs_nothing_but_itself() {
    for slow in [false, true] {
        let disk = MemoryDisk::new(1 << 20);
        let disk = if slow { disk.slow() } else { disk };
        let served = Served::new(disk, ServerOptions::default());
        served.check_health();
        let before = descriptors();
        for conversation in STYLES.into_iter().map(conversation).chain(other_endings()) {
            for cut in 0..=conversation.len() {
                talk(&served.path, &conversation[..cut], cut % 3);
                if cut % 3 == 0 {
                    talk(&served.path, &conversation[..cut], 1);
                }
            }
            served.check_health();
            assert_eq!(descriptors(), before);
        }
        served.end();
    }
}
