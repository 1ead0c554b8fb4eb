//! Memory that is bounded over all collections, rows that are more than there is room for, and a thread that ends.

use std::sync::Arc;

use vexfs_index::Element;

use super::*;

fn small(memory: u64) -> Options {
    Options { memory: Some(memory), ..options(SyncMode::Lazy) }
}

/// Each directory's head had the whole of what a head may take.
#[test]
fn the_heads_of_many_collections_take_no_more_than_all_may() {
    let (volume, _) = Volume::open_still(Arc::new(MemDisk::default()), small(8 << 20)).unwrap();
    let inner = &volume.inner;
    let heads = || -> usize {
        let collections = inner.collections.read();
        collections.values().filter_map(|collection| collection.head()).map(|head| head.waiting_bytes()).sum()
    };
    let mut most = 0;
    for dir in 0..40 {
        let at = FileId(100 + dir);
        volume.set_dir(at, link(&format!("dir{dir}")));
        for n in 0..4 {
            let rows: Vec<f32> = (0..200 * 16).map(|i| 1.0 + ((dir * 7 + n * 3 + i) % 89) as f32).collect();
            let rows: Vec<&[f32]> = rows.chunks_exact(16).collect();
            let name = Link { parent: at, name: format!("{n}.npy").into_bytes() };
            put_link(&volume, 1_000 + dir * 10 + n, name, &rows);
            most = most.max(heads());
        }
    }
    // What came since they were last looked at may be above.
    assert!(most <= inner.budget.heads + inner.budget.head / 2, "{most} of {}", inner.budget.heads);
    assert!(most > inner.budget.heads / 2, "too small a test");
    assert_eq!(inner.collections.read().len(), 40);
    let points: u64 = volume.report(FileId::ROOT).collections.iter().map(|collection| collection.points).sum();
    assert_eq!(points, 40 * 4 * 200);
}

/// A file of very many short rows would take the memory of all others: it is refused before one is read.
#[test]
fn a_file_of_more_rows_than_there_is_memory_for_is_refused() {
    let (volume, _) = Volume::open_still(Arc::new(MemDisk::default()), small(1 << 20)).unwrap();
    volume.link(FileId(10), link("many.npy"));
    let target = volume.prepare(FileId(10), 1, Element::I8).unwrap();
    let most = usize::try_from(volume.inner.budget.rows).unwrap();
    assert!(volume.rows(&target, most).is_ok());
    let error = volume.rows(&target, most + 1).err().unwrap().to_string();
    assert!(error.contains(&format!("{} rows", most + 1)) && error.contains(&most.to_string()), "{error}");
}

/// There was memory taken for rows that no file could be had for.
#[test]
fn rows_that_the_disk_has_no_room_for_are_an_error_with_its_errno() {
    let disk = MemDisk::default();
    let (volume, _) = Volume::open_still(Arc::new(disk.clone()), small(1 << 20)).unwrap();
    volume.link(FileId(10), link("large.npy"));
    let target = volume.prepare(FileId(10), 16, Element::F32).unwrap();
    disk.fail_at(disk.calls(), Fault::Always(28));
    let error = volume.rows(&target, 9_000).err().unwrap();
    assert!(matches!(error, PutError::Room { errno: 28, .. }), "{error}");
    disk.heal();
    assert!(volume.rows(&target, 9_000).is_ok());
}

/// Who waited for the thread that seals waited for ever when it was gone.
#[test]
fn when_the_thread_that_seals_panics_nobody_waits_for_it_and_the_status_says_so() {
    let disk = MemDisk::default();
    let (volume, _) = Volume::open(Arc::new(disk.clone()), small(3 << 20)).unwrap();
    disk.watch(|_| assert_ne!(std::thread::current().name(), Some("vexfs-seal"), "for a test"));
    for n in 0..6 {
        put_bulk(&volume, 10 + n, &format!("{n}.npy"), n);
    }
    volume.settle(&|| false).unwrap_err();
    disk.unwatch();
    let said = volume.report(FileId::ROOT).last_error.unwrap();
    assert!(said.contains("vexfs-seal"), "{said}");
    assert_eq!(near(&volume, &bulk(5)[..4], 1), ["5.npy"]);
    // What was given in is made durable by who asks for it, as before.
    volume.commit().unwrap();
}

#[test]
fn the_report_tells_what_memory_is_kept_for() {
    let (volume, _) = Volume::open(Arc::new(MemDisk::default()), small(64 << 20)).unwrap();
    let memory = || volume.report(FileId::ROOT).memory;
    assert_eq!((memory().allowed, memory().heads, memory().names), (Some(64 << 20), 0, 0));
    volume.pause(true);
    put(&volume, 10, "small.vec", &[&[1.0, 2.0, 3.0, 4.0]]);
    put_bulk(&volume, 11, "bulk.npy", 1);
    let waiting = memory();
    assert!(waiting.heads >= 16 && waiting.unsealed == BULK_ROWS as u64 * 16 && waiting.copies == 0, "{waiting:?}");
    assert!(waiting.names > 0, "{waiting:?}");
    volume.settle(&|| false).unwrap();
    near(&volume, &[1.0, 2.0, 3.0, 4.0], 1);
    volume.search(&Query::nearest(vec![1.0, 2.0, 3.0, 4.0], 1), &mut |_, _, _| true).unwrap();
    let sealed = memory();
    assert!(sealed.unsealed == 0 && sealed.copies > BULK_ROWS as u64 * 4, "{sealed:?}");
    assert!(sealed.scratches >= BULK_ROWS as u64 / 8, "{sealed:?}");
}
