//! Searches beside everything that exchanges parts: writes, unlinks, seals and merges, each on a thread of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

const STABLE: u64 = 20;
const ROWS: usize = 3;

fn rows(n: u64) -> [[f32; 2]; ROWS] {
    std::array::from_fn(|row| [1.0 + n as f32, 1.0 + row as f32])
}

fn put_rows(volume: &Volume, file: u64) {
    let rows = rows(file);
    let rows: Vec<&[f32]> = rows.iter().map(<[f32; 2]>::as_slice).collect();
    put(volume, file, &format!("{file}.npy"), &rows);
}

/// What nobody touches is found by every search, each row once; of what is written all rows or none.
fn whole(volume: &Volume) -> usize {
    let answer = volume.search(&nearest(&[1.0, 1.0], 1_000), &mut |_, _, _| true).unwrap();
    let mut files: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
    for hit in answer.hits {
        assert!(files.entry(hit.file.0).or_default().insert(hit.row), "{}#{} twice", hit.file.0, hit.row);
    }
    for file in 100..100 + STABLE {
        assert_eq!(files.get(&file).map(BTreeSet::len), Some(ROWS), "{file}");
    }
    assert!(files.values().all(|rows| rows.len() == ROWS), "{files:?}");
    files.len()
}

#[test]
fn searches_beside_seals_merges_and_deletes_miss_nothing_and_see_nothing_twice() {
    let (volume, _) = Volume::open_still(Arc::new(MemDisk::default()), options(SyncMode::Lazy)).unwrap();
    (100..100 + STABLE).for_each(|file| put_rows(&volume, file));
    let stop = AtomicBool::new(false);
    // Searches that saw some of what is written beside them.
    let beside = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // However the threads are scheduled, there are some.
            for n in (0..1_000_000).take_while(|n| *n < 1_500 || beside.load(Ordering::Acquire) < 200) {
                let file = 200 + n % 7;
                match n % 3 {
                    0 | 1 => put_rows(&volume, file),
                    _ => volume.unlink(FileId(file), &link(&format!("{file}.npy"))),
                }
            }
            stop.store(true, Ordering::Release);
        });
        scope.spawn(|| {
            let inner = &volume.inner;
            while !stop.load(Ordering::Acquire) {
                let collections: Vec<_> = inner.collections.read().values().cloned().collect();
                for collection in collections {
                    maintain::freeze(inner, &collection);
                    let parts = collection.parts.load_full();
                    for part in parts.iter().skip(1).filter(|part| part.as_segment().is_none()) {
                        maintain::rewrite(inner, &collection, std::slice::from_ref(part), &|_| true).unwrap();
                    }
                    let merged: Vec<_> = collection.parts.load().iter().skip(1).cloned().collect();
                    if merged.len() > 2 {
                        maintain::rewrite(inner, &collection, &merged, &|_| true).unwrap();
                    }
                }
            }
        });
        while !stop.load(Ordering::Acquire) {
            let seen = whole(&volume) > STABLE as usize;
            beside.fetch_add(u64::from(seen), Ordering::AcqRel);
        }
    });
    assert!(beside.into_inner() >= 200);
    whole(&volume);
}

/// A file that is replaced has one vector or the other at every moment; "no such vector" was answered now and then.
#[test]
fn a_vector_is_read_while_its_file_is_replaced_again_and_again() {
    let (volume, _) = Volume::open_still(Arc::new(MemDisk::default()), options(SyncMode::Lazy)).unwrap();
    put_rows(&volume, 100);
    let stop = AtomicBool::new(false);
    let read = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in (0..1_000_000).take_while(|n| *n < 2_000 || read.load(Ordering::Acquire) < 2_000) {
                put_rows(&volume, 100);
            }
            stop.store(true, Ordering::Release);
        });
        while !stop.load(Ordering::Acquire) {
            assert!(volume.vector(FileId(100), 1).is_some());
            assert!(volume.neighbors(FileId(100), 1, FileId::ROOT, &mut |_, _, _| true).is_some());
            read.fetch_add(1, Ordering::AcqRel);
        }
    });
    assert!(read.into_inner() >= 2_000);
}
