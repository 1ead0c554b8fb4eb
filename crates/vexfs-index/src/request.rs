//! Questions to an index, and the scratch that answering needs.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::Instant;

use crate::Slot;
use crate::graph::Nodes;
use crate::kernels::{Prepared, asked_ahead, prefetch_row};

/// How hard a walk tries.
#[derive(Copy, Clone, Debug, PartialEq)]
pub enum Effort {
    /// Candidates kept.
    Ef(usize),
    /// Recall that the walk should come to; 1 compares with every vector.
    Recall(f32),
}

impl Default for Effort {
    /// A margin over the 0.95 that users are promised.
    fn default() -> Effort {
        Effort::Recall(0.99)
    }
}

/// Which slots may be returned.
pub trait Filter: Sync {
    /// May this one?
    fn allows(&self, slot: Slot) -> bool;
    /// The share of slots that may, if known.
    fn selectivity(&self) -> Option<f32> {
        None
    }
    /// The slots that may, as bits (slot n is bit n % 64 of word n / 64), where they are at hand: what few slots are
    /// allowed is found much faster then.
    fn bits(&self) -> Option<&[u64]> {
        None
    }
}

/// Slots as bits.
pub struct Bits(
    /// See [`Filter::bits`]. Slots behind the end may not be returned.
    pub Vec<u64>,
);

impl Bits {
    /// These slots, all below `len`.
    pub fn of(len: usize, slots: impl IntoIterator<Item = usize>) -> Bits {
        let mut words = vec![0; len.div_ceil(64)];
        slots.into_iter().for_each(|slot| words[slot / 64] |= 1 << (slot % 64));
        Bits(words)
    }
}

impl Filter for Bits {
    fn allows(&self, slot: Slot) -> bool {
        has_bit(&self.0, slot.0)
    }
    fn bits(&self) -> Option<&[u64]> {
        Some(&self.0)
    }
}

pub(crate) fn has_bit(bits: &[u64], node: u32) -> bool {
    bits.get(node as usize / 64).is_some_and(|word| word >> (node % 64) & 1 == 1)
}

/// How long an answer is wanted.
#[derive(Copy, Clone, Default)]
pub struct Until<'a> {
    /// When to give up.
    pub deadline: Option<Instant>,
    /// Is nobody left to take the answer? Asked as often as the clock, which is many thousand times a second.
    pub cancelled: Option<&'a (dyn Fn() -> bool + Sync)>,
}

impl Until<'_> {
    /// An error if the answer is no longer wanted.
    pub fn check(&self) -> Result<(), SearchError> {
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(SearchError::Deadline);
        }
        match self.cancelled.is_some_and(|cancelled| cancelled()) {
            true => Err(SearchError::Cancelled),
            false => Ok(()),
        }
    }
}

/// A question.
#[derive(Clone)]
pub struct Request<'a> {
    /// Hits wanted. With `max_distance` this may be as large as one likes: a walk goes on only as long as it finds
    /// points within.
    pub k: usize,
    /// How hard to try.
    pub effort: Effort,
    /// Compare with every vector.
    pub exact: bool,
    /// Only hits at most this far, in the index's unit.
    pub max_distance: Option<f32>,
    /// Only these.
    pub filter: Option<&'a dyn Filter>,
    /// How long it is wanted.
    pub until: Until<'a>,
    /// After how many distances to give up.
    pub max_distances: Option<u64>,
}

impl Request<'_> {
    /// The `k` nearest with default effort.
    pub fn nearest(k: usize) -> Request<'static> {
        Request {
            k,
            effort: Effort::default(),
            exact: false,
            max_distance: None,
            filter: None,
            until: Until::default(),
            max_distances: None,
        }
    }

    /// All that are at most so far, `most` of them at most.
    pub fn within(max_distance: f32, most: usize) -> Request<'static> {
        Request { max_distance: Some(max_distance), ..Request::nearest(most) }
    }

    /// May the slot be returned?
    pub(crate) fn allows(&self, slot: u32) -> bool {
        self.filter.is_none_or(|filter| filter.allows(Slot(slot)))
    }
}

/// A hit.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Neighbor {
    /// Where it is.
    pub slot: Slot,
    /// Full-precision distance, in the index's unit.
    pub distance: f32,
}

/// What an answer cost.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Distances computed.
    pub distances: u64,
    /// Nodes whose links were read.
    pub hops: u64,
}

/// A search that gave up.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SearchError {
    /// At its deadline.
    #[error("the deadline passed")]
    Deadline,
    /// Nobody wants the answer any more.
    #[error("the search was cancelled")]
    Cancelled,
    /// At its limit of distances.
    #[error("the work limit was reached")]
    WorkLimit,
}

/// A node and its distance, ordered by distance, then node. Distances are never NaN: vectors and queries are finite.
#[derive(Copy, Clone, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub distance: f32,
    pub node: u32,
}

impl Eq for Candidate {}
impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Candidate) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Candidate {
    fn cmp(&self, other: &Candidate) -> Ordering {
        self.distance.total_cmp(&other.distance).then(self.node.cmp(&other.node))
    }
}

/// Memory that searches and inserts use again and again. One at a time.
#[derive(Default)]
pub struct Scratch {
    pub(crate) visited: Visited,
    /// To be expanded, nearest first.
    pub(crate) near: BinaryHeap<std::cmp::Reverse<Candidate>>,
    /// The best so far, farthest first.
    pub(crate) best: BinaryHeap<Candidate>,
    pub(crate) links: Vec<u32>,
    pub(crate) sorted: Vec<Candidate>,
    pub(crate) chosen: Vec<Candidate>,
    pub(crate) pool: crate::graph::Pool,
    pub(crate) query: crate::codes::CodedQuery,
    pub(crate) values: Vec<f32>,
    /// The last query, for its memory.
    pub(crate) exact: Option<Prepared>,
}

impl Scratch {
    /// Bytes that it keeps from one use to the next, the query's own aside.
    pub fn bytes(&self) -> usize {
        let candidates = self.near.capacity() + self.best.capacity() + self.sorted.capacity() + self.chosen.capacity();
        let words = self.visited.stamps.capacity() + self.links.capacity() + self.values.capacity();
        candidates * size_of::<Candidate>() + 4 * words + self.pool.bytes()
    }
}

/// Which nodes a walk has met: a bit for each, so that a large graph's marks stay in the nearest caches.
#[derive(Default)]
pub(crate) struct Marks {
    bits: Vec<u64>,
    nodes: usize,
    /// What to clear before the next walk.
    met: Vec<u32>,
}

impl Marks {
    /// From `nodes` up all count as met.
    pub fn start(&mut self, nodes: usize) {
        for node in self.met.drain(..) {
            if let Some(bits) = self.bits.get_mut(node as usize / 64) {
                *bits = 0;
            }
        }
        if self.bits.len() < nodes.div_ceil(64) {
            self.bits.resize(nodes.div_ceil(64), 0);
        }
        self.nodes = nodes;
    }

    pub fn bytes(&self) -> usize {
        8 * self.bits.capacity() + 4 * self.met.capacity()
    }

    /// All met since the walk began, in their order.
    pub fn met(&self) -> &[u32] {
        &self.met
    }

    /// True at the first meeting.
    #[inline(always)]
    pub fn meet(&mut self, node: u32) -> bool {
        match self.bits.get_mut(node as usize / 64) {
            Some(bits) if (node as usize) < self.nodes && *bits >> (node % 64) & 1 == 0 => {
                *bits |= 1 << (node % 64);
                self.met.push(node);
                true
            }
            _ => false,
        }
    }
}

/// Which nodes a walk has met: a stamp for each, so that nothing is cleared between walks.
#[derive(Default)]
pub(crate) struct Visited {
    stamps: Vec<u32>,
    now: u32,
}

impl Visited {
    pub fn start(&mut self, nodes: usize) {
        if self.stamps.len() < nodes {
            self.stamps.resize(nodes, 0);
        }
        self.now = self.now.wrapping_add(1);
        if self.now == 0 {
            self.stamps.fill(0);
            self.now = 1;
        }
    }

    /// As [`Visited::meet`], also for a node that was added after the walk began.
    pub fn meet_any(&mut self, node: u32) -> bool {
        if self.stamps.len() <= node as usize {
            self.stamps.resize(node as usize + 1, 0);
        }
        self.meet(node)
    }

    /// True at the first meeting. A node that was added after the walk began counts as met.
    pub fn meet(&mut self, node: u32) -> bool {
        match self.stamps.get_mut(node as usize) {
            Some(stamp) if *stamp != self.now => {
                *stamp = self.now;
                true
            }
            _ => false,
        }
    }
}

/// Counts distances and watches the limits.
pub(crate) struct Budget<'a> {
    pub stats: Stats,
    until: Until<'a>,
    most: u64,
    next_look: u64,
    /// A limit of the search's own, not of who asked.
    own: u64,
}

/// Distances between two looks at the clock: some tens of microseconds.
const LOOK_EVERY: u64 = 512;

impl<'a> Budget<'a> {
    pub fn new(request: &Request<'a>) -> Budget<'a> {
        Budget {
            stats: Stats::default(),
            until: request.until,
            most: request.max_distances.unwrap_or(u64::MAX),
            next_look: 0,
            own: u64::MAX,
        }
    }

    pub fn unlimited() -> Budget<'static> {
        let until = Until::default();
        Budget { stats: Stats::default(), until, most: u64::MAX, next_look: u64::MAX, own: u64::MAX }
    }

    /// Stops what comes next after so many more distances, to try another way.
    pub fn give_up_after(&mut self, distances: u64) {
        self.own = self.stats.distances.saturating_add(distances);
    }

    /// Was it that limit, rather than the asker's?
    pub fn gave_up(&self) -> bool {
        self.stats.distances > self.own && self.stats.distances <= self.most
    }

    /// Lifts that limit.
    pub fn go_on(&mut self) {
        self.own = u64::MAX;
    }

    pub fn spend(&mut self, distances: u64) -> Result<(), SearchError> {
        self.stats.distances += distances;
        if self.stats.distances > self.most.min(self.own) {
            return Err(SearchError::WorkLimit);
        }
        if self.stats.distances >= self.next_look {
            self.next_look = self.stats.distances.saturating_add(LOOK_EVERY);
            self.until.check()?;
        }
        Ok(())
    }
}

/// Keeps the `k` nearest of what it is offered.
pub(crate) fn keep(best: &mut BinaryHeap<Candidate>, k: usize, candidate: Candidate) {
    if best.len() < k {
        best.push(candidate);
    } else if let Some(mut farthest) = best.peek_mut()
        && candidate < *farthest
    {
        *farthest = candidate;
    }
}

/// Rows asked for ahead of their use.
const ASKED: usize = 6;

/// Exact scan of `nodes`, some of which are read into `batch` at a time: the `k` nearest, into `best`.
pub(crate) fn scan<'a>(
    nodes: &mut Nodes<'_>,
    row: impl Fn(u32) -> &'a [u8],
    query: &Prepared,
    k: usize,
    (batch, best): (&mut Vec<u32>, &mut BinaryHeap<Candidate>),
    budget: &mut Budget<'_>,
) -> Result<(), SearchError> {
    while nodes.next(batch) {
        for node in asked_ahead(batch, ASKED, |node| prefetch_row(row(*node))) {
            budget.spend(1)?;
            keep(best, k, Candidate { distance: query.distance(row(*node)), node: *node });
        }
    }
    Ok(())
}

/// Empties `best` into hits, nearest first.
pub(crate) fn deliver(best: &mut BinaryHeap<Candidate>, request: &Request<'_>, out: &mut Vec<Neighbor>) {
    out.clear();
    while let Some(candidate) = best.pop() {
        if request.max_distance.is_none_or(|most| candidate.distance <= most) {
            out.push(Neighbor { slot: Slot(candidate.node), distance: candidate.distance });
        }
    }
    out.reverse();
}
