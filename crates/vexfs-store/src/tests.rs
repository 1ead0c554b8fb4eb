//! A volume on a disk in memory: what holds without trouble, and at every call that fails or is the last before power
//! is cut.

mod crash;
mod world;

use std::sync::Arc;

use vexfs_index::{Effort, Element};

use crate::disk::{Disk, Fault, MemDisk, write_small};
use crate::*;

fn options(sync: SyncMode) -> Options {
    Options { sync, root_inode: 2, threads: 2, boot: "one".to_owned(), sync_source: None }
}

fn link(name: &str) -> Link {
    Link { parent: FileId::ROOT, name: name.as_bytes().to_vec() }
}

fn print(size: u64) -> Fingerprint {
    Fingerprint { size, mtime: i128::from(size), ctime: 0 }
}

fn open(disk: &MemDisk) -> Result<(Volume, Recovery), OpenError> {
    Volume::open(Arc::new(disk.clone()), options(SyncMode::Lazy))
}

fn put(volume: &Volume, file: u64, name: &str, rows: &[&[f32]]) {
    let file = FileId(file);
    volume.link(file, link(name));
    let target = volume.prepare(file, rows[0].len(), Element::F32).unwrap();
    let mut bytes = Vec::new();
    rows.iter().for_each(|row| target.space.encode(row, &mut bytes).unwrap());
    assert!(volume.put(file, print(rows.len() as u64), &target, bytes).unwrap());
}

fn near(volume: &Volume, vector: &[f32], k: usize) -> Vec<String> {
    let query = Query {
        vector: vector.to_vec(),
        k,
        effort: Effort::default(),
        // What is kept is asked here, not how well a walk finds it.
        exact: true,
        max_distance: None,
        scope: FileId::ROOT,
        exclude: None,
        deadline: None,
    };
    let answer = volume.search(&query, &mut |_, _, _| true).unwrap();
    answer.hits.into_iter().map(|hit| String::from_utf8(hit.path).unwrap()).collect()
}

/// Rows enough for a segment of their own.
fn bulk(seed: u64) -> Vec<f32> {
    let mut state = seed * 2 + 1;
    (0..BULK_ROWS * 4)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn put_bulk(volume: &Volume, file: u64, name: &str, seed: u64) {
    let numbers = bulk(seed);
    let rows: Vec<&[f32]> = numbers.chunks_exact(4).collect();
    put(volume, file, name, &rows);
}

fn settle(volume: &Volume) {
    while volume.report(FileId::ROOT).pending > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn one_process_has_a_volume_open() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    assert!(matches!(open(&disk), Err(OpenError::Busy)));
    drop(volume);
}

#[test]
fn a_volume_of_another_version_is_refused() {
    let disk = MemDisk::default();
    write_small(&disk, "volume.toml", b"format = 7\nuuid = \"u\"\n").unwrap();
    assert!(matches!(open(&disk), Err(OpenError::Version { found: 7, supported: 1 })));
    write_small(&disk, "volume.toml", b"\xff").unwrap();
    assert!(matches!(open(&disk.crash()), Err(OpenError::VolumeFile(_))));
}

#[test]
fn a_synced_segment_is_served_after_a_crash_and_the_head_is_to_be_read_again() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    put_bulk(&volume, 10, "bulk.npy", 1);
    put(&volume, 11, "small.vec", &[&[9.0, 9.0, 9.0, 9.0]]);
    settle(&volume);
    volume.commit().unwrap();
    let crashed = disk.crash();
    drop(volume);
    let (volume, recovery) = open(&crashed).unwrap();
    assert_eq!(recovery.unread, [FileId(11)]);
    assert!(recovery.quarantined.is_empty());
    assert_eq!(near(&volume, &bulk(1)[..4], 1), ["bulk.npy"]);
    assert_eq!(volume.report(FileId::ROOT).collections[0].segments, 1);
}

#[test]
fn close_seals_what_would_be_slow_to_read_again() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    let numbers = bulk(3);
    for (n, rows) in numbers.chunks(400).enumerate() {
        let rows: Vec<&[f32]> = rows.chunks_exact(4).collect();
        put(&volume, 100 + n as u64, &format!("{n}.npy"), &rows);
    }
    volume.close().unwrap();
    let (volume, recovery) = open(&disk.crash()).unwrap();
    assert!(recovery.unread.is_empty(), "{} files", recovery.unread.len());
    assert_eq!(near(&volume, &numbers[..4], 1), ["0.npy"]);
}

#[test]
fn segments_are_merged_and_dead_rows_left_behind() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    for n in 0..5 {
        put_bulk(&volume, 20 + n, &format!("{n}.npy"), n);
        settle(&volume);
    }
    // Four of one size class become one.
    while volume.report(FileId::ROOT).collections[0].segments > 2 {
        std::thread::yield_now();
    }
    for n in 0..5 {
        assert_eq!(near(&volume, &bulk(n)[..4], 1), [format!("{n}.npy")]);
    }
    for n in 1..5 {
        volume.unlink(FileId(20 + n), &link(&format!("{n}.npy")));
    }
    while volume.report(FileId::ROOT).collections[0].dead > 0 {
        std::thread::yield_now();
    }
    assert_eq!(near(&volume, &bulk(3)[..4], 1), ["0.npy"]);
    volume.close().unwrap();
    assert_eq!(disk.list("segments").unwrap().len(), 1);
}

#[test]
fn a_rotten_block_is_found_out_and_its_files_are_read_again() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    put_bulk(&volume, 10, "bulk.npy", 1);
    volume.close().unwrap();
    let name = format!("segments/{}", disk.list("segments").unwrap()[0]);
    let len = disk.map(&name).unwrap().bytes().len();
    for n in 0..400 {
        let rotten = disk.crash();
        let at = (n * 7_919 * 31) % len;
        rotten.corrupt(&name, |bytes| match n % 4 {
            0 => bytes.truncate(at),
            _ => bytes[at] ^= 1 << (n % 8),
        });
        let (volume, recovery) = open(&rotten).unwrap();
        assert_eq!(recovery.quarantined.len(), 1, "byte {at} of {len}");
        assert_eq!(recovery.unread, [FileId(10)]);
        assert!(near(&volume, &bulk(1)[..4], 1).is_empty());
        assert!(volume.report(FileId::ROOT).last_error.is_some());
    }
}

#[test]
fn a_copied_volume_reads_its_files_anew() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    put_bulk(&volume, 10, "bulk.npy", 1);
    volume.close().unwrap();
    let moved = Options { root_inode: 77, ..options(SyncMode::Lazy) };
    let (volume, recovery) = Volume::open(Arc::new(disk.crash()), moved).unwrap();
    assert!(recovery.rekeyed);
    assert!(near(&volume, &bulk(1)[..4], 1).is_empty());
    assert!(volume.ready().is_err(), "searches wait for the walk");
}

/// Were the folder's name not synced, a power cut would take all segments at once and each file would be read again.
#[test]
fn a_power_cut_does_not_take_the_folder_of_segments() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    put_bulk(&volume, 10, "bulk.npy", 1);
    volume.close().unwrap();
    assert_eq!(disk.crash().list("segments").unwrap().len(), 1);
}

/// Overwriting in place, the catalog's commit, then a power cut that kept the file's new times and its old bytes: the
/// fingerprint agrees, and the index would go on answering with vectors that the file does not hold.
#[test]
fn a_reading_ahead_of_its_files_bytes_is_read_again_after_a_power_cut() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    put_bulk(&volume, 10, "bulk.npy", 1);
    settle(&volume);
    volume.commit().unwrap();
    let of_boot = |boot: &str| Options { boot: boot.to_owned(), ..options(SyncMode::Lazy) };
    let crashed = disk.crash();
    let (killed, recovery) = Volume::open(Arc::new(crashed.crash()), of_boot("one")).unwrap();
    assert!(recovery.unread.is_empty(), "a killed process loses no bytes");
    drop(killed);
    let (cut, recovery) = Volume::open(Arc::new(crashed.clone()), of_boot("two")).unwrap();
    assert_eq!(recovery.unread, [FileId(10)]);
    assert!(near(&cut, &bulk(1)[..4], 1).is_empty());
    // Killed before it was read again: still to be read.
    cut.commit().unwrap();
    let again = crashed.crash();
    drop(cut);
    let (_volume, recovery) = Volume::open(Arc::new(again), of_boot("two")).unwrap();
    assert_eq!(recovery.unread, [FileId(10)]);
}

#[test]
fn what_the_source_has_made_durable_is_not_read_again_after_a_power_cut() {
    let disk = MemDisk::default();
    let with_source = |boot: &str| Options {
        boot: boot.to_owned(),
        sync_source: Some(Arc::new(|| Ok(()))),
        ..options(SyncMode::Lazy)
    };
    let (volume, _) = Volume::open(Arc::new(disk.clone()), with_source("one")).unwrap();
    put_bulk(&volume, 10, "bulk.npy", 1);
    volume.close().unwrap();
    let (volume, recovery) = Volume::open(Arc::new(disk.crash()), with_source("two")).unwrap();
    assert!(recovery.unread.is_empty());
    assert_eq!(near(&volume, &bulk(1)[..4], 1), ["bulk.npy"]);
}

/// A small history; `durable` is told after each commit what must hold from then on.
fn history(volume: &Volume, durable: &mut dyn FnMut(&[&str])) -> Result<(), CommitError> {
    put(volume, 1_001, "a.vec", &[&[1.0, 0.0, 0.0, 0.0]]);
    put(volume, 1_002, "b.vec", &[&[0.0, 1.0, 0.0, 0.0]]);
    volume.commit()?;
    durable(&["a.vec", "b.vec"]);
    volume.rename(FileId(1_002), &link("b.vec"), link("c.vec"), None);
    volume.unlink(FileId(1_001), &link("a.vec"));
    volume.commit()?;
    durable(&["c.vec"]);
    put(volume, 1_003, "d.vec", &[&[0.0, 0.0, 1.0, 0.0]]);
    volume.rename(FileId(1_003), &link("d.vec"), link("c.vec"), Some(FileId(1_002)));
    volume.commit()?;
    durable(&["c.vec"]);
    Ok(())
}

fn names(volume: &Volume) -> Vec<String> {
    let mut names: Vec<String> = volume
        .known_files()
        .into_iter()
        .flat_map(|file| volume.paths(file, FileId::ROOT))
        .map(|path| String::from_utf8(path).unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn at_every_call_a_crash_or_a_failing_disk_leaves_a_moment_that_was() {
    let moments: [&[&str]; 4] = [&[], &["a.vec", "b.vec"], &["c.vec"], &["c.vec"]];
    let calls = {
        let disk = MemDisk::default();
        let (volume, _) = open(&disk).unwrap();
        history(&volume, &mut |_| {}).unwrap();
        drop(volume);
        disk.calls()
    };
    let mut points = 0;
    for fault in [Fault::Always(5), Fault::Torn(5), Fault::Once(28)] {
        for at in 0..calls {
            let disk = MemDisk::default();
            disk.fail_at(at, fault);
            let mut held = 0;
            if let Ok((volume, _)) = open(&disk) {
                let mut step = 0;
                let result = history(&volume, &mut |_| {
                    step += 1;
                    held = step;
                });
                // A disk that fails once serves again: what could not be written is written by the next commit.
                if result.is_err() && matches!(fault, Fault::Once(_)) {
                    disk.heal();
                    volume.commit().unwrap();
                    held = held.max(step);
                }
            }
            let crashed = disk.crash();
            let (volume, _) = open(&crashed).unwrap_or_else(|error| panic!("{fault:?} at {at}: {error}"));
            let found = names(&volume);
            // Whatever was told durable is there, or a later moment of the history.
            let allowed = moments[held..].iter().any(|moment| *moment == found) || between(&found, held);
            assert!(allowed, "{fault:?} at {at}: after moment {held} found {found:?}");
            points += 1;
        }
    }
    assert!(points > 60, "{points}");
}

/// The commit thread may write a moment between two of the history's commits.
fn between(found: &[String], held: usize) -> bool {
    let states: [&[&str]; 5] = [&["a.vec"], &["a.vec", "b.vec"], &["a.vec", "c.vec"], &["c.vec"], &["c.vec", "d.vec"]];
    let from = [0, 1, 3, 3][held];
    states[from..].iter().any(|state| *state == found)
}

#[test]
fn searches_beside_overwrites_see_the_old_vectors_or_the_new_ones() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    let one = [[1.0f32, 0.0], [1.0, 0.1], [1.0, 0.2]];
    let other = [[0.0f32, 1.0], [0.1, 1.0]];
    put(&volume, 5, "x.npy", &[&one[0], &one[1], &one[2]]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..2_000 {
                match n % 2 {
                    0 => put(&volume, 5, "x.npy", &[&other[0], &other[1]]),
                    _ => put(&volume, 5, "x.npy", &[&one[0], &one[1], &one[2]]),
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Release);
        });
        let mut seen = [0, 0];
        while !stop.load(std::sync::atomic::Ordering::Acquire) {
            match near(&volume, &[1.0, 1.0], 9).len() {
                3 => seen[0] += 1,
                2 => seen[1] += 1,
                n => panic!("{n} hits: neither the old three nor the new two"),
            }
        }
        assert!(seen[0] > 0 || seen[1] > 0);
    });
}

#[test]
fn settings_are_read_or_explained() {
    let config = Config::parse("metric = \"l2\"\ndimension = 3\n").unwrap();
    assert_eq!(config.dimension, Some(3));
    assert!(Config::parse("").unwrap() == Config::default());
    assert!(Config::parse("a = 1").unwrap_err().contains("line 1"));
    assert!(Config::parse("\nm = 1000").unwrap_err().contains("m: 1000"));
}
