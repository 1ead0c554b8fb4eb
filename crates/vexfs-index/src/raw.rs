//! Memory on huge pages: what a walk reads at random places.
//!
//! With `unsafe`, as are the kernels and the nodes of heads: a `Vec` can't ask for huge pages before it is touched, and they
//! are worth a third of a walk's time (a random record costs 21 ns on them and 34 ns on 4 KiB pages).
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::Region;

/// Where a build keeps what it works on.
#[derive(Copy, Clone)]
pub enum Place<'a> {
    /// On huge pages.
    Memory,
    /// In files: the kernel takes their pages where memory is short. Asked for so many zeroed bytes, the function gives a
    /// file that has no name and all its bytes on the disk, since writing where the disk is full would end the process.
    Files(&'a (dyn Fn(u64) -> io::Result<OwnedFd> + Sync)),
}

impl Place<'_> {
    /// So many zeroed bytes.
    pub fn zeroed(self, len: usize) -> io::Result<Huge> {
        match self {
            Place::Files(file) if len > 0 => Huge::of_file(file(len as u64)?, len),
            Place::Memory | Place::Files(_) => {
                Huge::zeroed(len).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
            }
        }
    }
}

/// Zeroed bytes, page-aligned, on huge pages where the machine gives them, or of a file.
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
    pub(crate) fn zeroed(len: usize) -> Option<Huge> {
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

    /// The first bytes of a file that is at least as long, and is nobody else's.
    fn of_file(file: OwnedFd, len: usize) -> io::Result<Huge> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing. The file has no name and its only
        // descriptor ends here, so nobody else writes or cuts it.
        let start = unsafe { mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, &file, 0) }?;
        let start = NonNull::new(start).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Huge { start: start.cast(), len })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised (zeroed) bytes, alive as long as `self`; `bytes_mut` excludes writers, and a
        // memory that is handed out as atomics is never read by this method (see `atomics`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// None at all?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// No bytes, where these begin: for prefetches.
    pub(crate) fn nothing(&self) -> &[u8] {
        // SAFETY: a slice without bytes, at an address that is not null.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), 0) }
    }

    /// Bytes among others that change.
    ///
    /// # Safety
    /// They are within the memory, and nobody writes them as long as the slice lives.
    pub(crate) unsafe fn slice(&self, at: usize, len: usize) -> &[u8] {
        debug_assert!(at + len <= self.len);
        // SAFETY: the caller's promise; all bytes are initialised (zeroed).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(at), len) }
    }

    /// Writes bytes among others that are read.
    ///
    /// # Safety
    /// There is room for them within the memory, and nobody else reads or writes them meanwhile.
    pub(crate) unsafe fn write(&self, at: usize, bytes: &[u8]) {
        debug_assert!(at + bytes.len() <= self.len);
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr().add(at), bytes.len()) };
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

/// Words of a graph: on huge pages, or where a file is mapped.
pub enum Words {
    /// On huge pages; writable.
    Own(Huge),
    /// Never written.
    Mapped(Region, Range<usize>),
}

impl Words {
    /// As [`Huge::zeroed`].
    pub fn zeroed(words: usize) -> Option<Words> {
        Huge::zeroed(words.checked_mul(4)?).map(Words::Own)
    }

    /// The little-endian words in `range` of `region`, where they lie if the machine can read them there, or else a
    /// copy. `None` if there are no such words, or no memory.
    pub fn mapped(region: &Region, range: Range<usize>) -> Option<Words> {
        let bytes = region.bytes().get(range.clone()).filter(|bytes| bytes.len().is_multiple_of(4))?;
        let readable = cfg!(target_endian = "little") && bytes.as_ptr().cast::<AtomicU32>().is_aligned();
        if readable { Some(Words::Mapped(region.clone(), range)) } else { Words::copied(bytes) }
    }

    /// A copy of little-endian words on huge pages.
    fn copied(bytes: &[u8]) -> Option<Words> {
        let mut memory = Huge::zeroed(bytes.len())?;
        for (to, from) in memory.bytes_mut().as_chunks_mut::<4>().0.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *to = u32::from_le_bytes(*from).to_ne_bytes();
        }
        Some(Words::Own(memory))
    }

    /// A copy on huge pages; `None` where these are already, or there is no memory.
    pub fn warmed(&self) -> Option<Words> {
        match self {
            Words::Own(_) => None,
            Words::Mapped(region, range) => Words::copied(region.bytes().get(range.clone())?),
        }
    }

    #[inline]
    pub fn get(&self) -> &[AtomicU32] {
        match self {
            // SAFETY: page-aligned (or empty and aligned), a whole number of words, always initialised; the bytes
            // are reached through this method only, so all access is atomic.
            Words::Own(memory) => unsafe { std::slice::from_raw_parts(memory.start.as_ptr().cast(), memory.len / 4) },
            Words::Mapped(region, range) => {
                let bytes = &region.bytes()[range.clone()];
                // SAFETY: `mapped` saw that the bytes are aligned and a whole number of words, and a region's bytes
                // are always the same. Only a graph under construction is written to, and that has words of its own.
                unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / 4) }
            }
        }
    }

    /// Bytes of memory kept, mapped ones not counted.
    pub fn kept(&self) -> usize {
        match self {
            Words::Own(memory) => memory.len(),
            Words::Mapped(..) => 0,
        }
    }
}
