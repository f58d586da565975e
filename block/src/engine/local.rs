//! What a thread with a ring knows about itself: what is in flight on it, whether it is ending, and
//! which buffers are registered.

use std::cell::{Cell, RefCell};
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Poll, Waker};

use tokio_uring::buf::fixed::FixedBufRegistry;

use crate::pool::PoolMemory;
use crate::{AlignedBuf, BufferPool, PoolOptions, Result};

thread_local! {
    static LOCAL: Local = const { Local::new() };
}

struct Local {
    ring: Cell<bool>,
    closing: Cell<bool>,
    in_flight: Cell<usize>,
    drained: Cell<Option<Waker>>,
    registered: Cell<u64>,
    buffers: RefCell<Option<BufferPool>>,
}

impl Local {
    const fn new() -> Self {
        Self {
            ring: Cell::new(false),
            closing: Cell::new(false),
            in_flight: Cell::new(0),
            drained: Cell::new(None),
            registered: Cell::new(NO_POOL),
            buffers: RefCell::new(None),
        }
    }

    fn end_one(&self) {
        let left = self.in_flight.get().saturating_sub(1);
        self.in_flight.set(left);
        if left == 0
            && let Some(waker) = self.drained.take()
        {
            waker.wake();
        }
    }
}

/// The id that no pool has.
const NO_POOL: u64 = 0;

/// While it lives, the calling thread runs a ring.
pub(super) struct RingScope(());

impl RingScope {
    pub(super) fn enter() -> Self {
        LOCAL.with(|local| {
            local.ring.set(true);
            local.closing.set(false);
            local.in_flight.set(0);
        });
        Self(())
    }

    /// Refuses new operations and waits for those in flight.
    pub(super) async fn drain(&self) {
        LOCAL.with(|local| local.closing.set(true));
        std::future::poll_fn(|cx| {
            LOCAL.with(|local| {
                if local.in_flight.get() == 0 {
                    return Poll::Ready(());
                }
                local.drained.set(Some(cx.waker().clone()));
                Poll::Pending
            })
        })
        .await;
    }
}

impl Drop for RingScope {
    fn drop(&mut self) {
        LOCAL.with(|local| {
            local.ring.set(false);
            local.closing.set(false);
            local.registered.set(NO_POOL);
            local.buffers.borrow_mut().take();
        });
    }
}

/// While it lives, the calling thread runs without a ring.
pub(super) struct PoolScope;

impl Drop for PoolScope {
    fn drop(&mut self) {
        LOCAL.with(|local| local.buffers.borrow_mut().take());
    }
}

/// Whether the calling thread runs a ring.
pub(crate) fn has_ring() -> bool {
    LOCAL.with(|local| local.ring.get())
}

/// Whether the calling thread's ring is ending and takes no more operations.
pub(crate) fn closing() -> bool {
    LOCAL.with(|local| local.closing.get())
}

/// The id of the pool whose buffers are registered with the calling thread's ring.
pub(crate) fn registered_pool() -> u64 {
    LOCAL.with(|local| local.registered.get())
}

/// Registers the pool's buffers with the calling thread's ring, if it has one, and none is yet.
pub(crate) fn register_pool(memory: &Arc<PoolMemory>) {
    LOCAL.with(|local| {
        if !local.ring.get() || local.registered.get() != NO_POOL {
            return;
        }
        match FixedBufRegistry::new(memory.pieces()).register() {
            // The runtime's driver keeps the registry from now on, until the ring is gone.
            Ok(()) => local.registered.set(memory.id()),
            Err(error) => tracing::debug!(%error, "the buffers are not registered with the ring"),
        }
    });
}

/// The pool that everybody on the calling thread shares.
pub(crate) fn thread_pool_of_buffers() -> Result<BufferPool> {
    LOCAL.with(|local| {
        if let Some(pool) = &*local.buffers.borrow() {
            return Ok(pool.clone());
        }
        let pool = BufferPool::registered_later(PoolOptions::default())?;
        *local.buffers.borrow_mut() = Some(pool.clone());
        Ok(pool)
    })
}

/// The same, unless nobody has asked for it yet.
pub(crate) fn thread_pool_of_buffers_if_any() -> Option<BufferPool> {
    LOCAL.with(|local| local.buffers.borrow().clone())
}

/// What the kernel uses while an operation is in flight: a descriptor and, for a transfer, a buffer.
///
/// It is the operation's own until the completion comes, and is given back by [`InFlight::complete`].
/// tokio-uring also drops it unasked: after the completion of an operation whose future was dropped, which
/// is harmless, and when a whole runtime is dropped, which may be before the kernel is done. The second can
/// only happen after the [`RingScope`] ended; then both are leaked.
pub(crate) struct InFlight {
    held: ManuallyDrop<(Arc<OwnedFd>, Option<AlignedBuf>)>,
}

impl InFlight {
    /// Counts one more operation in flight on this thread.
    pub(crate) fn begin(file: Arc<OwnedFd>, buf: Option<AlignedBuf>) -> Self {
        LOCAL.with(|local| local.in_flight.set(local.in_flight.get() + 1));
        Self { held: ManuallyDrop::new((file, buf)) }
    }

    /// The buffer, after the completion came.
    pub(crate) fn complete(mut self) -> Option<AlignedBuf> {
        self.held.1.take()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // A thread that is being torn down has no ring any more.
        let _ = LOCAL.try_with(|local| {
            if local.ring.get() {
                // SAFETY: dropped once, here. While the ring runs, tokio-uring lets go of an operation's data
                // only after its completion, so the kernel no longer uses the buffer or the descriptor.
                unsafe { ManuallyDrop::drop(&mut self.held) };
                local.end_one();
            }
        });
    }
}
