//! The server as its owner sees it: bound, run, ended.
//!
//! A panic in a connection's task ends that connection alone. One that ends a shard's whole thread (or the acceptor's) ends the server: the
//! shutdown begins by itself, in order, so that nobody is given to a shard that is no more; [`ServerHandle::is_ending`] tells the owner, and
//! [`ServerHandle::join`] which thread it was. A server that lacks a part is started anew rather than guessed at.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use block::Engine;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::accept::{self, Acceptor};
use crate::budget::Budget;
use crate::listen::Listener;
use crate::log_limit::LogLimits;
use crate::shard::{self, ShardSeed, ShardTask};
use crate::slots::Slots;
use crate::{Error, ErrorKind, Export, ListenAddress, Result, ServerOptions, export};

/// How far the end of a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// It serves.
    Running,
    /// It accepts nothing more, and connections finish what is in flight.
    Stopping,
    /// Connections that are still there are closed.
    Aborting,
    /// Every connection is gone.
    Drained,
}

/// A server that listens and does not serve yet: clients may connect, and wait.
pub struct Server {
    listeners: Vec<Arc<Listener>>,
    only: Option<OwnedFd>,
    exports: Arc<[Export]>,
    options: ServerOptions,
    on_shard_start: Option<ShardTask>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("addresses", &self.addresses())
            .field("exports", &self.exports)
            .finish_non_exhaustive()
    }
}

/// What is going on in a server right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Connections that are open.
    pub connections: usize,
    /// Those of them that are in their handshake.
    pub half_open: usize,
    /// Device operations in flight, those of connections that are gone included.
    pub operations: usize,
    /// The memory of requests in flight, in bytes.
    pub memory_bytes: u64,
}

impl Server {
    /// Listens at every address. A unix socket that a dead server left is taken over.
    ///
    /// # Errors
    /// Where an address is in use, cannot be had or is refused, or an export cannot be named on the wire.
    pub fn bind(addresses: &[ListenAddress], exports: Vec<Export>, options: ServerOptions) -> Result<Self> {
        export::check(&exports)?;
        let mut listeners = Vec::new();
        for address in addresses {
            listeners.extend(Listener::bind(address, &options.access)?);
        }
        Self::listening(listeners, exports, options)
    }

    /// Serves what connects to sockets that listen already.
    ///
    /// # Errors
    /// Where an export cannot be named on the wire.
    pub fn listening(listeners: Vec<Listener>, exports: Vec<Export>, options: ServerOptions) -> Result<Self> {
        export::check(&exports)?;
        let is_open =
            |listener: &&Listener| listener.tcp_address().is_some_and(|at| options.access.is_open(at));
        for listener in listeners.iter().filter(is_open) {
            tracing::warn!(
                "{} can be reached from other machines without TLS: whoever is on the way there can read and change the disks",
                listener.address()
            );
        }
        let listeners = listeners.into_iter().map(Arc::new).collect();
        Ok(Self { listeners, only: None, exports: exports.into(), options, on_shard_start: None })
    }

    /// Serves one connection, which is there already, and ends with it.
    ///
    /// # Errors
    /// Where an export cannot be named on the wire.
    pub fn of_connection(connection: OwnedFd, exports: Vec<Export>, options: ServerOptions) -> Result<Self> {
        Ok(Self { only: Some(connection), ..Self::listening(Vec::new(), exports, options)? })
    }

    /// The addresses, with the ports that the system chose.
    #[must_use]
    pub fn addresses(&self) -> Vec<ListenAddress> {
        self.listeners.iter().map(|listener| listener.address().clone()).collect()
    }

    /// Makes sockets ours that a predecessor handed over, once it has ended.
    ///
    /// # Errors
    /// What the system says.
    pub fn own_listeners(&self) -> Result<()> {
        self.listeners.iter().try_for_each(|listener| listener.own(&self.options.access))
    }

    /// Has every shard run `task` beside its connections, on the same event loop and ring. A shard ends after
    /// its task did; the task is told to end by [`crate::ShardContext::drained`].
    #[must_use]
    pub fn on_shard_start(mut self, task: ShardTask) -> Self {
        self.on_shard_start = Some(task);
        self
    }

    /// How many threads serve best: two for each processor.
    ///
    /// A thread has its turn of a processor beside its clients' threads. One that serves several of them needs more than its turn, and waits
    /// for the next while all of its clients wait for it; where the load is short of a thread for each client, more of them cost nothing.
    #[must_use]
    pub fn default_shards() -> usize {
        2 * thread::available_parallelism().map_or(1, usize::from)
    }

    /// Fails where this process may not open the files that a server of so many `shards` has, and `others` beside: asked before
    /// whoever serves is told to end.
    ///
    /// # Errors
    /// One that names the limit.
    pub fn check_open_files(shards: usize, others: usize) -> Result<()> {
        // The acceptor is a thread, too.
        let checked = Engine::check_open_files(shards.max(1).saturating_add(1), others);
        checked.map_err(|error| Error::new(ErrorKind::Io, format!("cannot serve: {error}")))
    }

    /// Serves from `shards` threads (at least one), each with an event loop of `engine`.
    ///
    /// # Errors
    /// Where threads cannot be had, or files for them.
    pub fn run(self, shards: usize, engine: Engine) -> Result<ServerHandle> {
        Self::check_open_files(shards, self.listeners.len())?;
        // Whoever is told that it serves can connect.
        let accepting = accept::event_loop()?;
        let (phase, phases) = watch::channel(Phase::Running);
        let slots = Slots::default();
        let budget = Budget::new(&self.options.limits);
        let operations = Arc::new(AtomicUsize::new(0));
        let logs = Arc::new(LogLimits::default());
        let monitor = Monitor {
            phase: phases.clone(),
            slots: slots.clone(),
            budget: budget.clone(),
            operations: Arc::clone(&operations),
            logs: Arc::clone(&logs),
        };
        let mut handle = ServerHandle {
            phase: phase.clone(),
            monitor,
            addresses: self.addresses(),
            listeners: Mutex::new(self.listeners.clone()),
            threads: Vec::new(),
        };
        let mut senders = Vec::new();
        for index in 0..shards.max(1) {
            let (sender, inbox) = mpsc::unbounded_channel();
            let load = Arc::new(AtomicUsize::new(0));
            let seed = ShardSeed {
                index,
                inbox,
                phases: phases.clone(),
                exports: Arc::clone(&self.exports),
                options: self.options.clone(),
                budget: budget.clone(),
                operations: Arc::clone(&operations),
                task: self.on_shard_start.clone(),
                logs: Arc::clone(&logs),
            };
            senders.push(accept::Shard { sender, load });
            let end = EndOfPanicked(phase.clone());
            handle.spawn(format!("nbd-shard-{index}"), move || {
                let _end = end;
                shard::run(seed, engine);
            })?;
        }
        let acceptor = Acceptor {
            listeners: self.listeners,
            only: self.only,
            shards: senders,
            slots,
            phase,
            options: self.options,
            logs,
        };
        handle.spawn("nbd-accept".to_owned(), move || accept::run(acceptor, &accepting))?;
        Ok(handle)
    }
}

/// Begins the end of the server where the thread that has it ends by a panic.
struct EndOfPanicked(watch::Sender<Phase>);

impl Drop for EndOfPanicked {
    fn drop(&mut self) {
        if thread::panicking() {
            begin_end(&self.0);
        }
    }
}

fn begin_end(phase: &watch::Sender<Phase>) {
    phase.send_if_modified(|phase| {
        let begins = *phase == Phase::Running;
        if begins {
            *phase = Phase::Stopping;
        }
        begins
    });
}

/// A server that serves. Dropping it begins the shutdown and does not wait for it.
#[derive(Debug)]
pub struct ServerHandle {
    phase: watch::Sender<Phase>,
    monitor: Monitor,
    addresses: Vec<ListenAddress>,
    /// Until the end begins: then nobody is to wait for nothing.
    listeners: Mutex<Vec<Arc<Listener>>>,
    threads: Vec<JoinHandle<()>>,
}

/// Sees what is going on in a server, also when that has ended. Clones see the same.
#[derive(Clone, Debug)]
pub struct Monitor {
    phase: watch::Receiver<Phase>,
    slots: Slots,
    budget: Budget,
    operations: Arc<AtomicUsize>,
    logs: Arc<LogLimits>,
}

impl Monitor {
    /// As [`ServerHandle::is_ending`].
    #[must_use]
    pub fn is_ending(&self) -> bool {
        *self.phase.borrow() != Phase::Running
    }

    /// How many requests to the export of this name failed because there was no room on its disk.
    #[must_use]
    pub fn requests_without_room(&self, export: &str) -> u64 {
        self.logs.without_room(export)
    }

    /// What is going on right now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            connections: self.slots.connections(),
            half_open: self.slots.half_open(),
            operations: self.operations.load(Ordering::Relaxed),
            memory_bytes: self.budget.used_bytes(),
        }
    }
}

impl ServerHandle {
    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let context = format!("cannot start the thread {name}");
        let thread = thread::Builder::new().name(name).spawn(body);
        self.threads.push(thread.map_err(|source| Error::io(context, source))?);
        Ok(())
    }

    /// The addresses, with the ports that the system chose.
    #[must_use]
    pub fn addresses(&self) -> &[ListenAddress] {
        &self.addresses
    }

    /// The sockets that it listens at, for a successor; none once the end began.
    #[must_use]
    pub fn listeners(&self) -> Vec<Arc<Listener>> {
        self.listeners.lock().clone()
    }

    /// Whether its end has begun, whoever began it: its owner, the end of the one connection that it serves, or a panic.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.monitor.is_ending()
    }

    /// Waits until its end has begun, as [`ServerHandle::is_ending`] has it.
    pub async fn ending(&self) {
        let mut phase = self.phase.subscribe();
        phase.wait_for(|phase| *phase != Phase::Running).await.expect("a sender is here");
    }

    /// What is going on right now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.monitor.stats()
    }

    /// Whoever is to see what is going on without owning the server.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    /// Begins the end: nothing more is accepted, connections finish what is in flight, and are closed
    /// after the grace period whatever they do. Returns at once.
    pub fn shutdown(&self) {
        self.listeners.lock().clear();
        begin_end(&self.phase);
    }

    /// Waits for every thread of the server: for the shutdown, if nobody began it before. Connections end
    /// within the grace period; device operations in flight and the shards' own tasks are waited for.
    ///
    /// # Errors
    /// Where a thread ended by a panic.
    pub fn join(mut self) -> Result<()> {
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                result = Err(Error::new(ErrorKind::Panicked, format!("the thread {name} panicked")));
            }
        }
        result
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.shutdown();
    }
}
