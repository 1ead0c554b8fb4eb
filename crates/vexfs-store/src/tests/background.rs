//! Work behind that is to pause, or to be slow, and who waits for it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::background::{Background, Kind};

/// Long enough to be noticed if it went on, and no test waits for more.
const WHILE: Duration = Duration::from_millis(150);

fn report(volume: &Volume) -> Report {
    volume.report(FileId::ROOT)
}

#[test]
fn what_is_paused_stays_as_it_is_is_found_and_goes_on() {
    let (volume, _) = open(&MemDisk::default()).unwrap();
    volume.pause(true);
    put_bulk(&volume, 10, "bulk.npy", 1);
    put(&volume, 11, "small.vec", &[&[9.0, 9.0, 9.0, 9.0]]);
    std::thread::sleep(WHILE);
    let paused = report(&volume);
    assert_eq!((paused.pending, paused.collections[0].segments), (BULK_ROWS as u64 + 1, 0));
    assert!(paused.background.paused);
    assert_eq!(near(&volume, &bulk(1)[..4], 1), ["bulk.npy"]);
    assert_eq!(near(&volume, &[9.0, 9.0, 9.0, 9.0], 1), ["small.vec"]);
    volume.commit().unwrap();
    volume.pause(false);
    settle(&volume);
    assert!(!report(&volume).background.paused);
}

/// Two threads that link may each be at a row.
const AT_ONCE: u64 = 2;

#[test]
fn a_build_pauses_in_its_midst_tells_how_far_it_is_and_loses_nothing() {
    let (volume, _) = open(&MemDisk::default()).unwrap();
    put_bulk(&volume, 10, "bulk.npy", 1);
    let linked = || report(&volume).background.work.map_or(0, |work| work.linked);
    while linked() == 0 && report(&volume).pending > 0 {
        std::thread::yield_now();
    }
    volume.pause(true);
    std::thread::sleep(WHILE);
    let before = linked();
    if let Some(work) = report(&volume).background.work {
        assert_eq!((work.kind, work.points, &*work.directory), (Kind::Seal, BULK_ROWS as u64, ""));
        std::thread::sleep(WHILE);
        assert!(linked() <= before + AT_ONCE, "it went on from {before} to {}", linked());
        assert_eq!(near(&volume, &bulk(1)[..4], 1), ["bulk.npy"]);
    }
    volume.pause(false);
    settle(&volume);
    assert_eq!(near(&volume, &bulk(1)[..4], 1), ["bulk.npy"]);
    assert_eq!(report(&volume).collections[0].segments, 1);
    // Its commit may go on a little.
    while report(&volume).background.work.is_some() {
        std::thread::yield_now();
    }
}

#[test]
fn who_waits_for_what_is_paused_does_not_wait_for_ever() {
    let (volume, _) = open(&MemDisk::default()).unwrap();
    volume.pause(true);
    put_bulk(&volume, 10, "0.npy", 0);
    volume.settle(&|| false).unwrap();
    assert_eq!(report(&volume).pending, 0);
    put_bulk(&volume, 11, "1.npy", 1);
    volume.optimize(false, &|| false).unwrap();
    assert_eq!(report(&volume).collections[0].segments, 1);
    assert!(report(&volume).background.paused, "as it was told");
    put_bulk(&volume, 12, "2.npy", 2);
    volume.close().unwrap();
}

#[test]
fn who_brings_more_than_there_is_memory_for_gets_room_though_it_is_paused() {
    let few = Options { memory: Some(BULK_ROWS as u64 * 16 * 4), ..options(SyncMode::Lazy) };
    let (volume, _) = Volume::open(Arc::new(MemDisk::default()), few).unwrap();
    volume.pause(true);
    for n in 0..6 {
        put_bulk(&volume, 10 + n, &format!("{n}.npy"), n);
        assert!(report(&volume).pending <= 2 * BULK_ROWS as u64);
    }
}

#[test]
fn a_rate_bounds_what_is_written_behind_until_somebody_waits() {
    let disk = MemDisk::default();
    // A bulk file's rows are a sixteenth of it, and links and codes a few times as much.
    let rate = BULK_ROWS as u64 * 16 * 16;
    let slow = Options { background_rate: Some(rate), ..options(SyncMode::Lazy) };
    let (volume, _) = Volume::open(Arc::new(disk), slow).unwrap();
    let began = Instant::now();
    put_bulk(&volume, 10, "0.npy", 0);
    assert_eq!(report(&volume).background.rate, Some(rate));
    settle(&volume);
    let bytes = report(&volume).collections[0].segment_bytes;
    let least = Duration::from_secs_f64(bytes as f64 / rate as f64) - Duration::from_millis(50);
    assert!(began.elapsed() >= least, "{bytes} bytes in {:?} at {rate} a second", began.elapsed());
    // A thousand years' work, but somebody waits.
    volume.set_background_rate(1);
    put_bulk(&volume, 11, "1.npy", 1);
    volume.settle(&|| false).unwrap();
    put_bulk(&volume, 12, "2.npy", 2);
    volume.set_background_rate(0);
    settle(&volume);
    assert_eq!(report(&volume).background.rate, None);
}

#[test]
fn what_is_held_is_let_go_when_the_volume_ends() {
    let background = Background::new(1);
    let stop = AtomicBool::new(false);
    let passed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A year's bytes.
            while background.go_on(&stop, 1 << 25) {
                passed.fetch_add(1, Ordering::SeqCst);
            }
        });
        std::thread::sleep(WHILE);
        stop.store(true, Ordering::SeqCst);
        background.wake();
    });
    assert_eq!(passed.into_inner(), 0);
}

#[test]
fn a_barrier_that_nobody_waits_for_any_more_ends_and_nothing_is_lost() {
    let disk = MemDisk::default();
    disk.fail_at(0, Fault::Slow(Duration::from_millis(2)));
    let (volume, _) = open(&disk).unwrap();
    // Nothing is sealed meanwhile.
    let alone = volume.inner.rewriting.lock();
    put_bulk(&volume, 10, "0.npy", 0);
    put_bulk(&volume, 11, "1.npy", 1);
    assert!(matches!(volume.settle(&|| true), Err(CommitError::Cancelled)));
    assert!(matches!(volume.optimize(false, &|| true), Err(CommitError::Cancelled)));
    drop(alone);
    // In the midst of its build.
    let asked = AtomicUsize::new(0);
    let soon = || asked.fetch_add(1, Ordering::SeqCst) > 2_000;
    match volume.optimize(false, &soon) {
        Err(CommitError::Cancelled) => {}
        other => assert!(asked.load(Ordering::SeqCst) <= 2_000, "{other:?}"),
    }
    volume.settle(&|| false).unwrap();
    for n in 0..2 {
        assert_eq!(near(&volume, &bulk(n)[..4], 1), [format!("{n}.npy")]);
    }
}

#[test]
fn a_search_that_nobody_waits_for_any_more_ends() {
    let (volume, _) = open(&MemDisk::default()).unwrap();
    put(&volume, 10, "a.vec", &[&[1.0, 2.0, 3.0, 4.0]]);
    let until = Until { cancelled: Some(&|| true), ..Until::default() };
    let answer = volume.search(&Query { until, ..nearest(&[1.0, 2.0, 3.0, 4.0], 1) }, &mut |_, _, _| true);
    assert_eq!(answer.unwrap_err(), SearchError::Cancelled);
}
