//! Memory that was freed, given back to the system: glibc's allocator keeps it for each thread's next use. Elsewhere nothing
//! is done.
#![allow(unsafe_code)]

/// Has all threads allocate from one heap, so that what one has freed serves the others, and little is kept. To be called
/// before threads are started.
pub fn share_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes numbers.
    let done = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    #[cfg(target_env = "gnu")]
    if done == 0 {
        log::warn!("the allocator keeps a heap for each thread");
    }
}

/// Gives back what there is. Takes a while.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number, and the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
