//! The store over shuttle's locks and atomics: searches beside writes, seals, merges and removals, in many random
//! schedules. `cargo test -p vexfs-store --features schedules`; `VEXFS_SCHEDULES=N` takes N of each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use vexfs_index::Element;

use crate::disk::MemDisk;
use crate::*;

const ROWS: u32 = 2;

/// Runs `body` in so many schedules, half of them chosen at random and half by preemptions at few random places, and
/// prints how many there were.
fn explore(name: &str, body: impl Fn() + Send + Sync + Copy + 'static) {
    static RUN: AtomicUsize = AtomicUsize::new(0);
    let schedules: usize = std::env::var("VEXFS_SCHEDULES").map_or(600, |value| value.parse().unwrap());
    let before = RUN.load(Ordering::SeqCst);
    let run = |scheduler: Box<dyn Scheduler + Send>| {
        let mut config = shuttle::Config::new();
        // A commit goes deep into the catalog.
        config.stack_size = 1 << 20;
        shuttle::Runner::new(scheduler, config).run(move || {
            RUN.fetch_add(1, Ordering::SeqCst);
            body();
        });
    };
    run(Box::new(RandomScheduler::new(schedules / 2)));
    run(Box::new(PctScheduler::new(3, schedules / 2)));
    eprintln!("{name}: {} schedules", RUN.load(Ordering::SeqCst) - before);
}

fn volume() -> Arc<Volume> {
    Arc::new(Volume::open_still(Arc::new(MemDisk::default()), Options::new(SyncMode::Lazy)).unwrap().0)
}

fn link(name: u64) -> Link {
    Link { parent: FileId::ROOT, name: format!("{name}.npy").into_bytes() }
}

/// A reading tells by its vectors whose it is and which one.
fn value(file: u64, reading: u32, row: u32) -> [f32; 3] {
    [file as f32, reading as f32, row as f32 + 1.0]
}

fn put(volume: &Volume, file: u64, reading: u32) {
    volume.link(FileId(file), link(file));
    let target = volume.prepare(FileId(file), 3, Element::F32).unwrap();
    let mut rows = Vec::new();
    (0..ROWS).for_each(|row| target.space.encode(&value(file, reading, row), &mut rows).unwrap());
    let print = Fingerprint { size: 1, mtime: i128::from(reading), ctime: 0 };
    volume.put(FileId(file), print, &target, rows).unwrap();
}

fn seal(volume: &Volume) {
    let collections: Vec<_> = volume.inner.collections.read().values().cloned().collect();
    for collection in collections {
        maintain::freeze(&volume.inner, &collection);
        let parts = collection.parts.load_full();
        let waiting: Vec<_> = parts.iter().skip(1).filter(|part| part.as_segment().is_none()).cloned().collect();
        waiting.iter().for_each(|part| rewrite(volume, &collection, std::slice::from_ref(part)));
    }
}

fn merge(volume: &Volume) {
    let collections: Vec<_> = volume.inner.collections.read().values().cloned().collect();
    for collection in collections {
        let parts = collection.parts.load_full();
        let segments: Vec<_> = parts.iter().filter(|part| part.as_segment().is_some()).cloned().collect();
        if !segments.is_empty() {
            rewrite(volume, &collection, &segments);
        }
    }
}

fn rewrite(volume: &Volume, collection: &collection::Collection, parts: &[Arc<part::Part>]) {
    let _alone = volume.inner.rewriting.lock();
    // Who waited may find that its parts are gone.
    let now = collection.parts.load_full();
    if parts.iter().all(|part| now.iter().any(|known| Arc::ptr_eq(known, part))) {
        maintain::rewrite(&volume.inner, collection, parts, &|_| true).unwrap();
    }
}

/// What is found: of each file the readings, and of each the rows; a row that is found twice is an error.
type Found = BTreeMap<u64, BTreeMap<u32, BTreeSet<u32>>>;

fn found(volume: &Volume) -> Found {
    let query = Query { exact: true, ..Query::nearest(vec![1.0, 1.0, 1.0], 100) };
    let mut found = Found::new();
    for hit in volume.search(&query, &mut |_, _, _| true).unwrap().hits {
        // Cosine: the distance tells which reading's row it is.
        let of = |reading: u32| {
            let value = value(hit.file.0, reading, hit.row);
            let dot: f32 = value.iter().sum();
            let norm: f32 = value.iter().map(|x| x * x).sum();
            (1.0 - dot / (norm.sqrt() * 3f32.sqrt()) - hit.distance).abs() < 1e-5
        };
        let reading = (0..10).find(|reading| of(*reading)).expect("a vector that nobody wrote");
        let rows = found.entry(hit.file.0).or_default().entry(reading).or_default();
        assert!(rows.insert(hit.row), "file {} row {} twice", hit.file.0, hit.row);
    }
    for (file, readings) in &found {
        assert_eq!(readings.len(), 1, "file {file} in two readings: {readings:?}");
        assert!(readings.values().all(|rows| rows.len() == ROWS as usize), "half of file {file}: {readings:?}");
    }
    found
}

fn reading(found: &Found, file: u64) -> Option<u32> {
    found.get(&file).and_then(|readings| readings.keys().next().copied())
}

/// While a file is overwritten and everything is sealed and merged, each search sees one reading of it whole, and never an
/// older one than the search before.
#[test]
fn a_search_sees_the_old_vectors_or_the_new_ones_beside_seals_and_merges() {
    explore("overwrite, seal, merge, search", || {
        let volume = volume();
        put(&volume, 10, 0);
        put(&volume, 11, 0);
        seal(&volume);
        put(&volume, 12, 0);
        let writer = {
            let volume = Arc::clone(&volume);
            shuttle::thread::spawn(move || {
                put(&volume, 11, 1);
                put(&volume, 11, 2);
            })
        };
        let sealer = {
            let volume = Arc::clone(&volume);
            shuttle::thread::spawn(move || {
                seal(&volume);
                merge(&volume);
            })
        };
        let mut last = 0;
        for _ in 0..3 {
            let found = found(&volume);
            assert_eq!((reading(&found, 10), reading(&found, 12)), (Some(0), Some(0)), "{found:?}");
            let now = reading(&found, 11).expect("file 11 is never gone");
            assert!(now >= last, "an older reading comes back");
            last = now;
        }
        writer.join().unwrap();
        sealer.join().unwrap();
        assert_eq!(reading(&found(&volume), 11), Some(2));
        merge(&volume);
        assert_eq!(reading(&found(&volume), 11), Some(2));
    });
}

/// What is removed before a search starts is in none, whatever is rewritten meanwhile; what a rename replaces is gone in
/// the step in which the other has its name.
#[test]
fn what_is_removed_is_in_no_later_search_beside_seals_and_merges() {
    explore("unlink, rename, seal, merge, search", || {
        let volume = volume();
        (10..14).for_each(|file| put(&volume, file, 0));
        seal(&volume);
        put(&volume, 12, 1);
        let remover = {
            let volume = Arc::clone(&volume);
            shuttle::thread::spawn(move || {
                volume.unlink(FileId(10), &link(10));
                assert_eq!(reading(&found(&volume), 10), None);
                volume.rename((FileId(11), false), (&link(11), true), (link(13), true), Some(FileId(13)));
                let found = found(&volume);
                assert_eq!((reading(&found, 11), reading(&found, 13)), (Some(0), None), "{found:?}");
            })
        };
        let sealer = {
            let volume = Arc::clone(&volume);
            shuttle::thread::spawn(move || {
                merge(&volume);
                seal(&volume);
            })
        };
        let mut before: Option<Found> = None;
        for _ in 0..3 {
            let now = found(&volume);
            assert_eq!((reading(&now, 11), reading(&now, 12)), (Some(0), Some(1)), "{now:?}");
            if let Some(before) = &before {
                assert!(now.keys().all(|file| before.contains_key(file)), "{before:?}, then {now:?}");
            }
            before = Some(now);
        }
        remover.join().unwrap();
        sealer.join().unwrap();
        let last = found(&volume);
        assert_eq!(last.keys().copied().collect::<Vec<_>>(), [11, 12]);
    });
}
