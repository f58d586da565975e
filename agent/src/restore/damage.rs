//! What could not be brought back, and what a restore does about it.

use std::collections::BTreeMap;

use block::ByteRange;
use parking_lot::Mutex;
use serde::Serialize;

use crate::cli::Failure;

/// A stretch of the disk that could not be brought back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Damage {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The chunk, unless even that is not known because the disk's map is damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) chunk: Option<String>,
    pub(super) reason: String,
}

/// More would say nothing more, and could fill the memory.
const MAX_LISTED: usize = 100_000;

/// What to do with damage: stop at the first, or note all of it and go on.
#[derive(Debug)]
pub(super) struct DamageLog {
    keep_going: bool,
    found: Mutex<Found>,
}

/// What was found, by where it begins. No two neighbours have the same chunk and reason: a damaged node of the map is one
/// place, however many chunks it loses.
#[derive(Debug, Default)]
struct Found {
    listed: BTreeMap<u64, Damage>,
    bytes: u64,
}

impl DamageLog {
    pub(super) fn new(keep_going: bool) -> Self {
        Self { keep_going, found: Mutex::default() }
    }

    /// Notes damage if the restore is to go on, and fails if it is not.
    ///
    /// # Errors
    /// `error`, with where on the disk it is, unless it is to be passed over.
    pub(super) fn note(
        &self,
        range: ByteRange,
        chunk: Option<String>,
        error: repository::Error,
    ) -> anyhow::Result<()> {
        use repository::ErrorKind;
        let what = || format!("{range} of the disk cannot be restored");
        // A full memory or a refusal is no damage, and would be the same for all that follows.
        let damage = matches!(
            error.kind(),
            ErrorKind::Damaged
                | ErrorKind::Lost
                | ErrorKind::NotFound
                | ErrorKind::UnknownCodec
                | ErrorKind::UnknownKey
                | ErrorKind::Io
        );
        if !damage {
            return Err(anyhow::Error::from(error).context(what()));
        }
        if !self.keep_going {
            return Err(Failure::new(
                what(),
                "give --keep-going to restore all the rest, with zeroes there, or name another snapshot; \
                 `lifeboot verify` says what else is damaged, and what needs it",
            )
            .because(error)
            .into());
        }
        let (offset, len) = (range.start(), range.len());
        self.found.lock().add(Damage { offset, len, chunk, reason: error.to_string() });
        Ok(())
    }

    /// All that was noted, in the order of the disk, and how many bytes it is.
    pub(super) fn conclude(self) -> (Vec<Damage>, u64) {
        let Found { listed, bytes } = self.found.into_inner();
        (listed.into_values().collect(), bytes)
    }
}

impl Found {
    /// Adds damage that overlaps nothing that was added before.
    fn add(&mut self, mut damage: Damage) {
        self.bytes += damage.len;
        let end = damage.offset + damage.len;
        if self.listed.get(&end).is_some_and(|after| after.is_like(&damage)) {
            damage.len += self.listed.remove(&end).map_or(0, |after| after.len);
        }
        let is_full = self.listed.len() >= MAX_LISTED;
        let before = self.listed.range_mut(..damage.offset).next_back().map(|(_, before)| before);
        match before.filter(|before| before.offset + before.len == damage.offset && before.is_like(&damage)) {
            Some(before) => before.len += damage.len,
            None if is_full => {}
            None => drop(self.listed.insert(damage.offset, damage)),
        }
    }
}

impl Damage {
    fn is_like(&self, other: &Self) -> bool {
        self.chunk == other.chunk && self.reason == other.reason
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damage(offset: u64, len: u64, reason: &str) -> Damage {
        Damage { offset, len, chunk: None, reason: reason.to_owned() }
    }

    #[test]
    fn neighbours_with_one_reason_are_one_place_in_whatever_order_they_are_found() {
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [2, 0, 3, 1]] {
            let mut found = Found::default();
            for chunk in order {
                found.add(damage(chunk * 10, 10, "the map"));
            }
            found.add(damage(40, 10, "another node"));
            found.add(damage(60, 5, "another node"));
            assert_eq!(found.bytes, 55);
            let listed: Vec<_> = found.listed.into_values().collect();
            let wanted =
                [damage(0, 40, "the map"), damage(40, 10, "another node"), damage(60, 5, "another node")];
            assert_eq!(listed, wanted, "{order:?}");
        }
    }
}
