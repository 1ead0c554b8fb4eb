//! Atomics, locks and pointers by which searches and writers meet. The feature `schedules` puts shuttle's in their place,
//! for the tests of `schedules.rs` only.

#[cfg(not(feature = "schedules"))]
pub use arc_swap::{ArcSwap, ArcSwapOption};
#[cfg(not(feature = "schedules"))]
pub use parking_lot::{Condvar, Mutex, RwLock};
#[cfg(not(feature = "schedules"))]
pub use std::sync::atomic::AtomicU64;
#[cfg(not(feature = "schedules"))]
pub use std::thread::yield_now;

#[cfg(feature = "schedules")]
pub use shuttled::*;

#[cfg(feature = "schedules")]
mod shuttled {
    use std::sync::{Arc, PoisonError};
    use std::time::Duration;

    pub use shuttle::sync::atomic::AtomicU64;
    use shuttle::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};
    pub use shuttle::thread::yield_now;

    /// As parking_lot's.
    #[derive(Default)]
    pub struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Mutex<T> {
            Mutex(shuttle::sync::Mutex::new(value))
        }
        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }
    }

    /// As parking_lot's.
    #[derive(Default)]
    pub struct RwLock<T>(shuttle::sync::RwLock<T>);

    impl<T> RwLock<T> {
        pub fn new(value: T) -> RwLock<T> {
            RwLock(shuttle::sync::RwLock::new(value))
        }
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().unwrap_or_else(PoisonError::into_inner)
        }
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            self.0.write().unwrap_or_else(PoisonError::into_inner)
        }
    }

    /// The threads that wait are not run in schedules.
    pub struct Condvar;

    impl Condvar {
        pub fn new() -> Condvar {
            Condvar
        }
        pub fn notify_all(&self) {}
        pub fn wait_for<T>(&self, _guard: &mut MutexGuard<'_, T>, _most: Duration) {
            shuttle::thread::yield_now();
        }
    }

    /// As arc_swap's: each operation is one step.
    pub struct ArcSwapOption<T>(Mutex<Option<Arc<T>>>);

    impl<T> ArcSwapOption<T> {
        pub fn from_pointee(value: Option<T>) -> ArcSwapOption<T> {
            ArcSwapOption(Mutex::new(value.map(Arc::new)))
        }
        pub fn load_full(&self) -> Option<Arc<T>> {
            self.0.lock().clone()
        }
        pub fn store(&self, value: Option<Arc<T>>) {
            *self.0.lock() = value;
        }
        pub fn swap(&self, value: Option<Arc<T>>) -> Option<Arc<T>> {
            std::mem::replace(&mut *self.0.lock(), value)
        }
    }

    /// As arc_swap's: each operation is one step.
    pub struct ArcSwap<T>(Mutex<Arc<T>>);

    impl<T> ArcSwap<T> {
        pub fn from_pointee(value: T) -> ArcSwap<T> {
            ArcSwap(Mutex::new(Arc::new(value)))
        }
        pub fn load_full(&self) -> Arc<T> {
            Arc::clone(&self.0.lock())
        }
        pub fn load(&self) -> Arc<T> {
            self.load_full()
        }
        pub fn store(&self, value: Arc<T>) {
            *self.0.lock() = value;
        }
    }
}
