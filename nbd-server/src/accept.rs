//! The one thread that accepts: it gives each socket to the shard with the fewest connections, and leads the shutdown.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::ServerOptions;
use crate::listen::{Listener, SocketFile};
use crate::server::Phase;
use crate::shard::Newcomer;
use crate::slots::Slots;
use crate::socket::Accepted;

/// How long accepting pauses when the system has no descriptor left.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(100);

/// A shard as the acceptor sees it.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub(crate) sender: mpsc::UnboundedSender<Newcomer>,
    pub(crate) load: Arc<AtomicUsize>,
}

/// What the accepting thread works with.
#[derive(Debug)]
pub(crate) struct Acceptor {
    pub(crate) listeners: Vec<Listener>,
    pub(crate) shards: Vec<Shard>,
    pub(crate) slots: Slots,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) options: ServerOptions,
}

/// Accepts until the shutdown, then leads it to its end.
pub(crate) fn run(acceptor: Acceptor) {
    // Whatever happens here, the shards must not wait for ever.
    let end = EndGuard(acceptor.phase.clone());
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "no event loop for accepting connections");
            return;
        }
    };
    runtime.block_on(accept_until_drained(acceptor));
    drop(end);
}

struct EndGuard(watch::Sender<Phase>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.send_replace(Phase::Drained);
    }
}

async fn accept_until_drained(acceptor: Acceptor) {
    let Acceptor { listeners, shards, slots, phase, options } = acceptor;
    let distributor = Distributor { shards, slots: slots.clone(), options: options.clone(), refusing: false };
    let mut accepting = JoinSet::new();
    for listener in listeners {
        accepting.spawn(accept_at(listener, distributor.clone()));
    }
    let mut phases = phase.subscribe();
    // The sender is ours, so this ends by the shutdown alone.
    let _ = phases.wait_for(|phase| *phase >= Phase::Stopping).await;
    accepting.shutdown().await;
    drop(distributor);
    if tokio::time::timeout(options.limits.shutdown_grace, slots.empty()).await.is_err() {
        tracing::warn!(connections = slots.connections(), "closing connections that did not end in time");
        phase.send_replace(Phase::Aborting);
        slots.empty().await;
    }
}

async fn accept_at(listener: Listener, mut distributor: Distributor) {
    let mut source = match Source::new(listener) {
        Ok(source) => source,
        Err(error) => {
            tracing::error!(%error, "cannot accept connections");
            return;
        }
    };
    loop {
        match source.accept().await {
            Ok(accepted) => distributor.hand_over(accepted),
            // The peer was gone before we came to it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection; trying again soon");
                tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
            }
        }
    }
}

enum Source {
    Unix(
        UnixListener,
        #[expect(dead_code, reason = "removes the socket's file when it is dropped")] SocketFile,
    ),
    Tcp(TcpListener),
}

impl Source {
    fn new(listener: Listener) -> io::Result<Self> {
        match listener {
            Listener::Unix(listener, file) => Ok(Self::Unix(UnixListener::from_std(listener)?, file)),
            Listener::Tcp(listener) => Ok(Self::Tcp(TcpListener::from_std(listener)?)),
        }
    }

    async fn accept(&mut self) -> io::Result<Accepted> {
        match self {
            Self::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0.into_std()?)),
            Self::Tcp(listener) => Ok(Accepted::Tcp(listener.accept().await?.0.into_std()?)),
        }
    }
}

#[derive(Clone, Debug)]
struct Distributor {
    shards: Vec<Shard>,
    slots: Slots,
    options: ServerOptions,
    /// Whether the last connection was refused: one warning is enough for a run of them.
    refusing: bool,
}

impl Distributor {
    /// Gives the socket to a shard, or closes it where there is no place for it.
    fn hand_over(&mut self, accepted: Accepted) {
        let slot = match self.slots.take(&self.options.limits) {
            Ok(slot) => slot,
            Err(full) => {
                if !std::mem::replace(&mut self.refusing, true) {
                    tracing::warn!(?full, "refusing connections: there are too many");
                }
                return;
            }
        };
        self.refusing = false;
        // Equal loads take turns, because the shard that gets a connection moves to the end.
        let Some(least) =
            (0..self.shards.len()).min_by_key(|&index| self.shards[index].load.load(Ordering::Relaxed))
        else {
            return;
        };
        let shard = self.shards.remove(least);
        let newcomer = Newcomer::new(accepted, slot, &shard.load);
        if shard.sender.send(newcomer).is_err() {
            tracing::warn!("a shard is gone; the connection for it is closed");
        }
        self.shards.push(shard);
    }
}
