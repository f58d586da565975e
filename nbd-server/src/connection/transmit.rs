//! Transmission: one task reads requests, answers what it can at once, and sends every reply; what may
//! wait for the device runs in tasks of its own, which this one outlives.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::thread;

use block::{AlignedBuf, Attempt};
use proto::server::{Admission, Command, ReplyEncoder, Verdict};
use proto::wire::{Cut, Errno, NotARequest, RequestHeader, SelectedContext};

use super::ahead::Written;
use super::control::Control;
use super::end::End;
use super::intake::Intake;
use super::negotiate::Negotiated;
use super::perform;
use super::read::{Plan, Reads};
use super::request::{Request, Shared};
use super::spin::{Spin, Waited};
use super::stall::Stall;
use super::status;
use crate::LateRequests;
use crate::budget::Allowance;
use crate::server::Phase;
use crate::shard::ShardState;
use crate::slots::Transmitting;
use crate::socket::Socket;

/// How much is received after a long payload, which goes straight into its buffer: the next header, and little of what follows.
const SHORT_RECEIVE_BYTES: usize = 4 << 10;
/// Processors of this machine.
static PROCESSORS: LazyLock<usize> = LazyLock::new(|| thread::available_parallelism().map_or(1, usize::from));

/// What the bytes that come next are.
enum State {
    /// A request's header.
    Header,
    /// Whatever they are, they are not looked at before there is memory for this request.
    Memory {
        header: RequestHeader,
        then: Then,
        bytes: u32,
        allowance: Pin<Box<dyn Future<Output = Allowance>>>,
    },
    /// The payload of a WRITE.
    Payload { request: Request, fua: bool, buf: AlignedBuf, filled: usize, written: Written },
    /// The payload of a request that was refused.
    Skip { header: RequestHeader, left: usize, errno: Errno },
}

/// What a request with memory does.
enum Then {
    Fetch,
    FindHoles,
    Receive {
        fua: bool,
    },
    Control {
        command: Command,
    },
    /// Tell of these contexts.
    Status {
        one: bool,
        contexts: Rc<[SelectedContext]>,
    },
}

/// What taking requests came to.
enum Taken {
    /// More bytes are needed.
    NeedsBytes,
    /// Something must end or be sent first.
    NeedsRoom,
    /// Nothing more is taken.
    Ended(End),
}

/// The memory that the data of a READ or WRITE takes, in bytes.
fn data_bytes(header: &RequestHeader) -> u32 {
    u32::try_from(header.len).expect("admission bounds what carries data")
}

struct Transmission {
    socket: Socket,
    intake: Intake,
    state: State,
    admission: Admission,
    reads: Rc<Reads>,
    contexts: Rc<[SelectedContext]>,
    shared: Rc<Shared>,
    shard: Rc<ShardState>,
    control: Rc<Control>,
    receive_limit: usize,
    transmitting: Transmitting,
    spin: Spin,
    /// The client had nothing more to say when the request that is being taken was waited for: it has one in flight.
    waited: bool,
    /// The phase in which this task is listed to be told of the next.
    listed_in: Option<Phase>,
    end: Option<End>,
    stall: Stall,
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
    shard: Rc<ShardState>,
    control: Rc<Control>,
) -> End {
    let Negotiated { socket, agreed, device, rest } = negotiated;
    socket.enlarge_send_buffer();
    let sends_files = socket.is_plain();
    tracing::debug!(export = %Cut(&agreed.info.name), replies = ?agreed.replies, contexts = agreed.contexts.len(), "a client transmits");
    let admission = Admission {
        size: agreed.info.size,
        flags: agreed.info.flags,
        replies: agreed.replies,
        has_contexts: !agreed.contexts.is_empty(),
        max_request: shard.options.limits.request_bytes,
    };
    let encoder = ReplyEncoder::new(agreed.replies);
    let shared =
        Shared::new(encoder, agreed.info.name, shard.options.late_requests, Rc::clone(&shard.operations));
    let spin = Spin::new(shard.has_own_task);
    let mut transmission = Transmission {
        socket,
        intake: Intake::new(&rest),
        state: State::Header,
        admission,
        reads: Rc::new(Reads::new(device, sends_files)),
        contexts: agreed.contexts.into(),
        shared,
        shard,
        control,
        receive_limit: usize::MAX,
        transmitting,
        spin,
        waited: false,
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
            let is_waiting = matches!(self.state, State::Payload { .. }) || !self.is_sent();
            if !is_waiting {
                self.stall.end();
                return Poll::Pending;
            }
            let is_wanted = self.end.is_some() || self.shard.budget.is_wanted();
            if self.stall.poll(cx, &self.shard.options.limits, is_wanted).is_pending() {
                return Poll::Pending;
            }
            self.cut(End::Stalled);
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
        loop {
            let taken = if self.end.is_some() { Taken::NeedsRoom } else { self.take_requests(cx) };
            let taken = match taken {
                Taken::Ended(end) => {
                    self.finish(end);
                    Taken::NeedsRoom
                }
                other => other,
            };
            let sent = self.send(cx).unwrap_or_else(|error| {
                self.cut(End::Socket(error));
                false
            });
            let idle = self.shared.tasks() == 0 && self.is_sent();
            if self.end.is_some() {
                match self.end.take_if(|_| idle) {
                    Some(end) => return Poll::Ready(end),
                    None => return Poll::Pending,
                }
            }
            match taken {
                Taken::NeedsBytes => match self.receive(cx) {
                    Poll::Ready(Ok(0)) => self.finish(End::PeerClosed),
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(error)) => self.cut(End::Socket(error)),
                    Poll::Pending if idle && self.control.is_stopping() => self.finish(End::Stopping),
                    Poll::Pending => match self.wait_awake(idle) {
                        Waited::Found(len) => self.intake.received(len),
                        Waited::GiveWay => {
                            give_way(cx);
                            return Poll::Pending;
                        }
                        Waited::Sleep => return Poll::Pending,
                    },
                },
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

    /// Waits for the next request for a moment without letting the thread sleep; how many bytes came.
    fn wait_awake(&mut self, idle: bool) -> Waited<usize> {
        if !matches!(self.state, State::Header) {
            return Waited::Sleep;
        }
        self.waited = true;
        if !(idle && self.socket.is_plain() && self.has_room() && self.shard.operations.is_idle()) {
            return Waited::Sleep;
        }
        let room = self.intake.room(self.receive_limit);
        self.spin.wait(|| self.socket.try_receive(room))
    }

    /// Takes no more requests. What is in flight ends, and its replies are sent.
    fn finish(&mut self, end: End) {
        self.end.get_or_insert(end);
        if let State::Payload { request, .. } = std::mem::replace(&mut self.state, State::Header) {
            request.abandon();
        }
    }

    /// Ends the connection without another byte to or from the peer. What is in flight still ends.
    fn cut(&mut self, end: End) {
        self.finish(end);
        self.shared.outbox.borrow_mut().close();
        // The peer must not wait for us to wait for a disk. Where it fails, it is gone already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
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

    /// One connection's share of the memory: a quarter, or one request.
    fn may_hold(&self, len: u32) -> bool {
        let held = self.shared.held_bytes();
        held == 0 || held + u64::from(len) <= self.shard.options.limits.memory_bytes / 4
    }

    fn receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let State::Payload { buf, filled, .. } = &mut self.state {
            let received = self.socket.poll_read(cx, &mut buf[*filled..]);
            if let Poll::Ready(Ok(len)) = received {
                *filled += len;
                self.stall.moved(len);
            }
            return received;
        }
        let received = self.socket.poll_read(cx, self.intake.room(self.receive_limit));
        if let Poll::Ready(Ok(len)) = received {
            self.intake.received(len);
        }
        received
    }

    /// Sends what is queued; whether anything was.
    fn send(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut any = false;
        loop {
            let sent = self.shared.outbox.borrow_mut().send(&mut self.socket)?;
            self.socket.try_flush()?;
            any |= sent > 0;
            self.stall.moved(sent);
            if self.is_sent() {
                return Ok(any);
            }
            match self.socket.poll_writable(cx) {
                Poll::Ready(result) => result?,
                Poll::Pending => return Ok(any),
            }
        }
    }

    /// Takes requests from what was received until something is missing.
    fn take_requests(&mut self, cx: &mut Context<'_>) -> Taken {
        loop {
            if self.shared.gave_up() {
                return Taken::Ended(End::Stopping);
            }
            match std::mem::replace(&mut self.state, State::Header) {
                State::Header => {
                    if self.control.is_stopping() && self.shard.options.late_requests == LateRequests::Leave {
                        return Taken::Ended(End::Stopping);
                    }
                    if self.is_full() {
                        return Taken::NeedsRoom;
                    }
                    match RequestHeader::at_front(self.intake.bytes(), self.admission.replies) {
                        Ok(Some(header)) => {
                            if let Some(taken) = self.take_request(header) {
                                return taken;
                            }
                        }
                        Ok(None) => return Taken::NeedsBytes,
                        Err(NotARequest) => return Taken::Ended(End::NotARequest),
                    }
                }
                State::Memory { header, then, bytes, mut allowance } => {
                    let granted =
                        if self.may_hold(bytes) { allowance.as_mut().poll(cx) } else { Poll::Pending };
                    match granted {
                        Poll::Ready(allowance) => self.begin(header, then, Some((bytes, allowance))),
                        Poll::Pending => {
                            self.state = State::Memory { header, then, bytes, allowance };
                            return Taken::NeedsRoom;
                        }
                    }
                }
                State::Payload { request, fua, mut buf, mut filled, written } => {
                    filled += self.intake.move_into(&mut buf[filled..]);
                    let written = written.go_on(&*self.reads.device, request.header.offset, &buf, filled);
                    if filled < buf.len() {
                        self.state = State::Payload { request, fua, buf, filled, written };
                        return Taken::NeedsBytes;
                    }
                    if written.is_all_of(&buf) {
                        request.finish(Ok(()));
                        continue;
                    }
                    let device = Rc::clone(&self.reads.device);
                    tokio::task::spawn_local(perform::write(device, request, buf, fua));
                }
                State::Skip { header, left, errno } => {
                    let skipped = left.min(self.intake.bytes().len());
                    self.intake.consume(skipped);
                    if skipped < left {
                        self.state = State::Skip { header, left: left - skipped, errno };
                        return Taken::NeedsBytes;
                    }
                    self.shared.reply(&self.shared.encoder.refused(&header, errno));
                }
            }
        }
    }

    /// Takes the request at the front of the intake; `None` where the next one can be taken.
    fn take_request(&mut self, header: RequestHeader) -> Option<Taken> {
        let style = self.admission.replies;
        let mut verdict = self.admission.check(&header);
        if self.control.is_stopping() && matches!(verdict, Verdict::Perform(_) | Verdict::Filter { .. }) {
            verdict = Verdict::Refuse(Errno::Shutdown);
        }
        match verdict {
            Verdict::Perform(Command::Write { fua: false }) if header.len <= Intake::INLINE_BYTES as u64 => {
                return self.take_small_write(header);
            }
            Verdict::Perform(command) => {
                self.intake.consume(style.request_bytes());
                self.perform(header, command);
            }
            Verdict::Filter { one } => return self.take_filter(header, one),
            Verdict::Nothing => {
                // A length of nothing may still be that of a payload: of nothing.
                self.intake.consume(style.request_bytes());
                self.shared.reply(&self.shared.encoder.done(&header));
            }
            Verdict::Refuse(errno) => {
                self.intake.consume(style.request_bytes());
                self.state = State::Skip { header, left: header.payload_len(style) as usize, errno };
            }
            Verdict::Disconnect => return Some(Taken::Ended(End::Disconnected)),
            Verdict::TooLong => return Some(Taken::Ended(End::PayloadTooLong)),
        }
        None
    }

    /// A WRITE whose payload fits beside its header: the device takes it from there, if it can at once.
    fn take_small_write(&mut self, header: RequestHeader) -> Option<Taken> {
        self.receive_limit = usize::MAX;
        let head = self.admission.replies.request_bytes();
        let whole = head + header.len as usize;
        let Some(message) = self.intake.bytes().get(..whole) else { return Some(Taken::NeedsBytes) };
        let encoder = self.shared.encoder;
        match self.reads.device.try_write(header.offset, &message[head..]) {
            Ok(Attempt::Done) => {
                self.intake.consume(whole);
                self.shared.reply(&encoder.done(&header));
            }
            // Of a write no device says that it is zeroes; one that does is given it again.
            Ok(Attempt::WouldWait | Attempt::Zeroes) => {
                self.intake.consume(head);
                self.with_memory(header, data_bytes(&header), Then::Receive { fua: false });
            }
            Err(error) => {
                self.intake.consume(whole);
                self.shared.fail(&header, &error);
            }
        }
        None
    }

    /// A BLOCK_STATUS whose payload names the contexts. It is so short that it is waited for where it stands.
    fn take_filter(&mut self, header: RequestHeader, one: bool) -> Option<Taken> {
        self.receive_limit = usize::MAX;
        let head = self.admission.replies.request_bytes();
        let whole = head + header.len as usize;
        let Some(message) = self.intake.bytes().get(..whole) else { return Some(Taken::NeedsBytes) };
        let filtered = self.admission.filter(&header, &message[head..], &self.contexts);
        self.intake.consume(whole);
        match filtered {
            Ok((header, contexts)) => self.block_status(header, one, contexts.into()),
            Err(errno) => self.shared.reply(&self.shared.encoder.refused(&header, errno)),
        }
        None
    }

    fn perform(&mut self, header: RequestHeader, command: Command) {
        match command {
            Command::Read { whole } => match self.reads.at_once(&header, whole, &self.shared) {
                Plan::Answered => {}
                Plan::Fetch => self.with_memory(header, data_bytes(&header), Then::Fetch),
                Plan::FindHoles => self.with_memory(header, data_bytes(&header), Then::FindHoles),
            },
            Command::Write { fua } => {
                if header.len > Intake::INLINE_BYTES as u64 {
                    self.receive_limit = SHORT_RECEIVE_BYTES;
                }
                self.with_memory(header, data_bytes(&header), Then::Receive { fua });
            }
            Command::BlockStatus { one } => self.block_status(header, one, Rc::clone(&self.contexts)),
            _ => self.begin(header, Then::Control { command }, None),
        }
    }

    fn block_status(&mut self, header: RequestHeader, one: bool, contexts: Rc<[SelectedContext]>) {
        let bytes = status::reply_bytes(contexts.len(), one, self.admission.replies);
        let then = Then::Status { one, contexts };
        match bytes {
            Some(bytes) => self.with_memory(header, bytes, then),
            None => self.begin(header, then, None),
        }
    }

    /// Goes on with the request once there is memory for its data.
    fn with_memory(&mut self, header: RequestHeader, bytes: u32, then: Then) {
        let now = if self.may_hold(bytes) { self.shard.budget.try_take(bytes) } else { None };
        match now {
            Some(allowance) => self.begin(header, then, Some((bytes, allowance))),
            None => {
                let allowance = Box::pin(self.shard.budget.take(bytes));
                self.state = State::Memory { header, then, bytes, allowance };
            }
        }
    }

    fn begin(&mut self, header: RequestHeader, then: Then, allowance: Option<(u32, Allowance)>) {
        let waited = std::mem::take(&mut self.waited);
        let request = Request::begin(header, &self.shared, allowance);
        let reads = Rc::clone(&self.reads);
        match then {
            Then::Fetch => {
                tokio::task::spawn_local(reads.fetch(request));
            }
            Then::FindHoles => {
                tokio::task::spawn_local(reads.find_holes(request));
            }
            Then::Receive { fua } => {
                let buf = perform::buffer(header.len as usize);
                // Who has more in flight, or company, is served faster by writing beside the receiving.
                let is_alone = waited && self.shared.in_flight() == 1 && self.has_room();
                let written = if is_alone && !fua { Written::SoFar(0) } else { Written::AsAWhole };
                self.state = State::Payload { request, fua, buf, filled: 0, written };
            }
            Then::Control { command } => {
                let (device, control) = (Rc::clone(&reads.device), Rc::clone(&self.control));
                tokio::task::spawn_local(perform::control(device, request, command, control));
            }
            Then::Status { one, contexts } => {
                let device = Rc::clone(&reads.device);
                tokio::task::spawn_local(status::answer(device, request, one, contexts));
            }
        }
    }
}
