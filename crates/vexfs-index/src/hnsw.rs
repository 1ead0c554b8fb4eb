//! What the algorithm of HNSW is made of: levels, walks, the choice of neighbours. The head's own walk is over full rows; that
//! of sealed graphs, over codes, is in `graph.rs`.

use std::cmp::Reverse;

use crate::kernels::asked_ahead;
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
    budget: &mut Budget<'_>,
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
    budget: &mut Budget<'_>,
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
        budget.spend(links.len() as u64)?;
        for node in asked_ahead(links, PREFETCH, |node| graph.prefetch(*node)) {
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

/// Chooses at most `most` of `sorted` (nearest first) so that none is nearer to another chosen one than to the node
/// (the paper's heuristic, its algorithm 4 without the options), by `slack` at least. Those that are chosen already stay.
pub(crate) fn choose(
    between: &impl Fn(u32, u32) -> f32,
    slack: f32,
    sorted: &[Candidate],
    most: usize,
    chosen: &mut Vec<Candidate>,
) {
    for candidate in sorted {
        if chosen.len() >= most {
            break;
        }
        // Of points that equal the node one is enough: a list full of them leads nowhere else.
        let crowded = |other: &Candidate| {
            other.node == candidate.node
                || candidate.distance == 0.0 && other.distance == 0.0
                || between(candidate.node, other.node) * slack < candidate.distance
        };
        if !chosen.iter().any(crowded) {
            chosen.push(*candidate);
        }
    }
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
