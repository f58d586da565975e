//! The simulated disk as a [`BlockDevice`]: each operation takes some polls, may fail, and may be cut off.

use std::rc::Rc;

use super::disk::{NewBytes, SimDisk};
use super::yield_now;
use crate::{
    AlignedBuf, Attempt, BLOCK_SIZE, BlockDevice, ByteRange, DeviceFuture, Durability, Error, ErrorKind,
    Extent, ExtentState, Geometry, OpenDevice, Result, ZeroMode,
};

impl OpenDevice for SimDisk {
    fn open(&self) -> Result<Rc<dyn BlockDevice>> {
        Ok(Rc::new(self.clone()))
    }
}

impl SimDisk {
    fn check(&self, offset: u64, len: u64) -> Result<ByteRange> {
        let size = self.0.lock().options.size;
        ByteRange::new(offset, len).filter(|range| range.fits(size)).ok_or_else(|| {
            Error::new(ErrorKind::InvalidRange, format_args!("{len} bytes at {offset} of {size}"))
        })
    }

    /// Takes a random number of polls; `step` runs in each. Fails where the power was cut meanwhile.
    async fn wait(&self, epoch: u64, mut step: impl FnMut(&Self)) -> Result<()> {
        let polls = {
            let mut contents = self.0.lock();
            let most = u64::from(contents.options.max_delay);
            contents.rng.below(most + 1)
        };
        for _ in 0..polls {
            yield_now().await;
            self.still(epoch)?;
            step(self);
        }
        self.still(epoch)
    }

    fn still(&self, epoch: u64) -> Result<()> {
        if self.0.lock().epoch == epoch {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Shutdown, "the simulated power was cut"))
    }

    async fn change(&self, range: ByteRange, what: NewBytes, durability: Durability) -> Result<()> {
        let (epoch, change, fault) = {
            let mut contents = self.0.lock();
            let faults = contents.options.faults;
            let fault = if contents.full || contents.rng.chance(faults.no_space) {
                Some(ErrorKind::NoSpace)
            } else if contents.rng.chance(faults.write) {
                Some(ErrorKind::Io)
            } else {
                None
            };
            (contents.epoch, contents.begin(range, what), fault)
        };
        let mut guard = InFlight { disk: self, change: Some(change) };
        let outcome = self.wait(epoch, |disk| disk.0.lock().progress(change)).await;
        guard.change = None;
        outcome?;
        let mut contents = self.0.lock();
        if let Some(kind) = fault {
            contents.abandon(change);
            match kind {
                ErrorKind::NoSpace => contents.stats.no_space += 1,
                _ => contents.stats.failed_writes += 1,
            }
            return Err(Error::new(kind, format_args!("writing {range}: simulated")));
        }
        contents.finish(change, durability == Durability::Stable);
        Ok(())
    }
}

/// Leaves the change in flight where its future is dropped before its end.
struct InFlight<'a> {
    disk: &'a SimDisk,
    change: Option<u64>,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if let Some(change) = self.change {
            self.disk.0.lock().orphan(change);
        }
    }
}

/// A sync that is under way.
struct Syncing<'a> {
    disk: &'a SimDisk,
    epoch: u64,
}

impl Drop for Syncing<'_> {
    fn drop(&mut self) {
        let mut contents = self.disk.0.lock();
        if contents.epoch == self.epoch {
            contents.syncing -= 1;
        }
    }
}

impl BlockDevice for SimDisk {
    fn geometry(&self) -> Geometry {
        let options = self.0.lock().options;
        Geometry {
            size: options.size,
            minimum_io: options.minimum_io,
            preferred_io: BLOCK_SIZE as u32,
            read_only: false,
            can_trim: true,
            fast_zero: true,
            shared_flush: true,
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<Attempt> {
        self.check(offset, buf.len() as u64)?;
        let mut contents = self.0.lock();
        if !contents.options.fast_paths || contents.options.faults.read > 0 || contents.rng.chance(500) {
            return Ok(Attempt::WouldWait);
        }
        contents.stats.reads += 1;
        contents.read(offset, buf);
        Ok(Attempt::Done)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<Attempt> {
        let range = self.check(offset, data.len() as u64)?;
        let mut contents = self.0.lock();
        let faults = contents.options.faults;
        let may_fail = contents.full || faults.write > 0 || faults.no_space > 0;
        if !contents.options.fast_paths || may_fail || contents.rng.chance(300) {
            return Ok(Attempt::WouldWait);
        }
        let change = contents.begin(range, NewBytes::Given(data.to_vec()));
        if contents.rng.chance(200) {
            contents.progress(change);
            contents.abandon(change);
            return Ok(Attempt::WouldWait);
        }
        contents.finish(change, false);
        Ok(Attempt::Done)
    }

    fn read(&self, offset: u64, mut buf: AlignedBuf) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(async move {
            let range = match self.check(offset, buf.len() as u64) {
                Ok(range) => range,
                Err(error) => return (Err(error), buf),
            };
            let (epoch, fails) = {
                let mut contents = self.0.lock();
                contents.stats.reads += 1;
                let faults = contents.options.faults;
                (contents.epoch, contents.rng.chance(faults.read))
            };
            if let Err(error) = self.wait(epoch, |_| ()).await {
                return (Err(error), buf);
            }
            if fails {
                buf.fill(0xee);
                self.0.lock().stats.failed_reads += 1;
                return (Err(Error::new(ErrorKind::Io, format_args!("reading {range}: simulated"))), buf);
            }
            self.0.lock().read(offset, &mut buf);
            (Ok(()), buf)
        })
    }

    fn write(
        &self,
        offset: u64,
        buf: AlignedBuf,
        durability: Durability,
    ) -> DeviceFuture<'_, (Result<()>, AlignedBuf)> {
        Box::pin(async move {
            let result = match self.check(offset, buf.len() as u64) {
                Ok(range) => self.change(range, NewBytes::Given(buf.to_vec()), durability).await,
                Err(error) => Err(error),
            };
            (result, buf)
        })
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        _mode: ZeroMode,
        durability: Durability,
    ) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(range.start(), range.len())?;
            self.change(range, NewBytes::Zero, durability).await
        })
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(range.start(), range.len())?;
            self.change(range, NewBytes::Forgotten, durability).await
        })
    }

    fn flush(&self) -> DeviceFuture<'_, Result<()>> {
        Box::pin(async move {
            let (epoch, before, fails) = {
                let mut contents = self.0.lock();
                let faults = contents.options.faults;
                contents.syncing += 1;
                (contents.epoch, contents.sync_point(), contents.rng.chance(faults.sync))
            };
            let syncing = Syncing { disk: self, epoch };
            self.wait(epoch, |_| ()).await?;
            drop(syncing);
            let mut contents = self.0.lock();
            if fails {
                contents.fail_sync(before);
                return Err(Error::new(ErrorKind::Io, "syncing: simulated"));
            }
            contents.sync(before);
            Ok(())
        })
    }

    fn extents(&self, range: ByteRange, limit: usize) -> DeviceFuture<'_, Result<Vec<Extent>>> {
        Box::pin(async move {
            self.check(range.start(), range.len())?;
            let contents = self.0.lock();
            let mut extents: Vec<Extent> = Vec::new();
            for (_, part) in range.split(BLOCK_SIZE) {
                let zero = contents.is_zero(part);
                let state = ExtentState { hole: zero, zero, depth: 1, dirty: false };
                let count = extents.len();
                match extents.last_mut() {
                    Some(last) if last.state == state => {
                        last.range = ByteRange::from_bounds(last.range.start(), part.end());
                    }
                    _ if count == limit => break,
                    _ => extents.push(Extent { range: part, state }),
                }
            }
            Ok(extents)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Executor, Faults, Rng, SECTOR, SimOptions};
    use super::*;

    const SIZE: u64 = 64 * 1024;

    fn write_all(executor: &mut Executor, disk: &SimDisk, byte: u8) {
        let disk = disk.clone();
        executor.block_on(1000, async move {
            let buf = AlignedBuf::from_slice(&[byte; SIZE as usize]);
            disk.write(0, buf, Durability::Volatile).await.0.unwrap();
        });
    }

    fn flush(executor: &mut Executor, disk: &SimDisk) -> Result<()> {
        let disk = disk.clone();
        executor.block_on(1000, async move { disk.flush().await })
    }

    #[test]
    fn a_power_cut_keeps_what_was_synced_and_loses_or_tears_some_of_the_rest() {
        let (mut lost, mut kept, mut torn) = (0, 0, 0);
        for seed in 0..60 {
            let mut executor = Executor::new(seed);
            let disk = SimDisk::new(SimOptions::new(SIZE, seed));
            write_all(&mut executor, &disk, 1);
            flush(&mut executor, &disk).unwrap();
            write_all(&mut executor, &disk, 2);
            disk.power_cut(&mut Rng::new(seed));
            let view = disk.view();
            assert!(view.iter().all(|&byte| byte == 1 || byte == 2), "seed {seed}");
            match view.iter().filter(|&&byte| byte == 2).count() as u64 {
                0 => lost += 1,
                SIZE => kept += 1,
                _ => torn += 1,
            }
        }
        assert!(lost > 0 && kept > 0 && torn > 0, "lost {lost}, kept {kept}, torn {torn}");
    }

    #[test]
    fn a_retried_sync_succeeds_and_has_lost_data() {
        let mut lost = 0;
        for seed in 0..20 {
            let mut executor = Executor::new(seed);
            let disk = SimDisk::new(SimOptions::new(SIZE, seed));
            write_all(&mut executor, &disk, 1);
            disk.set_faults(Faults { sync: 1000, ..Faults::default() });
            flush(&mut executor, &disk).unwrap_err();
            disk.set_faults(Faults::default());
            flush(&mut executor, &disk).unwrap();
            disk.power_cut(&mut Rng::new(seed));
            lost += usize::from(disk.view().contains(&0));
        }
        assert!(lost > 0);
    }

    #[test]
    fn a_write_whose_future_was_dropped_may_land_until_it_is_drained() {
        let (mut landed, mut not) = (0, 0);
        for seed in 0..60 {
            let disk = SimDisk::new(SimOptions { max_delay: 1000, ..SimOptions::new(SIZE, seed) });
            let mut executor = Executor::new(seed);
            let writer = disk.clone();
            executor.spawn(async move {
                let buf = AlignedBuf::from_slice(&[1; SECTOR as usize]);
                writer.write(0, buf, Durability::Volatile).await.0
            });
            executor.run(1);
            drop(executor);
            let before = disk.view();
            disk.drain(&mut Rng::new(seed));
            if disk.view() == before {
                not += 1;
            } else {
                landed += 1;
            }
            assert!(!disk.land_one_orphan(&mut Rng::new(seed)), "nothing is in flight after a drain");
        }
        assert!(landed > 0 && not > 0, "landed {landed}, not {not}");
    }

    #[test]
    fn a_stable_write_survives_a_power_cut() {
        for seed in 0..20 {
            let mut executor = Executor::new(seed);
            let disk = SimDisk::new(SimOptions::new(SIZE, seed));
            let writer = disk.clone();
            executor.block_on(1000, async move {
                let buf = AlignedBuf::from_slice(&[9; 5000]);
                writer.write(1000, buf, Durability::Stable).await.0.unwrap();
            });
            disk.power_cut(&mut Rng::new(seed));
            assert!(disk.view()[1000..6000].iter().all(|&byte| byte == 9), "seed {seed}");
        }
    }

    #[test]
    fn what_lies_outside_is_refused() {
        let disk = SimDisk::new(SimOptions::new(SIZE, 0));
        let error = disk.check(SIZE - 1, 2).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidRange);
        assert!(disk.check(u64::MAX, 2).is_err());
    }
}
