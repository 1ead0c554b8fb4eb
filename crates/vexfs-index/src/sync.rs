//! Atomics, locks and words of the mutable index. Its schedule tests compile it over shuttle's in their place.

pub use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
pub use std::sync::{Mutex, MutexGuard};

pub use crate::raw::Words;
