//! How a shard tells its connections that the server is ending.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

use crate::server::Phase;

/// What a shard tells all of its connections.
pub(crate) struct Control {
    phase: Cell<Phase>,
    waiting: RefCell<Vec<Waker>>,
}

impl Default for Control {
    fn default() -> Self {
        Self { phase: Cell::new(Phase::Running), waiting: RefCell::default() }
    }
}

impl Control {
    /// Enters a phase and tells everybody who listens.
    pub(crate) fn enter(&self, phase: Phase) {
        if phase > self.phase.replace(phase) {
            for waker in self.waiting.take() {
                waker.wake();
            }
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.phase.get() >= Phase::Stopping
    }

    pub(crate) fn is_aborting(&self) -> bool {
        self.phase.get() >= Phase::Aborting
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase.get()
    }

    /// Has the task be woken when the next phase is entered.
    pub(crate) fn listen(&self, cx: &Context<'_>) {
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
    }

    /// Takes the task from those who listen.
    pub(crate) fn forget(&self, waker: &Waker) {
        self.waiting.borrow_mut().retain(|other| !other.will_wake(waker));
    }

    /// Waits until the server is ending.
    pub(crate) async fn stopping(&self) {
        poll_fn(|cx| {
            if self.is_stopping() {
                return Poll::Ready(());
            }
            self.listen(cx);
            Poll::Pending
        })
        .await;
    }
}
