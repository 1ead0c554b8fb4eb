//! Memory that was freed, given back to the system: glibc's allocator keeps it for the next use. Elsewhere nothing is done.
#![allow(unsafe_code)]

/// Gives back what there is. Takes a while.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number, and the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
