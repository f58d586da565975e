//! A request that became a task: it is counted until its reply is sent or thrown away, and it is
//! answered whatever happens to its task.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Instant;

use block::ByteRange;
use proto::server::ReplyEncoder;
use proto::wire::{Cut, Errno, RequestHeader};

use super::end::End;
use super::outbox::Outbox;
use super::perform;
use crate::LateRequests;
use crate::budget::Allowance;
use crate::log_limit::LogLimits;
use crate::shard::Operations;

/// What a connection shares with the tasks of its requests.
pub(super) struct Shared {
    pub(super) outbox: RefCell<Outbox>,
    pub(super) encoder: ReplyEncoder,
    /// What errors call the disk.
    export: String,
    late_requests: LateRequests,
    tasks: Cell<usize>,
    held: Cell<usize>,
    held_bytes: Cell<u64>,
    /// A reply was left out, or broken off: the connection must end instead.
    gave_up: RefCell<Option<End>>,
    logs: Arc<LogLimits>,
    waker: RefCell<Option<Waker>>,
    operations: Rc<Operations>,
}

impl Shared {
    pub(super) fn new(
        encoder: ReplyEncoder,
        export: String,
        late_requests: LateRequests,
        operations: Rc<Operations>,
        logs: Arc<LogLimits>,
    ) -> Rc<Self> {
        Rc::new(Self {
            outbox: RefCell::default(),
            encoder,
            export,
            late_requests,
            tasks: Cell::new(0),
            held: Cell::new(0),
            held_bytes: Cell::new(0),
            gave_up: RefCell::new(None),
            logs,
            waker: RefCell::default(),
            operations,
        })
    }

    /// How many tasks are running.
    pub(super) fn tasks(&self) -> usize {
        self.tasks.get()
    }

    /// How many requests have a task or a reply that holds memory.
    pub(super) fn in_flight(&self) -> usize {
        self.held.get()
    }

    /// The memory of these requests, in bytes.
    pub(super) fn held_bytes(&self) -> u64 {
        self.held_bytes.get()
    }

    /// Whether nothing that is answered reaches the client any more.
    pub(super) fn is_closed(&self) -> bool {
        self.outbox.borrow().is_closed()
    }

    /// How the connection must end, if it must.
    pub(super) fn gave_up(&self) -> Option<End> {
        self.gave_up.borrow_mut().take()
    }

    /// Has the connection end like this.
    pub(super) fn give_up(&self, end: End) {
        self.gave_up.borrow_mut().get_or_insert(end);
    }

    /// Has the connection's task be woken when something changed here.
    pub(super) fn listen(&self, cx: &Context<'_>) {
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
    }

    /// Has the connection's task look at what changed here.
    pub(super) fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    fn log_failure(&self, header: &RequestHeader, error: &block::Error) {
        let RequestHeader { kind, offset, len, .. } = header;
        // What a client can provoke at will is worth no warning at all.
        let provoked = matches!(error.kind(), block::ErrorKind::Unsupported | block::ErrorKind::InvalidRange);
        let export = Cut(&self.export);
        let admitted = if provoked { None } else { self.logs.request.admit(Instant::now()) };
        match admitted {
            Some(left_out) => {
                tracing::warn!(%export, ?kind, offset, len, %error, left_out, "a request failed");
            }
            None => tracing::debug!(%export, ?kind, offset, len, %error, "a request failed"),
        }
    }

    /// Queues a short reply.
    pub(super) fn reply(&self, bytes: &[u8]) {
        self.outbox.borrow_mut().put(bytes);
    }

    /// Answers that a request failed, why, and where, as far as the device tells. Where late requests are left to a
    /// client that reconnects, what the device gave up because it is ending is left too.
    pub(super) fn fail(&self, header: &RequestHeader, error: &block::Error) {
        let errno = errno(error);
        if errno == Errno::Shutdown && self.late_requests == LateRequests::Leave {
            self.give_up(End::Stopping);
            return;
        }
        self.log_failure(header, error);
        if errno == Errno::NoSpace {
            self.logs.lacks_room(&self.export);
        }
        let offset = error.range().and_then(|range| first_within(header, range));
        let why =
            if self.export.is_empty() { error.to_string() } else { format!("{}: {error}", self.export) };
        self.reply(&self.encoder.failed(header, errno, offset, &why));
    }
}

/// What a request holds until its reply is sent: its place in the connection, and its memory.
pub(super) struct Held {
    shared: Rc<Shared>,
    bytes: u64,
    _allowance: Option<Allowance>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.held.set(shared.held.get() - 1);
        shared.held_bytes.set(shared.held_bytes.get() - self.bytes);
    }
}

impl Held {
    fn new(shared: &Rc<Shared>, allowance: Option<(u32, Allowance)>) -> Rc<Self> {
        let (bytes, allowance) = match allowance {
            Some((bytes, allowance)) => (u64::from(bytes), Some(allowance)),
            None => (0, None),
        };
        shared.held.set(shared.held.get() + 1);
        shared.held_bytes.set(shared.held_bytes.get() + bytes);
        Rc::new(Self { shared: Rc::clone(shared), bytes, _allowance: allowance })
    }
}

/// A request under way in a task of its own.
pub(super) struct Request {
    pub(super) header: RequestHeader,
    pub(super) shared: Rc<Shared>,
    held: Rc<Held>,
    answered: bool,
    /// A part of its reply is queued, and can be followed by the rest alone.
    promised: bool,
}

impl Request {
    /// Counts the request, with the memory that it was allowed.
    pub(super) fn begin(
        header: RequestHeader,
        shared: &Rc<Shared>,
        allowance: Option<(u32, Allowance)>,
    ) -> Self {
        shared.tasks.set(shared.tasks.get() + 1);
        shared.operations.begin();
        let held = Held::new(shared, allowance);
        Self { header, shared: Rc::clone(shared), held, answered: false, promised: false }
    }

    /// What keeps the request counted while its data is queued.
    pub(super) fn held(&self) -> Rc<Held> {
        Rc::clone(&self.held)
    }

    /// What counts the memory of a part of its data until that is sent.
    pub(super) fn hold_part(&self, bytes: u32, allowance: Allowance) -> Rc<Held> {
        Held::new(&self.shared, Some((bytes, allowance)))
    }

    /// From now on its reply goes on as it began, or the connection ends.
    pub(super) const fn promise(&mut self) {
        self.promised = true;
    }

    /// Gives it up unanswered: the connection ends in the middle of it.
    pub(super) fn abandon(mut self) {
        self.answered = true;
    }

    /// Answers with whatever `put` queues.
    pub(super) fn answer(mut self, put: impl FnOnce(&mut Outbox, &Self)) {
        self.answered = true;
        let shared = Rc::clone(&self.shared);
        put(&mut shared.outbox.borrow_mut(), &self);
    }

    /// Answers that it was done, or why not.
    pub(super) fn finish(self, result: block::Result<()>) {
        match result {
            Ok(()) => {
                let done = self.shared.encoder.done(&self.header);
                self.answer(|outbox, _| outbox.put(&done));
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Answers that it failed.
    pub(super) fn fail(mut self, error: &block::Error) {
        self.answered = true;
        self.shared.fail(&self.header, error);
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if !self.answered && self.promised {
            self.shared.give_up(End::File(io::Error::other("the task that read it panicked")));
        } else if !self.answered {
            // Its task panicked. The client must not wait for ever.
            let failed = self.shared.encoder.refused(&self.header, Errno::Io);
            if let Ok(mut outbox) = self.shared.outbox.try_borrow_mut() {
                outbox.put(&failed);
            }
        }
        self.shared.tasks.set(self.shared.tasks.get() - 1);
        self.shared.operations.end();
        self.shared.wake();
    }
}

/// Where `range` begins within the request; `None` where it lies elsewhere, which would be no place in the reply.
fn first_within(header: &RequestHeader, range: ByteRange) -> Option<u64> {
    let within = range.intersection(perform::range(header));
    (!within.is_empty()).then(|| within.start())
}

/// The one place where a device's error becomes one of the protocol's.
const fn errno(error: &block::Error) -> Errno {
    use block::ErrorKind;
    match error.kind() {
        ErrorKind::InvalidRange => Errno::Invalid,
        ErrorKind::NoSpace => Errno::NoSpace,
        ErrorKind::NotPermitted => Errno::NotPermitted,
        ErrorKind::Unsupported => Errno::NotSupported,
        ErrorKind::Shutdown => Errno::Shutdown,
        // Damage, a failed sync, and whatever else comes.
        _ => Errno::Io,
    }
}
