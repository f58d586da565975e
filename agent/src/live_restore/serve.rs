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
use std::time::{Duration, Instant};

use block::{Engine, OpenDevice};
use nbd_server::{Export, ExportNames, Server, ServerHandle, ShardContext, ShardTask};
use repository::Repository;

use super::damage;
use super::fetching::SharedPool;
use super::late::LateExport;
use super::lease::LeaseKeeper;
use super::open::{self, Found, Opened, Wish};
use super::order::{Order, Wanted};
use super::record::SessionRecord;
use super::scrape::Scraped;
use super::service::{ServedDisk, Service, share};
use super::stamp;
use super::story::{End, Story};
use super::take_over::{self, Heir};
use super::target_lock;
use crate::cli::{Context, Failure, Interrupt};
use crate::in_use::Claim;
use crate::live::{LiveDisk, Session, SessionOptions};
use crate::source::Fallbacks;
use crate::status::Status;
use crate::trace::TraceKeeper;

pub(crate) use super::story::{Until, Watcher};

/// Fills in flight on each shard at most, of all disks together: how many there are is up to what keeps the source busy.
const FILLS_PER_SHARD: usize = 32;
/// Each disk has at least so many of them.
const LEAST_FILLS: usize = 8;

/// How long after it has its addresses a start has locked its targets, in general.
const OTHERS_START: Duration = Duration::from_millis(500);

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
    let claims = if order.takes_over { Vec::new() } else { claim_all(order, &wanted)? };
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
    let exports: Vec<_> = found.iter().map(|found| Arc::new(LateExport::of(&found.names().1))).collect();
    let begun = Instant::now();
    let mut bound = loop {
        match bind(order, &wanted, (&found, &exports), context, interrupt) {
            // Somebody else has the place, and is not done with taking it.
            Err(error)
                if order.takes_over
                    && is_address_in_use(&error)
                    && begun.elapsed() < take_over::PATIENCE_WITH_OTHERS =>
            {
                interrupt.check()?;
                std::thread::sleep(take_over::LOOK_INTERVAL);
            }
            bound => break bound.map_err(|error| in_use_rather_than(error, &wanted, interrupt))?,
        }
    };
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

/// Has the addresses: those of an agent whose place is taken, who has ended then, or its own.
fn bind(
    order: &Order,
    wanted: &[Wanted],
    (found, late): (&[Found<'_>], &[Arc<LateExport>]),
    context: &Context,
    interrupt: &Interrupt,
) -> anyhow::Result<Bound> {
    let place = if order.takes_over {
        take_over::place(wanted, &order.listen, &order.server, order.engine, interrupt)?
    } else {
        None
    };
    let exports = nbd_exports(found, late);
    let bind_metrics =
        || order.metrics.as_ref().map(|address| Scraped::bind(address, &order.server.access)).transpose();
    let Some((predecessor, listeners)) = place else {
        let claims = if order.takes_over { claim_all(order, wanted)? } else { Vec::new() };
        let server = Server::bind(&order.listen, exports, order.server.clone())?;
        let metrics = bind_metrics()?;
        return Ok(Bound { server, exports: late.to_vec(), metrics, claims, has_taken_over: false });
    };
    let server = Server::listening(listeners, exports, order.server.clone())?;
    for found in found {
        found.look_ahead().inspect_err(|_| {
            context.output().warn(format_args!(
                "the agent with the process id {} goes on: its place cannot be taken like this",
                predecessor.pid()
            ));
        })?;
    }
    tracing::info!(pid = predecessor.pid(), "taking the place of the agent that serves");
    predecessor.end()?;
    server.own_listeners()?;
    let claims = claim_all(order, wanted)?;
    // Guests wait: they are not to wait for a scraper's address.
    let metrics = bind_metrics().unwrap_or_else(|error| {
        context.output().warn(format_args!("no metrics: {error:#}"));
        None
    });
    Ok(Bound { server, exports: late.to_vec(), metrics, claims, has_taken_over: true })
}

/// That another lifeboot has one of the targets, where that is why an address is in use: the same command, given twice.
fn in_use_rather_than(error: anyhow::Error, wanted: &[Wanted], interrupt: &Interrupt) -> anyhow::Error {
    if !is_address_in_use(&error) {
        return error;
    }
    let begun = Instant::now();
    loop {
        let used = |wanted: &Wanted| target_lock::in_use_by_another(&wanted.target, wanted.state.path());
        if let Some(used) = wanted.iter().find_map(used) {
            return used;
        }
        if begun.elapsed() >= OTHERS_START || interrupt.is_raised() {
            return error;
        }
        std::thread::sleep(take_over::LOOK_INTERVAL);
    }
}

fn is_address_in_use(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<nbd_server::Error>()
        .is_some_and(|error| error.kind() == nbd_server::ErrorKind::AddressInUse)
}

/// Keeps others from all of these targets.
fn claim_all(order: &Order, wanted: &[Wanted]) -> anyhow::Result<Vec<Claim>> {
    let claims = wanted.iter().map(|wanted| claim(wanted, order.drive.is_some()));
    claims.filter_map(Result::transpose).collect()
}

/// What was had before anything was made: who listens, where its disks are put in, and what keeps others away.
struct Bound {
    server: Server,
    exports: Vec<Arc<LateExport>>,
    metrics: Option<Scraped>,
    claims: Vec<Claim>,
    has_taken_over: bool,
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
    let handle = match bound.server.on_shard_start(workers(&disks)).run(shards(), engine) {
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
        let statuses: Vec<Status> = self
            .service
            .statuses()
            .into_iter()
            .map(|status| Status { uri: None, background: None, limit: None, connections: None, ..status })
            .collect();
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

/// Keeps others from a target until the session ends. An agent that serves it already is named. A QEMU that is being moved
/// onto it may have locked it; whether one is was looked at where `is_settled`.
fn claim(wanted: &Wanted, is_settled: bool) -> anyhow::Result<Option<Claim>> {
    let error = match crate::in_use::claim(&wanted.target) {
        Ok(claim) => return Ok(Some(claim)),
        Err(error) => error,
    };
    let dir = wanted.state.path();
    if let Ok(Some(record)) = wanted.state.record() {
        if is_settled && record.handed_over {
            return Ok(None);
        }
        wanted.state.check_stands_alone(&record, &wanted.target)?;
        record.check_not_handed_over(&wanted.state)?;
    }
    Err(target_lock::in_use_by_another(&wanted.target, dir).unwrap_or(error))
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

/// Exports of sessions that are still to be opened: whoever connects waits.
fn nbd_exports(found: &[Found<'_>], exports: &[Arc<LateExport>]) -> Vec<Export> {
    let exports = found.iter().zip(exports).map(|(found, late)| {
        let (snapshot, name) = found.names();
        let mut export = Export::new(name.clone(), Arc::clone(late) as Arc<dyn OpenDevice>);
        export.names = Some(Arc::clone(late) as Arc<dyn ExportNames>);
        export.description = format!("live restore of {snapshot}/{name}");
        export.dirty_bitmap = Some(super::DIRTY_BITMAP.to_owned());
        export
    });
    exports.collect()
}

fn poisoned(record: &SessionRecord, error: anyhow::Error) -> Failure {
    Failure::new(
        format!("the target {} could not be brought onto stable storage", record.target.display()),
        "look after its storage, then run the same command: it goes on from what is known to be stable",
    )
    .because(error)
}

/// What each shard runs beside its connections: fills, and on one shard for each disk the commits.
fn workers(disks: &[Arc<LiveDisk>]) -> ShardTask {
    let disks = disks.to_vec();
    Arc::new(move |shard| {
        let disks = disks.clone();
        Box::pin(run_workers(shard, disks))
    })
}

async fn run_workers(shard: ShardContext, disks: Vec<Arc<LiveDisk>>) {
    let fills = (FILLS_PER_SHARD / disks.len().max(1)).max(LEAST_FILLS);
    let mut tasks = tokio::task::JoinSet::new();
    for disk in &disks {
        let device = match disk.device() {
            Ok(device) => device,
            Err(error) => {
                tracing::error!(%error, "a shard cannot open a target: it copies nothing home");
                continue;
            }
        };
        for _ in 0..fills {
            tasks.spawn_local(device.clone().fill_worker());
        }
        if shard.index() == 0 {
            tasks.spawn_local(device.clone().commit_worker());
        }
    }
    shard.stopping().await;
    for disk in &disks {
        disk.session().stop_workers();
    }
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a worker of a session failed");
        }
    }
}
