//! A shard: one thread, one event loop, and the connections that live on it.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block::Engine;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use crate::budget::Budget;
use crate::connection::{self, Control};
use crate::directory::OpenDevices;
use crate::log_limit::LogLimits;
use crate::server::Phase;
use crate::slots::Slot;
use crate::socket::{Accepted, Socket};
use crate::{Export, ServerOptions};

/// What a shard runs beside its connections; see [`crate::Server::on_shard_start`].
pub type ShardTask = Arc<dyn Fn(ShardContext) -> Pin<Box<dyn Future<Output = ()>>> + Send + Sync>;

/// What a shard's own task knows of it.
#[derive(Clone, Debug)]
pub struct ShardContext {
    index: usize,
    phases: watch::Receiver<Phase>,
}

impl ShardContext {
    /// The shard's number, from 0.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.index
    }

    /// Waits until the shutdown begins. Requests may still be in flight then.
    pub async fn stopping(&self) {
        self.reached(Phase::Stopping).await;
    }

    /// Waits until the server's last connection is gone, so that nobody needs the task any more. It must end then.
    pub async fn drained(&self) {
        self.reached(Phase::Drained).await;
    }

    async fn reached(&self, wanted: Phase) {
        // A server that is gone altogether has reached every phase.
        let _ = self.phases.clone().wait_for(|phase| *phase >= wanted).await;
    }
}

/// A socket that was accepted, and what it counts for.
#[derive(Debug)]
pub(crate) struct Newcomer {
    socket: Accepted,
    ticket: Ticket,
}

/// Counts a connection while it lives.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) slot: Slot,
    load: Arc<AtomicUsize>,
}

impl Newcomer {
    pub(crate) fn new(socket: Accepted, slot: Slot, load: &Arc<AtomicUsize>) -> Self {
        load.fetch_add(1, Ordering::Relaxed);
        Self { socket, ticket: Ticket { slot, load: Arc::clone(load) } }
    }
}

impl Ticket {
    /// Who else is on the shard, from now on.
    pub(crate) fn neighbours(&self) -> Neighbours {
        Neighbours(Arc::clone(&self.load))
    }
}

/// The other connections of a shard.
#[derive(Debug)]
pub(crate) struct Neighbours(Arc<AtomicUsize>);

impl Neighbours {
    /// Whether there are any.
    pub(crate) fn are_there(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 1
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a shard is made of. Everything in it may change threads; what it becomes may not.
pub(crate) struct ShardSeed {
    pub(crate) index: usize,
    pub(crate) inbox: mpsc::UnboundedReceiver<Newcomer>,
    pub(crate) phases: watch::Receiver<Phase>,
    pub(crate) exports: Arc<[Export]>,
    pub(crate) options: ServerOptions,
    pub(crate) budget: Budget,
    pub(crate) operations: Arc<AtomicUsize>,
    pub(crate) task: Option<ShardTask>,
    pub(crate) logs: Arc<LogLimits>,
}

/// What every connection of a shard shares.
pub(crate) struct ShardState {
    pub(crate) options: ServerOptions,
    pub(crate) budget: Budget,
    pub(crate) devices: Rc<OpenDevices>,
    pub(crate) operations: Rc<Operations>,
    pub(crate) logs: Arc<LogLimits>,
    /// Whether others than connections work on the thread.
    pub(crate) has_own_task: bool,
}

/// Device operations in flight on this shard, so that it ends after the last of them.
pub(crate) struct Operations {
    here: Cell<usize>,
    everywhere: Arc<AtomicUsize>,
    ended: Notify,
}

impl Operations {
    fn new(everywhere: Arc<AtomicUsize>) -> Self {
        Self { here: Cell::new(0), everywhere, ended: Notify::new() }
    }

    pub(crate) fn begin(&self) {
        self.here.set(self.here.get() + 1);
        self.everywhere.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn end(&self) {
        self.here.set(self.here.get() - 1);
        self.everywhere.fetch_sub(1, Ordering::Relaxed);
        if self.here.get() == 0 {
            self.ended.notify_one();
        }
    }

    /// How many are in flight here.
    pub(crate) fn count(&self) -> usize {
        self.here.get()
    }

    async fn none(&self) {
        while self.count() > 0 {
            self.ended.notified().await;
        }
    }
}

/// Runs a shard on the calling thread until the server is drained.
pub(crate) fn run(seed: ShardSeed, engine: Engine) {
    if let Err(error) = block::short_turns() {
        tracing::debug!(%error, "a shard takes turns of the usual length");
    }
    engine.run(serve(seed));
}

async fn serve(seed: ShardSeed) {
    let ShardSeed { index, mut inbox, mut phases, exports, options, budget, operations, task, logs } = seed;
    let own_task =
        task.map(|task| tokio::task::spawn_local(task(ShardContext { index, phases: phases.clone() })));
    let devices = Rc::new(OpenDevices::new(exports, options.limits.request_bytes, Arc::clone(&logs)));
    let operations = Rc::new(Operations::new(operations));
    let has_own_task = own_task.is_some();
    let state = Rc::new(ShardState {
        options,
        budget,
        devices,
        operations: Rc::clone(&operations),
        logs,
        has_own_task,
    });
    let control = Rc::new(Control::default());
    let mut connections = JoinSet::new();
    // Nothing in these branches is an operation of a device: each may be dropped at any time.
    loop {
        tokio::select! {
            newcomer = inbox.recv() => match newcomer {
                Some(newcomer) => welcome(newcomer, &state, &control, &mut connections),
                // The acceptor is gone: nobody comes any more, but phases still change.
                None => break,
            },
            Ok(()) = phases.changed() => control.enter(*phases.borrow_and_update()),
            Some(result) = connections.join_next() => report(result),
        }
    }
    loop {
        control.enter(*phases.borrow_and_update());
        tokio::select! {
            joined = connections.join_next() => match joined {
                Some(result) => report(result),
                None => break,
            },
            Ok(()) = phases.changed() => {}
        }
    }
    operations.none().await;
    if let Some(own_task) = own_task {
        report(own_task.await);
    }
}

fn welcome(newcomer: Newcomer, state: &Rc<ShardState>, control: &Rc<Control>, connections: &mut JoinSet<()>) {
    let Newcomer { socket, ticket } = newcomer;
    match Socket::from_accepted(socket) {
        Ok(socket) => {
            let serving = connection::serve(socket, ticket, Rc::clone(state), Rc::clone(control));
            connections.spawn_local(serving);
        }
        Err(error) => tracing::warn!(%error, "a connection could not be taken into the event loop"),
    }
}

fn report(result: Result<(), tokio::task::JoinError>) {
    if let Err(error) = result {
        tracing::error!(%error, "a task of the server panicked; the others go on");
    }
}
