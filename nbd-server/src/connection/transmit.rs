//! Transmission: one task reads requests, answers what it can at once, and sends every reply; what may
//! wait for the device runs in tasks of its own, which this one outlives.

mod memory;
mod take;

use std::future::{Future, poll_fn};
use std::io;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::thread;

use proto::server::{Admission, ReplyEncoder};
use proto::wire::{Cut, SelectedContext};

use super::control::Control;
use super::end::End;
use super::intake::Intake;
use super::negotiate::Negotiated;
use super::parts;
use super::perform;
use super::read::Reads;
use super::request::Shared;
use super::spin::{Spin, Waited};
use super::stall::Stall;
use super::turn::Turn;
use crate::budget::Share;
use crate::server::Phase;
use crate::shard::{Neighbours, ShardState};
use crate::slots::Transmitting;
use crate::socket::Socket;
use take::{State, Taken};

/// Processors of this machine.
static PROCESSORS: LazyLock<usize> = LazyLock::new(|| thread::available_parallelism().map_or(1, usize::from));

/// The least of a payload that is worth waiting for awake: over a network packets come more often than the thread could sleep and be
/// woken, and each has little.
const LEAST_AWAKE_BYTES: usize = 4 << 10;

struct Transmission {
    socket: Socket,
    intake: Intake,
    state: State,
    admission: Admission,
    reads: Rc<Reads>,
    contexts: Rc<[SelectedContext]>,
    shared: Rc<Shared>,
    /// What it has of the memory, whatever others hold.
    share: Share,
    shard: Rc<ShardState>,
    control: Rc<Control>,
    receive_limit: usize,
    transmitting: Transmitting,
    neighbours: Neighbours,
    spin: Spin,
    /// Whether the client has sent the first part of a message, and the rest has yet to come.
    owes_bytes: bool,
    /// The phase in which this task is listed to be told of the next.
    listed_in: Option<Phase>,
    end: Option<End>,
    stall: Stall,
}

/// Where the next bytes go.
fn room<'a>(state: &'a mut State, intake: &'a mut Intake, limit: usize) -> &'a mut [u8] {
    match state {
        State::Payload { buf, filled, .. } => &mut buf[*filled..],
        State::Part(write) => write.room(),
        _ => intake.room(limit),
    }
}

/// Has the current task go on once the event loop has looked for whoever else has come.
fn give_way(cx: &mut Context<'_>) {
    let once = std::pin::pin!(tokio::task::yield_now());
    // The first look at it leaves word; it need not be looked at again.
    let looked = once.poll(cx);
    debug_assert!(looked.is_pending());
}

/// Serves requests until the connection ends. Every task that it began has ended when it returns.
pub(super) async fn transmit(
    negotiated: Negotiated,
    transmitting: Transmitting,
    neighbours: Neighbours,
    shard: Rc<ShardState>,
    control: Rc<Control>,
) -> End {
    let Negotiated { socket, agreed, device, rest } = negotiated;
    socket.enlarge_send_buffer();
    // Before there is a request that would wait for it.
    perform::make_buffers();
    let reads = Rc::new(Reads::new(device, &socket));
    tracing::debug!(export = %Cut(&agreed.info.name), replies = ?agreed.replies, contexts = agreed.contexts.len(), "a client transmits");
    let admission = Admission {
        size: agreed.info.size,
        flags: agreed.info.flags,
        replies: agreed.replies,
        has_contexts: !agreed.contexts.is_empty(),
        max_request: shard.options.limits.request_bytes,
    };
    let encoder = ReplyEncoder::new(agreed.replies);
    let shared = Shared::new(
        encoder,
        agreed.info.name,
        shard.options.late_requests,
        Rc::clone(&shard.operations),
        Arc::clone(&shard.logs),
    );
    let spin = Spin::new(shard.has_own_task);
    let mut transmission = Transmission {
        socket,
        intake: Intake::new(&rest),
        state: State::Header,
        admission,
        reads,
        contexts: agreed.contexts.into(),
        shared,
        share: shard.budget.share(),
        shard,
        control,
        receive_limit: usize::MAX,
        transmitting,
        neighbours,
        spin,
        owes_bytes: false,
        listed_in: None,
        end: None,
        stall: Stall::default(),
    };
    let end = poll_fn(|cx| transmission.poll(cx)).await;
    poll_fn(|cx| {
        transmission.control.forget(cx.waker());
        Poll::Ready(())
    })
    .await;
    end
}

impl Transmission {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            if let Poll::Ready(end) = self.advance(cx) {
                return Poll::Ready(end);
            }
            if !self.owes_bytes && self.is_sent() {
                self.stall.end();
                return Poll::Pending;
            }
            let (is_ending, holds_common) = (self.end.is_some(), self.holds_common());
            let ShardState { budget, options, .. } = &*self.shard;
            let is_wanted = |mark| is_ending || (holds_common && budget.is_wanted_since(mark));
            match self.stall.poll(cx, &options.limits, budget.mark(), is_wanted) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(waited) => self.cut(End::Stalled(waited)),
            }
        }
    }

    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        self.shared.listen(cx);
        if self.listed_in != Some(self.control.phase()) {
            self.listed_in = Some(self.control.phase());
            self.control.listen(cx);
        }
        if self.control.is_aborting() {
            self.cut(End::Stopping);
        }
        let mut turn = Turn::default();
        loop {
            let taken = if self.end.is_some() { Taken::NeedsRoom } else { self.take_requests(cx) };
            let taken = match taken {
                Taken::Ended(end) => {
                    self.finish(end);
                    Taken::NeedsRoom
                }
                other => other,
            };
            let sent = self.send(cx).unwrap_or_else(|end| {
                if let End::File(_) = end {
                    self.reads.device.not_resident();
                }
                self.cut(end);
                false
            });
            let idle = self.shared.tasks() == 0 && self.is_sent();
            if self.end.is_some() {
                match self.end.take_if(|_| idle) {
                    Some(end) => return Poll::Ready(end),
                    None => return Poll::Pending,
                }
            }
            self.owes_bytes = matches!(taken, Taken::NeedsBytes) && self.has_begun();
            match taken {
                Taken::NeedsBytes => {
                    let received = match self.receive(cx) {
                        Poll::Ready(received) => received,
                        Poll::Pending if idle && self.control.is_stopping() => {
                            self.finish(End::Stopping);
                            continue;
                        }
                        Poll::Pending => match self.wait_awake() {
                            Waited::Found(received) => received,
                            Waited::GiveWay => {
                                give_way(cx);
                                return Poll::Pending;
                            }
                            Waited::Sleep => return Poll::Pending,
                        },
                    };
                    match received {
                        Ok(0) => self.finish(End::PeerClosed),
                        Ok(len) if turn.is_over_after(len) && self.neighbours.are_there() => {
                            give_way(cx);
                            return Poll::Pending;
                        }
                        Ok(_) => {}
                        Err(error) => self.cut(End::Socket(error)),
                    }
                }
                // What was sent just now may have made room.
                _ if sent => {}
                _ => return Poll::Pending,
            }
        }
    }

    /// Whether there is a processor for each connection, and one for its client.
    fn has_room(&self) -> bool {
        2 * self.transmitting.count() <= *PROCESSORS
    }

    /// Waits for the next request, or for more of the one that comes, for a moment without letting the thread sleep; how many bytes
    /// came.
    fn wait_awake(&mut self) -> Waited<io::Result<usize>> {
        let in_flight = match self.state {
            State::Header => 0,
            State::Payload { .. } => 1,
            _ => return Waited::Sleep,
        };
        let is_alone = self.shared.tasks() == in_flight && self.shard.operations.count() == in_flight;
        if !(is_alone && self.is_sent() && self.has_room()) {
            return Waited::Sleep;
        }
        let (socket, room) = (&mut self.socket, room(&mut self.state, &mut self.intake, self.receive_limit));
        let enough = if in_flight == 0 { 0 } else { room.len().min(LEAST_AWAKE_BYTES) };
        let waited = self
            .spin
            .wait(|| socket.try_read(room), |received| received.as_ref().is_ok_and(|&len| len >= enough));
        if let Waited::Found(Ok(len)) = waited {
            self.received(len);
        }
        waited
    }

    /// Takes no more requests. What is in flight ends, and its replies are sent.
    fn finish(&mut self, end: End) {
        self.end.get_or_insert(end);
        self.owes_bytes = false;
        match std::mem::replace(&mut self.state, State::Header) {
            State::Payload { request, .. } | State::Part(parts::Write { request, .. }) => request.abandon(),
            _ => {}
        }
    }

    /// Ends the connection without another byte to or from the peer. What is in flight still ends.
    fn cut(&mut self, end: End) {
        self.finish(end);
        self.shared.outbox.borrow_mut().close();
        // The peer must not wait for us to wait for a disk. Where it fails, it is gone already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Whether something of the next message is there, or of what belongs to one.
    fn has_begun(&self) -> bool {
        !matches!(self.state, State::Header) || !self.intake.bytes().is_empty()
    }

    /// Whether every reply that was made is on its way, or for nobody: what TLS has encrypted of it stays where the
    /// connection was cut.
    fn is_sent(&self) -> bool {
        let outbox = self.shared.outbox.borrow();
        outbox.is_closed() || (outbox.is_empty() && self.socket.is_flushed())
    }

    fn is_full(&self) -> bool {
        let limits = &self.shard.options.limits;
        self.shared.in_flight() >= limits.requests_in_flight.max(1) || self.shared.outbox.borrow().is_full()
    }

    /// Whether it holds memory that another connection could have.
    fn holds_common(&self) -> bool {
        self.shared.held_bytes() > self.share.used_bytes()
    }

    fn receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let room = room(&mut self.state, &mut self.intake, self.receive_limit);
        let received = self.socket.poll_read(cx, room);
        if let Poll::Ready(Ok(len)) = received {
            self.received(len);
        }
        received
    }

    /// Notes that so many bytes came to where the next ones go.
    fn received(&mut self, len: usize) {
        match &mut self.state {
            State::Payload { filled, .. } => *filled += len,
            State::Part(write) => write.received(len),
            _ => self.intake.received(len),
        }
        // Who takes no replies does not make up for it with what it sends.
        if self.is_sent() {
            self.stall.moved(len);
        }
    }

    /// Sends what is queued; whether anything was.
    fn send(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let mut any = false;
        loop {
            let sent = self.shared.outbox.borrow_mut().send(&mut self.socket)?;
            self.socket.try_flush().map_err(End::Socket)?;
            any |= sent > 0;
            self.stall.moved(sent);
            if self.is_sent() {
                return Ok(any);
            }
            match self.socket.poll_writable(cx) {
                Poll::Ready(result) => result.map_err(End::Socket)?,
                Poll::Pending => return Ok(any),
            }
        }
    }
}
