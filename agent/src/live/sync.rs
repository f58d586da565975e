//! Where threads meet: the locks and counters of the engine, between whose steps the model checks come in.
//!
//! In production these are `parking_lot`'s mutex and the standard atomics, and [`point`] is nothing. In a test that runs
//! under shuttle each of them lets any other thread go first; in all other tests they are what they are in production.
//! A lock under which the map is looked at must be this one: under shuttle all threads are one to the system.
//! Under shuttle, tokio's locks and notices are used as they are: they are atomic between two polls.

#[cfg(not(test))]
pub(super) use plain::{AtomicU8, AtomicU64, Mutex, point};
#[cfg(test)]
pub(super) use stepped::{AtomicU8, AtomicU64, Modelled, Mutex, point};

#[cfg(not(test))]
mod plain {
    pub(in crate::live) use std::sync::atomic::{AtomicU8, AtomicU64};

    pub(in crate::live) use parking_lot::Mutex;

    /// A place at which another thread may go first.
    #[inline]
    pub(in crate::live) const fn point() {}
}

#[cfg(test)]
mod stepped {
    use std::cell::Cell;
    use std::sync::atomic::Ordering;

    use parking_lot::MutexGuard;

    thread_local! {
        static IS_MODELLED: Cell<bool> = const { Cell::new(false) };
    }

    /// Threads of shuttle run on this thread until this is dropped.
    #[derive(Debug)]
    pub(in crate::live) struct Modelled(());

    impl Modelled {
        pub(in crate::live) fn new() -> Self {
            IS_MODELLED.set(true);
            Self(())
        }
    }

    impl Drop for Modelled {
        fn drop(&mut self) {
            IS_MODELLED.set(false);
        }
    }

    /// A place at which another thread may go first.
    pub(in crate::live) fn point() {
        if IS_MODELLED.get() && !std::thread::panicking() {
            shuttle::thread::yield_now();
        }
    }

    #[derive(Debug, Default)]
    pub(in crate::live) struct Mutex<T>(parking_lot::Mutex<T>);

    impl<T> Mutex<T> {
        pub(in crate::live) const fn new(value: T) -> Self {
            Self(parking_lot::Mutex::new(value))
        }

        pub(in crate::live) fn lock(&self) -> MutexGuard<'_, T> {
            if !IS_MODELLED.get() {
                return self.0.lock();
            }
            point();
            loop {
                if let Some(guard) = self.0.try_lock() {
                    return guard;
                }
                shuttle::thread::yield_now();
            }
        }
    }

    macro_rules! atomic {
        ($name:ident, $of:ty) => {
            #[derive(Debug)]
            pub(in crate::live) struct $name(std::sync::atomic::$name);

            impl $name {
                pub(in crate::live) const fn new(value: $of) -> Self {
                    Self(std::sync::atomic::$name::new(value))
                }

                pub(in crate::live) fn load(&self, order: Ordering) -> $of {
                    point();
                    self.0.load(order)
                }

                #[allow(dead_code, reason = "each atomic has all of them")]
                pub(in crate::live) fn fetch_add(&self, value: $of, order: Ordering) -> $of {
                    point();
                    self.0.fetch_add(value, order)
                }

                #[allow(dead_code, reason = "each atomic has all of them")]
                pub(in crate::live) fn fetch_sub(&self, value: $of, order: Ordering) -> $of {
                    point();
                    self.0.fetch_sub(value, order)
                }

                #[allow(dead_code, reason = "each atomic has all of them")]
                pub(in crate::live) fn fetch_update(
                    &self,
                    set_order: Ordering,
                    fetch_order: Ordering,
                    update: impl FnMut($of) -> Option<$of>,
                ) -> Result<$of, $of> {
                    point();
                    self.0.fetch_update(set_order, fetch_order, update)
                }
            }
        };
    }

    atomic!(AtomicU8, u8);
    atomic!(AtomicU64, u64);
}
