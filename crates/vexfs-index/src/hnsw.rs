//! The algorithm of HNSW, for every form of graph: walk a layer, choose neighbours, link a node.

use std::cmp::Reverse;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::request::{Budget, Candidate, Scratch, SearchError, keep};

/// A graph that can be walked.
pub(crate) trait Walk {
    /// Nodes; larger numbers are ignored where they are met.
    fn nodes(&self) -> usize;
    /// Replaces `out` by the neighbours of a node in a layer.
    fn neighbours(&self, node: u32, layer: usize, out: &mut Vec<u32>);
    /// A node's data will be wanted soon.
    fn prefetch(&self, node: u32);
}

/// Layers above 0 at most: with M = 2 a billion nodes have 30.
pub(crate) const MAX_LAYER: usize = 31;

/// From `entry` in layer `top` down to layer `bottom` + 1, each time to the nearest node.
pub(crate) fn descend(
    graph: &impl Walk,
    distance: &impl Fn(u32) -> f32,
    entry: u32,
    (top, bottom): (usize, usize),
    links: &mut Vec<u32>,
    budget: &mut Budget,
) -> Result<Candidate, SearchError> {
    let mut at = Candidate { node: entry, distance: distance(entry) };
    budget.spend(1)?;
    for layer in (bottom + 1..=top).rev() {
        loop {
            graph.neighbours(at.node, layer, links);
            budget.stats.hops += 1;
            let before = at;
            for node in links.iter().filter(|node| (**node as usize) < graph.nodes()) {
                budget.spend(1)?;
                at = at.min(Candidate { node: *node, distance: distance(*node) });
            }
            if at == before {
                break;
            }
        }
    }
    Ok(at)
}

/// Walks one layer from `entry`. The `ef` nearest nodes that `accept` lets pass are in `scratch.best` afterwards; the
/// walk goes on through those that it doesn't, as long as `ef` have not been found or something nearer is in view.
pub(crate) fn walk_layer(
    graph: &impl Walk,
    distance: &impl Fn(u32) -> f32,
    accept: &impl Fn(u32) -> bool,
    entry: Candidate,
    (ef, layer): (usize, usize),
    scratch: &mut Scratch,
    budget: &mut Budget,
) -> Result<(), SearchError> {
    let Scratch { visited, near, best, links, .. } = scratch;
    visited.start(graph.nodes());
    near.clear();
    best.clear();
    visited.meet(entry.node);
    near.push(Reverse(entry));
    if accept(entry.node) {
        best.push(entry);
    }
    while let Some(Reverse(at)) = near.pop() {
        if best.len() >= ef && best.peek().is_some_and(|farthest| at > *farthest) {
            break;
        }
        graph.neighbours(at.node, layer, links);
        budget.stats.hops += 1;
        links.retain(|node| visited.meet(*node));
        // Memory is the price: ask for what comes some distances later.
        for node in links.iter().take(PREFETCH) {
            graph.prefetch(*node);
        }
        budget.spend(links.len() as u64)?;
        for (n, node) in links.iter().enumerate() {
            if let Some(later) = links.get(n + PREFETCH) {
                graph.prefetch(*later);
            }
            let found = Candidate { node: *node, distance: distance(*node) };
            if best.len() < ef || best.peek().is_some_and(|farthest| found < *farthest) {
                near.push(Reverse(found));
                if accept(*node) {
                    keep(best, ef, found);
                }
            }
        }
    }
    Ok(())
}

/// Records asked for ahead of their use.
const PREFETCH: usize = 4;

/// Chooses at most `m` of `sorted` (nearest first) so that none is nearer to another chosen one than to the node
/// (the paper's heuristic, its algorithm 4 without the options).
fn choose(between: &impl Fn(u32, u32) -> f32, sorted: &[Candidate], m: usize, chosen: &mut Vec<Candidate>) {
    chosen.clear();
    for candidate in sorted {
        if chosen.len() >= m {
            break;
        }
        let crowded = |other: &Candidate| between(candidate.node, other.node) < candidate.distance;
        if !chosen.iter().any(crowded) {
            chosen.push(*candidate);
        }
    }
}

/// A node's links in all its layers: for each a count and room for `2m` (layer 0) or `m` neighbours. Readers take
/// no lock; writers hold the node's.
pub(crate) struct Links {
    slots: Box<[AtomicU32]>,
    writing: Mutex<()>,
}

impl Links {
    pub fn new(m: usize, level: usize) -> Links {
        let room = 1 + 2 * m + level * (1 + m);
        Links { slots: (0..room).map(|_| AtomicU32::new(0)).collect(), writing: Mutex::new(()) }
    }

    fn layer(&self, m: usize, layer: usize) -> &[AtomicU32] {
        let (start, room) = match layer {
            0 => (0, 1 + 2 * m),
            _ => (1 + 2 * m + (layer - 1) * (1 + m), 1 + m),
        };
        self.slots.get(start..start + room).unwrap_or_default()
    }

    /// Replaces `out` by the neighbours in a layer.
    pub fn read(&self, m: usize, layer: usize, out: &mut Vec<u32>) {
        out.clear();
        if let [count, slots @ ..] = self.layer(m, layer) {
            let count = count.load(Ordering::Acquire) as usize;
            out.extend(slots.iter().take(count).map(|slot| slot.load(Ordering::Relaxed)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Under the lock. A reader meanwhile may see some old and some new neighbours: all are nodes of the layer.
    fn write(&self, m: usize, layer: usize, neighbours: &[Candidate]) {
        if let [count, slots @ ..] = self.layer(m, layer) {
            for (slot, neighbour) in slots.iter().zip(neighbours) {
                slot.store(neighbour.node, Ordering::Relaxed);
            }
            count.store(neighbours.len().min(slots.len()) as u32, Ordering::Release);
        }
    }

    /// Bytes kept.
    pub fn bytes(&self) -> usize {
        size_of::<Links>() + self.slots.len() * 4
    }
}

/// Where walks begin: the node of the highest layer.
#[derive(Default)]
pub(crate) struct Entry {
    /// 0, or layer << 32 | node + 1.
    packed: AtomicU64,
    raising: Mutex<()>,
}

impl Entry {
    /// Node and layer; `None` in a graph without nodes.
    pub fn get(&self) -> Option<(u32, usize)> {
        match self.packed.load(Ordering::Acquire) {
            0 => None,
            packed => Some(((packed as u32) - 1, (packed >> 32) as usize)),
        }
    }

    fn set(&self, node: u32, layer: usize) {
        self.packed.store((layer as u64) << 32 | u64::from(node + 1), Ordering::Release);
    }
}

/// A graph that nodes can be linked into, from several threads.
pub(crate) trait Growing: Walk {
    fn m(&self) -> usize;
    fn ef_construction(&self) -> usize;
    fn entry(&self) -> &Entry;
    fn links(&self, node: u32) -> Option<&Links>;
    /// Distance between two nodes.
    fn between(&self, one: u32, other: u32) -> f32;
}

/// Links a node of the given level; `distance` is its distance to others.
pub(crate) fn insert(
    graph: &impl Growing,
    node: u32,
    level: usize,
    distance: &impl Fn(u32) -> f32,
    scratch: &mut Scratch,
) {
    let raising = graph.entry().raising.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((entry, top)) = graph.entry().get() else {
        graph.entry().set(node, level);
        return;
    };
    // The lock is kept only by one that raises the top: others may link beside it.
    let raising = (level > top).then_some(raising);
    let mut budget = Budget::unlimited();
    let start = descend(graph, distance, entry, (top, level.min(top)), &mut scratch.links, &mut budget);
    let Ok(mut start) = start else { return };
    let m = graph.m();
    for layer in (0..=level.min(top)).rev() {
        let accept = |other: u32| other != node;
        let walked =
            walk_layer(graph, distance, &accept, start, (graph.ef_construction(), layer), scratch, &mut budget);
        if walked.is_err() {
            return;
        }
        let Scratch { best, sorted, chosen, .. } = scratch;
        sorted.clear();
        sorted.extend(best.drain());
        sorted.sort_unstable();
        choose(&|a, b| graph.between(a, b), sorted, m, chosen);
        if let Some(links) = graph.links(node) {
            let _writing = links.lock();
            links.write(m, layer, chosen);
        }
        if let Some(nearest) = sorted.first() {
            start = *nearest;
        }
        let neighbours = std::mem::take(chosen);
        for neighbour in &neighbours {
            link_back(graph, neighbour, node, layer, scratch);
        }
        scratch.chosen = neighbours;
    }
    if raising.is_some() {
        graph.entry().set(node, level);
    }
}

/// Adds `node` to the neighbours of `of`, choosing anew where there is no room.
fn link_back(graph: &impl Growing, of: &Candidate, node: u32, layer: usize, scratch: &mut Scratch) {
    let m = graph.m();
    let room = if layer == 0 { 2 * m } else { m };
    let Some(links) = graph.links(of.node) else {
        return;
    };
    let Scratch { links: current, sorted, chosen, .. } = scratch;
    let _writing = links.lock();
    links.read(m, layer, current);
    if current.contains(&node) {
        return;
    }
    sorted.clear();
    sorted.push(Candidate { node, distance: of.distance });
    if current.len() < room {
        // Order doesn't matter to readers: append.
        if let [count, slots @ ..] = links.layer(m, layer)
            && let Some(slot) = slots.get(current.len())
        {
            slot.store(node, Ordering::Relaxed);
            count.store(current.len() as u32 + 1, Ordering::Release);
        }
        return;
    }
    sorted.extend(current.iter().map(|other| Candidate { node: *other, distance: graph.between(of.node, *other) }));
    sorted.sort_unstable();
    choose(&|a, b| graph.between(a, b), sorted, room, chosen);
    links.write(m, layer, chosen);
}

/// The level of a node: geometric, with ratio 1/m, from the seed and the node's number (SplitMix64).
pub(crate) fn level(seed: u64, node: u32, m: usize) -> usize {
    let mut z = seed.wrapping_add((u64::from(node) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let uniform = ((z >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
    ((-uniform.ln() / (m.max(2) as f64).ln()) as usize).min(MAX_LAYER)
}
