//! Waiting for several futures on one thread, without a runtime.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::task::Poll;

/// Runs the futures that `items` become, at most `most` at once; the results in the items' order.
pub(super) async fn join_each<I, F, T>(items: Vec<I>, most: usize, mut begin: impl FnMut(I) -> F) -> Vec<T>
where
    F: Future<Output = T>,
{
    let mut waiting: VecDeque<(usize, I)> = items.into_iter().enumerate().collect();
    let mut results: Vec<Option<T>> = (0..waiting.len()).map(|_| None).collect();
    let mut running: Vec<(usize, Pin<Box<F>>)> = Vec::new();
    std::future::poll_fn(|cx| {
        loop {
            while running.len() < most.max(1)
                && let Some((index, item)) = waiting.pop_front()
            {
                running.push((index, Box::pin(begin(item))));
            }
            let before = running.len();
            running.retain_mut(|(index, future)| match future.as_mut().poll(cx) {
                Poll::Ready(result) => {
                    results[*index] = Some(result);
                    false
                }
                Poll::Pending => true,
            });
            if running.is_empty() && waiting.is_empty() {
                return Poll::Ready(());
            }
            if running.len() == before || waiting.is_empty() {
                return Poll::Pending;
            }
        }
    })
    .await;
    results.into_iter().map(|result| result.expect("every future has ended")).collect()
}

/// Ends when either does. Only for futures that may be dropped: timers and notices, never I/O.
pub(super) async fn first_of(a: impl Future<Output = ()>, b: impl Future<Output = ()>) {
    let (mut a, mut b) = (pin!(a), pin!(b));
    std::future::poll_fn(|cx| {
        if a.as_mut().poll(cx).is_ready() || b.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        Poll::Pending
    })
    .await;
}

/// The future's result, or `None` where the timer ends before it: it goes on when it is polled again.
pub(super) async fn before<T>(
    future: &mut (impl Future<Output = T> + Unpin),
    timer: impl Future<Output = ()>,
) -> Option<T> {
    let mut timer = pin!(timer);
    std::future::poll_fn(|cx| match Pin::new(&mut *future).poll(cx) {
        Poll::Ready(result) => Poll::Ready(Some(result)),
        Poll::Pending => timer.as_mut().poll(cx).map(|()| None),
    })
    .await
}

#[cfg(test)]
mod tests {
    use block::sim::{Executor, yield_now};

    use super::*;

    #[test]
    fn results_come_in_order_and_no_more_run_at_once_than_allowed() {
        let mut executor = Executor::new(3);
        let results = executor.block_on(10_000, async {
            let running = std::cell::Cell::new(0);
            let running = &running;
            join_each((0..20).collect(), 4, |item: u64| async move {
                running.set(running.get() + 1);
                assert!(running.get() <= 4);
                for _ in 0..(item * 7) % 5 {
                    yield_now().await;
                }
                running.set(running.get() - 1);
                item
            })
            .await
        });
        assert_eq!(results, (0..20).collect::<Vec<_>>());
    }
}
