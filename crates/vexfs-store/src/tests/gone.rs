//! What is kept of files, segments and collections that are gone, and what becomes of what was on its way to them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vexfs_index::{Element, Index, Metric, Params, Place, Space, build_in};

use super::*;
use crate::collection::Collection;
use crate::part::{Part, Reading};
use crate::row::State;
use crate::segment::{Segment, SegmentError, SegmentFile};

fn at(dir: u64, name: &str) -> Link {
    Link { parent: FileId(dir), name: name.as_bytes().to_vec() }
}

fn put_at(volume: &Volume, dir: u64, file: u64, rows: &[f32], dimension: usize) {
    let rows: Vec<&[f32]> = rows.chunks_exact(dimension).collect();
    put_link(volume, file, at(dir, &format!("{file}.npy")), &rows);
}

/// Makes a segment of what a collection of this directory waits to have sealed.
fn seal(volume: &Volume, dir: u64) -> (Arc<Collection>, Arc<Part>) {
    let inner = &volume.inner;
    let id = volume.nearest_collection(FileId(dir)).unwrap();
    let collection = inner.collections.read().get(&id).cloned().unwrap();
    maintain::freeze(inner, &collection);
    let waiting: Vec<_> = collection.parts.load().iter().skip(1).cloned().collect();
    assert!(maintain::rewrite(inner, &collection, &waiting, &|_| true).unwrap());
    let part = collection.parts.load().last().cloned().unwrap();
    (collection, part)
}

fn is_warm(part: &Part) -> bool {
    part.as_segment().unwrap().index.memory().index > 0
}

/// A reading that ended while its rows were gathered has some of them in the segment and counted with all: a segment of
/// fewer points than had ended was taken for empty, and what else was in it was not found.
#[test]
fn of_a_file_that_ended_a_segment_counts_the_rows_that_it_has() {
    let disk = MemDisk::default();
    let space = Space::new(2, Metric::L2, Element::F32).unwrap();
    let mut rows = Vec::new();
    (0..3).for_each(|n| space.encode(&[n as f32, 1.0], &mut rows).unwrap());
    let params = Params::default();
    let built = build_in(Place::Memory, &space, &rows, &params, 1, &|| true).unwrap().unwrap();
    let readings = [(10, 1_000), (11, 2)].map(|(file, rows)| Reading::unborn(FileId(file), rows));
    let files =
        readings.each_ref().map(|r| SegmentFile { file: r.file, generation: Generation(r.file.0), rows: r.rows });
    let points = [(0, 7), (1, 0), (1, 1)];
    let content = segment::Content { space, files: &files, points: &points, rows: &rows, built: &built };
    segment::write(&disk, SegmentId(1), &content, &|_| true, usize::MAX).unwrap();
    readings[0].end(0);
    let part = Part::sealed(Segment::open(&disk, SegmentId(1)).unwrap(), readings.to_vec());
    assert_eq!(part.ended_points(), 1);
    readings[1].end(0);
    assert_eq!(part.ended_points(), 3);
}

/// What a segment's copies take was counted where there were none, and where they were made twice, and taken back twice
/// of a segment that was given up while it was rewritten: from then on no segment was copied to huge pages.
#[test]
fn the_budget_for_copies_is_whole_when_the_segments_are_gone() {
    let few = Options { memory: Some(8 << 20), ..options(SyncMode::Lazy) };
    let (volume, _) = Volume::open_still(Arc::new(MemDisk::default()), few).unwrap();
    volume.set_dir(FileId(5), link("wide"));
    volume.set_dir(FileId(6), link("many"));
    let wide: Vec<f32> = (0..900 * 1_024).map(|n| 1.0 + (n % 97) as f32).collect();
    put_at(&volume, 5, 10, &wide, 1_024);
    let (_, without) = seal(&volume, 5);
    assert!(!is_warm(&without), "so few have no graph");
    for n in 0..4 {
        put_at(&volume, 6, 20, &bulk(n), 4);
        let (collection, part) = seal(&volume, 6);
        assert!(is_warm(&part), "{n}");
        // As the thread does that verifies.
        volume.inner.warm(part.as_segment().unwrap());
        if n == 1 {
            volume.inner.quarantine(&collection, &part, &SegmentError::Malformed("for a test"));
            assert!(maintain::rewrite(&volume.inner, &collection, &[part], &|_| true).unwrap());
        }
    }
}

/// Each try left another file of the segment's whole size, and the disk was soon full.
#[test]
fn a_segment_that_cannot_be_opened_leaves_no_file() {
    let disk = MemDisk::default();
    let (volume, _) = Volume::open_still(Arc::new(disk.clone()), options(SyncMode::Lazy)).unwrap();
    put_bulk(&volume, 10, "0.npy", 0);
    let collection = volume.inner.collections.read().values().next().cloned().unwrap();
    let inputs = Vec::from(&collection.parts.load()[1..]);
    disk.fail_reads_from(disk.reads(), rustix::io::Errno::MFILE.raw_os_error());
    maintain::rewrite(&volume.inner, &collection, &inputs, &|_| true).unwrap_err();
    disk.heal();
    assert!(disk.list("segments").unwrap().is_empty());
    assert_eq!(near(&volume, &bulk(0)[..4], 1), ["0.npy"]);
}

/// A removed directory's collection went at once: the files of its segments stayed.
#[test]
fn of_a_removed_directory_no_segment_stays() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    volume.set_dir(FileId(5), link("dir"));
    put_at(&volume, 5, 10, &bulk(1), 4);
    volume.settle(&|| false).unwrap();
    assert_eq!(disk.list("segments").unwrap().len(), 1);
    volume.unlink(FileId(10), &at(5, "10.npy"));
    volume.remove_dir(FileId(5));
    for _ in 0..1_000 {
        if disk.list("segments").unwrap().is_empty() && volume.inner.collections.read().is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{:?} are still there", disk.list("segments").unwrap());
}

/// A file that was being read waited for a collection to be sealed that nobody would seal any more: its close(2) never
/// returned.
#[test]
fn who_waits_for_room_in_a_removed_directory_does_not_wait_for_ever() {
    let few = Options { memory: Some(3 << 20), ..options(SyncMode::Lazy) };
    let (volume, _) = Volume::open(Arc::new(MemDisk::default()), few).unwrap();
    volume.set_dir(FileId(5), link("other"));
    volume.set_dir(FileId(6), link("dir"));
    put_at(&volume, 5, 9, &[1.0, 2.0], 2);
    // A long build elsewhere.
    let building = volume.inner.rewriting.lock();
    std::thread::sleep(Duration::from_secs(2));
    put_at(&volume, 6, 10, &bulk(1), 4);
    put_at(&volume, 6, 11, &bulk(2), 4);
    let target = volume.prepare_in(FileId(6), FileId(12), 4, Element::F32).unwrap();
    for file in [10, 11] {
        volume.unlink(FileId(file), &at(6, &format!("{file}.npy")));
    }
    volume.remove_dir(FileId(6));
    drop(building);
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    std::thread::scope(|scope| {
        let volume = &volume;
        scope.spawn(move || {
            let mut row = Vec::new();
            target.space.encode(&[1.0; 4], &mut row).unwrap();
            let put = volume.put(FileId(12), print(1), &target, row).unwrap();
            tell.send(put).unwrap();
        });
        let put = told.recv_timeout(Duration::from_secs(20));
        // So that the test ends.
        volume.inner.tended.store(false, Ordering::Release);
        assert_eq!(put, Ok(false));
    });
}

/// A collection went for want of points while a file's were on their way: they were taken, and nobody asked there.
#[test]
fn what_comes_to_a_collection_that_went_meanwhile_is_found() {
    let (volume, _) = open(&MemDisk::default()).unwrap();
    volume.link(FileId(10), link("late.npy"));
    let late = volume.prepare(FileId(10), 2, Element::F32).unwrap();
    put(&volume, 11, "other.npy", &[&[1.0, 2.0, 3.0]]);
    while volume.inner.collections.read().len() > 1 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut row = Vec::new();
    late.space.encode(&[1.0, 2.0], &mut row).unwrap();
    assert!(volume.put(FileId(10), print(1), &late, row).unwrap());
    assert_eq!(near(&volume, &[1.0, 2.0], 1), ["late.npy"]);
}

/// A put that has come as far as the head, and that nobody sees yet.
fn unseen(volume: &Volume, file: FileId, link: Link) -> State {
    volume.link(file, link);
    let target = volume.prepare(file, 2, Element::F32).unwrap();
    let mut row = Vec::new();
    target.space.encode(&[3.0, 4.0], &mut row).unwrap();
    let inner = &volume.inner;
    let id = volume.nearest_collection(FileId::ROOT).unwrap();
    let collection = inner.collections.read().get(&id).cloned().unwrap();
    let (reading, generation) = (Reading::unborn(file, 1), Generation(99));
    collection.append(&reading, generation, &row);
    State::Indexed { collection: id, generation, reading }
}

/// A reading that nobody had seen yet ended with its segment, and then became the file's: nothing found it, or read it again.
#[test]
fn a_file_whose_segment_is_given_up_before_it_was_seen_is_read_again() {
    let (volume, _) = Volume::open_still(Arc::new(MemDisk::default()), options(SyncMode::Lazy)).unwrap();
    put(&volume, 11, "other.npy", &[&[1.0, 2.0]]);
    let (inner, file) = (&volume.inner, FileId(10));
    let state = unseen(&volume, file, link("late.npy"));
    let (collection, part) = seal(&volume, FileId::ROOT.0);
    inner.quarantine(&collection, &part, &SegmentError::Malformed("for a test"));
    volume.take_unread();
    assert!(inner.publish(&mut inner.writer.lock(), file, print(1), state));
    assert_eq!(volume.take_unread(), [file]);
    assert!(volume.vector(file, 0).is_none());
}

/// Which files lie below a directory is remembered: of one that had no name while it was read, and has one again, the old
/// answer was used.
#[test]
fn a_file_that_loses_its_name_and_gets_it_again_while_it_is_read_is_found_in_its_directory() {
    let (volume, _) = Volume::open_still(Arc::new(MemDisk::default()), options(SyncMode::Lazy)).unwrap();
    put(&volume, 11, "other.npy", &[&[1.0, 2.0]]);
    volume.set_dir(FileId(5), link("dir"));
    let (file, name) = (FileId(10), at(5, "late.npy"));
    let state = unseen(&volume, file, name.clone());
    volume.unlink(file, &name);
    let below = Query { scope: FileId(5), ..nearest(&[3.0, 4.0], 1) };
    let found = || volume.search(&below, &mut |_, _, _| true).unwrap().hits.len();
    assert_eq!(found(), 0);
    volume.link(file, name);
    let published = volume.inner.publish(&mut volume.inner.writer.lock(), file, print(1), state);
    assert!(published);
    assert_eq!(found(), 1);
}

/// A head kept all that was dead in it until it had as many points as make a segment: a few files that are written over and
/// over took its memory and every search's time.
#[test]
fn a_head_that_is_mostly_dead_is_sealed() {
    let (volume, _) = Volume::open_still(Arc::new(MemDisk::default()), options(SyncMode::Lazy)).unwrap();
    let rows: Vec<f32> = (0..100 * 2).map(|n| n as f32 + 1.0).collect();
    let mut most = 0;
    for _ in 0..200 {
        for file in 10..13 {
            put_at(&volume, FileId::ROOT.0, file, &rows, 2);
        }
        let report = volume.report(FileId::ROOT);
        assert_eq!(report.collections[0].points, 300);
        let collection = volume.inner.collections.read().values().next().cloned().unwrap();
        let head = collection.head().unwrap();
        most = most.max(head.index().len());
        let waiting: Vec<_> = collection.parts.load().iter().skip(1).cloned().collect();
        if !waiting.is_empty() {
            maintain::rewrite(&volume.inner, &collection, &waiting, &|_| true).unwrap();
        }
    }
    assert!((4_096..6_000).contains(&most), "{most}");
    let found = volume.search(&nearest(&[1.0, 2.0], 400), &mut |_, _, _| true).unwrap();
    assert_eq!(found.hits.len(), 300);
}

/// The status counted rows that were on their way, and no search could find, beside those in whose place they come.
#[test]
fn what_is_not_published_yet_is_not_counted() {
    let (volume, _) = Volume::open_still(Arc::new(MemDisk::default()), options(SyncMode::Lazy)).unwrap();
    put_at(&volume, FileId::ROOT.0, 10, &[1.0, 2.0], 2);
    let collection = volume.inner.collections.read().values().next().cloned().unwrap();
    let schema = collection.schema.load_full().unwrap();
    let mut bytes = Vec::new();
    schema.space.encode(&[2.0, 1.0], &mut bytes).unwrap();
    let unborn = Reading::unborn(FileId(10), 1);
    collection.append(&unborn, Generation(99), &bytes);
    assert_eq!(volume.report(FileId::ROOT).collections[0].points, 1);
    unborn.bear(volume.inner.version.load(Ordering::Acquire));
    assert_eq!(volume.report(FileId::ROOT).collections[0].points, 2);
}
