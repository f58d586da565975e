//! Leases: framed JSON, which other programs and other versions write too.
//!
//! | bytes of the input | what |
//! |---|---|
//! | 0 | bit 0: a first line that fits is put before the rest |
//! | 1.. | the file, or the document in it |

use jiff::{SignedDuration, Timestamp};
use repository::{Lease, Leases, SnapshotName, fuzzing};

use super::{framed, has};
use crate::memory::bounded;

const SESSION: &str = "00112233445566778899aabbccddeeff";

const LEASE: &str = r#"{
  "features": [],
  "session": "00112233445566778899aabbccddeeff",
  "snapshot": "web01@2026-11-21T00:33:12Z",
  "disk": "disk0",
  "host": "größe \"1\"",
  "since": "2026-11-21T00:40:00.5Z",
  "renewed": "2026-11-22T00:40:00.5Z",
  "expires": "2026-11-29T00:40:00.5Z"
}
"#;

/// One that ends as late as a time can be.
const ENDLESS: &str = r#"{"features":[],"session":"00112233445566778899aabbccddeeff","snapshot":"a@0001-01-01T00:00:00Z",
"disk":"d","host":"","since":"-009999-01-02T01:59:59Z","renewed":"9999-12-30T22:00:00Z","expires":"9999-12-30T22:00:00Z"}"#;

fn check(lease: &Lease) {
    assert_eq!(lease.session, SESSION);
    let snapshot: SnapshotName = lease.snapshot.parse().expect("it names a snapshot");
    let among = Leases { live: vec![lease.clone()], ..Leases::default() };
    assert_eq!(among.of(&snapshot).count(), 1, "whoever asks for the snapshot's leases finds this one");
    assert!(among.held().expect("it is understood").contains(&snapshot));
    assert!(lease.since <= lease.renewed && lease.renewed <= lease.expires);
    assert!(!lease.has_expired(lease.renewed), "it ends before it was renewed");
    for now in [lease.since, lease.expires, Timestamp::MIN, Timestamp::MAX] {
        let renewed = lease.renewed(now);
        assert!(renewed.renewed >= lease.renewed && renewed.since == lease.since);
        let soon = renewed.renewed.checked_add(SignedDuration::from_hours(24)).unwrap_or(Timestamp::MAX);
        assert!(!renewed.has_expired(soon), "one that was renewed holds for days");
        assert!(fuzzing::encode_lease(&renewed).is_ok(), "one that was renewed can be left");
    }
    let file = fuzzing::encode_lease(lease).expect("what was read can be written");
    assert_eq!(fuzzing::lease(&file, SESSION).ok().as_ref(), Some(lease), "it does not come back");
}

/// Leases: little memory is held; what is read can be written, and comes back the same; it is of the session that was asked
/// for, and of a snapshot that can be; renewing makes it no shorter.
pub fn leases(data: &[u8]) {
    let Some((mode, rest)) = data.split_first() else { return };
    let file = if has(*mode, 0) { framed("lease", rest) } else { rest.to_vec() };
    if let Ok(lease) = bounded(file.len(), 32, 16 << 10, || fuzzing::lease(&file, SESSION)) {
        check(&lease);
    }
}

/// Bare and framed, and one whose times are as far apart as they can be.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let lease = LEASE.as_bytes();
    vec![
        [&[1], lease].concat(),
        [&[0], &framed("lease", lease)[..]].concat(),
        [&[1], ENDLESS.as_bytes()].concat(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_leases() {
        for lease in [LEASE, ENDLESS] {
            check(&fuzzing::lease(&framed("lease", lease.as_bytes()), SESSION).unwrap());
        }
    }
}
