//! Crash enumeration: every sequence of at most three operations, a crash at every call to the disk, and any part of
//! what was not synced lost.
//!
//! What must hold of the volume that opens afterwards: at once, each vector that is found is the one that its file
//! holds under that name, and what was synced is found; after the walk exactly what the source holds is found, before
//! and after one more remount.
//!
//! `cargo test` takes the sequences of at most two; `VEXFS_CRASH=full` takes all (minutes). After the shorter ones the
//! recovery itself is crashed at each of its calls.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::world::{Bytes, Source, SourceSurvivors, World, is_kill};
use crate::FileId;
use crate::disk::{MemDisk, Survivors};

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Op {
    Create,
    Overwrite,
    Append,
    Rename,
    RenameOver,
    Unlink,
    Link,
    Attach,
    Detach,
    Fsync,
    FsyncOther,
    Seal,
    Merge,
    Commit,
}

const OPS: [Op; 14] = [
    Op::Create,
    Op::Overwrite,
    Op::Append,
    Op::Rename,
    Op::RenameOver,
    Op::Unlink,
    Op::Link,
    Op::Attach,
    Op::Detach,
    Op::Fsync,
    Op::FsyncOther,
    Op::Seal,
    Op::Merge,
    Op::Commit,
];

/// Two files, synced, one of them in a segment; a vector is attached to the other.
fn before(world: &mut World) {
    world.walk();
    world.create("a", 2);
    world.seal().unwrap();
    world.create("b", 1);
    world.attach("b");
    world.fsync("b").unwrap();
    world.fsync("a").unwrap();
}

fn run(world: &mut World, op: Op) {
    match op {
        Op::Create => world.create("c", 2),
        Op::Overwrite => world.overwrite("a"),
        Op::Append => world.append("a"),
        Op::Rename => world.rename("a", "d"),
        Op::RenameOver => world.rename("b", "a"),
        Op::Unlink => world.unlink("a"),
        Op::Link => world.link("a", "e"),
        Op::Attach => world.attach("a"),
        Op::Detach => world.detach("b"),
        Op::Fsync => world.fsync("a").unwrap(),
        Op::FsyncOther => world.fsync("b").unwrap(),
        Op::Seal => world.seal().unwrap(),
        Op::Merge => world.merge().unwrap(),
        Op::Commit => world.volume.commit().unwrap(),
    }
}

/// Names and rows that a sync has promised.
type Promised = BTreeMap<String, Bytes>;

#[derive(Default)]
struct Figures {
    sequences: u64,
    moments: AtomicU64,
    states: AtomicU64,
    violations: Mutex<Vec<String>>,
    /// Crashed states of the sequence that were looked at.
    seen: Mutex<HashSet<(u64, Source, bool, Promised)>>,
}

/// A crash now, in every way.
fn crash(disk: &MemDisk, source: &Source, promised: &Promised, what: &str, figures: &Figures, again: bool) {
    let moment = figures.moments.fetch_add(1, Ordering::Relaxed);
    let ways = [
        (Survivors::All, SourceSurvivors::All),
        (Survivors::All, SourceSurvivors::Nothing),
        (Survivors::All, SourceSurvivors::Times),
        (Survivors::All, SourceSurvivors::SomeNames),
        (Survivors::Nothing, SourceSurvivors::Nothing),
        (Survivors::Nothing, SourceSurvivors::All),
        (Survivors::Nothing, SourceSurvivors::Times),
        (Survivors::Torn(moment), SourceSurvivors::All),
        (Survivors::Torn(moment + 1), SourceSurvivors::Nothing),
        (Survivors::Some(moment), SourceSurvivors::All),
        (Survivors::Some(moment + 1), SourceSurvivors::SomeNames),
        (Survivors::Some(moment + 2), SourceSurvivors::Nothing),
    ];
    for (survivors, of_source) in ways {
        let image = disk.crash_with(survivors);
        let left = source.crash(of_source);
        let kill = is_kill(survivors, of_source);
        if !figures.seen.lock().insert((image.digest(), left.clone(), kill, promised.clone())) {
            continue;
        }
        figures.states.fetch_add(1, Ordering::Relaxed);
        let boot = if kill { "first" } else { "second" };
        let what = format!("{what}, {survivors:?}, {of_source:?}");
        if again {
            crash_while_opening(&image.crash_with(Survivors::All), &left, promised, &what, figures);
        }
        if let Err(error) = look(image, left, promised, boot) {
            figures.violations.lock().push(format!("{what}: {error}"));
        }
    }
}

/// The volume that crashed crashes once more at each call of its recovery.
fn crash_while_opening(image: &MemDisk, left: &Source, promised: &Promised, what: &str, figures: &Figures) {
    let images: Arc<Mutex<Vec<MemDisk>>> = Arc::default();
    let sink = Arc::clone(&images);
    image.watch(move |disk| {
        let mut images = sink.lock();
        let seed = images.len() as u64;
        images.push(disk.crash_with(Survivors::Nothing));
        images.push(disk.crash_with(Survivors::Torn(seed)));
        images.push(disk.crash_with(Survivors::Some(seed)));
    });
    let opened = World::mount(image.clone(), left.clone(), "second").and_then(|mut world| {
        world.walk();
        world.volume.commit().map_err(|error| crate::OpenError::Catalog(error.to_string()))
    });
    image.unwatch();
    if let Err(error) = opened {
        figures.violations.lock().push(format!("{what}: {error}"));
    }
    for (n, image) in std::mem::take(&mut *images.lock()).into_iter().enumerate() {
        figures.states.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = look(image, left.clone(), promised, "third") {
            figures.violations.lock().push(format!("{what}, again in image {n} of the recovery: {error}"));
        }
    }
}

/// Opens what a crash left and holds it against what the source holds and what was promised.
fn look(image: MemDisk, left: Source, promised: &Promised, boot: &str) -> Result<(), String> {
    let mut world = World::mount(image, left, boot).map_err(|error| format!("open: {error}"))?;
    // A crash is no damage.
    if let Some(error) = world.volume.report(FileId::ROOT).last_error {
        return Err(format!("open: {error}"));
    }
    let at_once = world.found().map_err(|error| format!("at once: {error}"))?;
    for (name, bytes) in promised {
        for row in bytes.places() {
            if !at_once.iter().any(|(found, at)| *at == row && world.same(found, name)) {
                return Err(format!("synced {name} row {row} is not found"));
            }
        }
    }
    world.walk();
    world.exact("after the walk")?;
    world.create("new", 1);
    world.fsync("new").map_err(|error| format!("after the walk: {error}"))?;
    world.exact("after a write")?;
    let World { source, disk, .. } = world;
    let mut world = World::mount(disk.crash(), source, boot).map_err(|error| format!("second open: {error}"))?;
    world.found().map_err(|error| format!("after a remount: {error}"))?;
    world.walk();
    world.exact("after a remount")
}

fn enumerate(sequences: impl Iterator<Item = Vec<Op>>) -> Figures {
    let figures = Arc::new(Figures::default());
    let mut count = 0;
    for sequence in sequences {
        count += 1;
        figures.seen.lock().clear();
        let disk = MemDisk::default();
        let mut world = World::mount(disk.clone(), Source::default(), "first").unwrap();
        before(&mut world);
        let again = sequence.len() < 2;
        for (step, op) in sequence.iter().enumerate() {
            let promised = world.source.settled();
            // The source is synced before the store is told.
            match op {
                Op::Fsync => world.sync_source("a"),
                Op::FsyncOther => world.sync_source("b"),
                _ => {}
            }
            let (source, figures) = (world.source.clone(), Arc::clone(&figures));
            let what = format!("{sequence:?} in step {step}");
            disk.watch(move |disk| crash(disk, &source, &promised, &what, &figures, again));
            run(&mut world, *op);
            disk.unwatch();
        }
        let what = format!("{sequence:?} afterwards");
        crash(&disk, &world.source, &world.source.settled(), &what, &figures, again);
    }
    let figures = Arc::into_inner(figures).unwrap();
    Figures { sequences: count, ..figures }
}

#[test]
fn after_a_crash_at_any_call_no_vector_is_lost_resurrected_or_misnamed() {
    let full = std::env::var("VEXFS_CRASH").is_ok_and(|value| value == "full");
    let mut sequences: Vec<Vec<Op>> = vec![Vec::new()];
    for length in 1..=3 {
        let shorter: Vec<Vec<Op>> = sequences.iter().filter(|known| known.len() + 1 == length).cloned().collect();
        for known in shorter {
            sequences.extend(OPS.iter().map(|op| [&known[..], &[*op]].concat()));
        }
    }
    if !full {
        sequences.retain(|sequence| sequence.len() < 3);
    }
    let start = std::time::Instant::now();
    let Figures { sequences, moments, states, violations, .. } = enumerate(sequences.into_iter());
    let (moments, states, violations) = (moments.into_inner(), states.into_inner(), violations.into_inner());
    eprintln!("{sequences} sequences, {moments} crash points, {states} states, {:.1?}", start.elapsed());
    let some: Vec<_> = violations.iter().take(20).cloned().collect();
    assert!(violations.is_empty(), "{} violations, as:\n{}", violations.len(), some.join("\n"));
    assert!(sequences >= 211 && moments > 1_000 && states > 3_000);
}

#[test]
fn a_crash_while_the_first_segment_is_written_has_not_lost_the_catalog() {
    let disk = MemDisk::default();
    let mut world = World::mount(disk.clone(), Source::default(), "first").unwrap();
    world.walk();
    world.create("a", 2);
    let figures = Arc::new(Figures::default());
    let (source, seen) = (world.source.clone(), Arc::clone(&figures));
    disk.watch(move |disk| crash(disk, &source, &Promised::new(), "the first seal", &seen, false));
    world.seal().unwrap();
    disk.unwatch();
    assert!(figures.moments.load(Ordering::Relaxed) > 10);
    assert_eq!(*figures.violations.lock(), [""; 0]);
}
