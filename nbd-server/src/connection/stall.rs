//! A peer that neither takes its replies nor sends the payload that it announced: how long it is waited for.
//!
//! Whoever waits for memory decides: then the peer must move something worth the name within the patience. Where nobody does, it
//! costs its bounded buffers alone. It may be a virtual machine whose process is stopped, so it is closed only in the end.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use crate::Limits;
use crate::budget::Mark;

/// Less than this within the patience is nothing: a byte a second would hold memory for ever.
const LEAST_BYTES: u64 = 64 << 10;

/// How long one connection's peer is waited for. The timer is kept from one wait to the next, so that a wait costs no more than a look
/// at the clock.
#[derive(Debug, Default)]
pub(super) struct Stall {
    wait: Option<Wait>,
    timer: Option<Pin<Box<Sleep>>>,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    /// When something moved last.
    since: Instant,
    window: Instant,
    moved: u64,
    /// The beginning of the window, for the budget.
    mark: Mark,
}

/// A peer was waited for in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stalled {
    /// Nobody needed what it holds, and still it took too long: so long.
    Timeout(Duration),
    /// Others waited for the memory that it holds: so long.
    Wanted(Duration),
}

impl fmt::Display for Stalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout(waited) => write!(f, "for {} s (--stall-timeout)", waited.as_secs_f64().round()),
            Self::Wanted(waited) => {
                let waited = waited.as_secs_f64().round();
                write!(
                    f,
                    "for {waited} s in which others waited for the memory of its requests, or the connection was ending"
                )
            }
        }
    }
}

impl Stall {
    /// Nothing is waited for.
    pub(super) fn end(&mut self) {
        self.wait = None;
    }

    /// The peer took or sent so much of what is waited for.
    pub(super) fn moved(&mut self, bytes: usize) {
        if let Some(wait) = self.wait.as_mut().filter(|_| bytes > 0) {
            wait.moved += bytes as u64;
            wait.since = Instant::now();
        }
    }

    /// Waits, from the first call after [`Stall::end`] on. Ready where the connection is to be closed; has the task be
    /// woken when that may be. `mark` is now, and `is_wanted` whether others wanted what the peer holds since such a moment.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        limits: &Limits,
        mark: Mark,
        is_wanted: impl Fn(Mark) -> bool,
    ) -> Poll<Stalled> {
        let now = Instant::now();
        let wait = self.wait.get_or_insert(Wait { since: now, window: now, moved: 0, mark });
        loop {
            let deadline = (wait.window + limits.patience_when_wanted).min(wait.since + limits.stall_timeout);
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            if now >= deadline {
                let is_slow = wait.moved < LEAST_BYTES;
                if now >= wait.since + limits.stall_timeout {
                    return Poll::Ready(Stalled::Timeout(now - wait.since));
                }
                if is_slow && is_wanted(wait.mark) {
                    return Poll::Ready(Stalled::Wanted(now - wait.window));
                }
                (wait.window, wait.moved, wait.mark) = (now, 0, mark);
            } else {
                // It was set for an earlier wait.
                timer.as_mut().reset(deadline);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);
    const TIMEOUT: Duration = Duration::from_secs(3600);

    fn limits() -> Limits {
        Limits { patience_when_wanted: PATIENCE, stall_timeout: TIMEOUT, ..Limits::default() }
    }

    async fn stalled(stall: &mut Stall, is_wanted: bool) -> Option<Stalled> {
        poll_fn(|cx| match stall.poll(cx, &limits(), Mark::default(), |_| is_wanted) {
            Poll::Ready(stalled) => Poll::Ready(Some(stalled)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }

    async fn is_closed(stall: &mut Stall, is_wanted: bool) -> bool {
        stalled(stall, is_wanted).await.is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_memory_waits_for_the_patience_and_others_for_the_timeout() {
        let mut stall = Stall::default();
        assert!(!is_closed(&mut stall, true).await);
        tokio::time::advance(PATIENCE - Duration::from_millis(10)).await;
        assert!(!is_closed(&mut stall, true).await);
        tokio::time::advance(Duration::from_millis(20)).await;
        let why = stalled(&mut stall, true).await.unwrap();
        assert!(why.to_string().starts_with("for 30 s in which others waited"), "{why}");
        let mut stall = Stall::default();
        for _ in 0..TIMEOUT.as_secs() / 60 {
            assert!(!is_closed(&mut stall, false).await);
            tokio::time::advance(Duration::from_secs(60)).await;
        }
        tokio::time::advance(Duration::from_millis(20)).await;
        let why = stalled(&mut stall, false).await.unwrap();
        assert_eq!(why.to_string(), "for 3600 s (--stall-timeout)");
    }

    #[tokio::test(start_paused = true)]
    async fn a_trickle_is_nothing_to_who_waits_and_enough_where_nobody_does() {
        let (mut wanted, mut unwanted) = (Stall::default(), Stall::default());
        let mut closed = false;
        for _ in 0..2 * TIMEOUT.as_secs() / 10 {
            closed |= is_closed(&mut wanted, true).await;
            assert!(!is_closed(&mut unwanted, false).await);
            wanted.moved(10);
            unwanted.moved(10);
            tokio::time::advance(Duration::from_secs(10)).await;
        }
        assert!(closed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_ended_says_nothing_of_the_next() {
        let mut stall = Stall::default();
        for _ in 0..10 {
            assert!(!is_closed(&mut stall, true).await);
            tokio::time::advance(PATIENCE / 2).await;
            stall.end();
        }
        for _ in 0..10 {
            assert!(!is_closed(&mut stall, true).await);
            stall.moved(LEAST_BYTES as usize);
            tokio::time::advance(PATIENCE + Duration::from_millis(20)).await;
        }
    }
}
