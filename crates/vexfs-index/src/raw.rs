//! Memory on huge pages: what a walk reads at random places.
//!
//! The one module beside the kernels with `unsafe`: a `Vec` can't ask for huge pages before it is touched, and they
//! are worth a third of a walk's time (a random record costs 21 ns on them and 34 ns on 4 KiB pages).
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Zeroed bytes, page-aligned, on huge pages where the machine gives them.
pub struct Huge {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory with one owner; shared access is to bytes or to atomics.
unsafe impl Send for Huge {}
// SAFETY: as above.
unsafe impl Sync for Huge {}

impl Huge {
    /// `None` where there is no such memory.
    pub fn zeroed(len: usize) -> Option<Huge> {
        if len == 0 {
            return Some(Huge { start: NonNull::<AtomicU32>::dangling().cast(), len });
        }
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags) };
        let start = NonNull::new(start.ok()?)?;
        // SAFETY: the range is the mapping just made. Advice that isn't followed costs speed only.
        let _ = unsafe { madvise(start.as_ptr(), len, Advice::LinuxHugepage) };
        Some(Huge { start: start.cast(), len })
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised (zeroed) bytes, alive as long as `self`; `bytes_mut` excludes writers, and a
        // memory that is handed out as atomics is never read by this method (see `atomics`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Huge {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping is this value's own and nothing borrows from it any more.
            let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        }
    }
}

/// Zeroed words on huge pages.
pub struct Words(Huge);

impl Words {
    /// As [`Huge::zeroed`].
    pub fn zeroed(words: usize) -> Option<Words> {
        Huge::zeroed(words.checked_mul(4)?).map(Words)
    }

    #[inline]
    pub fn get(&self) -> &[AtomicU32] {
        // SAFETY: page-aligned (or empty and aligned), a whole number of words, always initialised; the bytes are
        // reached through this method only, so all access is atomic.
        unsafe { std::slice::from_raw_parts(self.0.start.as_ptr().cast(), self.0.len / 4) }
    }

    /// Bytes kept.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}
