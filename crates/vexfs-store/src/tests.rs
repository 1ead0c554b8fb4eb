//! A volume on a disk in memory: what holds without trouble, and at every call that fails or is the last before power
//! is cut.

mod background;
mod beside;
mod crash;
mod gone;
mod model;
mod room;
mod rot;
mod world;

use std::sync::Arc;

use vexfs_index::{Element, Until};

use crate::disk::{DirDisk, Disk, Fault, MemDisk, write_small};
use crate::*;

fn options(sync: SyncMode) -> Options {
    Options { root_born: 9, threads: 2, boot: "one".to_owned(), ..Options::new(sync) }
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
    put_link(volume, file, link(name), rows);
}

fn put_link(volume: &Volume, file: u64, link: Link, rows: &[&[f32]]) {
    let file = FileId(file);
    volume.link(file, link);
    let target = volume.prepare(file, rows[0].len(), Element::F32).unwrap();
    let mut bytes = Vec::new();
    rows.iter().for_each(|row| target.space.encode(row, &mut bytes).unwrap());
    let mut room = volume.rows(&target, rows.len()).unwrap();
    room.push(&bytes);
    assert!(volume.put(file, print(rows.len() as u64), &target, room).unwrap());
}

fn nearest(vector: &[f32], k: usize) -> Query<'static> {
    Query {
        // What is kept is asked here, not how well a walk finds it.
        exact: true,
        ..Query::nearest(vector.to_vec(), k)
    }
}

fn near(volume: &Volume, vector: &[f32], k: usize) -> Vec<String> {
    let answer = volume.search(&nearest(vector, k), &mut |_, _, _| true).unwrap();
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
        let mut unread = recovery.unread;
        while unread.is_empty() {
            // It is found out behind, if not while it is opened.
            unread = volume.take_unread();
        }
        assert_eq!(unread, [FileId(10)], "byte {at} of {len}");
        assert_eq!(volume.report(FileId::ROOT).quarantined.len(), 1);
        assert!(near(&volume, &bulk(1)[..4], 1).is_empty());
        assert!(volume.report(FileId::ROOT).last_error.is_some());
    }
}

/// Restored on another file system: other numbers, one of them another file's old one; a file that changed on the way.
#[test]
fn a_copied_volume_answers_as_before_where_its_files_are_the_same() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    volume.set_dir(FileId(5), link("sub"));
    let below = |name: &str| Link { parent: FileId(5), name: name.as_bytes().to_vec() };
    put_bulk(&volume, 10, "bulk.npy", 1);
    put_bulk(&volume, 11, "other.npy", 2);
    put_bulk(&volume, 12, "changed.npy", 3);
    volume.rename((FileId(11), false), (&link("other.npy"), true), (below("other.npy"), true), None);
    volume.scan_finished();
    volume.close().unwrap();
    let print = print(BULK_ROWS as u64);
    let locate = move |path: &[u8], _attached: bool| match path {
        b"sub" => Some(Located { id: FileId(12), fingerprint: None }),
        b"bulk.npy" => Some(Located { id: FileId(11), fingerprint: Some(print) }),
        b"sub/other.npy" => Some(Located { id: FileId(10), fingerprint: Some(print) }),
        b"changed.npy" => Some(Located { id: FileId(13), fingerprint: Some(Fingerprint { mtime: 1, ..print }) }),
        _ => None,
    };
    // The roots of two file systems have one number.
    let moved = Options { root_born: 10, locate: Some(Arc::new(locate)), ..options(SyncMode::Lazy) };
    let copy = disk.crash();
    let (volume, recovery) = Volume::open(Arc::new(copy.clone()), moved.clone()).unwrap();
    assert!(recovery.rekeyed && volume.ready().is_ok());
    assert_eq!(recovery.unread, [FileId(13)]);
    for n in 0..2 {
        assert_eq!(near(&volume, &bulk(1)[..4], 1), ["bulk.npy"], "{n}");
        assert_eq!(near(&volume, &bulk(2)[..4], 1), ["sub/other.npy"], "{n}");
        assert_eq!(volume.paths(FileId(10), FileId::ROOT), [b"sub/other.npy"], "{n}");
        volume.commit().unwrap();
    }
    drop(volume);
    assert!(!check(&copy.crash(), false).unwrap().has_errors());
    let (volume, recovery) = Volume::open(Arc::new(copy.crash()), moved).unwrap();
    assert!(!recovery.rekeyed);
    assert_eq!(near(&volume, &bulk(2)[..4], 1), ["sub/other.npy"]);
}

#[test]
fn a_copied_volume_whose_files_cannot_be_found_reads_them_anew() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    put_bulk(&volume, 10, "bulk.npy", 1);
    volume.close().unwrap();
    let moved = Options { root_inode: 77, ..options(SyncMode::Lazy) };
    let (volume, recovery) = Volume::open(Arc::new(disk.crash()), moved).unwrap();
    assert!(recovery.rekeyed);
    assert!(near(&volume, &bulk(1)[..4], 1).is_empty());
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

/// Kept for ever: a state directory as 0.1.0 first wrote it, 4,200 points on a circle and one more.
#[test]
fn a_volume_of_version_1_opens_and_answers() {
    let disk = MemDisk::default();
    let files: [(&str, &[u8]); 3] = [
        ("volume.toml", include_bytes!("tests/v1/volume.toml")),
        ("catalog", include_bytes!("tests/v1/catalog")),
        ("segments/0000000000000001.seg", include_bytes!("tests/v1/0000000000000001.seg")),
    ];
    for (name, bytes) in files {
        disk.open(name).unwrap().write_at(0, bytes).unwrap();
    }
    let disk = disk.crash_with(crate::disk::Survivors::All);
    let root_inode = 10_035_425;
    let (volume, recovery) =
        Volume::open(Arc::new(disk.clone()), Options { root_inode, ..options(SyncMode::Lazy) }).unwrap();
    assert!(!recovery.rekeyed && recovery.quarantined.is_empty());
    assert_eq!(volume.uuid(), "3229d2a4-64da-4463-8fae-cbdb925efa39");
    let query = Query { exact: false, ..nearest(&[0.0, 1.0], 1) };
    let hit = volume.search(&query, &mut |_, _, _| true).unwrap().hits.remove(0);
    assert_eq!((&hit.path[..], hit.row), (&b"circle.npy"[..], 1_050));
    assert!(recovery.unread.is_empty());
    assert_eq!(volume.report(FileId::ROOT).collections[0].points, 4_201);
    volume.close().unwrap();
    assert!(!check(&disk.crash(), false).unwrap().has_errors());
}

/// Every byte of a vector that was removed is looked for in every file.
#[test]
fn a_removed_vectors_bytes_are_gone_from_every_file_after_a_purge() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    for n in 0..2 {
        put_bulk(&volume, 10 + n, &format!("{n}.npy"), n);
    }
    let secret = [0.123_456_7_f32, -0.765_432_1, 0.333_221_1, 0.411_922_8];
    put(&volume, 50, "secret.vec", &[&secret]);
    volume.optimize(false, &|| false).unwrap();
    let stored = volume.vector(FileId(50), 0).unwrap();
    let bytes: Vec<u8> = stored.iter().flat_map(|number| number.to_le_bytes()).collect();
    let holds = |disk: &MemDisk| {
        disk.files().iter().any(|name| disk.bytes(name).unwrap().windows(bytes.len()).any(|window| window == bytes))
    };
    assert!(holds(&disk), "it was sealed");
    volume.unlink(FileId(50), &link("secret.vec"));
    volume.optimize(true, &|| false).unwrap();
    assert!(!holds(&disk));
    assert!(!holds(&disk.crash()), "nor after a power cut");
    assert_eq!(near(&volume, &bulk(1)[..4], 1), ["1.npy"]);
    assert_eq!(volume.report(FileId::ROOT).collections[0].segments, 1);
    volume.commit().unwrap();
}

#[test]
fn what_settle_waited_for_is_linked_and_durable() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    put_bulk(&volume, 10, "bulk.npy", 1);
    put(&volume, 11, "small.vec", &[&[9.0, 9.0, 9.0, 9.0]]);
    assert!(volume.report(FileId::ROOT).oldest_pending_ms.is_some());
    volume.settle(&|| false).unwrap();
    let report = volume.report(FileId::ROOT);
    assert_eq!((report.pending, report.oldest_pending_ms), (0, None));
    let (volume, recovery) = open(&disk.crash()).unwrap();
    assert_eq!(recovery.unread, [FileId(11)]);
    assert_eq!(near(&volume, &bulk(1)[..4], 1), ["bulk.npy"]);
}

/// Without a bound, files that come faster than they are sealed fill the memory.
#[test]
fn who_brings_more_than_can_be_sealed_waits_and_nothing_is_dropped() {
    let disk = MemDisk::default();
    disk.fail_at(0, Fault::Slow(std::time::Duration::from_millis(2)));
    let few = Options { memory: Some(BULK_ROWS as u64 * 16 * 4), ..options(SyncMode::Lazy) };
    let (volume, _) = Volume::open(Arc::new(disk), few).unwrap();
    for n in 0..6 {
        put_bulk(&volume, 10 + n, &format!("{n}.npy"), n);
        assert!(volume.report(FileId::ROOT).pending <= 2 * BULK_ROWS as u64);
    }
    for n in 0..6 {
        assert_eq!(near(&volume, &bulk(n)[..4], 1), [format!("{n}.npy")]);
    }
}

/// One file of more rows than the budget has room for, and compacting, once took a few times their bytes of memory
/// whatever the budget: where that ended the process did.
#[test]
fn what_a_budget_has_no_room_for_is_built_in_a_file() {
    for (memory, in_files) in [(None, false), (Some(1 << 20), true)] {
        let disk = MemDisk::default();
        let few = Options { memory, ..options(SyncMode::Lazy) };
        let (volume, _) = Volume::open(Arc::new(disk.clone()), few).unwrap();
        let bytes = BULK_ROWS as u64 * 16;
        put_bulk(&volume, 10, "0.npy", 0);
        assert_eq!(disk.scratched() >= bytes, in_files, "its rows");
        put_bulk(&volume, 11, "1.npy", 1);
        volume.settle(&|| false).unwrap();
        assert_eq!(disk.scratched() >= 2 * bytes + 2 * BULK_ROWS as u64 * 128, in_files, "links too");
        let before = disk.scratched();
        volume.optimize(false, &|| false).unwrap();
        assert_eq!(disk.scratched() >= before + 2 * bytes, in_files, "rows that are gathered");
        assert_eq!(volume.report(FileId::ROOT).collections[0].segments, 1);
        for n in 0..2 {
            let walked = Query::nearest(bulk(n)[..4].to_vec(), 1);
            let answer = volume.search(&walked, &mut |_, _, _| true).unwrap();
            assert_eq!(answer.hits[0].path, format!("{n}.npy").into_bytes());
        }
    }
}

#[test]
fn a_build_without_room_on_the_disk_fails_loses_nothing_and_is_done_when_there_is() {
    let disk = MemDisk::default();
    let few = Options { memory: Some(1 << 20), ..options(SyncMode::Lazy) };
    let (volume, _) = Volume::open_still(Arc::new(disk.clone()), few).unwrap();
    put_bulk(&volume, 10, "0.npy", 0);
    let scratched = disk.scratched();
    disk.fail_at(disk.calls(), Fault::Always(rustix::io::Errno::NOSPC.raw_os_error()));
    let collection = volume.inner.collections.read().values().next().cloned().unwrap();
    let inputs = Vec::from(&collection.parts.load()[1..]);
    let error = maintain::rewrite(&volume.inner, &collection, &inputs, &|_| true).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(disk.scratched(), scratched);
    assert_eq!(near(&volume, &bulk(0)[..4], 1), ["0.npy"]);
    disk.heal();
    assert!(maintain::rewrite(&volume.inner, &collection, &inputs, &|_| true).unwrap());
    assert_eq!(near(&volume, &bulk(0)[..4], 1), ["0.npy"]);
}

/// A build takes a few times the bytes of its rows: with a small budget neither heads nor merges may be large. Heads
/// once grew as long as a build went on, whatever the budget.
#[test]
fn under_a_small_budget_heads_and_merges_stay_small() {
    let few = Options { memory: Some(16 << 20), ..options(SyncMode::Lazy) };
    let (volume, _) = Volume::open(Arc::new(MemDisk::default()), few).unwrap();
    for n in 0..48 {
        let numbers = bulk(n);
        let rows: Vec<&[f32]> = numbers.chunks_exact(4).take(1_024).collect();
        put(&volume, 10 + n, &format!("{n}.npy"), &rows);
    }
    let inner = &volume.inner;
    let collection = inner.collections.read().values().next().cloned().unwrap();
    let most = inner.budget.rows_in_memory(&collection.schema.load_full().unwrap());
    let idle = || {
        let parts = collection.parts.load_full();
        (!collection.head_is_full(inner.budget.head) && maintain::choose(&parts[1..], most).is_empty()).then_some(parts)
    };
    let parts = loop {
        match idle() {
            Some(parts) => break parts,
            None => std::thread::sleep(std::time::Duration::from_millis(5)),
        }
    };
    let rows: Vec<u64> = parts.iter().map(|part| part.live_points()).collect();
    assert_eq!(rows.iter().sum::<u64>(), 48 * 1_024);
    assert!(rows.iter().all(|rows| *rows <= most), "{rows:?}");
    assert!(rows.iter().any(|rows| *rows > most / 2), "some were merged: {rows:?}");
    assert_eq!(near(&volume, &bulk(47)[..4], 1), ["47.npy"]);
}

#[test]
fn a_search_whose_looks_at_files_take_too_long_stops_at_its_deadline() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    for n in 0..40 {
        put(&volume, 10 + n, &format!("{n}.vec"), &[&[1.0, n as f32]]);
    }
    let now = std::time::Instant::now();
    let until = Until { deadline: Some(now + std::time::Duration::from_millis(30)), ..Until::default() };
    let mut looks = 0;
    let answer = volume.search(&Query { until, ..nearest(&[1.0, 1.0], 40) }, &mut |_, _, _| {
        looks += 1;
        std::thread::sleep(std::time::Duration::from_millis(5));
        true
    });
    assert_eq!(answer.unwrap_err(), SearchError::Deadline);
    assert!(looks < 10, "{looks}");
}

#[test]
fn a_barrier_tells_of_a_disk_that_is_full() {
    let disk = MemDisk::default();
    let (volume, _) = open(&disk).unwrap();
    disk.fail_at(disk.calls(), Fault::Always(28));
    put_bulk(&volume, 10, "bulk.npy", 1);
    assert!(volume.settle(&|| false).is_err());
    assert_eq!(near(&volume, &bulk(1)[..4], 1), ["bulk.npy"], "searches go on");
    disk.heal();
    while volume.settle(&|| false).is_err() {}
    assert_eq!(volume.report(FileId::ROOT).pending, 0);
}

/// A small history; `durable` is told after each commit what must hold from then on.
fn history(volume: &Volume, durable: &mut dyn FnMut(&[&str])) -> Result<(), CommitError> {
    put(volume, 1_001, "a.vec", &[&[1.0, 0.0, 0.0, 0.0]]);
    put(volume, 1_002, "b.vec", &[&[0.0, 1.0, 0.0, 0.0]]);
    volume.commit()?;
    durable(&["a.vec", "b.vec"]);
    volume.rename((FileId(1_002), false), (&link("b.vec"), true), (link("c.vec"), true), None);
    volume.unlink(FileId(1_001), &link("a.vec"));
    volume.commit()?;
    durable(&["c.vec"]);
    put(volume, 1_003, "d.vec", &[&[0.0, 0.0, 1.0, 0.0]]);
    volume.rename((FileId(1_003), false), (&link("d.vec"), true), (link("c.vec"), true), Some(FileId(1_002)));
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
    for fault in [Fault::Always(5), Fault::Torn(5), Fault::Once(28), Fault::Once(5), Fault::Once(122), Fault::Short(28)]
    {
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
                if let (Err(CommitError::Io { errno, .. }), Fault::Once(wanted) | Fault::Short(wanted)) =
                    (&result, fault)
                {
                    assert_eq!(*errno, wanted, "{fault:?} at {at}: the errno passes");
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
    assert!(Config::parse("quantization = \"pq\"").unwrap_err().contains("\"sq8\", \"sq4\", \"rabitq\", \"none\""));
    for codes in ["sq4", "rabitq"] {
        assert!(Config::parse(&format!("quantization = \"{codes}\"")).is_ok());
        let refused = Config::parse(&format!("element = \"bits\"\nquantization = \"{codes}\"")).unwrap_err();
        assert_eq!(refused, format!("quantization: {codes} is for numbers; bits are their own codes"));
    }
}

/// A forced unmount lets the next daemon in as soon as the lock is free. While the lock went before the catalog was closed,
/// the next daemon read a catalog that the last one was still writing, and found it damaged for good.
#[test]
fn nothing_is_written_once_the_lock_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let root = || std::fs::File::open(dir.path()).unwrap().into();
    for round in 0..10 {
        let (volume, _) = Volume::open(Arc::new(DirDisk::new(root())), options(SyncMode::Lazy)).unwrap();
        put(&volume, round + 3, &format!("{round}.vec"), &[&[1.0, 2.0]]);
        let seen = std::thread::scope(|scope| {
            let next = scope.spawn(|| {
                let disk = DirDisk::new(root());
                while !disk.lock().unwrap() {
                    std::hint::spin_loop();
                }
                std::fs::read(dir.path().join("catalog")).unwrap()
            });
            volume.close().unwrap();
            next.join().unwrap()
        });
        assert!(seen == std::fs::read(dir.path().join("catalog")).unwrap(), "round {round}");
    }
}

/// A look at the source between a rename and the word of it finds a file under none of its names.
#[test]
fn a_rename_brings_back_what_a_look_in_its_midst_took_away() {
    let (volume, _) = open(&MemDisk::default()).unwrap();
    let (file, other) = (FileId(10), FileId(11));
    let put_both = |from: &str, to: &str| {
        put(&volume, file.0, from, &[&[1.0, 0.0]]);
        put(&volume, other.0, to, &[&[0.0, 1.0]]);
        volume.attach(file, vec![link(from)]);
        volume.unlink(file, &link(from));
        assert!(volume.content(file).is_none() && !volume.has_attached(file));
    };
    let is_to_be_read = |to: &str| {
        for id in [file, file.attached()] {
            assert_eq!(volume.links(id), [link(to)]);
            assert!(matches!(volume.content(id), Some((_, Content::Unread))));
        }
    };
    put_both("a.vec", "b.vec");
    volume.rename((file, true), (&link("a.vec"), true), (link("b.vec"), true), Some(other));
    is_to_be_read("b.vec");
    assert!(volume.content(other).is_none());
    put_both("b.vec", "c.vec");
    volume.exchange((file, true, link("b.vec")), (other, false, link("c.vec")), true);
    is_to_be_read("c.vec");
    assert_eq!(volume.links(other), [link("b.vec")]);
    assert!(matches!(volume.content(other), Some((_, Content::Indexed { .. }))));
}
