//! Buffers that are used again and again: memory taken once, lent as [`AlignedBuf`]s, and
//! registered with the thread's ring where there is one, so that the kernel need not look up and
//! pin their pages for every operation.

use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::{ALIGNMENT, AlignedBuf, Error, Result, engine, spare};

/// How many buffers of which sizes a pool holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    /// Buffers of [`BufferPool::SMALL`] bytes.
    pub small: u16,
    /// Buffers of [`BufferPool::LARGE`] bytes.
    pub large: u16,
}

impl Default for PoolOptions {
    /// 18 MiB: enough to keep a fast disk busy with 1 MiB pieces, and small requests beside them.
    fn default() -> Self {
        Self { small: 32, large: 16 }
    }
}

/// A bounded set of aligned buffers for one thread.
///
/// Buffers may travel to other threads and be dropped there. Where none is free, or one is too
/// small, [`BufferPool::take`] allocates: a pool bounds what is pinned, not what is used. What it allocates of the
/// large buffers' size is kept for whoever needs such a one next: up to 64 MiB, which the kernel may have while none of
/// it is in use.
/// Clones share one set.
#[derive(Clone, Debug)]
pub struct BufferPool {
    memory: Arc<PoolMemory>,
    /// Pools belong to threads, because rings do.
    _thread: std::marker::PhantomData<Rc<()>>,
}

impl BufferPool {
    /// The size in bytes of the small buffers.
    pub const SMALL: usize = 64 << 10;
    /// The size in bytes of the large buffers.
    pub const LARGE: usize = 1 << 20;

    /// A pool of its own for the calling thread.
    ///
    /// On a thread that [`crate::Engine::run`] gave a ring, its buffers are registered with that ring; where
    /// another pool already is, or the kernel refuses (`RLIMIT_MEMLOCK`), they are plain memory.
    ///
    /// # Errors
    /// Where the memory cannot be had.
    pub fn new(options: PoolOptions) -> Result<Self> {
        let pool = Self::unregistered(options)?;
        engine::register_pool(&pool.memory);
        Ok(pool)
    }

    fn unregistered(options: PoolOptions) -> Result<Self> {
        let memory = Arc::new(PoolMemory::map(options)?);
        Ok(Self { memory, _thread: std::marker::PhantomData })
    }

    /// As [`BufferPool::new`], but for the registering, which is done with the first buffer that is taken once all pages are there.
    /// Another thread sees to those: they take milliseconds, which nobody here has to wait.
    pub(crate) fn registered_later(options: PoolOptions) -> Result<Self> {
        let pool = Self::unregistered(options)?;
        if !engine::has_ring() {
            return Ok(pool);
        }
        let memory = Arc::clone(&pool.memory);
        memory.registration.store(AWAITS_PAGES, Ordering::Relaxed);
        let spawned = std::thread::Builder::new().name("buffers".to_owned()).spawn(move || memory.populate());
        if let Err(error) = spawned {
            tracing::debug!(%error, "no thread makes the buffers' pages: registering does");
            pool.memory.registration.store(DUE, Ordering::Release);
        }
        Ok(pool)
    }

    /// The one pool that everybody on this thread shares, of [`PoolOptions::default`], made at its first use
    /// and given up when [`crate::Engine::run`] returns. Its buffers are registered a moment later.
    ///
    /// # Errors
    /// Where its memory cannot be had.
    pub fn of_thread() -> Result<Self> {
        engine::thread_pool_of_buffers()
    }

    /// A buffer of `len` bytes, holding whatever was there before.
    #[must_use]
    pub fn take(&self, len: usize) -> AlignedBuf {
        self.try_take(len).or_else(|| spare::take(len)).unwrap_or_else(|| AlignedBuf::zeroed(len))
    }

    /// The same, if the pool has a buffer that is free and large enough.
    #[must_use]
    pub fn try_take(&self, len: usize) -> Option<AlignedBuf> {
        let registration = &self.memory.registration;
        if registration.load(Ordering::Acquire) == DUE {
            registration.store(NOT_DUE, Ordering::Relaxed);
            engine::register_pool(&self.memory);
        }
        PoolMemory::take(&self.memory, len)
    }

    /// Whether this pool's buffers are registered with the calling thread's ring.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        engine::registered_pool() == self.memory.id
    }
}

/// The place of a buffer in its pool; dropping it makes the place free again.
#[derive(Debug)]
pub(crate) struct Slot {
    pool: Arc<PoolMemory>,
    index: u16,
}

impl Slot {
    /// Which pool: a number that no other pool of this process ever has.
    pub(crate) fn pool_id(&self) -> u64 {
        self.pool.id
    }

    /// The index of the buffer among those registered.
    pub(crate) const fn index(&self) -> u16 {
        self.index
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool.give_back(self.index);
    }
}

/// The pool's buffers are registered, or that failed, or was never to be.
const NOT_DUE: u8 = 0;
/// They are to be registered when all pages are there.
const AWAITS_PAGES: u8 = 1;
/// They are to be registered.
const DUE: u8 = 2;

/// How much memory is populated at a time: other threads that map memory wait for one such piece at most.
const POPULATED_AT_ONCE: usize = 2 << 20;

/// One mapping, cut into the large buffers and then the small ones. It lives until the last buffer, and the
/// ring that they were registered with, are gone.
#[derive(Debug)]
pub(crate) struct PoolMemory {
    id: u64,
    base: NonNull<u8>,
    options: PoolOptions,
    free: Mutex<Free>,
    /// Whether the pool's thread is to register it with its ring.
    registration: AtomicU8,
}

// SAFETY: `base` is only handed out in disjoint pieces, each to one owner at a time (`free`).
unsafe impl Send for PoolMemory {}
// SAFETY: as above; everything else is behind a lock or never changes.
unsafe impl Sync for PoolMemory {}

#[derive(Debug)]
struct Free {
    small: Vec<u16>,
    large: Vec<u16>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl PoolMemory {
    fn map(options: PoolOptions) -> Result<Self> {
        let len = Self::bytes(options).max(ALIGNMENT);
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(|source| Error::io(format_args!("map {len} bytes for buffers"), source.into()))?;
        // SAFETY: the range is the mapping made above; the advice changes no contents.
        let advised = unsafe { rustix::mm::madvise(base, len, Advice::LinuxHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no huge pages for the buffer pool");
        }
        let base = NonNull::new(base.cast()).expect("mmap returns no null mapping");
        let large = (0..options.large).rev().collect();
        let small = (options.large..options.large + options.small).rev().collect();
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            base,
            options,
            free: Mutex::new(Free { small, large }),
            registration: AtomicU8::new(NOT_DUE),
        })
    }

    /// Has all pages made; then they can be registered in no time.
    fn populate(&self) {
        let len = Self::bytes(self.options);
        for at in (0..len).step_by(POPULATED_AT_ONCE) {
            let piece = POPULATED_AT_ONCE.min(len - at);
            // SAFETY: the range is part of the mapping; populating changes no contents.
            let populated = unsafe {
                rustix::mm::madvise(self.base.add(at).as_ptr().cast(), piece, Advice::LinuxPopulateWrite)
            };
            // Before Linux 5.14 it is registering that makes them.
            if populated.is_err() {
                break;
            }
        }
        self.registration.store(DUE, Ordering::Release);
    }

    const fn bytes(options: PoolOptions) -> usize {
        options.large as usize * BufferPool::LARGE + options.small as usize * BufferPool::SMALL
    }

    pub(crate) const fn id(&self) -> u64 {
        self.id
    }

    fn take(self: &Arc<Self>, len: usize) -> Option<AlignedBuf> {
        let index = {
            let mut free = self.free.lock();
            if len <= BufferPool::SMALL {
                free.small.pop().or_else(|| free.large.pop())?
            } else if len <= BufferPool::LARGE {
                free.large.pop()?
            } else {
                return None;
            }
        };
        let (memory, capacity) = self.piece(index);
        Some(AlignedBuf::from_slot(memory, capacity, len, Slot { pool: Arc::clone(self), index }))
    }

    fn give_back(&self, index: u16) {
        let mut free = self.free.lock();
        if index < self.options.large { free.large.push(index) } else { free.small.push(index) }
    }

    /// Where the buffer of this index begins, and its size.
    fn piece(&self, index: u16) -> (NonNull<u8>, usize) {
        assert!(index < self.options.large + self.options.small);
        let large = usize::from(index.min(self.options.large));
        let small = usize::from(index) - large;
        let at = large * BufferPool::LARGE + small * BufferPool::SMALL;
        let capacity = if index < self.options.large { BufferPool::LARGE } else { BufferPool::SMALL };
        // SAFETY: `at + capacity` is at most the length of the mapping, by the assertion and `bytes`.
        (unsafe { self.base.add(at) }, capacity)
    }

    /// Every buffer in the order of its index, for registration.
    pub(crate) fn pieces(self: &Arc<Self>) -> impl Iterator<Item = Registered> {
        (0..self.options.large + self.options.small).map(|index| {
            let (memory, capacity) = self.piece(index);
            Registered { memory, capacity, _pool: Arc::clone(self) }
        })
    }
}

impl Drop for PoolMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length. No buffer is left (each holds an `Arc` of
        // this), nor a ring in which it is registered (its registry holds one too).
        let unmapped = unsafe {
            rustix::mm::munmap(self.base.as_ptr().cast(), Self::bytes(self.options).max(ALIGNMENT))
        };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "a buffer pool could not be unmapped");
        }
    }
}

/// A piece of a pool as the ring's registry holds it: it keeps the mapping alive as long as the ring.
pub(crate) struct Registered {
    memory: NonNull<u8>,
    capacity: usize,
    _pool: Arc<PoolMemory>,
}

// SAFETY: the memory is part of a mapping that `_pool` keeps in place; it was zeroed by the kernel.
unsafe impl tokio_uring::buf::IoBuf for Registered {
    fn stable_ptr(&self) -> *const u8 {
        self.memory.as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.capacity
    }

    fn bytes_total(&self) -> usize {
        self.capacity
    }
}

// SAFETY: nobody reaches the memory through this value: the registry only tells the kernel the address.
unsafe impl tokio_uring::buf::IoBufMut for Registered {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.memory.as_ptr()
    }

    unsafe fn set_init(&mut self, _initialised: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Engine, IoEngine};

    #[test]
    fn buffers_come_back_when_dropped_and_never_overlap() {
        let pool = BufferPool::new(PoolOptions { small: 2, large: 1 }).unwrap();
        let mut bufs: Vec<_> = [4096, 60_000, 1 << 20].map(|len| pool.take(len)).into();
        for (n, buf) in (1u8..).zip(&mut bufs) {
            assert!(buf.slot().is_some());
            buf.fill(n);
        }
        for (n, buf) in (1u8..).zip(&bufs) {
            assert!(buf.iter().all(|&byte| byte == n));
        }
        assert!(pool.take(10).slot().is_none(), "an exhausted pool allocates");
        drop(bufs);
        assert!(pool.take(BufferPool::LARGE).slot().is_some());
        assert!(pool.take(BufferPool::LARGE + 1).slot().is_none());
    }

    #[test]
    fn a_pool_that_is_registered_later_is_so_once_and_can_be_used_at_once() {
        let Ok(engine) = Engine::choose(IoEngine::Uring) else { return };
        engine.run(async {
            let pool = BufferPool::registered_later(PoolOptions { small: 2, large: 3 }).unwrap();
            let mut bufs: Vec<_> = (0..3).map(|_| pool.take(BufferPool::LARGE)).collect();
            for (n, buf) in (1u8..).zip(&mut bufs) {
                buf.fill(n);
            }
            let registration = || pool.memory.registration.load(Ordering::Acquire);
            while registration() == AWAITS_PAGES {
                std::thread::yield_now();
            }
            for (n, buf) in (1u8..).zip(&bufs) {
                assert!(buf.iter().all(|&byte| byte == n), "populating overwrites nothing");
            }
            drop(pool.take(10));
            assert!(pool.is_registered());
            assert_eq!(registration(), NOT_DUE);
        });
    }

    #[test]
    fn a_buffer_outlives_its_pool_and_may_be_dropped_elsewhere() {
        let pool = BufferPool::new(PoolOptions { small: 1, large: 0 }).unwrap();
        let mut buf = pool.take(100);
        drop(pool);
        std::thread::spawn(move || buf.fill(1)).join().unwrap();
    }
}
