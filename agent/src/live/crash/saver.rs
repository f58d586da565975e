//! Saving: a frozen view taken while guests work, and one of a session at rest.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use block::sim::{Executor, Rng, SimDisk, SimOptions, yield_now};
use block::{AlignedBuf, ByteRange, OpenDevice};

use super::guest::Violation;
use super::model::{UNIT, value_of};
use super::start::ID;
use super::story::{STEP_LIMIT, Story};
use super::tally::Kind;
use super::world::{CHUNK_SIZE, World};
use crate::live::device::LiveDevice;
use crate::live::frozen::{AtRest, Frozen, FrozenOptions, FrozenReader, RestParts};
use crate::live::parts::WrittenPast;

/// What a view showed: the whole disk, but for the chunks whose rest could not be had.
pub(super) struct Shown {
    pub(super) bytes: Vec<u8>,
    pub(super) damaged: BTreeSet<u64>,
}

/// Freezes the session once, and takes everything out of the view while guests go on.
pub(super) struct Saver {
    pub(super) world: Rc<RefCell<World>>,
    pub(super) device: LiveDevice,
    pub(super) rng: Rng,
    pub(super) may_fail: bool,
    pub(super) leaving: Rc<Cell<bool>>,
}

impl Saver {
    pub(super) async fn work(mut self) -> Result<(), Violation> {
        for _ in 0..self.rng.below(300) {
            yield_now().await;
        }
        let session = Arc::clone(self.device.session());
        // Parked or poisoned: there is nothing to freeze.
        let Ok(still) = session.hold_still().await else { return Ok(()) };
        let everywhere = ByteRange::from_bounds(0, u64::MAX);
        if self.world.borrow().target.under_way(everywhere).writes > 0 {
            return Err("the target is being changed while the session is held still".to_owned());
        }
        let (model, at) = {
            let model = &mut self.world.borrow_mut().model;
            let at = model.tick();
            (model.clone(), at)
        };
        let spill_bytes = self.rng.below(8) * u64::from(CHUNK_SIZE);
        let spill = || Arc::new(SimDisk::new(SimOptions::new(spill_bytes, at))) as Arc<dyn OpenDevice>;
        let options = FrozenOptions {
            memory_bytes: self.rng.below(4) * u64::from(CHUNK_SIZE),
            spill: (spill_bytes > 0).then(spill),
        };
        let Ok(frozen) = still.freeze(options) else { return Ok(()) };
        drop(still);
        self.count(Kind::Frozen);
        let reader = frozen.reader(self.device.clone());
        let source = Arc::clone(&self.world.borrow().source);
        let backup = source.bytes(0..self.device.session.map.disk().size).to_vec();
        let most = (1 + self.rng.below(3)) * u64::from(CHUNK_SIZE);
        let shown = take_all(&frozen, &reader, backup, most, &mut self.rng).await;
        if frozen.copied_bytes() > 0 {
            self.count(Kind::FrozenCopied);
        }
        let shown = match shown {
            Ok(shown) => shown,
            Err(_) if self.may_fail || self.leaving.get() || frozen.failure().is_some() => {
                self.count(Kind::FrozenFailed);
                return Ok(());
            }
            Err(error) => return Err(format!("a view cannot be read: {error}")),
        };
        for (unit, bytes) in shown.bytes.chunks(UNIT as usize).enumerate() {
            if shown.damaged.contains(&(unit as u64 * UNIT / u64::from(CHUNK_SIZE))) {
                continue;
            }
            let value = value_of(bytes).ok_or_else(|| format!("unit {unit} is torn in a view"))?;
            if !model.may_read(unit, at, value) {
                let what = model.describe(unit);
                return Err(format!("a view begun at {at} shows {value:#x} in unit {unit}; {what}"));
            }
        }
        Ok(())
    }

    fn count(&self, kind: Kind) {
        self.world.borrow_mut().tally.count(kind, 1);
    }
}

/// The whole disk as a view shows it, over the backup's bytes.
async fn take_all(
    frozen: &Frozen,
    reader: &FrozenReader,
    backup: Vec<u8>,
    most: u64,
    rng: &mut Rng,
) -> block::Result<Shown> {
    let mut shown = Shown { bytes: backup, damaged: BTreeSet::new() };
    for places in frozen.runs(most) {
        for _ in 0..rng.below(20) {
            yield_now().await;
        }
        let at = frozen.chunks()[places.start] as usize * CHUNK_SIZE as usize;
        let (taken, buf) = reader.take(places, AlignedBuf::zeroed(most as usize)).await;
        shown.damaged.extend(taken?.damaged.into_iter().map(|(chunk, _)| chunk));
        shown.bytes[at..at + buf.len()].copy_from_slice(&buf);
    }
    Ok(shown)
}

impl Story {
    /// What a view of the session at rest shows; `None` where there is no session yet.
    pub(super) fn look_at_rest(&mut self) -> Result<Option<Shown>, Violation> {
        let mut world = self.world.borrow_mut();
        world.clear_faults();
        let parts = world.parts();
        let (target, journal) = (world.target.clone(), world.journal.clone());
        let mut rng = self.rng.fork();
        let backup = world.source.bytes(0..world.disk.size).to_vec();
        drop(world);
        let parts = RestParts {
            identity: parts.identity,
            session: ID,
            source: parts.source,
            clock: parts.clock,
            source_timeout: parts.options.source_timeout,
            live: Some(parts.live),
            boot: parts.boot,
            last_boot: parts.last_boot,
            check: parts.check,
            written_past: WrittenPast::No,
        };
        let shown = Executor::new(self.rng.next_u64()).block_on(STEP_LIMIT, async move {
            let Ok(rest) = AtRest::open(parts, &target, Some(&journal)).await else { return Ok(None) };
            let reader = rest.reader(Rc::new(target));
            take_all(rest.frozen(), &reader, backup, u64::from(CHUNK_SIZE), &mut rng).await.map(Some)
        });
        let shown = shown.map_err(|error| format!("a view at rest cannot be read: {error}"))?;
        if shown.is_some() {
            self.count(Kind::FrozenAtRest);
        }
        Ok(shown)
    }
}
