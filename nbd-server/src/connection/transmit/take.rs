//! Requests as they come: what the bytes of a connection are, and what becomes of them.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use block::{AlignedBuf, Attempt};
use proto::server::{Command, Verdict};
use proto::wire::{Errno, NotARequest, RequestHeader, SelectedContext};
use tokio::sync::oneshot;

use super::Transmission;
use super::memory::Waiting;
use crate::LateRequests;
use crate::budget::Allowance;
use crate::connection::ahead::Written;
use crate::connection::end::End;
use crate::connection::intake::Intake;
use crate::connection::parts;
use crate::connection::read::Plan;
use crate::connection::request::Request;
use crate::connection::{perform, status};

/// How much is received after a long payload, which goes straight into its buffer: the next header, and little of what follows.
const SHORT_RECEIVE_BYTES: usize = 4 << 10;

/// What the bytes that come next are.
pub(super) enum State {
    /// A request's header.
    Header,
    /// Whatever they are, they are not looked at before there is memory for a request.
    Memory(Waiting),
    /// The payload of a WRITE.
    Payload { request: Request, fua: bool, buf: AlignedBuf, filled: usize, written: Written },
    /// The payload of a WRITE in parts: of one of them.
    Part(parts::Write),
    /// A part is written, and so many bytes of the payload come after it.
    Writing { written: oneshot::Receiver<parts::Written>, left: usize },
    /// A READ is answered in parts, and nothing is taken before it has ended.
    Reading,
    /// The payload of a request that failed.
    Skip { left: usize, then: Failure },
}

/// How a request is answered whose payload is skipped.
pub(super) enum Failure {
    Refused(RequestHeader, Errno),
    Failed(RequestHeader, block::Error),
    /// It was answered already.
    Answered,
}

/// What a request with memory does.
pub(super) enum Then {
    /// `whole` where the client wants one chunk.
    Fetch {
        whole: bool,
    },
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
pub(super) enum Taken {
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

impl Transmission {
    /// Takes requests from what was received until something is missing.
    pub(super) fn take_requests(&mut self, cx: &mut Context<'_>) -> Taken {
        loop {
            if let Some(end) = self.shared.gave_up() {
                return Taken::Ended(end);
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
                State::Memory(waiting) => {
                    if let Some(waiting) = self.go_on_with_memory(cx, waiting) {
                        self.state = State::Memory(waiting);
                        return Taken::NeedsRoom;
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
                State::Part(mut write) => {
                    let taken = self.intake.move_into(write.room());
                    write.received(taken);
                    if !write.room().is_empty() {
                        self.state = State::Part(write);
                        return Taken::NeedsBytes;
                    }
                    let left = write.left();
                    self.state = State::Writing { written: write.write(Rc::clone(&self.reads.device)), left };
                }
                State::Writing { mut written, left } => match Pin::new(&mut written).poll(cx) {
                    Poll::Pending => {
                        self.state = State::Writing { written, left };
                        return Taken::NeedsRoom;
                    }
                    Poll::Ready(Ok((write, Ok(())))) if left == 0 => write.request.finish(Ok(())),
                    Poll::Ready(Ok((write, Ok(())))) => self.state = State::Part(write.next()),
                    Poll::Ready(Ok((write, Err(error)))) => {
                        let then = Failure::Failed(write.request.header, error);
                        write.request.abandon();
                        self.state = State::Skip { left, then };
                    }
                    // Its task panicked.
                    Poll::Ready(Err(_)) => self.state = State::Skip { left, then: Failure::Answered },
                },
                State::Reading => {
                    if self.shared.tasks() > 0 {
                        self.state = State::Reading;
                        return Taken::NeedsRoom;
                    }
                }
                State::Skip { left, then } => {
                    let skipped = left.min(self.intake.bytes().len());
                    self.intake.consume(skipped);
                    if skipped < left {
                        self.state = State::Skip { left: left - skipped, then };
                        return Taken::NeedsBytes;
                    }
                    match then {
                        Failure::Refused(header, errno) => {
                            self.shared.reply(&self.shared.encoder.refused(&header, errno));
                        }
                        Failure::Failed(header, error) => self.shared.fail(&header, &error),
                        Failure::Answered => {}
                    }
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
                let left = header.payload_len(style) as usize;
                self.state = State::Skip { left, then: Failure::Refused(header, errno) };
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
        let Some(message) = self.intake.message(whole) else { return Some(Taken::NeedsBytes) };
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
        let Some(message) = self.intake.message(whole) else { return Some(Taken::NeedsBytes) };
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
                Plan::Fetch => self.with_memory(header, data_bytes(&header), Then::Fetch { whole }),
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

    pub(super) fn begin(&mut self, header: RequestHeader, then: Then, allowance: Option<(u32, Allowance)>) {
        let request = Request::begin(header, &self.shared, allowance);
        let reads = Rc::clone(&self.reads);
        match then {
            Then::Fetch { .. } => {
                tokio::task::spawn_local(reads.fetch(request));
            }
            Then::FindHoles => {
                tokio::task::spawn_local(reads.find_holes(request));
            }
            Then::Receive { fua } => {
                let buf = perform::buffer(header.len as usize);
                let written = if fua { Written::AsAWhole } else { Written::SoFar(0) };
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
