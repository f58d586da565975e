//! A running agent, as whoever is asked something through its sockets sees it: its disks, and what they share.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use block::{Engine, FileDisk};
use nbd_server::{ListenAddress, Listener, Monitor, TlsServer};
use parking_lot::Mutex;

use super::advice;
use super::fetching::Fetching;
use super::handover::HandedOver;
use super::moved::Served;
use super::record::SessionRecord;
use super::report;
use super::room::{self, Room};
use super::state_dir::StateDir;
use super::stray;
use super::take_over::Heir;
use super::turns::{Busy, Saving, Turns};
use crate::cli::{Failure, Interrupt};
use crate::live::{LiveDisk, Phase, Resumed, Session, StatsSnapshot};
use crate::source::{FetchPool, FetchStats};
use crate::status::Status;
use crate::trace::TraceKeeper;

/// An agent that serves.
pub(crate) struct Service {
    /// By what its disks are read and written.
    pub(crate) engine: Engine,
    /// Sees the connections of its server.
    pub(crate) monitor: Monitor,
    /// TLS of whoever connects to its disks.
    pub(super) tls: Option<TlsServer>,
    /// Where its metrics are to be had.
    pub(super) metrics_url: Option<String>,
    pub(super) interrupt: Interrupt,
    pub(super) disks: Vec<ServedDisk>,
    /// Bytes a second that the background of all disks together may take; 0 is no limit.
    limit: AtomicU64,
    is_ending: AtomicBool,
    /// Where its clients come.
    pub(super) listeners: Vec<Weak<Listener>>,
    /// Another process may take its place.
    pub(super) may_be_succeeded: bool,
    /// Whoever is asked for the agent's place holds this.
    pub(super) succession: Mutex<()>,
    heir: Mutex<Option<Heir>>,
}

/// One of its disks.
pub(crate) struct ServedDisk {
    /// What its session is, as of this start.
    pub(crate) record: SessionRecord,
    /// Where its session is kept.
    pub(crate) state: StateDir,
    /// The target, whatever its path leads to by now.
    pub(super) target: FileDisk,
    /// The session and what opens it on any thread.
    pub(crate) disk: Arc<LiveDisk>,
    /// What fetches; nothing does for a session that does without its repository.
    pub(crate) fetching: Option<Fetching>,
    /// Where it is served, as anybody finds it from anywhere.
    pub(crate) addresses: Vec<ListenAddress>,
    /// Whether clients must use TLS there.
    pub(super) is_secure: bool,
    /// How its session was found; `None` where it is new.
    pub(crate) resumed: Option<Resumed>,
    /// Keeps what guests read while they start, where that is wanted and there is a repository.
    pub(crate) trace: Option<Arc<TraceKeeper>>,
    pub(super) rates: Rates,
    /// Whether guests' writes find room on its target.
    room: Room,
    /// What was told of a target that does not stand at its path.
    told_loss: Mutex<Option<String>>,
    /// Its share of the limit, as it was set last.
    share: AtomicU64,
    /// Nothing is left for its background to do.
    is_idle: AtomicBool,
    pub(super) handover: Handover,
}

/// Moving the machine from a disk's export onto its target.
#[derive(Debug)]
pub(super) struct Handover {
    /// Whoever moves it holds this.
    pub(super) turn: Mutex<()>,
    /// It and saving take turns.
    pub(super) saves: Arc<Turns>,
    /// QEMU may write to the target past us, as the session's record says.
    is_marked: AtomicBool,
    /// It was moved.
    pub(super) done: OnceLock<HandedOver>,
}

/// Bytes a second, lately.
#[derive(Debug, Default)]
pub(super) struct Rates {
    pub(super) home: AtomicU64,
    pub(super) fetched: AtomicU64,
}

impl Service {
    pub(super) fn new(
        interrupt: &Interrupt,
        engine: Engine,
        monitor: Monitor,
        disks: Vec<ServedDisk>,
        limit: u64,
    ) -> Self {
        let service = Self {
            engine,
            monitor,
            tls: None,
            metrics_url: None,
            interrupt: interrupt.clone(),
            disks,
            limit: AtomicU64::new(limit),
            is_ending: AtomicBool::new(false),
            listeners: Vec::new(),
            may_be_succeeded: false,
            succession: Mutex::default(),
            heir: Mutex::default(),
        };
        service.share_limit();
        service
    }

    /// The disks, in the order of their exports.
    pub(crate) fn disks(&self) -> &[ServedDisk] {
        &self.disks
    }

    /// Whether the machine was moved onto all of its targets: nothing is left to be served.
    pub(crate) fn is_handed_over(&self) -> bool {
        self.disks.iter().all(|disk| disk.handed_over().is_some())
    }

    /// How far each of them is.
    pub(crate) fn statuses(&self) -> Vec<Status> {
        self.disks.iter().map(|disk| self.status(disk)).collect()
    }

    /// How far a disk is.
    pub(crate) fn status(&self, disk: &ServedDisk) -> Status {
        self.status_of(disk, &disk.session().stats())
    }

    pub(super) fn status_of(&self, disk: &ServedDisk, stats: &StatsSnapshot) -> Status {
        let mut status = report::status(disk, stats);
        status.limit = Some(self.limit());
        status.connections = Some(self.monitor.stats().connections as u64);
        self.look_at_room(disk);
        if status.waiting.is_none() && disk.room.is_lacking(&disk.record.target, Instant::now()) {
            status.waiting = Some(room::advice(&disk.record.target));
        }
        status.loss = loss(disk, stray::found);
        status.seconds_left = status.expected_seconds(disk.share.load(Ordering::Relaxed));
        status
    }

    /// How far each disk is at the end, when nobody can be asked any more.
    pub(super) fn last_statuses(&self) -> Vec<Status> {
        let at_the_end = |disk: &ServedDisk| Status {
            loss: loss(disk, stray::left),
            uri: None,
            background: None,
            limit: None,
            connections: None,
            ..self.status(disk)
        };
        self.disks.iter().map(at_the_end).collect()
    }

    /// What to say where a disk's target does not stand at its path: whenever that is something else than before.
    pub(super) fn news_of_loss(disk: &ServedDisk) -> Option<String> {
        let loss = loss(disk, stray::found);
        let mut told = disk.told_loss.lock();
        let is_news = *told != loss;
        told.clone_from(&loss);
        loss.filter(|_| is_news)
    }

    fn look_at_room(&self, disk: &ServedDisk) {
        disk.room.look(self.monitor.requests_without_room(&disk.record.disk), Instant::now());
    }

    /// What to say where a guest's write has found no room on a disk's target for the first time in a while: once.
    pub(super) fn news_of_room(&self, disk: &ServedDisk) -> Option<String> {
        self.look_at_room(disk);
        disk.room.take_news().then(|| room::advice(&disk.record.target))
    }

    /// Bytes a second that the background may take, all disks together; 0 is no limit.
    pub(crate) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Changes the limit at once; returns the one before.
    pub(crate) fn set_limit(&self, bytes_per_second: u64) -> u64 {
        let old = self.limit.swap(bytes_per_second, Ordering::Relaxed);
        self.share_limit();
        old
    }

    /// Shares the limit out evenly among the disks that still have something to copy.
    pub(super) fn share_limit(&self) {
        let limit = self.limit();
        let busy = self.disks.iter().filter(|disk| disk.is_busy()).count() as u64;
        let share = share(limit, busy);
        for disk in &self.disks {
            // Setting it forgives what was taken in advance, so it is not set for nothing.
            if disk.share.swap(share, Ordering::Relaxed) != share {
                disk.session().set_limit(share);
            }
        }
    }

    /// Whether it was asked to end, or its server ends by itself: then [`nbd_server::ServerHandle::join`] says why.
    pub(super) fn is_to_end(&self) -> bool {
        self.interrupt.is_raised() || self.monitor.is_ending()
    }

    /// Another process takes its place: it is to end.
    pub(super) fn succeeded_by(&self, heir: Heir) {
        *self.heir.lock() = Some(heir);
    }

    pub(super) fn is_succeeded(&self) -> bool {
        self.heir.lock().is_some()
    }

    /// Who takes its place. It waits until this is dropped.
    pub(super) fn take_heir(&self) -> Option<Heir> {
        self.heir.lock().take()
    }

    /// Begins to end: workers end after the piece in hand, and what the source has not given soon is given up. A guest's client
    /// that reconnects asks for it again.
    pub(super) fn begin_ending(&self) {
        if self.is_ending.swap(true, Ordering::Relaxed) {
            return;
        }
        for disk in &self.disks {
            disk.session().stop_workers();
        }
        let mut pools: Vec<_> = self
            .disks
            .iter()
            .filter_map(|disk| disk.fetching.as_ref())
            .map(|fetching| &fetching.pool)
            .collect();
        // All disks of an agent share one.
        pools.dedup_by(|a, b| Arc::ptr_eq(a, b));
        pools.into_iter().for_each(FetchPool::close_later);
    }

    /// Fails once the agent is about to end: whatever takes long gives up then, in order.
    ///
    /// # Errors
    /// [`crate::cli::Interrupted`] or a [`Failure`].
    pub(crate) fn check_ending(&self) -> anyhow::Result<()> {
        self.interrupt.check()?;
        if self.is_ending.load(Ordering::Relaxed) {
            return Err(Failure::new("the agent is ending", "start it again, then ask again").into());
        }
        Ok(())
    }
}

/// What each of so many disks may take of a limit, in bytes a second; 0 is no limit.
pub(super) fn share(limit: u64, disks: u64) -> u64 {
    if limit == 0 { 0 } else { (limit / disks.max(1)).max(1) }
}

/// Where the target of a disk does not stand at its path: what a machine was moved onto is its own to look after.
fn loss(disk: &ServedDisk, told: fn(BorrowedFd<'_>, &Path) -> Option<String>) -> Option<String> {
    if disk.is_marked() { None } else { told(disk.target.as_fd(), &disk.record.target) }
}

impl ServedDisk {
    pub(super) fn new(
        record: SessionRecord,
        state: StateDir,
        target: FileDisk,
        disk: Arc<LiveDisk>,
        fetching: Option<Fetching>,
        addresses: &[ListenAddress],
        resumed: Option<Resumed>,
    ) -> Self {
        let share = disk.session().stats().limit;
        let handover = Handover {
            turn: Mutex::default(),
            saves: Arc::default(),
            is_marked: AtomicBool::new(record.handed_over),
            done: OnceLock::new(),
        };
        Self {
            record,
            state,
            target,
            disk,
            fetching,
            addresses: addresses.iter().map(advice::from_anywhere).collect(),
            is_secure: false,
            resumed,
            trace: None,
            rates: Rates::default(),
            room: Room::default(),
            told_loss: Mutex::default(),
            share: AtomicU64::new(share),
            is_idle: AtomicBool::new(false),
            handover,
        }
    }

    /// The session.
    pub(crate) fn session(&self) -> &Arc<Session> {
        self.disk.session()
    }

    /// What keeps the boot trace if its time has come. It may wait for the repository: for a thread that may. It has nothing of
    /// the target, so that one that hangs keeps nobody from it.
    pub(super) fn look_at_trace(&self, is_ending: bool) -> impl FnOnce() + Send + use<> {
        let (trace, session) = (self.trace.clone(), Arc::clone(self.session()));
        move || {
            if let Some(trace) = trace {
                trace.look(&session, is_ending);
            }
        }
    }

    /// Where it is served.
    pub(crate) fn uris(&self) -> Vec<String> {
        self.addresses.iter().map(|address| address.uri_over(&self.record.export(), self.is_secure)).collect()
    }

    /// What became of it, once the machine was moved onto the target.
    pub(crate) fn handed_over(&self) -> Option<&HandedOver> {
        self.handover.done.get()
    }

    /// Whether QEMU may write to the target past us.
    pub(crate) fn is_marked(&self) -> bool {
        self.handover.is_marked.load(Ordering::SeqCst)
    }

    /// Notes that the machine is about to be moved, by the QEMU of this monitor; `is_default`: the empty name means this disk's
    /// export. On stable storage when it returns.
    pub(super) fn note_begun(&self, qmp: &Path, is_default: bool) -> anyhow::Result<()> {
        let served = Served { addresses: &self.addresses, is_default };
        super::moved::begin(&self.state, &self.record, qmp, &served)
    }

    /// Forgets that, where the session is not marked: it came to nothing.
    pub(super) fn forget_begun(&self) {
        if !self.is_marked() {
            super::moved::forget(&self.state);
        }
    }

    /// Keeps in the session's record whether QEMU may write to the target past us: on stable storage when it returns.
    pub(super) fn mark(&self, is_marked: bool) -> anyhow::Result<()> {
        super::handover::mark(&self.state, &self.record, is_marked)?;
        self.handover.is_marked.store(is_marked, Ordering::SeqCst);
        Ok(())
    }

    /// Notes that QEMU has said that the machine runs from the target.
    pub(super) fn note_moved(&self, qmp: &Path) {
        super::moved::end(&self.state, &self.record, qmp);
    }

    /// Keeps the machine from being moved off us until this is dropped: for a save.
    ///
    /// # Errors
    /// While it is being moved, and where it was: a [`Failure`].
    pub(crate) fn begin_saving(&self) -> anyhow::Result<Saving> {
        let target = self.record.target.display();
        let saving = self.handover.saves.save().map_err(|busy| match busy {
            Busy::Saving => Failure::new(
                format!("{target} is being saved already, by another `save` or `capture`"),
                "ask again when that has ended; one that was interrupted ends within a few seconds",
            ),
            Busy::Moving => Failure::new(
                format!(
                    "a running machine is just being moved onto {target}: what it writes there, this agent does not see"
                ),
                format!(
                    "ask again in a moment; once it was moved, `lifeboot capture GROUP {target}` takes a snapshot of that \
                     disk, and the others can be saved when this agent has ended"
                ),
            ),
        })?;
        if self.is_marked() {
            let or_not = if self.handed_over().is_some() { "" } else { ", or is about to be" };
            return Err(Failure::new(
                format!(
                    "a running machine was moved onto {target}{or_not}: what it writes there, this agent does not see"
                ),
                format!(
                    "take a snapshot of that disk with `lifeboot capture GROUP {target}`; save the others when this agent has \
                     ended"
                ),
            )
            .into());
        }
        Ok(saving)
    }

    pub(super) fn fetched(&self) -> FetchStats {
        self.fetching.as_ref().map(Fetching::stats).unwrap_or_default()
    }

    pub(super) fn set_idle(&self, is_idle: bool) {
        self.is_idle.store(is_idle, Ordering::Relaxed);
    }

    fn is_busy(&self) -> bool {
        self.session().phase() == Phase::Filling && !self.is_idle.load(Ordering::Relaxed)
    }
}
