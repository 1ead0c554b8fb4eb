//! Looking at a graph rather than searching it: where walks begin, who is linked to whom, and what a walk can reach.
//!
//! Everything here is as long as the graph is large, except a point's neighbours and a walk with a limit; memory is
//! some words a node. Links that damaged bytes make up are left out, and counted by the report. A graph that grows
//! meanwhile is seen as it is where it is looked at.

use std::collections::{BTreeMap, VecDeque};

use crate::kernels::{Prepared, between};
use crate::request::Budget;
use crate::{Index, Mutable, Neighbor, Request, Scratch, Sealed, SearchError, Slot};

#[cfg(test)]
mod tests;

/// What there is to look at, by slots.
trait Linked {
    /// Slots given out.
    fn slots(&self) -> usize;
    /// Where walks begin, and in which layer.
    fn entry(&self) -> Option<(u32, usize)>;
    /// The highest layer of a point; `None` where it is in none.
    fn top(&self, slot: u32) -> Option<usize>;
    /// Replaces `out` by what a point's list in a layer holds.
    fn links(&self, slot: u32, layer: usize, out: &mut Vec<u32>);
    /// Full-precision distance of two points that are in the graph.
    fn between(&self, one: u32, other: u32) -> f32;
}

impl Linked for Sealed {
    fn slots(&self) -> usize {
        self.len()
    }

    fn entry(&self) -> Option<(u32, usize)> {
        Some((0, self.graph.as_ref()?.counts.len().checked_sub(1)?))
    }

    fn top(&self, slot: u32) -> Option<usize> {
        self.graph.as_ref()?.counts.iter().rposition(|count| (slot as usize) < *count)
    }

    fn links(&self, slot: u32, layer: usize, out: &mut Vec<u32>) {
        out.clear();
        out.extend(self.graph.iter().flat_map(|graph| graph.links(layer, slot)));
    }

    fn between(&self, one: u32, other: u32) -> f32 {
        between(self.space(), self.row(Slot(one)), self.row(Slot(other)))
    }
}

impl Linked for Mutable {
    fn slots(&self) -> usize {
        self.len()
    }

    fn entry(&self) -> Option<(u32, usize)> {
        self.entry_point()
    }

    fn top(&self, slot: u32) -> Option<usize> {
        Mutable::top(self, slot)
    }

    fn links(&self, slot: u32, layer: usize, out: &mut Vec<u32>) {
        self.linked_to(slot, layer, out);
    }

    fn between(&self, one: u32, other: u32) -> f32 {
        self.apart(one, other)
    }
}

/// A graph to look at; see the module.
pub struct Explorer<'a>(&'a dyn Linked);

/// What a graph is like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connectivity {
    /// From layer 0 up.
    pub layers: Vec<LayerReport>,
    /// Nodes that no way from the entry down through the layers leads to: no search can find them but an exact one.
    pub unreachable: usize,
    /// Some of these, lowest first.
    pub examples: Vec<Slot>,
}

/// What a layer is like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerReport {
    /// Nodes in it.
    pub nodes: usize,
    /// Links in it, each in one direction.
    pub links: usize,
    /// Links to what is no other node of the layer, and second ones to the same; they are counted nowhere else.
    pub broken: usize,
    /// Sets of nodes without a link between them, whatever its direction.
    pub components: usize,
    /// Nodes of the largest of these.
    pub largest: usize,
    /// Nodes that the links of this layer alone don't lead to from the entry.
    pub unreachable: usize,
    /// How many nodes have how many links, fewest links first.
    pub outgoing: Vec<(usize, usize)>,
    /// How many nodes are linked to how often, least first.
    pub incoming: Vec<(usize, usize)>,
}

/// Unreachable points that a report names.
const EXAMPLES: usize = 16;

impl Sealed {
    /// To look at the graph.
    pub fn explore(&self) -> Explorer<'_> {
        Explorer(self)
    }

    /// The nodes that an unfiltered search with this request meets in layer 0, in that order: its path. Empty where
    /// every search is an exact scan.
    pub fn path(&self, query: &[f32], request: &Request<'_>, scratch: &mut Scratch) -> Result<Vec<Slot>, SearchError> {
        let (Some(graph), Some(ef), false) = (&self.graph, self.ef(request), request.exact) else {
            return Ok(Vec::new());
        };
        let exact = Prepared::new(self.space(), query);
        let mut budget = Budget::new(request);
        let (ef, plan) = self.unfiltered(request, ef);
        self.walker(graph).nearest(&exact, (request.k, ef), plan, scratch, &mut budget)?;
        Ok(scratch.pool.marks.met().iter().map(|node| Slot(*node)).collect())
    }
}

impl Mutable {
    /// To look at the graph.
    pub fn explore(&self) -> Explorer<'_> {
        Explorer(self)
    }
}

impl Explorer<'_> {
    /// Where walks begin, and in which layer; `None` without a graph.
    pub fn entry(&self) -> Option<(Slot, usize)> {
        self.0.entry().map(|(node, layer)| (Slot(node), layer))
    }

    /// The highest layer that a point is in; `None` where it is in no graph (yet).
    pub fn top(&self, slot: Slot) -> Option<usize> {
        self.0.top(slot.0)
    }

    /// How many points are in each layer, from layer 0 up.
    pub fn layers(&self) -> Vec<usize> {
        let mut counts = Vec::new();
        for top in (0..self.0.slots() as u32).filter_map(|node| self.top(Slot(node))) {
            counts.resize(counts.len().max(top + 1), 0);
            counts[..=top].iter_mut().for_each(|count| *count += 1);
        }
        counts
    }

    /// The points that a point is linked to in a layer, nearest first, with their full-precision distances.
    pub fn neighbours(&self, slot: Slot, layer: usize) -> Vec<Neighbor> {
        let mut links = Vec::new();
        self.links(slot.0, layer, &mut links);
        let neighbour = |other: &u32| Neighbor { slot: Slot(*other), distance: self.0.between(slot.0, *other) };
        let mut near: Vec<Neighbor> = links.iter().map(neighbour).collect();
        near.sort_by(|a, b| a.distance.total_cmp(&b.distance).then(a.slot.cmp(&b.slot)));
        near
    }

    /// The first `limit` points that a breadth-first walk over a layer's links meets, and after how many links. The
    /// first is `from` itself; there is none where it isn't in the layer.
    pub fn around(&self, from: Slot, layer: usize, limit: usize) -> Vec<(Slot, usize)> {
        if limit == 0 || self.top(from).is_none_or(|top| top < layer) {
            return Vec::new();
        }
        let mut met = std::collections::HashSet::from([from.0]);
        let mut order = vec![(from, 0)];
        let (mut at, mut links) = (0, Vec::new());
        while let Some((node, hops)) = order.get(at).copied() {
            at += 1;
            self.links(node.0, layer, &mut links);
            for next in &links {
                if order.len() >= limit {
                    return order;
                }
                if met.insert(*next) {
                    order.push((Slot(*next), hops + 1));
                }
            }
        }
        order
    }

    /// Counts what is connected, in each layer and through all of them.
    pub fn connectivity(&self) -> Connectivity {
        let counts = self.layers();
        let mut report = Connectivity::default();
        // What a walk has come to in the layers above, from which it goes on below.
        let mut reached = vec![false; self.0.slots()];
        for (layer, nodes) in counts.iter().enumerate().rev() {
            report.layers.push(self.layer_report(layer, *nodes, &mut reached));
        }
        report.layers.reverse();
        let mut lost =
            (0..reached.len() as u32).filter(|node| !reached[*node as usize] && self.top(Slot(*node)).is_some());
        report.examples = lost.by_ref().take(EXAMPLES).map(Slot).collect();
        report.unreachable = report.examples.len() + lost.count();
        report
    }

    fn layer_report(&self, layer: usize, nodes: usize, reached: &mut [bool]) -> LayerReport {
        let all = reached.len();
        let mut report = LayerReport { nodes, ..LayerReport::default() };
        let mut sets = Sets::new(all);
        let (mut incoming, mut outgoing) = (vec![0usize; all], BTreeMap::new());
        let mut links = Vec::new();
        let in_layer = |node: u32| self.top(Slot(node)).is_some_and(|top| top >= layer);
        let members = || (0..all as u32).filter(|node| in_layer(*node));
        for node in members() {
            report.broken += self.links(node, layer, &mut links);
            report.links += links.len();
            *outgoing.entry(links.len()).or_insert(0) += 1;
            for other in &links {
                // A graph that grows may have more nodes by now.
                if let Some(count) = incoming.get_mut(*other as usize) {
                    *count += 1;
                    sets.join(node, *other);
                }
            }
        }
        let mut degrees = BTreeMap::new();
        let mut sizes: BTreeMap<u32, usize> = BTreeMap::new();
        for node in members() {
            *degrees.entry(incoming[node as usize]).or_insert(0) += 1;
            *sizes.entry(sets.of(node)).or_insert(0) += 1;
        }
        report.outgoing = outgoing.into_iter().collect();
        report.incoming = degrees.into_iter().collect();
        report.components = sizes.len();
        report.largest = sizes.into_values().max().unwrap_or(0);
        if let Some((entry, _)) = self.entry() {
            let mut alone = vec![false; all];
            self.spread(layer, &mut alone, [entry.0].into());
            report.unreachable = members().filter(|node| !alone[*node as usize]).count();
            let begin = members().filter(|node| reached[*node as usize]).chain([entry.0]).collect();
            self.spread(layer, reached, begin);
        }
        report
    }

    /// Marks all that a layer's links lead to from what is in the queue.
    fn spread(&self, layer: usize, met: &mut [bool], mut queue: VecDeque<u32>) {
        let mut links = Vec::new();
        // A graph that grows may begin at a node that is newer than the marks.
        queue.iter().for_each(|node| _ = met.get_mut(*node as usize).map(|met| *met = true));
        while let Some(node) = queue.pop_front() {
            self.links(node, layer, &mut links);
            for next in &links {
                if met.get_mut(*next as usize).is_some_and(|met| !std::mem::replace(met, true)) {
                    queue.push_back(*next);
                }
            }
        }
    }

    /// Links to other nodes of the layer, each once; returns how many others the list had.
    fn links(&self, node: u32, layer: usize, out: &mut Vec<u32>) -> usize {
        self.0.links(node, layer, out);
        let all = out.len();
        out.sort_unstable();
        out.dedup();
        out.retain(|other| *other != node && self.0.top(*other).is_some_and(|top| top >= layer));
        all - out.len()
    }
}

/// Disjoint sets of nodes, joined by rank's cheap stand-in: the smaller number leads.
struct Sets(Vec<u32>);

impl Sets {
    fn new(nodes: usize) -> Sets {
        Sets((0..nodes as u32).collect())
    }

    /// The leader of a node's set; ways to it are halved as they are gone.
    fn of(&mut self, mut node: u32) -> u32 {
        while self.0[node as usize] != node {
            self.0[node as usize] = self.0[self.0[node as usize] as usize];
            node = self.0[node as usize];
        }
        node
    }

    fn join(&mut self, one: u32, other: u32) {
        let (one, other) = (self.of(one), self.of(other));
        self.0[one.max(other) as usize] = one.min(other);
    }
}
