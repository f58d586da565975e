//! What happens while a service runs: who is told what, and when it ends.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::Notify;

use super::control::{Control, Tasks};
use super::damage::DamageKeeper;
use super::report::RateMeter;
use super::scrape::Scraped;
use super::service::{ServedDisk, Service};
use crate::live::{Phase, Session, StatsSnapshot};
use crate::status::Status;

/// How often signals and connections are looked at.
const TICK: Duration = Duration::from_millis(50);
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is looked whether guests have settled.
const TRACE_INTERVAL: Duration = Duration::from_secs(2);

/// How long a service goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// Until it is told to end.
    Told,
    /// Until every disk is home, or all of it but what is damaged, and no client is connected.
    Done,
}

/// Why a service ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It was told to.
    Parked,
    /// Another agent takes its place.
    TakenOver,
    /// Every disk is home.
    Complete,
    /// All is home but what is damaged.
    Settled,
    /// A sync of a disk failed.
    Poisoned,
}

/// Who is told how a service goes. Nothing in it may block: see [`super::serve`].
pub(crate) trait Watcher {
    /// Guests may connect.
    ///
    /// # Errors
    /// What is to end the service at once.
    fn ready(&mut self, service: &Arc<Service>) -> anyhow::Result<()>;

    /// How far each disk is, about once a second until all are home.
    fn progress(&mut self, statuses: &[Status]);

    /// A disk is home, and on stable storage; the statuses are those of all.
    fn disk_complete(&mut self, disk: usize, statuses: &[Status]);

    /// All disks are.
    fn complete(&mut self, statuses: &[Status]);

    /// Looks at what else the watcher waits for; breaks to end the service, in order.
    fn poll(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// The story of one service.
pub(super) struct Story<'a> {
    service: &'a Arc<Service>,
    until: Until,
    disks: Vec<Chapter<'a>>,
    told_at: Instant,
}

/// What was told of one disk.
struct Chapter<'a> {
    served: &'a ServedDisk,
    home: RateMeter,
    fetched: RateMeter,
    keeper: DamageKeeper<'a>,
    is_complete: bool,
    is_settled: bool,
}

impl<'a> Story<'a> {
    pub(super) fn new(service: &'a Arc<Service>, until: Until) -> Self {
        let disks = service.disks().iter().map(Chapter::new).collect();
        Self { service, until, disks, told_at: Instant::now() }
    }

    /// Tells it to its end.
    pub(super) fn tell(
        &mut self,
        watcher: &mut dyn Watcher,
        metrics: Option<Scraped>,
    ) -> anyhow::Result<End> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the control's event loop")?;
        let inside = runtime.enter();
        let controls = self.service.disks().iter().map(|disk| Control::listen(disk.state.path()));
        let controls = controls.collect::<std::io::Result<Vec<_>>>();
        drop(inside);
        let controls = controls.context("cannot listen for `lifeboot status`")?;
        watcher.ready(self.service)?;
        let end = runtime.block_on(async {
            let tasks = Tasks::new();
            let asked: Vec<_> = controls
                .into_iter()
                .enumerate()
                .map(|(disk, control)| {
                    tokio::spawn(control.serve(Arc::clone(self.service), disk, tasks.clone()))
                })
                .collect();
            if let Some(metrics) = metrics {
                let service = Arc::clone(self.service);
                tokio::spawn(async move {
                    if let Err(error) = metrics.serve(service).await {
                        tracing::error!(%error, "metrics cannot be served");
                    }
                });
            }
            let end = self.watch(watcher).await;
            self.service.begin_ending();
            asked.iter().for_each(tokio::task::JoinHandle::abort);
            tasks.ended().await;
            end
        });
        // What is left waits for a repository that does not answer.
        runtime.shutdown_background();
        Ok(end)
    }

    /// Keeps what is damaged for when no agent runs.
    pub(super) fn keep_damage(&mut self, statuses: &[Status]) {
        for (chapter, status) in self.disks.iter_mut().zip(statuses) {
            chapter.keeper.keep(status);
        }
    }

    async fn watch(&mut self, watcher: &mut dyn Watcher) -> End {
        let changed = Arc::new(Notify::new());
        for disk in self.service.disks() {
            tokio::spawn(tell_changes(Arc::clone(disk.session()), Arc::clone(&changed)));
        }
        let mut ticks = tokio::time::interval(TICK);
        let mut is_complete = false;
        let mut looked_at = Instant::now();
        let mut sought_at = looked_at;
        let mut looking: Option<tokio::task::JoinHandle<()>> = None;
        loop {
            tokio::select! {
                () = changed.notified() => {}
                _ = ticks.tick() => {}
            }
            if self.service.is_succeeded() {
                return End::TakenOver;
            }
            if self.service.is_to_end() || watcher.poll().is_break() {
                return End::Parked;
            }
            if self.disks.iter().any(|chapter| chapter.phase() == Phase::Poisoned) {
                return End::Poisoned;
            }
            for disk in 0..self.disks.len() {
                if !self.disks[disk].is_complete && self.disks[disk].phase() == Phase::Complete {
                    self.disks[disk].completed();
                    self.service.share_limit();
                    let statuses = self.service.statuses();
                    self.keep_damage(&statuses);
                    watcher.disk_complete(disk, &statuses);
                }
            }
            if !is_complete && self.disks.iter().all(|chapter| chapter.is_complete) {
                is_complete = true;
                watcher.complete(&self.service.statuses());
            }
            for disk in self.service.disks() {
                // Until all is home it is told with the progress.
                if let Some(why) = self.service.news_of_room(disk).filter(|_| is_complete) {
                    tracing::warn!("{why}");
                }
            }
            let now = Instant::now();
            if now.duration_since(sought_at) >= PROGRESS_INTERVAL {
                sought_at = now;
                let news = self.service.disks().iter().filter_map(Service::news_of_loss);
                news.for_each(|why| tracing::warn!("{why}"));
            }
            // One at a time, or they would queue up for a repository that does not answer.
            let is_looking = looking.as_ref().is_some_and(|looking| !looking.is_finished());
            if now.duration_since(looked_at) >= TRACE_INTERVAL && !is_looking {
                looked_at = now;
                let looks: Vec<_> =
                    self.service.disks().iter().map(|disk| disk.look_at_trace(false)).collect();
                looking = Some(tokio::task::spawn_blocking(|| looks.into_iter().for_each(|look| look())));
            }
            if !is_complete && now.duration_since(self.told_at) >= PROGRESS_INTERVAL {
                self.told_at = now;
                self.progress(now, watcher);
            }
            if self.until == Until::Done
                && self.disks.iter().all(|chapter| chapter.is_complete || chapter.is_settled)
                && self.service.monitor.stats().connections == 0
            {
                return if is_complete { End::Complete } else { End::Settled };
            }
        }
    }

    fn progress(&mut self, now: Instant, watcher: &mut dyn Watcher) {
        let mut statuses = Vec::new();
        for chapter in &mut self.disks {
            let stats = chapter.served.session().stats();
            chapter.sample(now, &stats);
            let status = self.service.status_of(chapter.served, &stats);
            chapter.keeper.keep(&status);
            statuses.push(status);
        }
        self.service.share_limit();
        watcher.progress(&statuses);
    }
}

impl<'a> Chapter<'a> {
    fn new(served: &'a ServedDisk) -> Self {
        let mut chapter = Self {
            served,
            home: RateMeter::default(),
            fetched: RateMeter::default(),
            keeper: DamageKeeper::new(&served.state),
            is_complete: false,
            is_settled: false,
        };
        chapter.sample(Instant::now(), &served.session().stats());
        chapter
    }

    fn phase(&self) -> Phase {
        self.served.session().phase()
    }

    fn sample(&mut self, now: Instant, stats: &StatsSnapshot) {
        let (home, fetched) = (stats.home_bytes, self.served.fetched().stored_bytes);
        let rates = &self.served.rates;
        let home = if self.is_complete { 0 } else { self.home.sample(now, home) };
        rates.home.store(home, Ordering::Relaxed);
        rates.fetched.store(self.fetched.sample(now, fetched), Ordering::Relaxed);
        self.is_settled = stats.is_settled();
        self.served.set_idle(self.is_settled);
    }

    fn completed(&mut self) {
        self.is_complete = true;
        self.served.rates.home.store(0, Ordering::Relaxed);
        self.served.rates.fetched.store(0, Ordering::Relaxed);
    }
}

/// Wakes whoever watches when a session changes its phase.
async fn tell_changes(session: Arc<Session>, changed: Arc<Notify>) {
    let mut phase = session.phase();
    while matches!(phase, Phase::Filling | Phase::Complete) {
        session.has_left(phase).await;
        phase = session.phase();
        changed.notify_one();
    }
}
