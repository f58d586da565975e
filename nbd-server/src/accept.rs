//! The one thread that accepts: it gives each socket to the shard with the fewest connections, and leads the shutdown.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, TcpKeepalive};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::listen::{Accepting, Listener};
use crate::log_limit::LogLimits;
use crate::server::Phase;
use crate::shard::Newcomer;
use crate::slots::Slots;
use crate::socket::Accepted;
use crate::{Error, Result, ServerOptions};

/// How long accepting pauses when the system has no descriptor left.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(100);
/// So long a TCP peer may be silent before it is asked whether it is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// So often it is asked then,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// and so many times: a host that is gone is noticed after 90 s.
const KEEPALIVE_PROBES: u32 = 6;

/// The congestion control of connections within this machine: Linux's own choice, which lets them have what their windows allow.
///
/// A machine may be set to another that paces (BBR). It sends as fast as it has seen data arrive, which tells of a network's speed, but
/// here of how busy the processors were: large reads had half of what they have without.
const CONGESTION_CONTROL_WITHIN: &[u8] = b"cubic";

/// A shard as the acceptor sees it.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub(crate) sender: mpsc::UnboundedSender<Newcomer>,
    pub(crate) load: Arc<AtomicUsize>,
}

/// What the accepting thread works with.
#[derive(Debug)]
pub(crate) struct Acceptor {
    pub(crate) listeners: Vec<Arc<Listener>>,
    /// A connection that is there already: the server ends with it.
    pub(crate) only: Option<OwnedFd>,
    pub(crate) shards: Vec<Shard>,
    pub(crate) slots: Slots,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) options: ServerOptions,
    pub(crate) logs: Arc<LogLimits>,
}

/// The event loop of the accepting thread.
///
/// # Errors
/// Where the system refuses it.
pub(crate) fn event_loop() -> Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("there is no event loop for accepting connections", error))
}

/// Accepts until the shutdown, then leads it to its end.
pub(crate) fn run(acceptor: Acceptor, runtime: &Runtime) {
    // Whatever happens here, the shards must not wait for ever.
    let end = EndGuard(acceptor.phase.clone());
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
    let Acceptor { listeners, only, shards, slots, phase, options, logs } = acceptor;
    let grace = options.limits.shutdown_grace;
    let mut distributor = Distributor { shards, slots: slots.clone(), options, logs };
    let mut accepting = JoinSet::new();
    let ends_when_empty = only.is_some();
    if let Some(only) = only {
        let taken = distributor.distribute(Socket::from(only), None);
        taken.unwrap_or_else(|error| tracing::error!(%error, "the connection cannot be served"));
    }
    for listener in listeners {
        accepting.spawn(accept_at(listener, distributor.clone()));
    }
    let mut phases = phase.subscribe();
    tokio::select! {
        // The sender is ours, so this ends by the shutdown alone.
        _ = phases.wait_for(|phase| *phase >= Phase::Stopping) => {}
        () = slots.empty(), if ends_when_empty => {
            phase.send_replace(Phase::Stopping);
        }
    }
    accepting.shutdown().await;
    drop(distributor);
    if tokio::time::timeout(grace, slots.empty()).await.is_err() {
        tracing::warn!(connections = slots.connections(), "closing connections that did not end in time");
        phase.send_replace(Phase::Aborting);
        slots.empty().await;
    }
}

async fn accept_at(listener: Arc<Listener>, mut distributor: Distributor) {
    let accepting = match Accepting::new(Arc::clone(&listener)) {
        Ok(accepting) => accepting,
        Err(error) => {
            tracing::error!(%error, address = %listener.address(), "cannot accept connections");
            return;
        }
    };
    loop {
        let accepted = accepting.accept().await;
        let accepted = accepted.and_then(|(socket, peer)| distributor.distribute(socket, Some(&peer)));
        match accepted {
            Ok(()) => {}
            // The peer was gone before we came to it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                if let Some(left_out) = distributor.logs.accepting.admit(Instant::now()) {
                    tracing::warn!(%error, left_out, "cannot accept a connection; trying again soon");
                }
                tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
            }
        }
    }
}

#[derive(Clone, Debug)]
struct Distributor {
    shards: Vec<Shard>,
    slots: Slots,
    options: ServerOptions,
    logs: Arc<LogLimits>,
}

impl Distributor {
    /// Gives the socket to a shard, or closes it where its peer may not connect or there is no place for it. A connection
    /// that was not accepted here but handed over, and has no `peer`, may always connect.
    fn distribute(&mut self, socket: Socket, peer: Option<&SockAddr>) -> io::Result<()> {
        let now = Instant::now();
        let is_unix = socket.domain()? == Domain::UNIX;
        if let Some(peer) = peer.filter(|_| !is_unix) {
            let from = peer.as_socket().map(|from| from.ip());
            if !self.options.access.allows(from) {
                if let Some(left_out) = self.logs.denied.admit(now) {
                    let from = from.map_or_else(
                        || "an unknown address".to_owned(),
                        |from| from.to_canonical().to_string(),
                    );
                    tracing::warn!(from, left_out, "a connection is refused: its network is not allowed");
                }
                return Ok(());
            }
        }
        let slot = match self.slots.take(&self.options.limits, now) {
            Ok(slot) => slot,
            Err(full) => {
                if let Some(left_out) = self.logs.full.admit(now) {
                    tracing::warn!(?full, left_out, "a connection is refused: there are too many");
                }
                return Ok(());
            }
        };
        let accepted = prepare(socket)?;
        // Equal loads take turns, because the shard that gets a connection moves to the end.
        let Some(least) =
            (0..self.shards.len()).min_by_key(|&index| self.shards[index].load.load(Ordering::Relaxed))
        else {
            return Ok(());
        };
        let shard = self.shards.remove(least);
        let newcomer = Newcomer::new(accepted, slot, &shard.load);
        if shard.sender.send(newcomer).is_err() {
            tracing::warn!("a shard is gone; the connection for it is closed");
        }
        self.shards.push(shard);
        Ok(())
    }
}

/// What a shard takes.
///
/// TCP_USER_TIMEOUT is left alone. It would notice a dead host with data on its way sooner than the kernel's quarter of an hour; but
/// it also cuts off a living host whose process does not read, though that answers every probe: a QEMU that is stopped. And it takes
/// the place of the count of probes, so a long one would keep the dead.
fn prepare(socket: Socket) -> io::Result<Accepted> {
    socket.set_nonblocking(true)?;
    match socket.domain()? {
        Domain::IPV4 | Domain::IPV6 => {
            let keepalive = TcpKeepalive::new()
                .with_time(KEEPALIVE_IDLE)
                .with_interval(KEEPALIVE_INTERVAL)
                .with_retries(KEEPALIVE_PROBES);
            socket.set_tcp_keepalive(&keepalive)?;
            if is_within_this_machine(&socket)
                && let Err(error) = socket.set_tcp_congestion(CONGESTION_CONTROL_WITHIN)
            {
                tracing::debug!(%error, "a connection within this machine keeps its congestion control");
            }
            Ok(Accepted::Tcp(socket.into()))
        }
        // Whatever else is a stream: what tokio's type for unix streams does is what any stream can.
        _ => Ok(Accepted::Unix(socket.into())),
    }
}

/// `false` of a peer that is gone already, and so has no address.
fn is_within_this_machine(socket: &Socket) -> bool {
    let ip = |at: io::Result<SockAddr>| Some(at.ok()?.as_socket()?.ip().to_canonical());
    let Some(peer) = ip(socket.peer_addr()) else { return false };
    peer.is_loopback() || ip(socket.local_addr()) == Some(peer)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_within_this_machine_is_not_paced() {
        let listener = Socket::from(TcpListener::bind("127.0.0.1:0").unwrap());
        listener.set_tcp_congestion(b"reno").unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap().as_socket().unwrap()).unwrap();
        let Accepted::Tcp(stream) = prepare(listener.accept().unwrap().0).unwrap() else {
            panic!("it is TCP")
        };
        let name = Socket::from(stream).tcp_congestion().unwrap();
        assert_eq!(name.split(|&byte| byte == 0).next(), Some(CONGESTION_CONTROL_WITHIN));
    }

    #[test]
    fn a_tcp_peer_that_is_gone_is_noticed_in_a_bounded_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let Accepted::Tcp(stream) = prepare(listener.accept().unwrap().0.into()).unwrap() else {
            panic!("it is TCP")
        };
        let socket = Socket::from(stream);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE_IDLE);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), KEEPALIVE_INTERVAL);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), KEEPALIVE_PROBES);
        assert_eq!(socket.tcp_user_timeout().unwrap(), None, "it cuts off clients that are only stopped");
    }
}
