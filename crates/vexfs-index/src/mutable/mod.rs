//! The head's index: points are pushed at any time, found at once, linked into a graph when there is time, and deleted.
//!
//! Searches take no lock. A slot names a point and is never given twice; a node holds a point and is used again when it
//! has been taken out of the graph and nobody can be looking at it any more (`cells.rs`, decision 5). Links are atomics
//! that writers change under the lock of the node that they are from (`links.rs`). What must be done now and then, to
//! take out what was deleted and to keep the graph whole, is done by who calls [`Mutable::tend`].

mod calibrate;
mod cells;
mod links;
mod look;
mod tend;

use self::calibrate::Efs;
use self::cells::{Cells, Pin, State};
use self::links::Entry;
use self::tend::Tended;
use super::sync::{AtomicU32, AtomicUsize, Mutex, Ordering};
use crate::hnsw::{Walk, descend, walk_layer};
use crate::kernels::Prepared;
use crate::request::{Budget, Candidate, deliver, keep};
use crate::{Effort, GoOn, Index, Memory, Neighbor, Params, Request, Scratch, SearchError, Slot, Space, Stats};

pub use self::tend::Reach;

/// Below this many points an exact scan is as fast as a walk and never misses.
const SCAN_BELOW: usize = 5_000;
/// A filter that passes less than this share is answered by an exact scan of what it passes.
const SCAN_SELECTIVITY: f32 = 0.1;
/// What the first chunk takes before it is full: a page of rows, links and states for all its nodes.
const FIRST_BYTES: usize = 16 << 10;

/// See the module.
pub struct Mutable {
    space: Space,
    params: Params,
    scan_below: usize,
    cells: Cells,
    /// By slot: number of the node + 1; 0 while it is being pushed.
    places: boxcar::Vec<AtomicU32>,
    entry: Entry,
    /// Slots given out. A thread that is slower than another leaves a gap below for a moment.
    end: AtomicUsize,
    live: AtomicUsize,
    pending: AtomicUsize,
    /// Links ever made, in points.
    linked: AtomicUsize,
    /// All slots below are linked or gone.
    settled: AtomicUsize,
    /// Nodes of deleted points that are still in the graph.
    dead: Mutex<Vec<u32>>,
    efs: Efs,
    /// Held by who tends.
    tended: Mutex<Tended>,
}

impl Mutable {
    /// Without points; costs some hundred bytes.
    pub fn new(space: Space, params: Params) -> Mutable {
        Mutable::scanning_below(SCAN_BELOW, space, params)
    }

    /// With another limit than usual.
    pub(crate) fn scanning_below(scan_below: usize, space: Space, params: Params) -> Mutable {
        let m = params.m.clamp(*crate::build::M.start(), *crate::build::M.end());
        Mutable {
            space,
            cells: Cells::new(space.row_bytes(), m, params.seed),
            params: Params { m, ef_construction: params.ef_construction.max(m), ..params },
            scan_below,
            places: boxcar::Vec::new(),
            entry: Entry::default(),
            end: AtomicUsize::new(0),
            live: AtomicUsize::new(0),
            pending: AtomicUsize::new(0),
            linked: AtomicUsize::new(0),
            settled: AtomicUsize::new(0),
            dead: Mutex::new(Vec::new()),
            efs: Efs::default(),
            tended: Mutex::default(),
        }
    }

    /// Bytes of memory that the points take, about: rows, links, what tells of both, and from the first on some pages.
    pub fn bytes(&self) -> usize {
        let m = self.params.m;
        let point = self.space.row_bytes() + 4 * (2 * m + m.div_ceil(m - 1)) + 32;
        match self.len() {
            0 => 0,
            points => FIRST_BYTES + points * point,
        }
    }

    /// Adds a row, pending: searches find it from now on. Slots are given out from 0 upwards, each once.
    pub fn push(&self, row: &[u8]) -> Slot {
        let slot = self.places.push(AtomicU32::new(0));
        self.live.fetch_add(1, Ordering::SeqCst);
        self.pending.fetch_add(1, Ordering::SeqCst);
        let node = self.cells.add(slot as u32, row);
        if let Some(place) = self.places.get(slot) {
            place.store(node + 1, Ordering::SeqCst);
        }
        self.end.fetch_max(slot + 1, Ordering::SeqCst);
        Slot(slot as u32)
    }

    /// Links a pending point into the graph. Does nothing where that was done, another thread does it, or the point is
    /// deleted.
    pub fn link(&self, slot: Slot, scratch: &mut Scratch) {
        let pin = self.cells.pin();
        let claimed = self.node(slot).and_then(|node| Some((node, self.cells.mark(node, slot.0, State::CLAIMED)?)));
        let Some((node, before)) = claimed else { return };
        if before.has(State::CLAIMED) {
            return;
        }
        self.sample(&pin, node, scratch);
        self.weave(&pin, node, scratch);
        // Deleted meanwhile: then it is out of use before anybody else could have its node.
        self.cells.mark(node, slot.0, State::LINKED);
        self.linked.fetch_add(1, Ordering::SeqCst);
        self.pending.fetch_sub(1, Ordering::SeqCst);
        self.settle();
    }

    /// Deletes a point: no search that starts after this returned finds it. False if it was deleted already, or never was.
    pub fn delete(&self, slot: Slot) -> bool {
        let _pin = self.cells.pin();
        let Some(node) = self.node(slot) else { return false };
        let Some(before) = self.cells.mark(node, slot.0, State::DEAD | State::CLAIMED) else { return false };
        if before.has(State::DEAD) {
            return false;
        }
        self.live.fetch_sub(1, Ordering::SeqCst);
        if !before.has(State::CLAIMED) {
            self.pending.fetch_sub(1, Ordering::SeqCst);
        }
        lock(&self.dead).push(node);
        self.settle();
        true
    }

    /// Gives a point another row, pending, and with it another slot; searches beside this find one of the two at least. `None`
    /// (and nothing changes) if it is deleted.
    pub fn update(&self, slot: Slot, row: &[u8]) -> Option<Slot> {
        // First, so that the new slot isn't what is to be updated.
        self.node(slot)?;
        let new = self.push(row);
        if self.delete(slot) {
            return Some(new);
        }
        self.delete(new);
        None
    }

    /// No point below this slot is pending.
    pub fn first_pending(&self) -> Slot {
        Slot(self.settled.load(Ordering::SeqCst) as u32)
    }

    /// Points that are not linked yet.
    pub fn pending(&self) -> usize {
        self.pending.load(Ordering::SeqCst)
    }

    /// Points that are not deleted.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::SeqCst)
    }

    /// The node of a slot; it may hold another point by now, or none.
    fn node(&self, slot: Slot) -> Option<u32> {
        self.places.get(slot.0 as usize)?.load(Ordering::SeqCst).checked_sub(1)
    }

    /// Raises `settled` past what is linked or gone.
    fn settle(&self) {
        let done = |slot: usize| {
            let node = self.node(Slot(slot as u32))?;
            let state = self.cells.state(node);
            Some(state.slot() != Some(slot as u32) || state.has(State::LINKED) || state.has(State::DEAD))
        };
        let mut settled = self.settled.load(Ordering::SeqCst);
        while done(settled) == Some(true) {
            settled += 1;
        }
        self.settled.fetch_max(settled, Ordering::SeqCst);
    }

    /// Compares with every point: the `k` nearest into `best`, which names slots.
    fn scan(
        &self,
        pin: &Pin<'_>,
        query: &Prepared,
        request: &Request<'_>,
        budget: &mut Budget<'_>,
        scratch: &mut Scratch,
    ) -> Result<(), SearchError> {
        scratch.best.clear();
        for node in 0..self.cells.len() as u32 {
            let state = self.cells.state(node);
            let Some(slot) = state.slot().filter(|slot| state.is_live() && request.allows(*slot)) else { continue };
            let Some(row) = pin.row(node) else { continue };
            budget.spend(1)?;
            keep(&mut scratch.best, request.k, Candidate { distance: query.distance(row), node: slot });
        }
        Ok(())
    }

    /// As [`Mutable::scan`], by a walk over the graph and a look at all that is pending. Fewer than there are only where the
    /// walk didn't meet more.
    fn walk(
        &self,
        pin: &Pin<'_>,
        query: &Prepared,
        (request, ef): (&Request<'_>, usize),
        (entry, top): (u32, usize),
        budget: &mut Budget<'_>,
        scratch: &mut Scratch,
    ) -> Result<(), SearchError> {
        let distance = |node: u32| pin.row(node).map_or(f32::INFINITY, |row| query.distance(row));
        let accept = |node: u32| {
            let state = self.cells.state(node);
            state.is_live() && state.slot().is_some_and(|slot| request.allows(slot))
        };
        // Read before the walk: what is linked meanwhile is met by the walk, by the scan, or by both.
        let settled = self.settled.load(Ordering::SeqCst);
        let graph = Graph { head: self, pin };
        let start = descend(&graph, &distance, entry, (top, 0), &mut scratch.links, budget)?;
        walk_layer(&graph, &distance, &accept, start, (ef, 0), scratch, budget)?;
        for slot in settled..self.len() {
            let Some(node) = self.node(Slot(slot as u32)) else { continue };
            if self.cells.state(node).slot() == Some(slot as u32) && scratch.visited.meet_any(node) && accept(node) {
                budget.spend(1)?;
                keep(&mut scratch.best, ef, Candidate { distance: distance(node), node });
            }
        }
        // From nodes to slots; what was deleted during the walk is left out.
        let Scratch { best, sorted, .. } = scratch;
        sorted.clear();
        sorted.extend(best.drain().filter_map(|found| {
            let state = self.cells.state(found.node);
            let slot = state.slot().filter(|_| state.is_live())?;
            Some(Candidate { node: slot, ..found })
        }));
        best.extend(sorted.drain(..));
        Ok(())
    }
}

/// The head's graph for who is counted.
struct Graph<'a> {
    head: &'a Mutable,
    pin: &'a Pin<'a>,
}

impl Walk for Graph<'_> {
    fn nodes(&self) -> usize {
        self.head.cells.len()
    }

    fn neighbours(&self, node: u32, layer: usize, out: &mut Vec<u32>) {
        out.clear();
        out.extend(links::targets(self.head.cells.list(node, layer)));
    }

    fn prefetch(&self, node: u32) {
        self.pin.prefetch(node);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> super::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Index for Mutable {
    fn space(&self) -> &Space {
        &self.space
    }

    fn len(&self) -> usize {
        self.end.load(Ordering::SeqCst)
    }

    fn read(&self, slot: Slot, out: &mut Vec<u8>) -> bool {
        let pin = self.cells.pin();
        out.clear();
        let Some(node) = self.node(slot) else { return false };
        // The state after the row: a node that is still this slot's now was so when the row was handed out.
        let row = pin.row(node).unwrap_or_default();
        let state = self.cells.state(node);
        if state.is_live() && state.slot() == Some(slot.0) {
            out.extend_from_slice(row);
        }
        !out.is_empty()
    }

    fn search(
        &self,
        query: &[f32],
        request: &Request<'_>,
        scratch: &mut Scratch,
        out: &mut Vec<Neighbor>,
    ) -> Result<Stats, SearchError> {
        let query = Prepared::again(scratch.exact.take(), &self.space, query);
        let mut budget = Budget::new(request);
        let answered = self.answer(&query, request, &mut budget, scratch);
        scratch.exact = Some(query);
        answered?;
        deliver(&mut scratch.best, request, out);
        Ok(budget.stats)
    }

    fn is_walked(&self) -> bool {
        self.entry.get().is_some() && !self.is_small()
    }

    fn learn(&self, queries: &[Vec<f32>], go_on: GoOn<'_>) -> bool {
        self.learn_from(queries, go_on)
    }

    fn memory(&self) -> Memory {
        let places = self.places.count() * size_of::<AtomicU32>();
        let nodes = self.cells.len() as u64;
        Memory { index: (self.cells.bytes() + places) as u64, vectors: nodes * self.space.row_bytes() as u64 }
    }
}

impl Mutable {
    /// Are there so few points that a search compares with each, linked or not?
    pub fn is_small(&self) -> bool {
        self.live() < self.scan_below
    }

    fn answer(
        &self,
        query: &Prepared,
        request: &Request<'_>,
        budget: &mut Budget<'_>,
        scratch: &mut Scratch,
    ) -> Result<(), SearchError> {
        let pin = self.cells.pin();
        let share = request.filter.map(|filter| filter.selectivity().unwrap_or(1.0));
        let exact = request.exact || matches!(request.effort, Effort::Recall(recall) if recall >= 1.0);
        let (entry, live) = (self.entry.get(), self.live());
        if let Some(entry) = entry
            && !exact
            && !self.is_small()
            && share.is_none_or(|share| share >= SCAN_SELECTIVITY)
        {
            if let Some(share) = share {
                // Where what is near isn't allowed a scan of what is comes cheaper.
                budget.give_up_after((live as f32 * share) as u64);
            }
            let effort = (request, self.ef(request));
            match self.walk(&pin, query, effort, entry, budget, scratch) {
                Err(SearchError::WorkLimit) if budget.gave_up() => scratch.best.clear(),
                walked => walked?,
            }
            budget.go_on();
            if scratch.best.len() >= request.k.min(live) {
                while scratch.best.len() > request.k {
                    scratch.best.pop();
                }
                return Ok(());
            }
        }
        self.scan(&pin, query, request, budget, scratch)
    }
}
