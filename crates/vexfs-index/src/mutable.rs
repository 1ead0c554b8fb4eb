//! The head's index: points are pushed at any time, found at once, and linked into a graph when there is time.
//!
//! Nodes never move and are never taken away, so searches take no lock; links are atomics that writers change
//! under the node's own lock. What is dead is left out by the search's filter, and for good when the head is sealed.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::hnsw::{Entry, Growing, Links, Walk, descend, insert, level, walk_layer};
use crate::kernels::{Prepared, between, prefetch};
use crate::request::{Budget, Candidate, deliver, keep, scan};
use crate::{Effort, Index, Memory, Neighbor, Params, Request, Scratch, SearchError, Slot, Space, Stats};

/// Below this many points an exact scan is as fast as a walk and never misses.
const SCAN_BELOW: usize = 5_000;
/// A filter that passes less than this share is answered by an exact scan of what it passes.
const SCAN_SELECTIVITY: f32 = 0.1;

/// See the module.
pub struct Mutable {
    space: Space,
    params: Params,
    nodes: boxcar::Vec<Node>,
    entry: Entry,
    /// Slots given out. A thread that is slower than another leaves a gap below for a moment.
    end: AtomicUsize,
    linked: AtomicUsize,
    /// All nodes below are linked.
    settled: AtomicUsize,
}

struct Node {
    row: Box<[u8]>,
    links: Links,
    claimed: AtomicBool,
    linked: AtomicBool,
}

impl Mutable {
    /// Without points; costs some hundred bytes.
    pub fn new(space: Space, params: Params) -> Mutable {
        Mutable {
            space,
            params,
            nodes: boxcar::Vec::new(),
            entry: Entry::default(),
            end: AtomicUsize::new(0),
            linked: AtomicUsize::new(0),
            settled: AtomicUsize::new(0),
        }
    }

    /// Adds a row, pending: searches find it from now on. Slots are given out from 0 upwards.
    pub fn push(&self, row: &[u8]) -> Slot {
        let slot = self.nodes.push_with(|slot| Node {
            row: row.into(),
            links: Links::new(self.params.m, level(self.params.seed, slot as u32, self.params.m)),
            claimed: AtomicBool::new(false),
            linked: AtomicBool::new(false),
        });
        self.end.fetch_max(slot + 1, Ordering::AcqRel);
        Slot(slot as u32)
    }

    /// Links a pending point into the graph. Does nothing where that was done or another thread does it.
    pub fn link(&self, slot: Slot, scratch: &mut Scratch) {
        let Some(node) = self.nodes.get(slot.0 as usize) else {
            return;
        };
        if node.claimed.swap(true, Ordering::AcqRel) {
            return;
        }
        let distance = |other: u32| self.between(slot.0, other);
        insert(self, slot.0, level(self.params.seed, slot.0, self.params.m), &distance, scratch);
        node.linked.store(true, Ordering::Release);
        self.linked.fetch_add(1, Ordering::AcqRel);
        let mut settled = self.settled.load(Ordering::Acquire);
        while self.nodes.get(settled).is_some_and(|node| node.linked.load(Ordering::Acquire)) {
            settled += 1;
        }
        self.settled.fetch_max(settled, Ordering::AcqRel);
    }

    /// No point below this slot is pending.
    pub fn first_pending(&self) -> Slot {
        Slot(self.settled.load(Ordering::Acquire) as u32)
    }

    /// Points that are not linked yet.
    pub fn pending(&self) -> usize {
        self.len().saturating_sub(self.linked.load(Ordering::Acquire))
    }

    /// The highest layer of a node that is in the graph; `None` of one that isn't.
    pub(crate) fn linked_level(&self, node: u32) -> Option<usize> {
        let linked = self.nodes.get(node as usize).is_some_and(|known| known.linked.load(Ordering::Acquire));
        linked.then(|| level(self.params.seed, node, self.params.m))
    }

    fn distance(&self, query: &Prepared, node: u32) -> f32 {
        // A node that is just being pushed by another thread is as far as can be.
        self.nodes.get(node as usize).map_or(f32::INFINITY, |node| query.distance(&node.row))
    }

    /// How many candidates a recall target asks for, where nothing was calibrated: a head is young. Measured on
    /// SIFT and MiniLM heads of 50,000 these come out above the target; a sealed segment knows its own.
    fn ef(&self, request: &Request<'_>) -> usize {
        let ef = match request.effort {
            Effort::Ef(ef) => ef,
            Effort::Recall(recall) if recall <= 0.9 => 64,
            Effort::Recall(recall) if recall <= 0.95 => 128,
            Effort::Recall(recall) if recall <= 0.98 => 200,
            Effort::Recall(_) => 400,
        };
        ef.max(request.k)
    }
}

impl Walk for Mutable {
    fn nodes(&self) -> usize {
        self.len()
    }

    fn neighbours(&self, node: u32, layer: usize, out: &mut Vec<u32>) {
        match self.nodes.get(node as usize) {
            Some(node) => node.links.read(self.params.m, layer, out),
            None => out.clear(),
        }
    }

    fn prefetch(&self, node: u32) {
        if let Some(node) = self.nodes.get(node as usize) {
            prefetch(&node.row, 0);
        }
    }
}

impl Growing for Mutable {
    fn m(&self) -> usize {
        self.params.m
    }
    fn ef_construction(&self) -> usize {
        self.params.ef_construction
    }
    fn entry(&self) -> &Entry {
        &self.entry
    }
    fn links(&self, node: u32) -> Option<&Links> {
        self.nodes.get(node as usize).map(|node| &node.links)
    }
    fn between(&self, one: u32, other: u32) -> f32 {
        match (self.nodes.get(one as usize), self.nodes.get(other as usize)) {
            (Some(one), Some(other)) => between(&self.space, &one.row, &other.row),
            _ => f32::INFINITY,
        }
    }
}

impl Index for Mutable {
    fn space(&self) -> &Space {
        &self.space
    }

    fn len(&self) -> usize {
        self.end.load(Ordering::Acquire)
    }

    fn row(&self, slot: Slot) -> &[u8] {
        self.nodes.get(slot.0 as usize).map_or(&[], |node| &node.row)
    }

    fn search(
        &self,
        query: &[f32],
        request: &Request<'_>,
        scratch: &mut Scratch,
        out: &mut Vec<Neighbor>,
    ) -> Result<Stats, SearchError> {
        let query = Prepared::new(&self.space, query);
        let mut budget = Budget::new(request);
        let distance = |node: u32| self.distance(&query, node);
        let accept = |node: &u32| request.allows(*node) && self.nodes.get(*node as usize).is_some();
        let selective = request.filter.and_then(|f| f.selectivity()).is_some_and(|share| share < SCAN_SELECTIVITY);
        let all = |budget: &mut Budget, scratch: &mut Scratch| {
            scratch.best.clear();
            scan((0..self.len() as u32).filter(accept), distance, request.k, budget, &mut scratch.best)
        };
        let exact = request.exact || matches!(request.effort, Effort::Recall(recall) if recall >= 1.0);
        match self.entry.get() {
            Some((entry, top)) if !exact && !selective && self.len() >= SCAN_BELOW => {
                // Read before the walk: what is linked meanwhile is met by the walk, by the scan, or by both.
                let settled = self.settled.load(Ordering::Acquire);
                let pending = self.pending() > 0;
                let start = descend(self, &distance, entry, (top, 0), &mut scratch.links, &mut budget)?;
                let ef = self.ef(request);
                walk_layer(self, &distance, &|node| accept(&node), start, (ef, 0), scratch, &mut budget)?;
                let missed = scratch.best.len() < request.k;
                if missed {
                    all(&mut budget, scratch)?;
                } else if pending {
                    for node in settled as u32..self.len() as u32 {
                        if scratch.visited.meet(node) && accept(&node) {
                            budget.spend(1)?;
                            keep(&mut scratch.best, ef, Candidate { distance: distance(node), node });
                        }
                    }
                }
            }
            _ => all(&mut budget, scratch)?,
        }
        while scratch.best.len() > request.k {
            scratch.best.pop();
        }
        deliver(&mut scratch.best, request, out);
        Ok(budget.stats)
    }

    fn memory(&self) -> Memory {
        let index = self.nodes.iter().map(|(_, node)| (size_of::<Node>() + node.links.bytes()) as u64).sum();
        Memory { index, vectors: (self.len() * self.space.row_bytes()) as u64 }
    }
}
