//! What each piece of the disk may hold: the history of a guest's changes, and what it was promised.
//!
//! A *unit* is 128 bytes, so that four lie in a sector and requests need not be aligned to anything. A
//! unit holds one 64-bit value, repeated; each write of a run has a value of its own.

use std::ops::Range;

use block::ByteRange;

/// Bytes of one unit.
pub(super) const UNIT: u64 = 128;

/// One change of a unit.
#[derive(Clone, Debug)]
struct Change {
    value: u64,
    begun: u64,
    /// When it was acknowledged, failed, or its maker died; from then on it changes nothing more.
    ended: Option<u64>,
    /// It was acknowledged as done, so what was before it is gone. Not a trim, nor a failed write.
    definite: bool,
    /// It was acknowledged with FUA, or seen after a power cut.
    durable: bool,
}

/// The histories of all units.
#[derive(Clone, Debug)]
pub(super) struct Model {
    units: Vec<Vec<Change>>,
    now: u64,
    next_value: u64,
    /// The latest beginning of a flush that succeeded.
    flushed: u64,
}

/// A change that is under way.
#[derive(Debug)]
pub(super) struct Begun {
    units: Range<usize>,
    at: u64,
    pub(super) value: u64,
}

/// How a change ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Acknowledged,
    Durable,
    /// It failed, or need not be done at all: it happened, in part, or not.
    Perhaps,
}

impl Model {
    /// Units that hold these values, for ever until they are changed.
    pub(super) fn new(values: &[u64]) -> Self {
        let change = |value| Change { value, begun: 0, ended: Some(0), definite: true, durable: true };
        Self {
            units: values.iter().map(|&value| vec![change(value)]).collect(),
            now: 1,
            next_value: 1,
            flushed: 0,
        }
    }

    /// The next moment.
    pub(super) const fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A value that nobody wrote yet.
    pub(super) const fn fresh_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    pub(super) fn begin(&mut self, range: ByteRange, value: u64) -> Begun {
        let at = self.tick();
        let units = (range.start() / UNIT) as usize..(range.end() / UNIT) as usize;
        for unit in units.clone() {
            let change = Change { value, begun: at, ended: None, definite: false, durable: false };
            self.units[unit].push(change);
        }
        Begun { units, at, value }
    }

    pub(super) fn end(&mut self, begun: Begun, how: Ended) {
        let now = self.tick();
        for unit in begun.units {
            let change = self.units[unit].iter_mut().find(|change| change.begun == begun.at);
            let change = change.expect("what is under way is not forgotten");
            change.ended = Some(now);
            change.definite = how != Ended::Perhaps;
            change.durable = how == Ended::Durable;
        }
    }

    /// A flush that began at `begun` succeeded.
    pub(super) fn flushed(&mut self, begun: u64) {
        self.flushed = self.flushed.max(begun);
    }

    /// Whether a read that began at `begun` and ends now may see this value.
    pub(super) fn may_read(&self, unit: usize, begun: u64, value: u64) -> bool {
        let history = &self.units[unit];
        history.iter().filter(|change| change.value == value).any(|change| {
            !history.iter().any(|later| {
                later.definite
                    && later.ended.is_some_and(|ended| ended < begun)
                    && change.ended.is_some_and(|ended| ended < later.begun)
            })
        })
    }

    /// Everybody died: what was under way has ended, one way or the other.
    pub(super) fn everybody_died(&mut self) {
        let now = self.tick();
        for change in self.units.iter_mut().flatten() {
            change.ended.get_or_insert(now);
        }
        // Only now: a read that had begun before a flush might still see what was there before it.
        for unit in 0..self.units.len() {
            self.forget_superseded(unit);
        }
    }

    /// What was not promised to be stable may be gone: values from before become possible again.
    /// Returns for each unit whether `value` may be what is left.
    pub(super) fn may_be_left(&self, unit: usize, value: u64) -> bool {
        let history = &self.units[unit];
        history
            .iter()
            .filter(|change| change.value == value)
            .any(|change| !self.is_superseded(history, change))
    }

    /// After a recovery this value was seen: so it is there until it is changed.
    pub(super) fn saw(&mut self, unit: usize, value: u64, durable: bool) {
        let now = self.now;
        if durable {
            self.units[unit].clear();
        }
        self.units[unit].push(Change { value, begun: now, ended: Some(now), definite: true, durable });
    }

    pub(super) fn describe(&self, unit: usize) -> String {
        format!("flushed at {}: {:?}", self.flushed, self.units[unit])
    }

    fn is_superseded(&self, history: &[Change], change: &Change) -> bool {
        history.iter().any(|later| {
            let is_stable = later.durable || later.ended.is_some_and(|ended| ended < self.flushed);
            later.definite && is_stable && change.ended.is_some_and(|ended| ended < later.begun)
        })
    }

    fn forget_superseded(&mut self, unit: usize) {
        if self.units[unit].len() == 1 {
            return;
        }
        let history = std::mem::take(&mut self.units[unit]);
        let kept = history.iter().filter(|change| !self.is_superseded(&history, change)).cloned().collect();
        self.units[unit] = kept;
    }
}

/// The bytes of a range of units that all hold `value`.
pub(super) fn bytes_of(value: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
    }
    bytes
}

/// The value that a unit's bytes hold, or `None` where they are torn.
pub(super) fn value_of(unit: &[u8]) -> Option<u64> {
    let first = u64::from_le_bytes(unit[..8].try_into().expect("eight bytes"));
    unit.windows(16).step_by(8).all(|words| words[..8] == words[8..]).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: ByteRange = ByteRange::from_bounds(0, UNIT);

    #[test]
    fn what_was_acknowledged_is_read_and_what_was_flushed_is_left() {
        let mut model = Model::new(&[7]);
        let write = model.begin(WHOLE, 8);
        assert!(model.may_read(0, 1, 7) && model.may_read(0, 1, 8));
        model.end(write, Ended::Acknowledged);
        let begun = model.tick();
        assert!(!model.may_read(0, begun, 7) && model.may_read(0, begun, 8));
        assert!(model.may_be_left(0, 7) && model.may_be_left(0, 8));
        model.flushed(begun);
        assert!(!model.may_be_left(0, 7) && model.may_be_left(0, 8));
    }

    #[test]
    fn a_flush_that_began_before_the_acknowledgement_promises_nothing() {
        let mut model = Model::new(&[7]);
        let write = model.begin(WHOLE, 8);
        let begun = model.tick();
        model.end(write, Ended::Acknowledged);
        model.flushed(begun);
        assert!(model.may_be_left(0, 7));
    }

    #[test]
    fn a_failed_write_and_a_trim_take_nothing_away() {
        let mut model = Model::new(&[7]);
        let write = model.begin(WHOLE, 8);
        model.end(write, Ended::Perhaps);
        let begun = model.tick();
        assert!(model.may_read(0, begun, 7) && model.may_read(0, begun, 8));
        model.saw(0, 8, false);
        let begun = model.tick();
        assert!(!model.may_read(0, begun, 7) && model.may_read(0, begun, 8));
        assert!(model.may_be_left(0, 7));
    }
}
