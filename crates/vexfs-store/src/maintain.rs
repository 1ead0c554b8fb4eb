//! The threads behind: one links pending points, one seals and merges, one commits, one verifies at the start what
//! opening left and then has indexes learn from what they are asked.
//!
//! Sealing, merging and rewriting are one thing, [`rewrite`]: the live rows of some parts become one segment that
//! takes their place.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use vexfs_index::{Index, Place, Scratch, Slot, build_in};

use crate::background::{Kind, Work};
use crate::collection::{Collection, new_head};
use crate::id::SegmentId;
use crate::memory;
use crate::part::Part;
use crate::segment::{self, Segment};
use crate::volume::Inner;

/// How long a closed file may stay out of the catalog on disk.
const COMMIT_EVERY: Duration = Duration::from_secs(2);
/// How often the source is made durable so that less is read again after a power cut. The kernel itself writes what is
/// older than 30 s.
const SYNC_SOURCE_EVERY: Duration = Duration::from_secs(30);
/// How long work may lie when nobody woke the threads.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long points may wait to be linked where no search is quicker for it.
const LINK_WITHIN: Duration = Duration::from_secs(1);
/// How often it is looked whether collections were asked enough to learn from it.
const LEARN_EVERY: Duration = Duration::from_secs(2);
/// Segments of one size class that are merged into one.
const TIER: usize = 4;
/// Bytes of a segment that are written under a rate before they are made durable.
const SYNC_EVERY: usize = 8 << 20;
/// At close, a smaller head is left to be read from its files by the next open.
pub(crate) const SEAL_AT_CLOSE: u64 = 4_096;

/// Starts the volume's threads. They end when `stop` is set and they are woken.
pub fn start(inner: &Arc<Inner>) -> io::Result<Vec<JoinHandle<()>>> {
    let thread = |name: &str, body: fn(&Inner)| {
        let inner = Arc::clone(inner);
        Builder::new().name(name.to_owned()).spawn(move || {
            let _watched = Watched(&inner);
            body(&inner);
        })
    };
    Ok(vec![
        thread("vexfs-link", link_loop)?,
        thread("vexfs-seal", seal_loop)?,
        thread("vexfs-commit", commit_loop)?,
        thread("vexfs-verify", |inner| {
            verify_all(inner);
            learn_loop(inner);
        })?,
    ])
}

/// Tells of a thread that panics: nobody may wait for it. It isn't started again, as what it was changing may be half
/// changed.
struct Watched<'a>(&'a Inner);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            self.0.tended.store(false, Ordering::Release);
            self.0.failures.fetch_add(1, Ordering::AcqRel);
            self.0.note(format!(
                "{name} panicked: what it does behind is done by nobody until the volume is opened again"
            ));
        }
    }
}

fn stopping(inner: &Inner) -> bool {
    inner.stop.load(Ordering::Acquire)
}

/// Waits to be woken, at most `most`.
fn wait(inner: &Inner, most: Duration) {
    let mut woken = inner.wake.0.lock();
    if !stopping(inner) && !*woken {
        inner.wake.1.wait_for(&mut woken, most);
    }
    *woken = false;
}

fn commit_loop(inner: &Inner) {
    let mut synced = Instant::now();
    while !stopping(inner) {
        std::thread::park_timeout(COMMIT_EVERY);
        if !stopping(inner) && synced.elapsed() >= SYNC_SOURCE_EVERY {
            inner.sync_source();
            synced = Instant::now();
        }
        if let Err(error) = inner.commit() {
            log::error!("{error}; the changes stay in memory and are tried again");
        }
    }
}

/// Verifies what was opened, then copies what walks read to huge pages.
fn verify_all(inner: &Inner) {
    let collections: Vec<_> = inner.collections.read().values().cloned().collect();
    for collection in collections {
        for part in collection.parts.load_full().iter() {
            let Some(segment) = part.as_segment() else { continue };
            match segment.verify(&|bytes| inner.go_on(bytes)) {
                Ok(true) => inner.warm(segment),
                Ok(false) => return,
                Err(error) => inner.quarantine(&collection, part, &error),
            }
        }
    }
}

/// What was asked enough learns from it (decision 19).
fn learn_loop(inner: &Inner) {
    while !stopping(inner) {
        let collections: Vec<_> = inner.collections.read().values().cloned().collect();
        for collection in collections {
            for part in collection.parts.load_full().iter() {
                part.learn(&collection.asked, &|| inner.go_on(0));
            }
        }
        std::thread::park_timeout(LEARN_EVERY);
    }
}

fn link_loop(inner: &Inner) {
    let mut scratch = Scratch::default();
    while !stopping(inner) {
        let collections: Vec<_> = inner.collections.read().values().cloned().collect();
        for collection in collections {
            // The head alone: what was frozen gets a graph of its own when it is sealed.
            let head = collection.head();
            let Some((head, index)) = head.as_ref().and_then(|head| Some((head, head.as_head()?))) else { continue };
            // Who stores files needs the cores now; what is gone by then is never linked.
            let waited = || head.oldest_pending().is_none_or(|since| since.elapsed() >= LINK_WITHIN);
            if index.is_small() && !inner.background.is_waited_for() && !waited() {
                continue;
            }
            let mut slot = index.first_pending().0;
            while index.pending() > 0
                && slot < index.len() as u32
                && inner.go_on(0)
                && !collection.head_is_full(inner.budget.head)
            {
                index.link(Slot(slot), &mut scratch);
                index.tend(&mut scratch);
                slot += 1;
            }
        }
        wait(inner, LOOK_EVERY);
    }
}

/// Memory that was freed and that the allocator keeps: given back when heads were sealed, and when the volume has become quiet.
struct Leftovers {
    /// The volume's version at the last look.
    at: u64,
    /// And when memory was last given back.
    given: u64,
    /// Has anything been sealed since?
    sealed: bool,
    not_before: Instant,
}

impl Leftovers {
    /// To be called while there is nothing to do.
    fn give_back(&mut self, version: u64) {
        let quiet = version == self.at && version != self.given;
        self.at = version;
        let began = Instant::now();
        if !(quiet || self.sealed) || began < self.not_before {
            return;
        }
        memory::give_back();
        (self.given, self.sealed) = (version, false);
        // A hundredth of the time at most: while it goes on nobody gets memory.
        self.not_before = began + 100 * began.elapsed();
    }
}

fn seal_loop(inner: &Inner) {
    let mut leftovers = Leftovers { at: 0, given: 0, sealed: false, not_before: Instant::now() };
    while !stopping(inner) {
        let collections: Vec<_> = inner.collections.read().values().cloned().collect();
        let mut worked = false;
        for collection in collections {
            if !inner.go_on(0) {
                return;
            }
            freeze_full_head(inner, &collection);
            let stepped =
                step(inner, &collection).and_then(|stepped| Ok(stepped || retire_if_empty(inner, &collection)?));
            match stepped {
                Ok(stepped) => worked |= stepped,
                Err(error) => {
                    inner.failures.fetch_add(1, Ordering::AcqRel);
                    inner.note(format!("sealing: {error}; the points stay where they are and it is tried again"));
                }
            }
        }
        leftovers.sealed |= worked;
        if !worked {
            leftovers.give_back(inner.version.load(Ordering::Acquire));
            std::thread::park_timeout(LOOK_EVERY);
        }
    }
}

/// A head that is full makes room for a new one; it is searched on until its segment is there.
pub(crate) fn freeze_full_head(inner: &Inner, collection: &Collection) {
    if collection.head_is_full(inner.budget.head) {
        freeze_if(inner, collection, || collection.head_is_full(inner.budget.head));
    }
}

/// While all heads together are too large the largest make room for new ones.
pub(crate) fn freeze_largest_heads(inner: &Inner) {
    let bytes = |collection: &Collection| collection.head().map_or(0, |head| head.waiting_bytes());
    let mut heads: Vec<(usize, Arc<Collection>)> =
        inner.collections.read().values().map(|collection| (bytes(collection), Arc::clone(collection))).collect();
    let mut sum: usize = heads.iter().map(|(bytes, _)| bytes).sum();
    if sum <= inner.budget.heads {
        return;
    }
    heads.sort_unstable_by_key(|(bytes, _)| *bytes);
    while sum > inner.budget.heads
        && let Some((size, collection)) = heads.pop()
    {
        // Unless somebody has done so meanwhile.
        freeze_if(inner, &collection, || bytes(&collection) >= size);
        sum -= size;
    }
}

/// The head, whatever its size, makes room for a new one.
pub(crate) fn freeze(inner: &Inner, collection: &Collection) {
    freeze_if(inner, collection, || true);
}

/// `wanted` is asked while nobody appends to the head.
fn freeze_if(inner: &Inner, collection: &Collection, wanted: impl FnOnce() -> bool) {
    let Some(schema) = collection.schema.load_full() else { return };
    let _appending = collection.append.lock();
    if !wanted() {
        return;
    }
    let _writer = inner.writer.lock();
    let mut parts = Vec::clone(&collection.parts.load());
    parts.insert(0, new_head(&schema));
    inner.exchange_parts(collection, parts);
}

/// One rewriting, if there is one to do.
fn step(inner: &Inner, collection: &Collection) -> io::Result<bool> {
    let _alone = inner.rewriting.lock();
    let Some(schema) = collection.schema.load_full() else { return Ok(false) };
    let parts = collection.parts.load_full();
    let inputs = choose(parts.get(1..).unwrap_or_default(), inner.budget.rows_in_memory(&schema));
    if inputs.is_empty() {
        return Ok(false);
    }
    rewrite(inner, collection, &inputs, &|bytes| inner.go_on(bytes))
}

/// What to rewrite next of all but the head: what is no segment yet, each for itself; a segment that is half
/// dead; of the smallest size class that is full as many as make no more than `most` rows.
pub(crate) fn choose(parts: &[Arc<Part>], most: u64) -> Vec<Arc<Part>> {
    if let Some(part) = parts.iter().find(|part| part.as_segment().is_none()) {
        return vec![Arc::clone(part)];
    }
    let live = |part: &Part| (part.index().len() as u64).saturating_sub(part.ended_points());
    if let Some(part) = parts.iter().find(|part| part.is_mostly_dead()) {
        return vec![Arc::clone(part)];
    }
    let class = |part: &Part| live(part).max(1).ilog(TIER as u64);
    let mut classes: Vec<u32> = parts.iter().map(|part| class(part)).collect();
    classes.sort_unstable();
    classes.dedup();
    classes
        .into_iter()
        .map(|wanted| {
            let mut members: Vec<Arc<Part>> = parts.iter().filter(|part| class(part) == wanted).cloned().collect();
            members.sort_by_key(|part| live(part));
            let mut sum = 0;
            let fit = members.iter().take_while(|part| {
                sum += live(part);
                sum <= most
            });
            let fit = fit.count();
            members.truncate(fit);
            members
        })
        .find(|members| members.len() >= TIER)
        .unwrap_or_default()
}

/// Makes one durable segment of the live rows of `inputs` and puts it in their place. False if it was not to `go_on`, which
/// is asked with the bytes that were read and written since it was last.
pub(crate) fn rewrite(
    inner: &Inner,
    collection: &Collection,
    inputs: &[Arc<Part>],
    go_on: segment::GoOn<'_>,
) -> io::Result<bool> {
    let Some(schema) = collection.schema.load_full() else { return Ok(false) };
    let most: usize = inputs.iter().map(|part| part.live().count()).sum();
    let kind = match inputs {
        [part] if part.as_segment().is_some() => Kind::Compact,
        [_] => Kind::Seal,
        _ => Kind::Merge,
    };
    let working =
        inner.background.begin(Work { kind, collection: collection.id, points: most as u64, since: Instant::now() });
    for part in inputs {
        // What rotted must not get new checksums.
        match part.as_segment().map_or(Ok(true), |segment| segment.verify(go_on)) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => {
                inner.quarantine(collection, part, &error);
                return Ok(false);
            }
        }
    }
    let size = schema.space.row_bytes();
    let files = |len| inner.disk.scratch(len);
    let place = if most as u64 <= inner.budget.rows_in_memory(&schema) { Place::Memory } else { Place::Files(&files) };
    let mut gathered;
    let (mut readings, mut files, mut points) = (Vec::new(), Vec::new(), Vec::with_capacity(most));
    let whole = match inputs {
        [part] => part.as_flat().filter(|flat| flat.len() == most),
        _ => None,
    };
    let rows = match whole {
        // As they lie, all of them, also if their reading ends meanwhile.
        Some(flat) => {
            readings.extend(inputs.iter().flat_map(|part| part.readings()).cloned());
            files.extend(inputs.iter().filter_map(|part| part.entry(0)));
            points.extend((0..most as u32).map(|row| (0, row)));
            flat.rows()
        }
        None => {
            gathered = place.zeroed(most * size)?;
            let mut room = gathered.bytes_mut().chunks_exact_mut(size);
            let mut bytes = Vec::new();
            for part in inputs {
                let mut numbers = HashMap::new();
                // A head's rows are in memory.
                let read = if part.as_segment().is_some() { size } else { 0 };
                for (slot, old, row) in part.live() {
                    // What ended, and was deleted, a moment ago can't be read.
                    if !part.index().read(slot, &mut bytes) {
                        continue;
                    }
                    let Some(to) = room.next() else { break };
                    to.copy_from_slice(&bytes);
                    if !go_on(read) {
                        return Ok(false);
                    }
                    let number = *numbers.entry(old).or_insert_with(|| {
                        readings.extend(part.reading(old).cloned());
                        files.extend(part.entry(old));
                        files.len() as u32 - 1
                    });
                    points.push((number, row));
                }
            }
            &gathered.bytes()[..points.len() * size]
        }
    };
    let output = if points.is_empty() {
        None
    } else {
        let threads = inner.options.threads;
        let built = build_in(place, &schema.space, rows, &schema.params, threads, &|| {
            working.linked();
            go_on(0)
        })?;
        let Some(built) = built else { return Ok(false) };
        let id = {
            let mut writer = inner.writer.lock();
            writer.meta.next_segment += 1;
            SegmentId(writer.meta.next_segment)
        };
        let content = segment::Content { space: schema.space, files: &files, points: &points, rows, built: &built };
        // Or what was written slowly would be collected, and go to the disk at once.
        let sync_every = inner.background.rate().map_or(usize::MAX, |_| SYNC_EVERY);
        segment::write(&*inner.disk, id, &content, go_on, sync_every)?;
        drop(built);
        let opened = Segment::open(&*inner.disk, id)
            .and_then(|segment| Ok(segment.verify(go_on)?.then_some(segment)))
            .map_err(io::Error::other);
        let segment = match opened {
            Ok(Some(segment)) => segment,
            not => {
                // Nothing names it, and the next try writes another.
                if let Err(error) = inner.disk.remove(&id.path()) {
                    log::warn!("{}: can't be removed: {error}", id.path());
                }
                return not.map(|_| false);
            }
        };
        inner.warm(&segment);
        Some(Part::sealed(segment, readings))
    };
    replace(inner, collection, inputs, output)?;
    Ok(true)
}

/// Names the new segment in the manifest, durably; then searches use it; then the old files go.
fn replace(inner: &Inner, collection: &Collection, inputs: &[Arc<Part>], output: Option<Arc<Part>>) -> io::Result<()> {
    let old: Vec<SegmentId> = inputs.iter().filter_map(|part| part.as_segment().map(|s| s.id)).collect();
    {
        let mut writer = inner.writer.lock();
        if let Some(segment) = output.as_ref().and_then(|part| part.as_segment()) {
            writer.dirty_segments.insert(segment.id, Some(collection.id));
        }
        for id in &old {
            writer.dirty_segments.insert(*id, None);
        }
        inner.changed(&mut writer);
        let mut parts = Vec::clone(&collection.parts.load());
        parts.retain(|part| !inputs.iter().any(|input| Arc::ptr_eq(input, part)));
        parts.extend(output);
        inner.exchange_parts(collection, parts);
    }
    // If this fails the old segments' files stay, as the durable manifest may still name them; the rows are kept
    // to be written by the next commit, and files that no manifest names are removed by the next open.
    inner.commit().map_err(io::Error::other)?;
    for id in old {
        inner.disk.remove(&id.path())?;
    }
    Ok(())
}

/// A collection that another has replaced at its root, or whose root is gone, goes when its last point has gone.
/// True if it went.
fn retire_if_empty(inner: &Inner, collection: &Collection) -> io::Result<bool> {
    let dir = collection.row.lock().dir;
    let replaced = inner.roots.read().get(&dir) != Some(&collection.id);
    if !replaced || collection.live_points() > 0 {
        return Ok(false);
    }
    let _alone = inner.rewriting.lock();
    let mut writer = inner.writer.lock();
    let in_use = inner.tree.read().files().any(|row| row.state.collection() == Some(collection.id));
    if in_use {
        return Ok(false);
    }
    let segments: Vec<SegmentId> =
        collection.parts.load().iter().filter_map(|part| part.as_segment().map(|s| s.id)).collect();
    writer.dirty_segments.extend(segments.iter().map(|id| (*id, None)));
    writer.dirty_collections.insert(collection.id);
    inner.collections.write().remove(&collection.id);
    inner.changed(&mut writer);
    drop(writer);
    // As in `replace`.
    inner.commit().map_err(io::Error::other)?;
    segments.iter().try_for_each(|id| inner.disk.remove(&id.path()))?;
    Ok(true)
}

/// Seals heads that would take long to read again. The threads have ended.
pub fn seal_for_close(inner: &Inner) {
    let collections: Vec<_> = inner.collections.read().values().cloned().collect();
    for collection in collections {
        let head = collection.head().map_or(0, |head| head.live_points());
        if head >= SEAL_AT_CLOSE {
            freeze(inner, &collection);
        }
        let parts = collection.parts.load_full();
        for part in parts.iter().skip(1).filter(|part| part.as_segment().is_none()) {
            if let Err(error) = rewrite(inner, &collection, std::slice::from_ref(part), &|_| true) {
                log::error!("sealing at close: {error}; the files are read again at the next open");
            }
        }
    }
}
