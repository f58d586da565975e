//! Serves a session until it is told to end, and says how it goes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use block::{Engine, OpenDevice};
use nbd_server::{Export, LateRequests, ListenAddress, Server, ServerHandle, ServerOptions, ShardTask};
use repository::Repository;

use super::advice;
use super::control::{Control, Tasks};
use super::damage::{self, DamageKeeper};
use super::late::LateDisk;
use super::open::{Found, Opened};
use super::record::SessionRecord;
use super::report::{Event, RateMeter};
use super::service::{ServedDisk, Service};
use super::state_dir::StateDir;
use crate::cli::{Context, Failure, Interrupt, Outcome};
use crate::live::{LiveDisk, Phase, Resumed};
use crate::output::{Progress, human_size};
use crate::status::Status;

/// How often signals and connections are looked at.
const TICK: Duration = Duration::from_millis(50);
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Fills in flight on each shard.
const FILLS_PER_SHARD: usize = 8;

/// How a session is served.
pub(super) struct Plan {
    /// The addresses, bound.
    pub(super) server: Server,
    /// Its export's disk, still to be put in.
    pub(super) late: Arc<LateDisk>,
    pub(super) exit_when_done: bool,
    pub(super) engine: Engine,
    pub(super) state: StateDir,
    pub(super) repository: Option<Repository>,
}

/// Serves until a signal, a failure, or, if that is wanted, completion.
pub(super) fn serve(
    opened: Opened,
    plan: Plan,
    context: &Context,
    interrupt: &Interrupt,
) -> anyhow::Result<Outcome> {
    let disk = Arc::new(LiveDisk::new(
        Arc::clone(&opened.session),
        Arc::new(opened.target.clone()),
        Arc::new(opened.journal.clone()),
    ));
    let Plan { server, late, exit_when_done, engine, state, repository } = plan;
    damage::recall(&opened.session, &state, &opened.record);
    let shards = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    late.put(Arc::clone(&disk));
    // Where it fails, a session that is new is taken back.
    let handle = server.on_shard_start(workers(&disk)).run(shards, engine)?;
    let Opened { record, pool, resumed, made, .. } = opened;
    if let Some(made) = made {
        made.keep();
    }
    let served = ServedDisk {
        record,
        state,
        disk,
        pool,
        addresses: handle.addresses().to_vec(),
        rate: AtomicU64::new(0),
    };
    let service = Arc::new(Service {
        context: context.clone(),
        engine,
        repository,
        interrupt: interrupt.clone(),
        disks: vec![served],
        is_ending: AtomicBool::new(false),
    });
    let served = &service.disks[0];
    let story = Story { context, service: &service, served, handle: &handle, exit_when_done };
    let mut keeper = DamageKeeper::new(&served.state);
    let told = story.tell(resumed, &mut keeper);
    handle.shutdown();
    handle.join()?;
    let parked = engine.run(async { anyhow::Ok(served.disk.device()?.park().await?) });
    let end = told?;
    served.rate.store(0, Ordering::Relaxed);
    let status = Status { uri: None, ..served.status() };
    keeper.keep(&status);
    parked.map_err(|error| poisoned(&served.record, error))?;
    let output = context.output();
    match end {
        End::Parked => {
            output.event(&Event::Parked(&status))?;
            output
                .line(format_args!("parked at {:.1} % home; the same command goes on", status.percent()))?;
        }
        End::Settled => {
            output.event(&Event::Settled(&status))?;
            output.line(format_args!(
                "settled: all is home but {} that cannot be had; the same command asks for that again",
                human_size(status.damaged_bytes)
            ))?;
        }
        End::Complete | End::Poisoned => {}
    }
    Ok(status.conclude(output))
}

/// Listens for a session that is still to be opened: whoever connects waits.
pub(super) fn bind(
    found: &Found<'_>,
    disk: &Arc<LateDisk>,
    listen: &[ListenAddress],
) -> nbd_server::Result<Server> {
    let (snapshot, name) = found.names();
    let mut export = Export::new(name.clone(), Arc::clone(disk) as Arc<dyn OpenDevice>);
    export.description = format!("live restore of {snapshot}/{name}");
    export.dirty_bitmap = Some(super::DIRTY_BITMAP.to_owned());
    // A guest's client reconnects and asks again: it must not hear of our end.
    let options = ServerOptions { late_requests: LateRequests::Leave, ..ServerOptions::default() };
    Server::bind(listen, vec![export], options)
}

fn poisoned(record: &SessionRecord, error: anyhow::Error) -> Failure {
    Failure::new(
        format!("the target {} could not be brought onto stable storage", record.target.display()),
        "look after its storage, then run the same command: it goes on from what is known to be stable",
    )
    .because(error)
}

/// What each shard runs beside its connections: fills, and on the first one the commits.
fn workers(disk: &Arc<LiveDisk>) -> ShardTask {
    let disk = Arc::clone(disk);
    Arc::new(move |shard| {
        let disk = Arc::clone(&disk);
        Box::pin(async move {
            let device = match disk.device() {
                Ok(device) => device,
                Err(error) => {
                    tracing::error!(%error, "a shard cannot open the target: it copies nothing home");
                    return;
                }
            };
            let mut tasks = tokio::task::JoinSet::new();
            for _ in 0..FILLS_PER_SHARD {
                tasks.spawn_local(device.clone().fill_worker());
            }
            if shard.index() == 0 {
                tasks.spawn_local(device.clone().commit_worker());
            }
            shard.stopping().await;
            disk.session().stop_workers();
            while let Some(ended) = tasks.join_next().await {
                if let Err(error) = ended {
                    tracing::error!(%error, "a worker of the session failed");
                }
            }
        })
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Parked,
    Complete,
    /// All is home but what is damaged.
    Settled,
    Poisoned,
}

/// What is said while the session is served.
struct Story<'a> {
    context: &'a Context,
    service: &'a Arc<Service>,
    served: &'a ServedDisk,
    handle: &'a ServerHandle,
    exit_when_done: bool,
}

impl Story<'_> {
    fn tell(&self, resumed: Option<Resumed>, keeper: &mut DamageKeeper<'_>) -> anyhow::Result<End> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the control's event loop")?;
        let control = {
            let _inside = runtime.enter();
            Control::listen(self.served.state.path()).context("cannot listen for `lifeboot status`")?
        };
        self.say(self.say_ready(resumed));
        runtime.block_on(async {
            let tasks = Tasks::new();
            let asked = tokio::spawn(control.serve(Arc::clone(self.service), 0, tasks.clone()));
            let end = self.watch(keeper).await;
            self.service.is_ending.store(true, Ordering::Relaxed);
            asked.abort();
            tasks.ended().await;
            Ok(end)
        })
    }

    async fn watch(&self, keeper: &mut DamageKeeper<'_>) -> End {
        let session = self.served.session();
        let output = self.context.output();
        let mut meter = RateMeter::default();
        let mut ticks = tokio::time::interval(TICK);
        let mut told_at = Instant::now();
        let mut told_complete = false;
        let mut told_waiting = None;
        let mut bar: Option<Progress> = None;
        meter.sample(Instant::now(), session.stats().home_bytes);
        let mut phase = session.phase();
        loop {
            tokio::select! {
                () = session.has_left(phase) => {}
                _ = ticks.tick() => {}
            }
            if self.service.interrupt.is_raised() {
                return End::Parked;
            }
            phase = session.phase();
            let now = Instant::now();
            if phase == Phase::Filling && now.duration_since(told_at) >= PROGRESS_INTERVAL {
                told_at = now;
                let stats = session.stats();
                self.served.rate.store(meter.sample(now, stats.home_bytes), Ordering::Relaxed);
                let status = self.served.status_of(&stats);
                keeper.keep(&status);
                self.say(output.event(&Event::Progress(&status)));
                if !output.is_json() {
                    bar.get_or_insert_with(|| output.progress("copying home", Some(status.size)))
                        .set(status.home_bytes);
                }
                if status.waiting != told_waiting {
                    if let (None, Some(why)) = (&told_waiting, &status.waiting) {
                        output.warn(why);
                    }
                    told_waiting.clone_from(&status.waiting);
                }
                if self.exit_when_done && stats.is_settled() && self.handle.stats().connections == 0 {
                    return End::Settled;
                }
            }
            match phase {
                Phase::Filling | Phase::Parked => {}
                Phase::Complete => {
                    if !told_complete {
                        told_complete = true;
                        bar = None;
                        self.served.rate.store(0, Ordering::Relaxed);
                        let status = self.served.status();
                        keeper.keep(&status);
                        self.say(self.say_complete(&status));
                    }
                    if self.exit_when_done && self.handle.stats().connections == 0 {
                        return End::Complete;
                    }
                }
                Phase::Poisoned => return End::Poisoned,
            }
        }
    }

    /// Whoever read our stdout may go away; guests that use the disk stay.
    fn say(&self, result: anyhow::Result<()>) {
        if let Err(error) = result {
            tracing::debug!(%error, "nobody listens");
        }
    }

    fn say_ready(&self, resumed: Option<Resumed>) -> anyhow::Result<()> {
        let output = self.context.output();
        let record = &self.served.record;
        let uris = self.served.uris();
        let status = self.served.status();
        let first = self.served.addresses.first();
        let qemu = first.map(|address| advice::qemu_arguments(address, &record.disk)).unwrap_or_default();
        output.event(&Event::Ready {
            uris: &uris,
            resumed: resumed.is_some(),
            qemu: &qemu,
            status: &status,
        })?;
        let how = match resumed {
            None => "restoring",
            Some(Resumed::Parked) => "going on where it was parked:",
            Some(Resumed::AgentDied) => "going on after the agent had died: everything is there:",
            Some(Resumed::HostDied) => "going on after the host had gone down: everything flushed is there:",
            Some(Resumed::SyncFailed) => {
                "going on after a sync had failed: what was flushed before is there:"
            }
            Some(Resumed::LiveFileLost) => {
                "going on after the agent had died and the live file was lost: what was flushed is there:"
            }
        };
        if let Some(loss) = resumed.and_then(advice::loss) {
            output.warn(loss);
        }
        output.line(format_args!(
            "{how} {}/{} ({}, {:.1} % home) to {}",
            record.snapshot,
            record.disk,
            human_size(record.size),
            status.percent(),
            record.target.display()
        ))?;
        for uri in &uris {
            output.line(format_args!("ready: {uri}"))?;
        }
        output.line(format_args!("QEMU: {}", advice::shell_line(&qemu)))?;
        // Without systemd there is nobody to tell.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        Ok(())
    }

    fn say_complete(&self, status: &Status) -> anyhow::Result<()> {
        let output = self.context.output();
        output.event(&Event::Complete(status))?;
        output.line(format_args!(
            "complete: {} holds the whole disk; {} fetched, {} written by the guest{}",
            self.served.record.target.display(),
            human_size(status.fetched_bytes),
            human_size(status.guest_bytes),
            if self.exit_when_done { "" } else { "; it goes on being served, Ctrl-C ends that" }
        ))
    }
}
