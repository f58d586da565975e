//! An agent's service: found, bound, opened, served, and ended, for one disk or for several.
//!
//! # All or nothing
//! Every target's session or disk is found, and every address bound, before anything is made. Then the disks are opened one after
//! another; where one cannot be, what was made for new ones is taken back, and sessions that were resumed are parked again.
//!
//! # Starting it from another verb
//! ```text
//!   let running = start(&order, repository, context, &interrupt)?;    // guests may connect
//!   running.tell(&Until::Told, &mut watcher)?                         // to the end; Running may change threads
//! ```
//! [`Watcher`] is told of ready, progress, complete, and the end, on the thread that called [`Running::tell`], which also answers the
//! control sockets: so nothing in it may block. What takes long (QMP, a child process) belongs to a thread of the watcher's
//! own; [`Watcher::poll`] is called some twenty times a second to look at it, and may end the service. The end is in order:
//! guests' requests finish, what is not complete is parked, and `tell` returns. A `Running` that is dropped untold parks too.

use std::sync::Arc;

use block::Engine;
use nbd_server::{Server, ServerHandle};
use repository::Repository;

use super::bound::{self, Bound};
use super::damage;
use super::fetching::SharedPool;
use super::lease::LeaseKeeper;
use super::open::{self, Found, Opened, Wish};
use super::order::{Order, Wanted};
use super::record::SessionRecord;
use super::scrape::Scraped;
use super::service::{ServedDisk, Service, share};
use super::stamp;
use super::story::{End, Story};
use super::take_over::Heir;
use super::workers;
use crate::cli::{Context, Failure, Interrupt};
use crate::in_use::Claim;
use crate::live::{LiveDisk, Session, SessionOptions};
use crate::source::Fallbacks;
use crate::status::Status;
use crate::trace::TraceKeeper;

pub(crate) use super::story::{Until, Watcher};

/// So many files each disk has open at most, and so many whatever serves them has beside the server.
const FILES_PER_DISK: usize = 6;
const FILES_BESIDE: usize = 12;

/// A service that runs: guests may connect.
pub(crate) struct Running {
    /// Keep others from the targets. They go before the targets' locks, which a successor waits for.
    _claims: Vec<Claim>,
    service: Arc<Service>,
    handle: Option<ServerHandle>,
    metrics: Option<Scraped>,
    /// Keeps the snapshots that are needed; nothing does without the repository.
    _leases: Option<LeaseKeeper>,
}

/// How a service ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Why.
    pub(crate) end: End,
    /// How far each disk was.
    pub(crate) statuses: Vec<Status>,
    /// Who takes our place: it goes on when this is dropped, with all else gone before.
    _heir: Option<Heir>,
}

/// Starts to serve what was ordered.
///
/// # Errors
/// Where a disk cannot be found, claimed or opened, or an address cannot be had. Then nothing is left of it.
pub(crate) fn start(
    order: &Order,
    repository: repository::Result<Repository>,
    context: &Context,
    interrupt: &Interrupt,
) -> anyhow::Result<Running> {
    let warn = |what| context.output().warn(what);
    let needed = order.snapshots_needed();
    let lacks =
        |repository: &Repository| needed.iter().try_for_each(|spec| repository.resolve(spec).map(drop));
    let (repository, fallbacks) = Fallbacks::beside(repository, &order.fallbacks, lacks, warn)?;
    let mut wanted = order.assign(&repository)?;
    wanted.retain(|wanted| !order.handed_over.contains(&wanted.target));
    // Before anything is made, or anybody told to end.
    Server::check_open_files(shards(), FILES_BESIDE + FILES_PER_DISK * wanted.len())?;
    // One that is taken over holds them.
    let claims = if order.takes_over { Vec::new() } else { bound::claim_all(order, &wanted)? };
    let pool = SharedPool::new(order.pool, &fallbacks);
    let options = SessionOptions {
        // Until it is known which disks have anything to copy.
        limit: share(order.options.limit, wanted.len() as u64),
        ..order.options
    };
    let wishes: Vec<Wish<'_>> = wanted
        .iter()
        .map(|wanted| Wish {
            repository: &repository,
            fallbacks: &fallbacks,
            spec: &wanted.spec,
            target: &wanted.target,
            force: order.force,
            moved: order.moved,
            takes_over: order.takes_over,
            engine: order.engine,
            pool: &pool,
            is_settled: order.drive.is_some(),
            options,
            uses_trace: order.uses_trace,
        })
        .collect();
    let found = wishes.iter().zip(&wanted).map(|(wish, wanted)| open::find(wish, &wanted.state));
    let found = found.collect::<anyhow::Result<Vec<_>>>()?;
    let mut bound = Bound::wait_for(order, &wanted, &found, context, interrupt)?;
    bound.claims.extend(claims);
    let opened = open_all(found, &wanted, order.engine, interrupt);
    let opened = opened.inspect_err(|_| {
        if bound.has_taken_over {
            context
                .output()
                .warn("the agent before has ended: nobody serves until this command is run again");
        }
    })?;
    drop(wishes);
    serve(order, opened, wanted, bound, repository.ok(), interrupt)
}

fn shards() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The last step of [`start`].
fn serve(
    order: &Order,
    opened: Vec<Opened>,
    wanted: Vec<Wanted>,
    bound: Bound,
    repository: Option<Repository>,
    interrupt: &Interrupt,
) -> anyhow::Result<Running> {
    let engine = order.engine;
    let disks: Vec<Arc<LiveDisk>> = opened.iter().map(live_disk).collect();
    for ((opened, wanted), (disk, export)) in opened.iter().zip(&wanted).zip(disks.iter().zip(&bound.exports))
    {
        damage::recall(&opened.session, &wanted.state, &opened.record);
        export.put(Arc::clone(disk), opened.record.epoch);
    }
    // Where it fails, sessions that are new are taken back.
    let handle = match bound.server.on_shard_start(workers::of(&disks)).run(shards(), engine) {
        Ok(handle) => handle,
        Err(error) => {
            give_back(&opened, &wanted, engine);
            return Err(error.into());
        }
    };
    let traced = repository.as_ref().filter(|_| order.uses_trace);
    let served = opened.into_iter().zip(wanted).zip(disks).map(|((opened, wanted), disk)| {
        let Opened { record, target, fetching, resumed, made, .. } = opened;
        if let Some(made) = made {
            made.keep();
        }
        let trace = traced
            .and_then(|repository| trace_keeper(repository, &record, disk.session(), resumed.is_some()));
        let addresses = handle.addresses();
        let mut served = ServedDisk::new(record, wanted.state, target, disk, fetching, addresses, resumed);
        served.trace = trace.map(Arc::new);
        served.is_secure = order.server.access.tls_is_required;
        served
    });
    let served: Vec<ServedDisk> = served.collect();
    let leases = repository.as_ref().map(|repository| LeaseKeeper::start(repository, &served)).transpose();
    let leases = leases.unwrap_or_else(|error| {
        tracing::warn!(error = format_args!("{error:#}"), "the repository is not told what is needed of it");
        None
    });
    let mut service = Service::new(interrupt, engine, handle.monitor(), served, order.options.limit);
    service.listeners = handle.listeners().iter().map(Arc::downgrade).collect();
    service.may_be_succeeded = order.may_be_succeeded;
    service.tls = order.server.tls.clone();
    service.metrics_url = bound.metrics.as_ref().map(Scraped::url);
    let service = Arc::new(service);
    Ok(Running {
        service,
        handle: Some(handle),
        metrics: bound.metrics,
        _leases: leases,
        _claims: bound.claims,
    })
}

impl Running {
    /// Tells how it goes and answers whoever asks, until it ends; then parks what is not complete.
    ///
    /// # Errors
    /// Where a disk was poisoned, or could not be parked: it is named. What the watcher says.
    pub(crate) fn tell(mut self, until: Until, watcher: &mut dyn Watcher) -> anyhow::Result<Ended> {
        let service = Arc::clone(&self.service);
        let mut story = Story::new(&service, until);
        let told = story.tell(watcher, self.metrics.take());
        let parked = self.stop();
        self.keep_traces();
        for disk in self.service.disks() {
            disk.rates.home.store(0, std::sync::atomic::Ordering::Relaxed);
            disk.rates.fetched.store(0, std::sync::atomic::Ordering::Relaxed);
        }
        let statuses = self.service.last_statuses();
        story.keep_damage(&statuses);
        let end = told?;
        parked?;
        Ok(Ended { end, statuses, _heir: service.take_heir() })
    }

    /// Keeps what the guests read while they started. By now everything of theirs is safe, so a repository that does not answer
    /// holds up the end only for a moment.
    fn keep_traces(&self) {
        let looks: Vec<_> = self.service.disks().iter().map(|disk| disk.look_at_trace(true)).collect();
        crate::trace::look_for_the_last_time(move || looks.into_iter().for_each(|look| look()));
    }

    /// Ends the server, and parks every disk that can be parked.
    fn stop(&mut self) -> anyhow::Result<()> {
        let Some(handle) = self.handle.take() else { return Ok(()) };
        self.service.begin_ending();
        handle.shutdown();
        let mut result = handle.join().map_err(anyhow::Error::from);
        for disk in self.service.disks() {
            let parked = park(&disk.disk, self.service.engine);
            match parked {
                Ok(()) => {
                    stamp::keep(&disk.state, &disk.record);
                    // Whoever takes its place serves it on.
                    if !self.service.is_succeeded() {
                        forget_pointer_if_home(disk.session(), &disk.record);
                    }
                }
                // The first that failed is the one to look after.
                Err(error) => result = result.and_then(|()| Err(poisoned(&disk.record, error).into())),
            }
        }
        result
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(error = format_args!("{error:#}"), "the service ended badly");
        }
    }
}

/// Records what the guests of a disk read while they start.
fn trace_keeper(
    repository: &Repository,
    record: &SessionRecord,
    session: &Session,
    is_resumed: bool,
) -> Option<TraceKeeper> {
    let (snapshot, disk) = (record.snapshot.parse().ok()?, record.disk.parse().ok()?);
    let data_chunks = session.data_chunks();
    Some(TraceKeeper::new(repository.clone(), &snapshot, disk, record.layout(), data_chunks, is_resumed))
}

/// Opens the disks one after another: all of them, or none.
fn open_all(
    found: Vec<Found<'_>>,
    wanted: &[Wanted],
    engine: Engine,
    interrupt: &Interrupt,
) -> anyhow::Result<Vec<Opened>> {
    let mut opened = Vec::new();
    for found in found {
        match found.open(interrupt) {
            Ok(one) => opened.push(one),
            Err(error) => {
                give_back(&opened, wanted, engine);
                return Err(error);
            }
        }
    }
    Ok(opened)
}

/// Parks sessions that were resumed; those that are new are taken back when they are dropped.
fn give_back(opened: &[Opened], wanted: &[Wanted], engine: Engine) {
    for (opened, wanted) in opened.iter().zip(wanted).filter(|(opened, _)| opened.resumed.is_some()) {
        match park(&live_disk(opened), engine) {
            Ok(()) => {
                stamp::keep(&wanted.state, &opened.record);
                forget_pointer_if_home(&opened.session, &opened.record);
            }
            // It is found as after a kill: nothing is lost.
            Err(error) => tracing::warn!(
                error = format_args!("{error:#}"),
                target = %opened.record.target.display(),
                "a session could not be parked"
            ),
        }
    }
}

/// All of the disk is home, and nobody serves it any more: whoever takes the target for a disk is right, and needs no session.
fn forget_pointer_if_home(session: &Session, record: &SessionRecord) {
    if session.is_all_stable() {
        open::forget_pointer(record);
    }
}

fn live_disk(opened: &Opened) -> Arc<LiveDisk> {
    Arc::new(LiveDisk::new(
        Arc::clone(&opened.session),
        Arc::new(opened.target.clone()),
        Arc::new(opened.journal.clone()),
    ))
}

fn park(disk: &LiveDisk, engine: Engine) -> anyhow::Result<()> {
    engine.run(async { anyhow::Ok(disk.device()?.park().await?) })
}

fn poisoned(record: &SessionRecord, error: anyhow::Error) -> Failure {
    Failure::new(
        format!("the target {} could not be brought onto stable storage", record.target.display()),
        "look after its storage, then run the same command: it goes on from what is known to be stable",
    )
    .because(error)
}
