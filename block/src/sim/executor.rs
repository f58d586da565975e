//! Runs tasks on the calling thread, one poll at a time, the next one chosen at random.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use parking_lot::Mutex;

use super::Rng;

type BoxedTask = Pin<Box<dyn Future<Output = ()>>>;

/// Why a run of the executor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Every task has ended.
    Finished,
    /// Tasks are left, and none of them can go on: a deadlock, unless somebody outside wakes them.
    Stuck,
    /// The number of steps was used up.
    Limit,
}

/// A deterministic executor. Dropping it drops every task where it stands, as a kill would.
#[derive(Debug)]
pub struct Executor {
    spawner: Spawner,
    tasks: Vec<Option<Task>>,
    unfinished: usize,
    queue: Arc<Queue>,
    rng: Rng,
    steps: u64,
}

/// Starts tasks, from inside a task too.
#[derive(Clone, Default)]
pub struct Spawner(Rc<RefCell<Vec<BoxedTask>>>);

/// The result of a spawned task, to be awaited or looked at.
#[derive(Debug)]
pub struct Join<T>(Rc<RefCell<JoinState<T>>>);

#[derive(Debug)]
struct JoinState<T> {
    result: Option<T>,
    waiting: Option<Waker>,
}

struct Task {
    future: BoxedTask,
    wake: Arc<TaskWake>,
    waker: Waker,
}

#[derive(Debug)]
struct Queue(Mutex<Vec<usize>>);

#[derive(Debug)]
struct TaskWake {
    index: usize,
    queued: AtomicBool,
    queue: Arc<Queue>,
}

impl Wake for TaskWake {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.queue.0.lock().push(self.index);
        }
    }
}

impl Executor {
    /// An executor whose choices follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            spawner: Spawner::default(),
            tasks: Vec::new(),
            unfinished: 0,
            queue: Arc::new(Queue(Mutex::new(Vec::new()))),
            rng: Rng::new(seed),
            steps: 0,
        }
    }

    /// Something to start tasks with, that tasks may keep.
    #[must_use]
    pub fn spawner(&self) -> Spawner {
        self.spawner.clone()
    }

    /// Starts a task.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Join<T> {
        self.spawner.spawn(future)
    }

    /// How many polls were done so far.
    #[must_use]
    pub const fn steps(&self) -> u64 {
        self.steps
    }

    /// Polls one ready task, chosen at random. False where none is ready.
    pub fn step(&mut self) -> bool {
        self.adopt();
        let index = {
            let mut ready = self.queue.0.lock();
            if ready.is_empty() {
                return false;
            }
            let at = self.rng.below(ready.len() as u64) as usize;
            ready.swap_remove(at)
        };
        self.steps += 1;
        let slot = &mut self.tasks[index];
        if let Some(task) = slot {
            task.wake.queued.store(false, Ordering::Release);
            let mut cx = Context::from_waker(&task.waker);
            if task.future.as_mut().poll(&mut cx).is_ready() {
                *slot = None;
                self.unfinished -= 1;
            }
        }
        self.adopt();
        true
    }

    /// Runs until every task has ended, none can go on, or `limit` polls were done.
    pub fn run(&mut self, limit: u64) -> Stop {
        for _ in 0..limit {
            if !self.step() {
                return if self.unfinished == 0 { Stop::Finished } else { Stop::Stuck };
            }
        }
        Stop::Limit
    }

    /// Runs `future` to its end, and whatever else is ready meanwhile.
    ///
    /// # Panics
    /// Where it does not end within `limit` polls, or can never end.
    pub fn block_on<T: 'static>(&mut self, limit: u64, future: impl Future<Output = T> + 'static) -> T {
        let join = self.spawn(future);
        for _ in 0..limit {
            if let Some(result) = join.take() {
                return result;
            }
            assert!(self.step(), "the future waits for something that nobody will do");
        }
        panic!("the future did not end within {limit} steps")
    }

    fn adopt(&mut self) {
        for future in self.spawner.0.borrow_mut().drain(..) {
            let index = self.tasks.len();
            let wake =
                Arc::new(TaskWake { index, queued: AtomicBool::new(true), queue: Arc::clone(&self.queue) });
            self.tasks.push(Some(Task { future, waker: Waker::from(Arc::clone(&wake)), wake }));
            self.unfinished += 1;
            self.queue.0.lock().push(index);
        }
    }
}

impl Spawner {
    /// Starts a task. It may be `!Send`.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Join<T> {
        let state = Rc::new(RefCell::new(JoinState { result: None, waiting: None }));
        let join = Join(Rc::clone(&state));
        self.0.borrow_mut().push(Box::pin(async move {
            let result = future.await;
            let waiting = {
                let mut state = state.borrow_mut();
                state.result = Some(result);
                state.waiting.take()
            };
            if let Some(waker) = waiting {
                waker.wake();
            }
        }));
        join
    }
}

impl<T> Join<T> {
    /// The result, once, if the task has ended.
    pub fn take(&self) -> Option<T> {
        self.0.borrow_mut().result.take()
    }
}

impl<T> Future for Join<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let mut state = self.0.borrow_mut();
        if let Some(result) = state.result.take() {
            return Poll::Ready(result);
        }
        state.waiting = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl std::fmt::Debug for Spawner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Spawner")
    }
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task").field("index", &self.wake.index).finish_non_exhaustive()
    }
}

/// Lets other tasks run once.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order_of(seed: u64) -> Vec<u32> {
        let mut executor = Executor::new(seed);
        let order = Rc::new(RefCell::new(Vec::new()));
        for task in 0..5 {
            let order = Rc::clone(&order);
            executor.spawn(async move {
                for _ in 0..4 {
                    order.borrow_mut().push(task);
                    yield_now().await;
                }
            });
        }
        assert_eq!(executor.run(1000), Stop::Finished);
        order.take()
    }

    #[test]
    fn the_same_seed_gives_the_same_order_and_another_seed_another() {
        assert_eq!(order_of(1), order_of(1));
        assert_ne!(order_of(1), order_of(2));
    }

    #[test]
    fn a_task_that_nobody_wakes_is_stuck() {
        let mut executor = Executor::new(0);
        executor.spawn(std::future::pending::<()>());
        assert_eq!(executor.run(10), Stop::Stuck);
    }

    #[test]
    fn a_task_started_by_a_task_gives_its_result() {
        let mut executor = Executor::new(0);
        let spawner = executor.spawner();
        let answer = executor.block_on(100, async move { spawner.spawn(async { 42 }).await });
        assert_eq!(answer, 42);
    }
}
