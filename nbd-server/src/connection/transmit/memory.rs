//! The memory that a request needs before it begins.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use proto::wire::RequestHeader;
use tokio::time::{Sleep, sleep};

use super::Transmission;
use super::take::{State, Then};
use crate::budget::{Allowance, Budget};
use crate::connection::parts::{self, InParts};
use crate::connection::request::Request;

/// For how long common memory is waited for: where others make use of it, as much comes back in less.
const WAIT_FOR_COMMON: Duration = Duration::from_millis(30);

/// A request for which there was no memory.
pub(super) struct Waiting {
    header: RequestHeader,
    then: Then,
    bytes: u32,
    allowance: Pin<Box<dyn Future<Output = Allowance>>>,
    /// How long it still waits for others, where it does.
    patience: Option<Patience>,
}

/// How long common memory is waited for.
struct Patience {
    timer: Pin<Box<Sleep>>,
    /// What had been given back of it when the waiting began.
    given_back: u64,
}

impl Patience {
    fn new(budget: &Budget) -> Self {
        Self { timer: Box::pin(sleep(WAIT_FOR_COMMON)), given_back: budget.given_back() }
    }

    /// Whether it has come to its end, and less than `bytes` came back meanwhile.
    fn is_in_vain(&mut self, cx: &mut Context<'_>, budget: &Budget, bytes: u32) -> bool {
        while self.timer.as_mut().poll(cx).is_ready() {
            if budget.given_back() - self.given_back < u64::from(bytes) {
                return true;
            }
            *self = Self::new(budget);
        }
        false
    }
}

impl Transmission {
    /// Goes on with the request once there is memory for its data.
    pub(super) fn with_memory(&mut self, header: RequestHeader, bytes: u32, then: Then) {
        let of_common = || if self.may_hold(bytes) { self.shard.budget.try_take(bytes) } else { None };
        match self.share.try_take(bytes).or_else(of_common) {
            Some(allowance) => self.begin(header, then, Some((bytes, allowance))),
            None => {
                let allowance = Box::pin(self.shard.budget.take(bytes));
                self.state = State::Memory(Waiting { header, then, bytes, allowance, patience: None });
            }
        }
    }

    /// Begins what waited if there is memory for it now, or if it need not wait for as much any more; it is given back where it waits on.
    pub(super) fn go_on_with_memory(
        &mut self,
        cx: &mut Context<'_>,
        mut waiting: Waiting,
    ) -> Option<Waiting> {
        let bytes = waiting.bytes;
        let of_common =
            if self.may_hold(bytes) { waiting.allowance.as_mut().poll(cx) } else { Poll::Pending };
        let granted = match of_common {
            Poll::Ready(allowance) => Some(allowance),
            // What it waited for before may have been its own.
            Poll::Pending => self.share.try_take(bytes),
        };
        if let Some(allowance) = granted {
            self.begin(waiting.header, waiting.then, Some((bytes, allowance)));
            return None;
        }
        if !self.waits_for_others(bytes) {
            waiting.patience = None;
        } else if self.waits_in_vain(cx, &mut waiting.patience, bytes) {
            match self.begin_in_parts(waiting.header, bytes, waiting.then) {
                Ok(()) => return None,
                // Its own memory is yet to be sent, which wakes this task.
                Err(then) => waiting.then = then,
            }
        }
        Some(waiting)
    }

    /// The most memory of one connection: a quarter, or one request.
    fn may_hold(&self, len: u32) -> bool {
        let held = self.shared.held_bytes();
        held == 0 || held + u64::from(len) <= self.shard.options.limits.memory_bytes / 4
    }

    /// Whether a request that waits for memory waits for what others hold, and not for what its own connection does.
    fn waits_for_others(&self, bytes: u32) -> bool {
        self.shared.tasks() == 0 && self.may_hold(bytes)
    }

    /// Whether others have given back too little for a while, or nothing since somebody else found so.
    fn waits_in_vain(&self, cx: &mut Context<'_>, patience: &mut Option<Patience>, bytes: u32) -> bool {
        let budget = &self.shard.budget;
        if budget.is_stuck() {
            return true;
        }
        let is_in_vain = patience.get_or_insert_with(|| Patience::new(budget)).is_in_vain(cx, budget, bytes);
        if is_in_vain {
            budget.get_stuck();
        }
        is_in_vain
    }

    /// Goes on with a request in parts; what it does is given back where that cannot be, or not now.
    fn begin_in_parts(&mut self, header: RequestHeader, bytes: u32, then: Then) -> Result<(), Then> {
        let Some(part_bytes) = self.share.part_bytes() else { return Err(then) };
        let in_parts = InParts::new(self.share.clone(), part_bytes);
        let (find_holes, whole) = match then {
            Then::Fetch { whole } => (false, whole),
            Then::FindHoles => (true, false),
            Then::Receive { fua } => {
                let Some(allowance) = self.share.try_take(part_bytes) else { return Err(then) };
                let request = Request::begin(header, &self.shared, Some((part_bytes, allowance)));
                self.shard.budget.go_without(bytes);
                self.state = State::Part(parts::Write::new(request, fua, in_parts));
                return Ok(());
            }
            Then::Control { .. } | Then::Status { .. } => return Err(then),
        };
        let request = Request::begin(header, &self.shared, None);
        let reads = Rc::clone(&self.reads);
        self.shard.budget.go_without(bytes);
        tokio::task::spawn_local(parts::read(reads, request, in_parts, find_holes, whole));
        self.state = State::Reading;
        Ok(())
    }
}
