//! A request from dispatch to reply: what it panics of stays its own, and how much stack it takes is known.
//!
//! The stack below the handler is painted when it begins and looked at when it has replied. What counts is the whole
//! stack of the thread, from the thread's first frame to the deepest byte that was written.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::io::Errno;

/// Handlers that panicked, of all mounts of this process.
pub static PANICS: AtomicU64 = AtomicU64::new(0);

/// The most stack that each operation was seen to take, bytes, of all mounts of this process.
static STACKS: Mutex<BTreeMap<&'static str, usize>> = Mutex::new(BTreeMap::new());

/// One request of so many has its stack measured: of a debug build, which the tests run, every one.
const EVERY: u32 = if cfg!(debug_assertions) { 1 } else { 64 };

/// The most stack that each operation was seen to take, bytes.
pub fn stacks() -> BTreeMap<&'static str, usize> {
    STACKS.lock().clone()
}

/// A request that is being handled; dropped when it has been answered.
pub struct Handling {
    operation: &'static str,
    painted: Option<Painted>,
    panicked: Cell<bool>,
}

impl Handling {
    /// To be begun before anything else is done.
    pub fn of(operation: &'static str) -> Handling {
        thread_local!(static HANDLED: Cell<u32> = const { Cell::new(0) });
        let handled = HANDLED.replace(HANDLED.get().wrapping_add(1));
        let painted = handled.is_multiple_of(EVERY).then(paint);
        Handling { operation, painted, panicked: Cell::new(false) }
    }

    /// A panic in a handler is this request's error, not the mount's end.
    pub fn guard<T>(&self, work: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            self.panicked.set(true);
            PANICS.fetch_add(1, Ordering::Relaxed);
            log::error!("{}: a handler panicked; the caller was answered EIO", self.operation);
            Err(Errno::IO)
        })
    }
}

impl Drop for Handling {
    fn drop(&mut self) {
        // The report of a panic takes what stack it likes.
        if let Some(painted) = self.painted.take().filter(|_| !self.panicked.get()) {
            let bytes = painted.depth();
            let mut stacks = STACKS.lock();
            let most = stacks.entry(self.operation).or_default();
            *most = bytes.max(*most);
        }
    }
}

const PAINT: u64 = 0x5a17_ed57_ac4b_10c5;
/// Bytes that are painted, and those of them next to the painter's own frame that are not.
const AREA: usize = 32 << 10;
const OWN: usize = 512;

/// A stretch of the thread's stack that has been painted: addresses.
struct Painted {
    from: usize,
    to: usize,
}

impl Painted {
    /// Bytes from the thread's first frame to the lowest that was written since. At the most `AREA` below where it was
    /// painted; a handler that took it all took so many or more.
    #[inline(never)]
    fn depth(&self) -> usize {
        let mut at = self.from;
        // SAFETY: the stretch belongs to this thread's stack and was written by `paint`.
        #[allow(unsafe_code)]
        while at < self.to && unsafe { std::ptr::read_volatile(at as *const u64) } == PAINT {
            at += 8;
        }
        first_frame() - at
    }
}

/// Not inlined: what is alive is above this function's frame.
#[inline(never)]
fn paint() -> Painted {
    let here = 0u64;
    let top = (&raw const here as usize) & !7;
    let painted = Painted { from: top - AREA, to: top - OWN };
    for at in (painted.from..painted.to).step_by(8) {
        // SAFETY: below this frame nothing is alive, and an event loop's stack is 2 MiB, of which handlers take little.
        #[allow(unsafe_code)]
        unsafe {
            std::ptr::write_volatile(at as *mut u64, PAINT);
        }
    }
    painted
}

/// The address at which the thread's stack begins, as the unwinder finds it.
fn first_frame() -> usize {
    thread_local!(static FIRST: Cell<usize> = const { Cell::new(0) });
    if FIRST.get() == 0 {
        let mut highest = 0usize;
        // SAFETY: `look` takes what it is given here: a pointer to a number that outlives the call.
        #[allow(unsafe_code)]
        unsafe {
            _Unwind_Backtrace(look, &raw mut highest);
        }
        FIRST.set(highest);
    }
    FIRST.get()
}

/// Keeps the highest of the frames' addresses; 0 goes on.
extern "C" fn look(context: *mut std::ffi::c_void, highest: *mut usize) -> std::ffi::c_int {
    // SAFETY: the unwinder gives its context and, unchanged, the pointer of `first_frame`.
    #[allow(unsafe_code)]
    unsafe {
        *highest = (*highest).max(_Unwind_GetCFA(context));
    }
    0
}

// The unwinder that the standard library is linked with (Itanium C++ ABI: Exception Handling, 1.3).
#[allow(unsafe_code)]
unsafe extern "C" {
    fn _Unwind_Backtrace(
        each: extern "C" fn(*mut std::ffi::c_void, *mut usize) -> std::ffi::c_int,
        argument: *mut usize,
    ) -> std::ffi::c_int;
    fn _Unwind_GetCFA(context: *mut std::ffi::c_void) -> usize;
}

#[cfg(test)]
mod tests;
