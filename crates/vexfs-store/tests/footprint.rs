//! What a file takes in memory, by an allocator that counts. A target of its own, since an allocator is for a whole process.
#![allow(unsafe_code, reason = "an allocator can't be had without")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vexfs_store::disk::DirDisk;
use vexfs_store::index::Element;
use vexfs_store::*;

struct Counting;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// What glibc's malloc takes for so many bytes.
fn chunk(size: usize) -> usize {
    (size + 8).next_multiple_of(16).max(32)
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.fetch_add(chunk(layout.size()), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        TAKEN.fetch_sub(chunk(layout.size()), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        TAKEN.fetch_add(chunk(size), Ordering::Relaxed);
        TAKEN.fetch_sub(chunk(layout.size()), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn open(dir: &Path) -> Volume {
    // No copies of segments, and the fewest of the catalog's pages.
    let options = Options { memory: Some(1 << 20), ..Options::new(SyncMode::Lazy) };
    let fd = std::fs::File::open(dir).unwrap();
    Volume::open(Arc::new(DirDisk::new(fd.into())), options).unwrap().0
}

fn put(volume: &Volume, n: u64) {
    let file = FileId(100_000 + n);
    volume.link(file, Link { parent: FileId::ROOT, name: format!("e{n:07}.vec").into_bytes() });
    let target = volume.prepare(file, 2, Element::U8).unwrap();
    let mut room = volume.rows(&target, 1).unwrap();
    room.push(&[(n % 200) as u8 + 1, (n / 200) as u8]);
    let time = 1_764_000_000_000_000_000 + i128::from(n);
    assert!(volume.put(file, Fingerprint { size: 2, mtime: time, ctime: time }, &target, room).unwrap());
}

/// Bytes that an open volume of so many sealed files takes: as it is after they were written, and after the next open.
fn taken(files: u64) -> (usize, usize) {
    let dir = tempfile::tempdir().unwrap();
    let before = TAKEN.load(Ordering::Relaxed);
    let volume = open(dir.path());
    (0..files).for_each(|n| put(&volume, n));
    volume.optimize(false, &|| false).unwrap();
    volume.settle(&|| false).unwrap();
    let written = TAKEN.load(Ordering::Relaxed) - before;
    volume.close().unwrap();
    let before = TAKEN.load(Ordering::Relaxed);
    let volume = open(dir.path());
    assert_eq!(volume.report(FileId::ROOT).files.indexed, files);
    let opened = TAKEN.load(Ordering::Relaxed) - before;
    volume.close().unwrap();
    (written, opened)
}

/// As in `tree.rs`, and told by the manual.
const FILE_BYTES: usize = 200;

#[test]
fn a_file_takes_200_bytes() {
    // Tables are filled to seven eighths before they are doubled: these are as full as can be. What any volume takes, a
    // full cache of the catalog's pages too, is in both.
    let (few, many) = (28_672, 57_344);
    let ((few_written, few_opened), (many_written, many_opened)) = (taken(few), taken(many));
    let each = |few_bytes: usize, many_bytes: usize| (many_bytes - few_bytes) as f64 / (many - few) as f64;
    let (written, opened) = (each(few_written, many_written), each(few_opened, many_opened));
    eprintln!("a file takes {written:.1} bytes once it is written, {opened:.1} after the next open");
    assert!(written.max(opened) <= FILE_BYTES as f64);
}
