//! How a life begins: the session is made or resumed, and everything is compared with what it may hold.

use std::rc::Rc;
use std::sync::Arc;

use block::sim::Executor;
use block::{AlignedBuf, BlockDevice};

use super::guest::Violation;
use super::model::{UNIT, value_of};
use super::source::SimSource;
use super::story::{STEP_LIMIT, Story};
use super::tally::Kind;
use super::world::{BACKUP, CHUNK_SIZE};
use crate::live::device::LiveDevice;
use crate::live::error::{self, ErrorKind};
use crate::live::journal::SessionId;
use crate::live::parts::{Resumed, SessionParts};
use crate::live::session::Session;

pub(super) const ID: SessionId = SessionId([7; 16]);

/// What became of a start.
pub(super) enum Start {
    Served(Arc<Session>),
    /// It was not given the time to end.
    CutOff,
    /// A device failed, and so did the start.
    Failed,
}

impl Story {
    /// Makes or resumes the session, within `patience` polls. Devices fail meanwhile where `may_fail`.
    pub(super) fn start(
        &mut self,
        executor: &mut Executor,
        patience: u64,
        may_fail: bool,
    ) -> Result<Start, Violation> {
        let mut world = self.world.borrow_mut();
        world.clear_faults();
        if may_fail {
            world.set_start_faults();
        }
        let (target, journal) = (world.target.clone(), world.journal.clone());
        let target_is_zero = world.target_is_zero;
        let (parts, was_begun) = (world.parts(), world.was_begun());
        drop(world);
        let started = executor.spawn(async move {
            if was_begun {
                let resumed = Session::resume(parts, ID, &target, &journal).await;
                return resumed.map(|(session, resumed)| (session, Some(resumed)));
            }
            // What a start left behind that was cut short, or failed, is not gone on with: the journal is made anew.
            journal.poke(0, &[0; 4096]);
            Session::create(parts, ID, target_is_zero, &target, &journal).await.map(|session| (session, None))
        });
        for _ in 0..patience {
            if let Some(result) = started.take() {
                return self.started(result, may_fail);
            }
            if !executor.step() {
                return Err("the session hangs at its start".to_owned());
            }
            self.disturb(0, false);
        }
        Ok(Start::CutOff)
    }

    fn started(
        &mut self,
        result: error::Result<(Arc<Session>, Option<Resumed>)>,
        may_fail: bool,
    ) -> Result<Start, Violation> {
        let (session, resumed) = match result {
            Err(error) if may_fail && matches!(error.kind(), ErrorKind::Device(_)) => {
                self.count(Kind::FailedStart);
                return Ok(Start::Failed);
            }
            Err(error) => return Err(format!("no start: {error}")),
            Ok(started) => started,
        };
        if self.expects_everything && resumed.is_none_or(Resumed::is_from_journal_alone) {
            return Err(format!("the live file was not believed after a kill: {resumed:?}"));
        }
        self.count(match resumed {
            None => Kind::Created,
            Some(Resumed::Parked) => Kind::ResumedParked,
            Some(Resumed::AgentDied) => Kind::ResumedAgentDied,
            Some(Resumed::HostDied) => Kind::ResumedHostDied,
            Some(Resumed::SyncFailed) => Kind::ResumedSyncFailed,
            Some(Resumed::LiveFileLost) => Kind::ResumedLiveFileLost,
        });
        let world = &mut *self.world.borrow_mut();
        world.clear_faults();
        world.is_served();
        Ok(Start::Served(session))
    }

    /// A shard's handle of the session.
    pub(super) fn device(&self, session: &Arc<Session>) -> LiveDevice {
        let world = self.world.borrow();
        let (target, journal) = (Rc::new(world.target.clone()), Rc::new(world.journal.clone()));
        session.device(target, journal).expect("the devices are fit")
    }

    /// Compares what a reader would see of the whole disk with what may be left; what was seen must stay.
    ///
    /// It looks past the engine's reads, which would bring everything home.
    pub(super) fn look_at_everything(&mut self, device: &LiveDevice) -> Result<(), Violation> {
        let bytes = self.disk_by_map(device);
        if let Some(shown) = self.at_rest.take() {
            let chunks = bytes.chunks(CHUNK_SIZE as usize).zip(shown.bytes.chunks(CHUNK_SIZE as usize));
            let differs = |(chunk, (found, shown_then)): (u64, (&[u8], &[u8]))| {
                (found != shown_then && !shown.damaged.contains(&chunk)).then_some(chunk)
            };
            if let Some(chunk) = (0..).zip(chunks).find_map(differs) {
                return Err(format!("chunk {chunk} is not what a view of the session at rest showed"));
            }
        }
        let mut world = self.world.borrow_mut();
        let now = world.model.tick();
        for (unit, bytes) in bytes.chunks(UNIT as usize).enumerate() {
            let value = value_of(bytes).ok_or_else(|| format!("unit {unit} is torn after recovery"))?;
            let may_be = if self.expects_everything {
                world.model.may_read(unit, now, value)
            } else {
                world.model.may_be_left(unit, value)
            };
            if !may_be {
                let (what, everything) = (world.model.describe(unit), self.expects_everything);
                return Err(format!(
                    "unit {unit} holds {value:#x} after a recovery (of everything: {everything}); {what}"
                ));
            }
            world.model.saw(unit, value, self.after_power_cut);
        }
        drop(world);
        self.check_bits(device, &bytes)
    }

    /// Reads the whole disk through the engine.
    pub(super) fn read_everything(
        &self,
        executor: &mut Executor,
        device: &LiveDevice,
    ) -> Result<(), Violation> {
        self.world.borrow().clear_faults();
        let (size, reader) = (self.world.borrow().disk.size, device.clone());
        let (result, bytes) = executor
            .block_on(STEP_LIMIT, async move { reader.read(0, AlignedBuf::zeroed(size as usize)).await });
        result.map_err(|error| format!("reading everything failed: {error}"))?;
        let is_the_same = bytes[..] == self.disk_by_map(device)[..];
        is_the_same.then_some(()).ok_or_else(|| "a read differs from what the map says".to_owned())
    }

    /// The disk's bytes: each block from the target where it is home, else from the backup.
    fn disk_by_map(&self, device: &LiveDevice) -> Vec<u8> {
        let world = self.world.borrow();
        let map = &device.session.map;
        let mut bytes = world.target.with_view(|view| view[..world.disk.size as usize].to_vec());
        for (blocks, is_home) in map.v().runs(0..map.block_count()) {
            if !is_home {
                let range = map.bytes(&blocks);
                let backup = world.source.bytes(range.start()..range.end());
                bytes[range.start() as usize..range.end() as usize].copy_from_slice(backup);
            }
        }
        bytes
    }

    /// A block that differs from the backup is in `G`; what was stable still is; what is stable is home.
    fn check_bits(&self, device: &LiveDevice, bytes: &[u8]) -> Result<(), Violation> {
        let world = self.world.borrow();
        let map = &device.session.map;
        for block in 0..map.block_count() {
            let range = map.bytes(&(block..block + 1));
            let (start, end) = (range.start() as usize, range.end() as usize);
            let differs = bytes[start..end] != *world.source.bytes(range.start()..range.end());
            if differs && !map.g().contains(block) {
                return Err(format!("block {block} differs from the backup and is not in the dirty bitmap"));
            }
            if map.p().contains(block) && !map.v().contains(block) {
                return Err(format!("block {block} is stable but not home"));
            }
        }
        for (word, &stable) in self.stable.iter().enumerate() {
            let lost = stable & !map.p().word(word);
            if lost != 0 {
                return Err(format!("blocks were called stable and are not: {lost:#x} of word {word}"));
            }
        }
        if map.home() != map.v().count() {
            return Err(format!("{} blocks are home, {} are counted", map.v().count(), map.home()));
        }
        Ok(())
    }

    /// Somebody restores another snapshot onto this target by mistake: that must be refused.
    pub(super) fn meet_another_snapshot(&mut self) -> Result<(), Violation> {
        let mut executor = Executor::new(self.rng.next_u64());
        let mut world = self.world.borrow_mut();
        world.clear_faults();
        let parts = world.parts();
        let other = Arc::new(SimSource::new(world.disk, &mut world.rng, 5, true));
        let (target, journal) = (world.target.clone(), world.journal.clone());
        drop(world);
        let mut identity = parts.identity.clone();
        identity.snapshot = "vm@earlier/disk0".to_owned();
        let parts = SessionParts { source: Arc::clone(&other) as _, identity, ..parts };
        let resume = executor.block_on(STEP_LIMIT, {
            let (target, journal) = (target.clone(), journal.clone());
            async move { Session::resume(parts, ID, &target, &journal).await }
        });
        let (session, _) = match resume {
            Err(error) if matches!(error.kind(), ErrorKind::Elsewhere | ErrorKind::NotAJournal) => {
                self.count(Kind::AnotherSnapshotRefused);
                return Ok(());
            }
            Err(error) => return Err(format!("another snapshot was refused for a wrong reason: {error}")),
            Ok(resumed) => resumed,
        };
        let device = session.device(Rc::new(target), Rc::new(journal)).expect("the devices are fit");
        let size = session.map.disk().size;
        let (result, bytes) = executor
            .block_on(STEP_LIMIT, async move { device.read(0, AlignedBuf::zeroed(size as usize)).await });
        if result.is_err() {
            return Ok(());
        }
        for (unit, bytes) in bytes.chunks(UNIT as usize).enumerate() {
            let value = value_of(bytes).ok_or_else(|| format!("unit {unit} is torn"))?;
            if value & BACKUP != 0 && value != other.value(unit as u64) {
                return Err(format!("unit {unit} of another snapshot was served"));
            }
        }
        Ok(())
    }
}
