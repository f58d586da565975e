//! Lives of an agent, one after the other, over one world; each ends as it may.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use block::sim::{Executor, Join, Rng};
use block::{AlignedBuf, BlockDevice};

use super::guest::{Guest, Violation};
use super::model::{UNIT, value_of};
use super::world::{BACKUP, SimSource, World};
use crate::live::device::LiveDevice;
use crate::live::error::{self, ErrorKind};
use crate::live::journal::SessionId;
use crate::live::mistakes::Mistake;
use crate::live::parts::Resumed;
use crate::live::session::Session;
use crate::live::stats::Phase;

/// Polls after which something that must end is taken not to.
const STEP_LIMIT: u64 = 2_000_000;

/// What a run went through.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) steps: u64,
    pub(super) power_cuts: u64,
    pub(super) kills: u64,
    pub(super) poisoned: u64,
    pub(super) parked: u64,
    pub(super) cut_while_resuming: u64,
    pub(super) completed: u64,
}

impl Tally {
    pub(super) const fn add(&mut self, other: Self) {
        self.steps += other.steps;
        self.power_cuts += other.power_cuts;
        self.kills += other.kills;
        self.poisoned += other.poisoned;
        self.parked += other.parked;
        self.cut_while_resuming += other.cut_while_resuming;
        self.completed += other.completed;
    }
}

/// Where a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// So many polls after the session began to be made or resumed; if it is faster, it works on at random.
    Starting(u64),
    /// So many polls after the work began.
    Working(u64),
}

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) place: Place,
    /// By a power cut, not by a kill.
    pub(super) by_power: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    PowerCut,
    Kill,
    /// The agent leaves in order; then perhaps the power goes.
    Park,
}

/// One seed's whole story.
pub(super) struct Story {
    world: Rc<RefCell<World>>,
    rng: Rng,
    waits_for_the_lock: bool,
    pub(super) tally: Tally,
    /// The last life ended by a power cut, so that what is seen is stable.
    after_power_cut: bool,
    /// Only agents died since everything was last seen, so everything acknowledged must be there.
    expects_everything: bool,
    leaving: Rc<Cell<bool>>,
}

struct Work {
    join: Join<Result<(), Violation>>,
    is_done: bool,
}

impl Story {
    pub(super) fn new(seed: u64, mistake: Option<Mistake>, waits_for_the_lock: bool) -> Self {
        let world = World::new(seed, mistake);
        Self {
            world: Rc::new(RefCell::new(world)),
            rng: Rng::new(seed ^ 0xfeed),
            waits_for_the_lock,
            tally: Tally::default(),
            after_power_cut: true,
            expects_everything: false,
            leaving: Rc::default(),
        }
    }

    /// Several lives, the last of which ends with the whole disk home and a power cut.
    pub(super) fn run(&mut self) -> Result<(), Violation> {
        let lives = 2 + self.rng.below(5);
        for _ in 0..lives {
            self.life(None)?;
            if self.rng.chance(150) {
                self.meet_another_snapshot()?;
            }
        }
        self.last_life()
    }

    /// One life, which ends where `cut` says, or at random.
    pub(super) fn life(&mut self, cut: Option<Cut>) -> Result<(), Violation> {
        let mut executor = Executor::new(self.rng.next_u64());
        let end = match cut {
            Some(cut) if cut.by_power => End::PowerCut,
            Some(_) => End::Kill,
            None => *self
                .rng
                .pick(&[End::PowerCut, End::PowerCut, End::Kill, End::Kill, End::Park])
                .expect("some"),
        };
        let patience = match cut {
            Some(Cut { place: Place::Starting(steps), .. }) => steps,
            None if self.rng.chance(150) => self.rng.below(80),
            _ => STEP_LIMIT,
        };
        let Some(session) = self.start(&mut executor, patience)? else {
            self.tally.cut_while_resuming += 1;
            self.end(executor, end, false);
            return Ok(());
        };
        let device = self.device(&session);
        self.look_at_everything(&device)?;
        self.expects_everything = true;
        let may_fail = cut.is_none() && self.rng.chance(600);
        let mut world = self.world.borrow_mut();
        if may_fail {
            world.set_faults();
        } else {
            world.clear_faults();
        }
        world.remember_live_file();
        drop(world);
        let mut work = self.spawn_everybody(&executor, &device, may_fail);
        let most = match cut {
            Some(Cut { place: Place::Working(steps), .. }) => steps,
            _ => self.rng.below(6000),
        };
        for step in 0..most {
            if !executor.step() {
                break;
            }
            self.disturb(step, may_fail);
            if look_at_work(&mut work)? {
                break;
            }
        }
        if end == End::Park && session.phase() != Phase::Poisoned {
            self.park(&mut executor, &device)?;
        }
        let is_poisoned = session.phase() == Phase::Poisoned;
        drop((device, session));
        self.end(executor, end, is_poisoned);
        Ok(())
    }

    /// Resumes and looks at what is left.
    pub(super) fn recover(&mut self) -> Result<(), Violation> {
        let mut executor = Executor::new(self.rng.next_u64());
        let session = self.start(&mut executor, STEP_LIMIT)?.ok_or("the session did not start")?;
        let device = self.device(&session);
        self.look_at_everything(&device)
    }

    fn last_life(&mut self) -> Result<(), Violation> {
        self.world.borrow().repair_source();
        let mut executor = Executor::new(self.rng.next_u64());
        let started = self.start(&mut executor, STEP_LIMIT)?;
        let session = started.ok_or("the last session did not start")?;
        let device = self.device(&session);
        self.look_at_everything(&device)?;
        self.expects_everything = true;
        let mut work = self.spawn_everybody(&executor, &device, false);
        for _ in 0..STEP_LIMIT {
            let is_done = look_at_work(&mut work)?;
            if (is_done && session.phase() == Phase::Complete) || !executor.step() {
                break;
            }
        }
        if session.phase() != Phase::Complete {
            return Err(format!("the restore did not come to its end: {:?}", session.stats()));
        }
        self.after_power_cut = false;
        self.read_everything(&mut executor, &device)?;
        self.look_at_everything(&device)?;
        self.tally.completed += 1;
        drop((device, session));
        self.end(executor, End::PowerCut, false);
        let mut executor = Executor::new(self.rng.next_u64());
        let started = self.start(&mut executor, STEP_LIMIT)?;
        let session = started.ok_or("the complete session did not start")?;
        if session.phase() != Phase::Complete {
            return Err(format!("the session is {:?} after it was complete", session.phase()));
        }
        let device = self.device(&session);
        self.read_everything(&mut executor, &device)?;
        self.look_at_everything(&device)
    }

    /// Makes or resumes the session. `None` where `patience` polls did not suffice.
    fn start(&mut self, executor: &mut Executor, patience: u64) -> Result<Option<Arc<Session>>, Violation> {
        let world = self.world.borrow();
        world.clear_faults();
        let (target, journal) = (world.target.clone(), world.journal.clone());
        let (mistake, target_is_zero) = (world.mistake, world.target_is_zero);
        drop(world);
        let (resume, create) = {
            let mut world = self.world.borrow_mut();
            (world.parts(), world.parts())
        };
        let started = executor.spawn(async move {
            let id = SessionId([7; 16]);
            match Session::resume_with(resume, id, &target, &journal, mistake).await {
                Err(error) if error.kind() == ErrorKind::NotAJournal => {
                    let session = Session::create(create, id, target_is_zero, &target, &journal).await?;
                    Ok((session.making(mistake), Resumed::Parked))
                }
                result => result,
            }
        });
        for _ in 0..patience {
            if let Some(result) = started.take() {
                let (session, resumed) =
                    result.map_err(|error: error::Error| format!("no start: {error}"))?;
                if self.expects_everything && resumed.is_from_journal_alone() {
                    return Err("the live file was not believed after a kill".to_owned());
                }
                self.world.borrow_mut().host_died = false;
                return Ok(Some(session));
            }
            if !executor.step() {
                return Err("the session hangs at its start".to_owned());
            }
            self.disturb(0, false);
        }
        Ok(None)
    }

    fn device(&self, session: &Arc<Session>) -> LiveDevice {
        let world = self.world.borrow();
        let (target, journal) = (Rc::new(world.target.clone()), Rc::new(world.journal.clone()));
        session.device(target, journal).expect("the devices are fit")
    }

    /// Compares what a reader would see of the whole disk with what may be left; what was seen must stay.
    ///
    /// It looks past the engine's reads, which would bring everything home.
    fn look_at_everything(&mut self, device: &LiveDevice) -> Result<(), Violation> {
        let bytes = self.disk_by_map(device);
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
        self.check_guest_bits(device)
    }

    /// Reads the whole disk through the engine.
    fn read_everything(&self, executor: &mut Executor, device: &LiveDevice) -> Result<(), Violation> {
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
        let mut bytes = world.target.view();
        bytes.truncate(world.disk.size as usize);
        for (blocks, is_home) in map.v().runs(0..map.block_count()) {
            if !is_home {
                let range = map.bytes(&blocks);
                let backup = world.source.bytes(range.start()..range.end());
                bytes[range.start() as usize..range.end() as usize].copy_from_slice(backup);
            }
        }
        bytes
    }

    /// A block that differs from the backup is in `G`.
    fn check_guest_bits(&self, device: &LiveDevice) -> Result<(), Violation> {
        let world = self.world.borrow();
        let map = &device.session.map;
        let view = world.target.view();
        for block in 0..map.block_count() {
            let bytes = map.bytes(&(block..block + 1));
            let (start, end) = (bytes.start() as usize, bytes.end() as usize);
            let differs = view[start..end] != *world.source.bytes(bytes.start()..bytes.end());
            if map.v().contains(block) && differs && !map.g().contains(block) {
                return Err(format!("block {block} differs from the backup and is not in the dirty bitmap"));
            }
            if map.p().contains(block) && !map.v().contains(block) {
                return Err(format!("block {block} is stable but not home"));
            }
        }
        if map.home() != map.v().count() {
            return Err(format!("{} blocks are home, {} are counted", map.v().count(), map.home()));
        }
        Ok(())
    }

    fn spawn_everybody(&mut self, executor: &Executor, device: &LiveDevice, may_fail: bool) -> Vec<Work> {
        for _ in 0..self.rng.below(4) + u64::from(!may_fail) {
            executor.spawn(device.clone().fill_worker());
        }
        executor.spawn(device.clone().commit_worker());
        self.leaving = Rc::default();
        (0..1 + self.rng.below(4))
            .map(|_| {
                let guest = Guest {
                    world: Rc::clone(&self.world),
                    device: device.clone(),
                    rng: self.rng.fork(),
                    may_fail,
                    leaving: Rc::clone(&self.leaving),
                };
                Work { join: executor.spawn(guest.work(60)), is_done: false }
            })
            .collect()
    }

    fn disturb(&mut self, step: u64, may_fail: bool) {
        if !self.waits_for_the_lock && self.rng.chance(5) {
            let world = &mut *self.world.borrow_mut();
            world.target.land_one_orphan(&mut world.rng);
        }
        if step % 64 != 63 {
            return;
        }
        let mut world = self.world.borrow_mut();
        if self.rng.chance(30) {
            world.remember_live_file();
        }
        if may_fail && self.rng.chance(60) {
            let is_full = self.rng.chance(300);
            world.target.set_full(is_full);
        }
    }

    fn park(&mut self, executor: &mut Executor, device: &LiveDevice) -> Result<(), Violation> {
        let begun = {
            let mut world = self.world.borrow_mut();
            world.clear_faults();
            world.model.tick()
        };
        self.leaving.set(true);
        let parker = device.clone();
        let parked = executor.spawn(async move { parker.park().await });
        for _ in 0..STEP_LIMIT {
            if let Some(result) = parked.take() {
                if result.is_ok() {
                    self.tally.parked += 1;
                    self.world.borrow_mut().model.flushed(begun);
                } else if device.session.phase() != Phase::Poisoned {
                    return Err(format!("parking failed: {result:?}"));
                }
                return Ok(());
            }
            if !executor.step() {
                return Err("parking hangs".to_owned());
            }
        }
        Err("parking does not end".to_owned())
    }

    fn end(&mut self, executor: Executor, end: End, is_poisoned: bool) {
        self.tally.steps += executor.steps();
        drop(executor);
        let mut world = self.world.borrow_mut();
        let is_cut = match end {
            End::PowerCut => true,
            End::Kill => false,
            End::Park => self.rng.chance(500),
        };
        self.after_power_cut = is_cut;
        self.expects_everything &= !is_cut && !is_poisoned;
        if is_cut {
            self.tally.power_cuts += 1;
            world.power_cut();
        } else {
            self.tally.kills += 1;
            world.killed(self.waits_for_the_lock);
        }
        if is_poisoned {
            self.tally.poisoned += 1;
            world.target.drop_clean_cache();
        }
    }

    /// Somebody restores another snapshot onto this target by mistake: that must be refused.
    fn meet_another_snapshot(&mut self) -> Result<(), Violation> {
        let mut executor = Executor::new(self.rng.next_u64());
        let mut world = self.world.borrow_mut();
        world.clear_faults();
        let mut parts = world.parts();
        let other = Arc::new(SimSource::new(world.disk, &mut world.rng, 5));
        parts.source = Arc::clone(&other) as _;
        parts.identity.snapshot = "vm@earlier/disk0".to_owned();
        let (target, journal, mistake) = (world.target.clone(), world.journal.clone(), world.mistake);
        drop(world);
        let resume = executor.block_on(STEP_LIMIT, {
            let (target, journal) = (target.clone(), journal.clone());
            async move { Session::resume_with(parts, SessionId([7; 16]), &target, &journal, mistake).await }
        });
        let (session, _) = match resume {
            Err(error) if matches!(error.kind(), ErrorKind::Elsewhere | ErrorKind::NotAJournal) => {
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

/// True where every guest has done its work.
fn look_at_work(work: &mut [Work]) -> Result<bool, Violation> {
    for work in work.iter_mut().filter(|work| !work.is_done) {
        if let Some(result) = work.join.take() {
            result?;
            work.is_done = true;
        }
    }
    Ok(work.iter().all(|work| work.is_done))
}
