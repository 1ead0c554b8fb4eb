//! A part of a collection: an index and the table from its slots to files and rows.
//!
//! Which rows are live is decided by versions: a reading of a file ([`Reading`]) is born at one version of the
//! volume and dies at another, so a search that fixed its version sees a file's old vectors or its new ones,
//! never both and never neither, and takes no lock for it.

use std::cell::OnceCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use vexfs_index::{Explorer, Filter, Flat, GoOn, Index, Mutable, SearchError as GaveUp, Slot, Until};

use crate::asked::Asked;
use crate::id::{FileId, Generation};
use crate::segment::{Segment, SegmentError, SegmentFile};
use crate::sync::{ArcSwapOption, AtomicU64, Mutex, RwLock};
use crate::tree::Tree;

/// The version of a reading that is not to be seen yet, or not to end yet.
const NEVER: u64 = u64::MAX;

/// One reading of a file's vectors, shared by the parts that hold its rows.
pub struct Reading {
    /// The file.
    pub file: FileId,
    /// How many rows.
    pub rows: u32,
    born: AtomicU64,
    died: AtomicU64,
    /// The counter of ended rows of the part that holds this reading. Whoever takes it out when the reading has ended
    /// counts the rows. Of two parts it is the newer's: the older is about to go, and a search of it that meets a row
    /// which has ended asks again with the filter.
    ended_in: ArcSwapOption<AtomicU64>,
}

impl Reading {
    /// A reading that no search sees yet.
    pub fn unborn(file: FileId, rows: u32) -> Arc<Reading> {
        Arc::new(Reading {
            file,
            rows,
            born: AtomicU64::new(NEVER),
            died: AtomicU64::new(NEVER),
            ended_in: ArcSwapOption::from_pointee(None),
        })
    }

    /// Seen by searches from `version` on.
    pub fn bear(&self, version: u64) {
        self.born.store(version, Ordering::Release);
    }

    /// Not seen by searches from `version` on.
    pub fn end(&self, version: u64) {
        self.died.store(version, Ordering::Release);
        self.count_ended();
    }

    /// Counts this reading's rows in `ended` from the moment that it ends, and no longer where they were counted before;
    /// of one that has ended, `rows`: those that were taken along before it did.
    fn count_in(&self, ended: &Arc<AtomicU64>, rows: impl FnOnce() -> u32) {
        if self.ended() {
            ended.fetch_add(u64::from(rows()), Ordering::AcqRel);
            return;
        }
        self.ended_in.store(Some(Arc::clone(ended)));
        if self.ended() {
            self.count_ended();
        }
    }

    fn count_ended(&self) {
        if let Some(ended) = self.ended_in.swap(None) {
            ended.fetch_add(u64::from(self.rows), Ordering::AcqRel);
        }
    }

    /// Is it seen at `version`?
    pub fn live_at(&self, version: u64) -> bool {
        self.born.load(Ordering::Acquire) <= version && version < self.died.load(Ordering::Acquire)
    }

    /// Is it seen by searches that start now, or has it been?
    fn born(&self) -> bool {
        self.born.load(Ordering::Acquire) != NEVER
    }

    /// Has it ended for every search that starts now?
    pub fn ended(&self) -> bool {
        self.died.load(Ordering::Acquire) != NEVER
    }
}

struct Head {
    index: Mutable,
    /// By slot: number of the reading, row.
    points: boxcar::Vec<(u32, u32)>,
    readings: boxcar::Vec<Waiting>,
}

/// A reading that is in no segment yet.
struct Waiting {
    reading: Arc<Reading>,
    generation: Generation,
    /// Since when.
    since: Instant,
}

impl Waiting {
    fn new(reading: Arc<Reading>, generation: Generation) -> Waiting {
        Waiting { reading, generation, since: Instant::now() }
    }
}

enum Store {
    Head(Box<Head>),
    Flat { index: Flat, waiting: Waiting },
    Sealed { segment: Box<Segment>, readings: Box<[Arc<Reading>]> },
}

/// See the module.
pub struct Part {
    store: Store,
    /// Rows whose reading has ended.
    ended: Arc<AtomicU64>,
    /// Which readings lie in the scope that was last asked for.
    scope: Mutex<Option<ScopeBits>>,
    /// How many queries the collection had been asked when the index learned from them; 0 if it hasn't.
    learned: AtomicU64,
}

#[derive(Clone)]
struct ScopeBits {
    scope: FileId,
    epoch: u64,
    inside: Arc<Vec<bool>>,
    /// Rows of the readings inside.
    rows: u64,
}

impl Part {
    fn new(store: Store) -> Arc<Part> {
        let part = Part { store, ended: Arc::default(), scope: Mutex::new(None), learned: AtomicU64::new(0) };
        let held = OnceCell::new();
        for (number, reading) in part.readings().enumerate() {
            // Of a reading that ended while its rows were gathered some are here.
            reading.count_in(&part.ended, || held.get_or_init(|| part.held())[number]);
        }
        Arc::new(part)
    }

    /// How many of each reading's rows there are.
    fn held(&self) -> Vec<u32> {
        let mut held = vec![0; self.readings().count()];
        for (number, _) in (0..self.index().len() as u32).filter_map(|slot| self.point(Slot(slot))) {
            if let Some(rows) = held.get_mut(number as usize) {
                *rows += 1;
            }
        }
        held
    }

    /// An empty head.
    pub fn head(index: Mutable) -> Arc<Part> {
        Part::new(Store::Head(Box::new(Head { index, points: boxcar::Vec::new(), readings: boxcar::Vec::new() })))
    }

    /// One file's rows, found by exact scan until a segment is built of them.
    pub fn flat(index: Flat, reading: Arc<Reading>, generation: Generation) -> Arc<Part> {
        Part::new(Store::Flat { index, waiting: Waiting::new(reading, generation) })
    }

    /// A segment; `readings` in the order of its files.
    pub fn sealed(segment: Segment, readings: Vec<Arc<Reading>>) -> Arc<Part> {
        Part::new(Store::Sealed { segment: Box::new(segment), readings: readings.into_boxed_slice() })
    }

    /// The searchable index.
    pub fn index(&self) -> &dyn Index {
        match &self.store {
            Store::Head(head) => &head.index,
            Store::Flat { index, .. } => index,
            Store::Sealed { segment, .. } => &segment.index,
        }
    }

    /// The graph to look at, if it has one.
    pub fn explore(&self) -> Option<Explorer<'_>> {
        match &self.store {
            Store::Head(head) => Some(head.index.explore()),
            Store::Flat { .. } => None,
            Store::Sealed { segment, .. } => Some(segment.index.explore()),
        }
    }

    /// The head's own index.
    pub fn as_head(&self) -> Option<&Mutable> {
        match &self.store {
            Store::Head(head) => Some(&head.index),
            _ => None,
        }
    }

    /// The segment, if it is one.
    pub fn as_segment(&self) -> Option<&Segment> {
        match &self.store {
            Store::Sealed { segment, .. } => Some(segment),
            _ => None,
        }
    }

    /// The index learns from what its collection was asked, if that is something new to it. `go_on` is asked before each query.
    pub fn learn(&self, asked: &Asked, go_on: GoOn<'_>) {
        let index = self.index();
        if index.is_walked()
            && let Some(lesson) = asked.lesson(self.learned.load(Ordering::Acquire))
            && index.learn(&lesson.queries, go_on)
        {
            self.learned.store(lesson.count, Ordering::Release);
        }
    }

    /// Has it learned?
    pub fn has_learned(&self) -> bool {
        self.learned.load(Ordering::Acquire) > 0
    }

    /// Appends a reading's rows to a head; `None` if this is no head. One caller at a time.
    pub fn append(&self, reading: &Arc<Reading>, generation: Generation, rows: &[u8]) -> Option<std::ops::Range<u32>> {
        let Store::Head(head) = &self.store else { return None };
        let Head { index, points, readings } = &**head;
        let number = readings.push(Waiting::new(Arc::clone(reading), generation)) as u32;
        reading.count_in(&self.ended, || reading.rows);
        let first = points.count() as u32;
        for (row, bytes) in rows.chunks_exact(index.space().row_bytes()).enumerate() {
            // The table first: a slot that a search finds has its entry.
            points.push((number, row as u32));
            index.push(bytes);
        }
        Some(first..points.count() as u32)
    }

    /// Reading (by number in this part) and row of a slot.
    fn point(&self, slot: Slot) -> Option<(u32, u32)> {
        match &self.store {
            Store::Head(head) => head.points.get(slot.0 as usize).copied(),
            Store::Flat { .. } => Some((0, slot.0)),
            Store::Sealed { segment, .. } => segment.point(slot.0 as usize),
        }
    }

    /// A reading by its number in this part.
    pub fn reading(&self, number: u32) -> Option<&Arc<Reading>> {
        match &self.store {
            Store::Sealed { readings, .. } => readings.get(number as usize),
            Store::Head(_) | Store::Flat { .. } => self.waiting(number).map(|waiting| &waiting.reading),
        }
    }

    fn waiting(&self, number: u32) -> Option<&Waiting> {
        match &self.store {
            Store::Head(head) => head.readings.get(number as usize),
            Store::Flat { waiting, .. } => (number == 0).then_some(waiting),
            Store::Sealed { .. } => None,
        }
    }

    /// What a segment that holds a reading says of it.
    pub fn entry(&self, number: u32) -> Option<SegmentFile> {
        match &self.store {
            Store::Sealed { segment, readings } => {
                // The file's number may be another than it was.
                Some(SegmentFile { file: readings.get(number as usize)?.file, ..segment.file(number as usize)? })
            }
            Store::Head(_) | Store::Flat { .. } => {
                let Waiting { reading, generation, .. } = self.waiting(number)?;
                Some(SegmentFile { file: reading.file, generation: *generation, rows: reading.rows })
            }
        }
    }

    /// The reading and row that a slot holds.
    pub fn resolve(&self, slot: Slot) -> Option<(&Arc<Reading>, u32)> {
        let (number, row) = self.point(slot)?;
        Some((self.reading(number)?, row))
    }

    /// Is the row of this slot what was written? The error says what rotted.
    pub fn trust(&self, slot: Slot) -> Result<(), SegmentError> {
        match &self.store {
            Store::Sealed { segment, .. } => segment.trust(slot.0 as usize),
            Store::Head(_) | Store::Flat { .. } => Ok(()),
        }
    }

    /// The slot of a row of a reading, if the part holds it.
    pub fn find(&self, wanted: &Arc<Reading>, row: u32) -> Option<Slot> {
        let number = self.readings().position(|reading| Arc::ptr_eq(reading, wanted))? as u32;
        (0..self.index().len() as u32).map(Slot).find(|slot| self.point(*slot) == Some((number, row)))
    }

    /// Every reading of the part, by number.
    pub fn readings(&self) -> Box<dyn Iterator<Item = &Arc<Reading>> + '_> {
        match &self.store {
            Store::Head(head) => Box::new(head.readings.iter().map(|(_, waiting)| &waiting.reading)),
            Store::Flat { waiting, .. } => Box::new(std::iter::once(&waiting.reading)),
            Store::Sealed { readings, .. } => Box::new(readings.iter()),
        }
    }

    /// Slots of the part whose reading has not ended: slot, number of the reading, row.
    pub fn live(&self) -> impl Iterator<Item = (Slot, u32, u32)> {
        (0..self.index().len() as u32).filter_map(|slot| {
            let (number, row) = self.point(Slot(slot))?;
            (!self.reading(number)?.ended()).then_some((Slot(slot), number, row))
        })
    }

    /// One file's rows, all of them in slot order, where it is that and no segment yet.
    pub fn as_flat(&self) -> Option<&Flat> {
        match &self.store {
            Store::Flat { index, .. } => Some(index),
            _ => None,
        }
    }

    /// Bytes of memory that the points of what is no segment take.
    pub fn waiting_bytes(&self) -> usize {
        match &self.store {
            Store::Head(head) => head.index.bytes(),
            Store::Flat { index, .. } => index.len() * index.space().row_bytes(),
            Store::Sealed { .. } => 0,
        }
    }

    /// What was appended to a head last.
    pub fn newest_reading(&self) -> Option<&Arc<Reading>> {
        match &self.store {
            Store::Head(head) => {
                head.readings.get(head.readings.count().checked_sub(1)?).map(|waiting| &waiting.reading)
            }
            Store::Flat { .. } | Store::Sealed { .. } => None,
        }
    }

    /// Points whose reading has not ended.
    pub fn live_points(&self) -> u64 {
        self.readings().filter(|reading| !reading.ended()).map(|r| u64::from(r.rows)).sum()
    }

    /// Points that a search at `version` may return.
    pub fn points_at(&self, version: u64) -> u64 {
        self.readings().filter(|reading| reading.live_at(version)).map(|r| u64::from(r.rows)).sum()
    }

    /// Points given in but not linked into a graph yet.
    pub fn pending(&self) -> u64 {
        match &self.store {
            Store::Head(head) => head.index.pending() as u64,
            Store::Flat { waiting, .. } if !waiting.reading.ended() => u64::from(waiting.reading.rows),
            Store::Flat { .. } | Store::Sealed { .. } => 0,
        }
    }

    /// Since when the oldest of the pending points has waited.
    pub fn oldest_pending(&self) -> Option<Instant> {
        match &self.store {
            Store::Head(head) if head.index.pending() > 0 => {
                let (number, _) = self.point(head.index.first_pending())?;
                self.waiting(number).map(|waiting| waiting.since)
            }
            Store::Flat { waiting, .. } if !waiting.reading.ended() => Some(waiting.since),
            _ => None,
        }
    }

    /// Rows whose reading has ended.
    pub fn ended_points(&self) -> u64 {
        self.ended.load(Ordering::Acquire)
    }

    /// Are its dead points no fewer than the live ones?
    pub fn is_mostly_dead(&self) -> bool {
        let ended = self.ended_points();
        ended >= (self.index().len() as u64).saturating_sub(ended)
    }

    fn inside(&self, tree: &RwLock<Tree>, scope: FileId, until: Until<'_>) -> Result<ScopeBits, GaveUp> {
        let tree = tree.read();
        let epoch = tree.epoch();
        if let Some(known) = &*self.scope.lock()
            && known.scope == scope
            && known.epoch == epoch
        {
            return Ok(known.clone());
        }
        let mut rows = 0;
        let mut inside = Vec::new();
        for reading in self.readings() {
            if inside.len() % LOOK_EVERY == 0 {
                until.check()?;
            }
            // A file that is gone may get its name, and this reading, yet.
            let named_later = || !reading.born() && tree.file(reading.file).is_none();
            let within = !reading.ended() && (tree.in_scope(reading.file, scope) || named_later());
            rows += if within { u64::from(reading.rows) } else { 0 };
            inside.push(within);
        }
        let bits = ScopeBits { scope, epoch, inside: Arc::new(inside), rows };
        *self.scope.lock() = Some(bits.clone());
        Ok(bits)
    }

    /// Has any file of the part a name below `scope`?
    pub fn reaches(&self, tree: &RwLock<Tree>, scope: FileId, until: Until<'_>) -> Result<bool, GaveUp> {
        let bits = self.inside(tree, scope, until)?;
        Ok(self.readings().enumerate().any(|(number, reading)| {
            // A reading newer than the bits is asked for by itself.
            let inside = bits.inside.get(number).copied();
            !reading.ended() && inside.unwrap_or_else(|| tree.read().in_scope(reading.file, scope))
        }))
    }

    /// The filter of a search; `None` if (but for the few that are being written now) every point passes.
    pub fn filter<'a>(&'a self, view: &'a View<'a>) -> Result<Option<PartFilter<'a>>, GaveUp> {
        let ended = self.ended_points();
        if ended == 0 && view.scope.is_none() && view.rejected.is_empty() {
            return Ok(None);
        }
        self.forced_filter(view).map(Some)
    }

    /// As [`Part::filter`], where a search without it met a row that must not be returned.
    pub fn forced_filter<'a>(&'a self, view: &'a View<'a>) -> Result<PartFilter<'a>, GaveUp> {
        let all = self.index().len() as u64;
        let (inside, passing) = match view.scope {
            Some(scope) => {
                let bits = self.inside(view.tree, scope, view.until)?;
                (Some(bits.inside), bits.rows)
            }
            None => (None, all.saturating_sub(self.ended_points())),
        };
        let selectivity = if all == 0 { 0.0 } else { (passing as f32 / all as f32).min(1.0) };
        Ok(PartFilter { part: self, view, inside, selectivity })
    }
}

/// What a search may see.
pub struct View<'a> {
    /// The volume's version when the search began.
    pub version: u64,
    /// Names.
    pub tree: &'a RwLock<Tree>,
    /// Only files below; `None` where the whole collection is asked.
    pub scope: Option<FileId>,
    /// The point that was asked by; it is no answer.
    pub exclude: Option<(FileId, u32)>,
    /// Files that turned out not to be what the index holds, or not the caller's to see.
    pub rejected: &'a [FileId],
    /// How long the answer is wanted.
    pub until: Until<'a>,
}

/// Files between two looks at the clock.
const LOOK_EVERY: usize = 1024;

impl View<'_> {
    /// May this row be returned, its scope aside?
    pub fn allows(&self, reading: &Reading, row: u32) -> bool {
        reading.live_at(self.version)
            && self.exclude != Some((reading.file, row))
            && !self.rejected.contains(&reading.file)
    }
}

/// See [`Part::filter`].
pub struct PartFilter<'a> {
    part: &'a Part,
    view: &'a View<'a>,
    inside: Option<Arc<Vec<bool>>>,
    selectivity: f32,
}

impl Filter for PartFilter<'_> {
    fn allows(&self, slot: Slot) -> bool {
        let Some((number, row)) = self.part.point(slot) else { return false };
        if let Some(bits) = &self.inside
            && bits.get(number as usize) == Some(&false)
        {
            return false;
        }
        let Some(reading) = self.part.reading(number) else { return false };
        self.view.allows(reading, row)
            && self.inside.as_ref().is_none_or(|bits| {
                // A reading newer than the bits is asked for by itself.
                bits.get(number as usize).copied().unwrap_or_else(|| {
                    let tree = self.view.tree.read();
                    self.view.scope.is_none_or(|scope| tree.in_scope(reading.file, scope))
                })
            })
    }

    fn selectivity(&self) -> Option<f32> {
        Some(self.selectivity)
    }
}
