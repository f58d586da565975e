//! Lives of an agent, one after the other, over one world; each ends as it may.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use block::ByteRange;
use block::sim::{Executor, Join, Rng};

use super::guest::{Guest, Violation};
use super::saver::{Saver, Shown};
use super::start::Start;
use super::tally::{Kind, Tally};
use super::world::World;
use crate::live::device::LiveDevice;
use crate::live::mistakes::{Making, Mistake, forget_late};
use crate::live::session::Session;
use crate::live::stats::Phase;

/// Polls after which something that must end is taken not to.
pub(super) const STEP_LIMIT: u64 = 2_000_000;

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

/// In the middle of what a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum During {
    Anything,
    Start,
    Flush,
    Checkpoint,
    Completion,
    Parking,
}

/// One seed's whole story. A mistake is made on this thread as long as it lives.
pub(super) struct Story {
    pub(super) world: Rc<RefCell<World>>,
    pub(super) rng: Rng,
    waits_for_the_lock: bool,
    /// The last life ended by a power cut, so that what is seen is stable.
    pub(super) after_power_cut: bool,
    /// Only agents died since everything was last seen, so everything acknowledged must be there.
    pub(super) expects_everything: bool,
    /// `P` at the end of the last life: it stays.
    pub(super) stable: Vec<u64>,
    leaving: Rc<Cell<bool>>,
    /// What a view of the session showed before it was started.
    pub(super) at_rest: Option<Shown>,
    /// The last start failed: what it wrote and did not sync is in memory, clean or not.
    failed_at_start: bool,
    _making: Making,
}

struct Work {
    join: Join<Result<(), Violation>>,
    is_done: bool,
}

impl Story {
    pub(super) fn new(seed: u64, mistake: Option<Mistake>, waits_for_the_lock: bool) -> Self {
        let story = Self {
            world: Rc::new(RefCell::new(World::new(seed, mistake))),
            rng: Rng::new(seed ^ 0xfeed),
            waits_for_the_lock,
            after_power_cut: true,
            expects_everything: false,
            stable: Vec::new(),
            leaving: Rc::default(),
            at_rest: None,
            failed_at_start: false,
            _making: Making::new(mistake),
        };
        story.count(Kind::Story);
        story
    }

    /// Several lives, the last of which ends with the whole disk home and a power cut.
    pub(super) fn run(&mut self) -> Result<(), Violation> {
        let lives = 2 + self.rng.below(5);
        for _ in 0..lives {
            self.life(None)?;
            if self.rng.chance(150) {
                self.meet_another_snapshot()?;
            }
            if self.rng.chance(40) {
                self.world.borrow_mut().lose_live_file();
                self.expects_everything = false;
            }
        }
        self.last_life()
    }

    /// What happened, up to now.
    pub(super) fn take_tally(&self) -> Tally {
        self.world.borrow_mut().take_tally()
    }

    pub(super) fn count(&self, kind: Kind) {
        self.world.borrow_mut().tally.count(kind, 1);
    }

    /// One life, which ends where `cut` says, or at random.
    pub(super) fn life(&mut self, cut: Option<Cut>) -> Result<(), Violation> {
        self.count(Kind::Life);
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
            None if std::mem::take(&mut self.failed_at_start) => self.rng.below(40),
            None if self.rng.chance(200) => self.rng.below(80),
            _ => STEP_LIMIT,
        };
        let fails_at_start = cut.is_none() && self.rng.chance(120);
        if cut.is_none() && patience == STEP_LIMIT && !fails_at_start && self.rng.chance(200) {
            self.at_rest = self.look_at_rest()?;
        }
        let session = match self.start(&mut executor, patience, fails_at_start)? {
            Start::Served(session) => session,
            Start::CutOff => {
                self.end(executor, end, During::Start, None);
                return Ok(());
            }
            Start::Failed => {
                self.failed_at_start = true;
                self.end(executor, end, During::Anything, None);
                return Ok(());
            }
        };
        let devices = self.devices(&session);
        self.look_at_everything(&devices[0])?;
        self.expects_everything = true;
        let may_fail = cut.is_none() && self.rng.chance(600);
        {
            let world = &mut *self.world.borrow_mut();
            if may_fail {
                world.set_faults();
            }
            world.remember_live_file();
        }
        let during = match cut {
            None if end != End::Park => *self
                .rng
                .pick(&[During::Anything, During::Flush, During::Checkpoint, During::Completion])
                .expect("some"),
            _ => During::Anything,
        };
        let mut work = self.spawn_everybody(&executor, &devices, may_fail, during);
        let most = match cut {
            Some(Cut { place: Place::Working(steps), .. }) => steps,
            _ => self.rng.below(6000),
        };
        let is_during = self.work(&mut executor, &mut work, &session, (most, during), may_fail)?;
        let mut during = if is_during { during } else { During::Anything };
        if end == End::Park && session.phase() != Phase::Poisoned {
            during = self.park(&mut executor, &devices[0], may_fail)?;
        }
        drop(devices);
        self.end(executor, end, during, Some(session));
        Ok(())
    }

    /// Resumes and looks at what is left.
    pub(super) fn recover(&mut self) -> Result<(), Violation> {
        let mut executor = Executor::new(self.rng.next_u64());
        let session = self.certain_start(&mut executor)?;
        let device = self.device(&session);
        self.look_at_everything(&device)
    }

    fn certain_start(&mut self, executor: &mut Executor) -> Result<Arc<Session>, Violation> {
        match self.start(executor, STEP_LIMIT, false)? {
            Start::Served(session) => Ok(session),
            Start::CutOff | Start::Failed => Err("the session did not start".to_owned()),
        }
    }

    fn last_life(&mut self) -> Result<(), Violation> {
        self.world.borrow().repair_source();
        let mut executor = Executor::new(self.rng.next_u64());
        let session = self.certain_start(&mut executor)?;
        let devices = self.devices(&session);
        self.look_at_everything(&devices[0])?;
        self.expects_everything = true;
        let mut work = self.spawn_everybody(&executor, &devices, false, During::Completion);
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
        self.read_everything(&mut executor, &devices[0])?;
        self.look_at_everything(&devices[0])?;
        self.count(Kind::Completed);
        drop(devices);
        self.end(executor, End::PowerCut, During::Anything, Some(session));
        let mut executor = Executor::new(self.rng.next_u64());
        let session = self.certain_start(&mut executor)?;
        if session.phase() != Phase::Complete {
            return Err(format!("the session is {:?} after it was complete", session.phase()));
        }
        let device = self.device(&session);
        self.read_everything(&mut executor, &device)?;
        self.look_at_everything(&device)
    }

    /// The handles of some shards.
    fn devices(&mut self, session: &Arc<Session>) -> Vec<LiveDevice> {
        let shards = 1 + self.rng.below(3);
        if shards > 1 {
            self.count(Kind::SeveralShards);
        }
        (0..shards).map(|_| self.device(session)).collect()
    }

    fn spawn_everybody(
        &mut self,
        executor: &Executor,
        devices: &[LiveDevice],
        may_fail: bool,
        during: During,
    ) -> Vec<Work> {
        let needed = u64::from(!may_fail || during == During::Completion);
        let workers = self.rng.below(4) + needed;
        if workers == 0 {
            self.count(Kind::NoFillWorker);
        }
        for _ in 0..workers {
            let device = self.rng.pick(devices).expect("a shard");
            executor.spawn(device.clone().fill_worker());
        }
        executor.spawn(devices[0].clone().commit_worker());
        self.leaving = Rc::default();
        let guests = 1 + self.rng.below(4);
        if guests > 1 {
            self.count(Kind::SeveralConnections);
        }
        let saver = self.rng.chance(250).then(|| Saver {
            world: Rc::clone(&self.world),
            device: self.rng.pick(devices).expect("a shard").clone(),
            rng: self.rng.fork(),
            may_fail,
            leaving: Rc::clone(&self.leaving),
        });
        let saver = saver.map(|saver| Work { join: executor.spawn(saver.work()), is_done: false });
        (0..guests)
            .map(|_| {
                let guest = Guest {
                    world: Rc::clone(&self.world),
                    device: self.rng.pick(devices).expect("a shard").clone(),
                    rng: self.rng.fork(),
                    may_fail,
                    leaving: Rc::clone(&self.leaving),
                };
                Work { join: executor.spawn(guest.work(60)), is_done: false }
            })
            .chain(saver)
            .collect()
    }

    /// Lets everybody work, for so many polls at most, or until some while after it came to what the life
    /// ends in the middle of. True where it did.
    fn work(
        &mut self,
        executor: &mut Executor,
        work: &mut [Work],
        session: &Session,
        (most, during): (u64, During),
        may_fail: bool,
    ) -> Result<bool, Violation> {
        let mut left = None;
        for step in 0..most {
            if left == Some(0) || !executor.step() {
                break;
            }
            self.disturb(step, may_fail);
            left = match left {
                Some(left) => Some(left - 1),
                None if during != During::Anything && self.is_under_way(during, session) => {
                    Some(self.rng.below(12))
                }
                None => None,
            };
            if look_at_work(work)? {
                break;
            }
        }
        Ok(left.is_some() && self.is_under_way(during, session))
    }

    fn is_under_way(&self, during: During, session: &Session) -> bool {
        let world = self.world.borrow();
        let layout = world.journal_layout();
        let in_log = || world.journal.under_way(ByteRange::from_bounds(layout.log_at(), layout.len_bytes()));
        let flushes = || {
            let of_target = world.target.under_way(ByteRange::from_bounds(0, 0)).syncs;
            let log = in_log();
            of_target + log.writes + log.syncs > 0
        };
        match during {
            During::Anything | During::Start | During::Parking => true,
            During::Flush => flushes(),
            During::Checkpoint => {
                let places = ByteRange::from_bounds(layout.slot_at(0), layout.log_at());
                world.journal.under_way(places).writes > 0
            }
            During::Completion => session.phase() == Phase::Filling && session.map.is_all_home() && flushes(),
        }
    }

    pub(super) fn disturb(&mut self, step: u64, may_fail: bool) {
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
            world.tally.count(Kind::TargetFull, u64::from(is_full));
        }
        if may_fail && self.rng.chance(30) {
            world.repair_source();
        }
    }

    /// Parks the session, or ends in the middle of it.
    fn park(
        &mut self,
        executor: &mut Executor,
        device: &LiveDevice,
        may_fail: bool,
    ) -> Result<During, Violation> {
        let goes_on_failing = may_fail && self.rng.chance(250);
        let patience = if self.rng.chance(300) { self.rng.below(100) } else { STEP_LIMIT };
        let begun = {
            let mut world = self.world.borrow_mut();
            if !goes_on_failing {
                world.clear_faults();
            }
            world.model.tick()
        };
        self.leaving.set(true);
        let parker = device.clone();
        let parked = executor.spawn(async move { parker.park().await });
        for _ in 0..patience {
            if let Some(result) = parked.take() {
                if result.is_ok() {
                    let everywhere = ByteRange::from_bounds(0, u64::MAX);
                    if self.world.borrow().target.under_way(everywhere).writes > 0 {
                        return Err("the target is being changed after parking".to_owned());
                    }
                    self.count(Kind::Parking);
                    self.world.borrow_mut().model.flushed(begun);
                } else if device.session.phase() != Phase::Poisoned {
                    return Err(format!("parking failed: {result:?}"));
                }
                return Ok(During::Anything);
            }
            if !executor.step() {
                return Err("parking hangs".to_owned());
            }
        }
        if patience == STEP_LIMIT { Err("parking does not end".to_owned()) } else { Ok(During::Parking) }
    }

    fn end(&mut self, executor: Executor, end: End, during: During, session: Option<Arc<Session>>) {
        let is_poisoned = session.as_ref().is_some_and(|session| session.phase() == Phase::Poisoned);
        let was_served = session.is_some();
        if let Some(session) = &session {
            let p = session.map.p();
            self.stable = (0..p.word_count()).map(|word| p.word(word)).collect();
        }
        let world = &mut *self.world.borrow_mut();
        world.tally.count(Kind::Step, executor.steps());
        drop((session, executor));
        forget_late();
        let is_cut = match end {
            End::PowerCut => true,
            End::Kill => false,
            End::Park => self.rng.chance(500),
        };
        self.after_power_cut = is_cut;
        self.expects_everything &= !is_cut && !is_poisoned;
        let in_the_middle = match during {
            During::Anything if end == End::Park => Some((Kind::PowerCutAfterParking, Kind::Kill)),
            During::Anything => None,
            During::Start => Some((Kind::PowerCutInStart, Kind::KillInStart)),
            During::Flush => Some((Kind::PowerCutInFlush, Kind::KillInFlush)),
            During::Checkpoint => Some((Kind::PowerCutInCheckpoint, Kind::KillInCheckpoint)),
            During::Completion => Some((Kind::PowerCutInCompletion, Kind::KillInCompletion)),
            During::Parking => Some((Kind::PowerCutInParking, Kind::KillInParking)),
        };
        if let Some((by_cut, by_kill)) = in_the_middle {
            world.tally.count(if is_cut { by_cut } else { by_kill }, 1);
        }
        if is_cut {
            world.tally.count(Kind::PowerCut, 1);
            world.power_cut();
        } else {
            world.tally.count(Kind::Kill, 1);
            world.killed(self.waits_for_the_lock);
        }
        if !was_served {
            world.was_not_started();
        }
        if is_poisoned {
            world.tally.count(Kind::Poisoned, 1);
            world.was_poisoned();
        }
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
