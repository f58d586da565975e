//! One connection's random work on the disk, each answer compared with what it may be.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::sim::{Rng, SECTOR, yield_now};
use block::{AlignedBuf, Attempt, BLOCK_SIZE, BlockDevice, ByteRange, Durability, ErrorKind, ZeroMode};

use super::model::{Ended, UNIT, bytes_of, value_of};
use super::tally::Kind;
use super::world::{CHUNK_SIZE, World};
use crate::live::device::LiveDevice;

/// What a guest found that must not be.
pub(super) type Violation = String;

/// A guest that works until it is dropped or `ops` are done.
pub(super) struct Guest {
    pub(super) world: Rc<RefCell<World>>,
    pub(super) device: LiveDevice,
    pub(super) rng: Rng,
    /// Whether an operation may fail in this life.
    pub(super) may_fail: bool,
    /// The agent is being parked: what is under way may fail, and nothing more is begun.
    pub(super) leaving: Rc<Cell<bool>>,
}

impl Guest {
    pub(super) async fn work(mut self, ops: u32) -> Result<(), Violation> {
        for _ in 0..ops {
            if self.leaving.get() {
                break;
            }
            match self.rng.below(100) {
                0..30 => self.read().await?,
                30..62 => self.write().await?,
                62..76 => self.flush().await?,
                76..84 => self.trim().await?,
                84..93 => self.zero().await?,
                93..96 => self.prefetch().await?,
                _ => self.extents().await?,
            }
            if self.rng.chance(300) {
                yield_now().await;
            }
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<(), Violation> {
        let range = self.range();
        self.count(Kind::Read);
        let begun = self.world.borrow_mut().model.tick();
        let mut buf = AlignedBuf::zeroed(range.len() as usize);
        let attempt = self.device.try_read(range.start(), &mut buf);
        if matches!(attempt, Ok(Attempt::Zeroes)) {
            // That is an answer; the waiting form must give one all the same.
            buf.fill(0);
            self.check_read(range, begun, &buf)?;
        }
        if matches!(attempt, Ok(Attempt::Done)) {
            self.count(Kind::FastRead);
            return self.check_read(range, begun, &buf);
        }
        if !self.device.is_home(range) {
            self.count(Kind::ReadOfBackup);
        }
        let (result, buf) = self.device.read(range.start(), buf).await;
        match result {
            Ok(()) => self.check_read(range, begun, &buf),
            Err(error) => {
                let world = self.world.borrow();
                let is_damaged =
                    range.units(u64::from(CHUNK_SIZE)).any(|chunk| world.source.is_damaged(chunk));
                drop(world);
                if is_damaged { Ok(()) } else { self.failed("a read", range, &error) }
            }
        }
    }

    fn check_read(&self, range: ByteRange, begun: u64, bytes: &[u8]) -> Result<(), Violation> {
        let mut world = self.world.borrow_mut();
        world.model.tick();
        for (unit, bytes) in range.units(UNIT).zip(bytes.chunks(UNIT as usize)) {
            let unit = unit as usize;
            let value =
                value_of(bytes).ok_or_else(|| format!("unit {unit} is torn: {:02x?}", &bytes[..16]))?;
            if !world.model.may_read(unit, begun, value) {
                let what = world.model.describe(unit);
                return Err(format!("a read begun at {begun} saw {value:#x} in unit {unit}; {what}"));
            }
        }
        Ok(())
    }

    async fn write(&mut self) -> Result<(), Violation> {
        let range = self.range();
        let durability = if self.rng.chance(200) { Durability::Stable } else { Durability::Volatile };
        self.count(Kind::Write);
        if !(range.start() | range.end()).is_multiple_of(SECTOR) {
            self.count(Kind::UnalignedWrite);
        }
        let begun = {
            let model = &mut self.world.borrow_mut().model;
            let value = model.fresh_value();
            model.begin(range, value)
        };
        let bytes = bytes_of(begun.value, range.len());
        if durability == Durability::Volatile
            && matches!(self.device.try_write(range.start(), &bytes), Ok(Attempt::Done))
        {
            self.world.borrow_mut().model.end(begun, Ended::Acknowledged);
            self.count(Kind::FastWrite);
            return Ok(());
        }
        let (result, _) = self.device.write(range.start(), AlignedBuf::from_slice(&bytes), durability).await;
        let how = match (&result, durability) {
            (Err(_), _) => Ended::Perhaps,
            (Ok(()), Durability::Stable) => Ended::Durable,
            (Ok(()), Durability::Volatile) => Ended::Acknowledged,
        };
        self.world.borrow_mut().model.end(begun, how);
        if how == Ended::Durable {
            self.count(Kind::FuaWrite);
        }
        self.may("a write", range, result)
    }

    async fn flush(&mut self) -> Result<(), Violation> {
        let begun = self.world.borrow_mut().model.tick();
        match self.device.flush().await {
            Ok(()) => {
                self.world.borrow_mut().model.flushed(begun);
                self.count(Kind::Flush);
            }
            Err(error) => self.failed("a flush", ByteRange::from_bounds(0, 0), &error)?,
        }
        Ok(())
    }

    async fn trim(&mut self) -> Result<(), Violation> {
        let range = self.range();
        let begun = self.world.borrow_mut().model.begin(range, 0);
        let durability = if self.rng.chance(100) { Durability::Stable } else { Durability::Volatile };
        let result = self.device.trim(range, durability).await;
        self.world.borrow_mut().model.end(begun, Ended::Perhaps);
        self.count(Kind::Trim);
        self.may("a trim", range, result)
    }

    async fn zero(&mut self) -> Result<(), Violation> {
        let range = self.range();
        let begun = self.world.borrow_mut().model.begin(range, 0);
        let durability = if self.rng.chance(200) { Durability::Stable } else { Durability::Volatile };
        let mode = if self.rng.chance(500) { ZeroMode::UNMAP } else { ZeroMode::ALLOCATE };
        let result = self.device.write_zeroes(range, mode, durability).await;
        let how = match (&result, durability) {
            (Err(_), _) => Ended::Perhaps,
            (Ok(()), Durability::Stable) => Ended::Durable,
            (Ok(()), Durability::Volatile) => Ended::Acknowledged,
        };
        self.world.borrow_mut().model.end(begun, how);
        self.count(if mode == ZeroMode::UNMAP { Kind::ZeroUnmap } else { Kind::ZeroAllocate });
        if how == Ended::Durable {
            self.count(Kind::FuaZero);
        }
        self.may("a write of zeroes", range, result)
    }

    async fn prefetch(&mut self) -> Result<(), Violation> {
        let range = self.range();
        let result = self.device.prefetch(range).await;
        self.count(Kind::Prefetch);
        self.may("a prefetch", range, result)
    }

    async fn extents(&mut self) -> Result<(), Violation> {
        let range = self.range();
        let begun = self.world.borrow_mut().model.tick();
        let limit = 1 + self.rng.below(6) as usize;
        self.count(Kind::Extents);
        let extents = match self.device.extents(range, limit).await {
            Ok(extents) => extents,
            Err(error) => return self.failed("extents", range, &error),
        };
        let world = self.world.borrow();
        let mut at = range.start();
        for extent in &extents {
            if extent.range.start() != at || extent.range.is_empty() {
                return Err(format!("extents of {range} have a gap: {extents:?}"));
            }
            at = extent.range.end();
            for unit in extent.range.units(UNIT).filter(|_| extent.state.zero) {
                if !world.model.may_read(unit as usize, begun, 0) {
                    let what = world.model.describe(unit as usize);
                    return Err(format!("unit {unit} is said to be zero: {what}"));
                }
            }
        }
        if extents.is_empty() || extents.len() > limit || at > range.end() {
            return Err(format!("extents of {range}, at most {limit}: {extents:?}"));
        }
        Ok(())
    }

    fn count(&self, kind: Kind) {
        self.world.borrow_mut().tally.count(kind, 1);
    }

    fn may(&self, what: &str, range: ByteRange, result: block::Result<()>) -> Result<(), Violation> {
        match result {
            Err(error) if error.kind() == ErrorKind::Damaged => Ok(()),
            Err(error) => self.failed(what, range, &error),
            Ok(()) => Ok(()),
        }
    }

    fn failed(&self, what: &str, range: ByteRange, error: &block::Error) -> Result<(), Violation> {
        if self.may_fail || self.leaving.get() {
            Ok(())
        } else {
            Err(format!("{what} of {range} failed: {error}"))
        }
    }

    /// A range of whole units: of any alignment, of blocks, or of chunks; often where others are as well.
    fn range(&mut self) -> ByteRange {
        let size = self.world.borrow().disk.size;
        let (grain, most) = *self
            .rng
            .pick(&[
                (UNIT, 8),
                (UNIT, 70),
                (512, 16),
                (BLOCK_SIZE, 6),
                (BLOCK_SIZE, 3),
                (u64::from(CHUNK_SIZE), 3),
            ])
            .expect("not empty");
        let within = if self.rng.chance(500) { 3 * u64::from(CHUNK_SIZE) } else { size };
        let start = self.rng.below(within / grain) * grain;
        let len = (1 + self.rng.below(most)) * grain;
        ByteRange::from_bounds(start, (start + len).min(size))
    }
}
