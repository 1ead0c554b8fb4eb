//! The sealed graph in memory: records of fixed stride on huge pages, and the walk over them.
//!
//! Nodes are numbered by level, highest first, so layer `l` is the first `counts[l]` nodes and node 0 is where walks
//! begin. A list of links is room for so many words: a neighbour's number + 1, or 0 from where the list ends. Lists
//! are atomics because the build links from several threads; a walk takes no lock.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::codes::{CodedQuery, Coder};
use crate::hnsw::Walk;
use crate::kernels::prefetch_word;
use crate::raw::{Huge, Words};
use crate::request::{Budget, Marks, SearchError};

/// See the module.
pub(crate) struct Graph {
    pub nodes: usize,
    pub m: usize,
    /// Empty where rows are walked themselves.
    pub codes: Huge,
    bottom: Words,
    /// Layers 1 and up.
    upper: Vec<Box<[AtomicU32]>>,
    /// Nodes of each layer.
    pub counts: Vec<usize>,
}

/// What a walk over codes needs besides the graph; a part of the scratch.
#[derive(Default)]
pub(crate) struct Pool {
    /// Sorted: key << 32 | node << 1 | expanded.
    entries: Vec<u64>,
    batch: Vec<u32>,
    keys: Vec<u32>,
}

/// The bits of a node and whether it was expanded in a pool's entry.
const EXPANDED: u64 = 1;

pub(crate) fn entry_node(entry: u64) -> u32 {
    (entry as u32) >> 1
}
pub(crate) fn entry_key(entry: u64) -> u32 {
    (entry >> 32) as u32
}
fn entry(key: u32, node: u32) -> u64 {
    u64::from(key) << 32 | u64::from(node) << 1
}

/// More nodes don't fit a pool's entry.
pub(crate) const MOST_NODES: usize = (1 << 31) - 2;

impl Graph {
    /// Without links. `None` where memory is short.
    pub fn new(counts: Vec<usize>, m: usize, stride: usize) -> Option<Graph> {
        let nodes = counts.first().copied().unwrap_or(0);
        let upper = counts.iter().skip(1).map(|count| (0..count * m).map(|_| AtomicU32::new(0)).collect()).collect();
        Some(Graph {
            nodes,
            m,
            codes: Huge::zeroed(nodes.checked_mul(stride)?)?,
            bottom: Words::zeroed(nodes.checked_mul(2 * m)?)?,
            upper,
            counts,
        })
    }

    /// Room of a list.
    pub fn room(&self, layer: usize) -> usize {
        if layer == 0 { 2 * self.m } else { self.m }
    }

    /// A node's list in a layer; empty where it has none.
    #[inline]
    pub fn list(&self, layer: usize, node: u32) -> &[AtomicU32] {
        let (words, room) = match layer {
            0 => (self.bottom.get(), 2 * self.m),
            _ => (self.upper.get(layer - 1).map_or(&[][..], |words| words), self.m),
        };
        let start = node as usize * room;
        words.get(start..start + room).unwrap_or_default()
    }

    /// All lists of a layer.
    pub fn lists(&self, layer: usize) -> &[AtomicU32] {
        match layer {
            0 => self.bottom.get(),
            _ => self.upper.get(layer - 1).map_or(&[][..], |words| words),
        }
    }

    #[inline]
    pub fn links<'a>(&'a self, layer: usize, node: u32) -> impl Iterator<Item = u32> + 'a {
        let words = self.list(layer, node).iter().map(|word| word.load(Ordering::Relaxed));
        words.take_while(|word| *word != 0).map(|word| word - 1)
    }

    /// Bytes kept.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.bottom.len() + self.upper.iter().map(|words| words.len() * 4).sum::<usize>()
    }

    /// From node 0 in the top layer down to `bottom` + 1, each time to the nearest node: its key and number.
    pub fn descend(
        &self,
        query: &CodedQuery,
        bottom: usize,
        pool: &mut Pool,
        budget: &mut Budget,
    ) -> Result<(u32, u32), SearchError> {
        let Pool { batch, keys, .. } = pool;
        let mut first = [0];
        query.keys(self.codes.bytes(), &[0], &mut first);
        budget.spend(1)?;
        let mut at = (first[0], 0);
        for layer in (bottom + 1..self.counts.len()).rev() {
            loop {
                batch.clear();
                batch.extend(self.links(layer, at.1));
                keys.resize(batch.len(), 0);
                query.keys(self.codes.bytes(), batch, keys);
                budget.stats.hops += 1;
                budget.spend(batch.len() as u64)?;
                let best = keys.iter().copied().zip(batch.iter().copied()).min().unwrap_or(at);
                if best >= at {
                    break;
                }
                at = best;
            }
        }
        Ok(at)
    }

    /// The `ef` nearest nodes of a layer that a walk from `start` finds are the pool's entries afterwards.
    pub fn walk<'p>(
        &self,
        query: &CodedQuery,
        start: (u32, u32),
        (ef, layer): (usize, usize),
        pool: &'p mut Pool,
        marks: &mut Marks,
        budget: &mut Budget,
    ) -> Result<&'p [u64], SearchError> {
        let Pool { entries, batch, keys } = pool;
        let data = self.codes.bytes();
        marks.start(self.nodes);
        marks.meet(start.1);
        entries.clear();
        entries.push(entry(start.0, start.1));
        keys.resize(self.room(layer).max(keys.len()), 0);
        let mut at = 0;
        while let Some(current) = entries.get_mut(at) {
            *current |= EXPANDED;
            let node = entry_node(*current);
            batch.clear();
            for link in self.list(layer, node) {
                let word = link.load(Ordering::Relaxed);
                if word == 0 {
                    break;
                }
                if marks.meet(word - 1) {
                    batch.push(word - 1);
                }
            }
            budget.stats.hops += 1;
            budget.spend(batch.len() as u64)?;
            query.keys(data, batch, keys);
            // The first unexpanded entry after this round.
            let mut next = at + 1;
            for (key, node) in keys.iter().zip(batch.iter()) {
                let new = entry(*key, *node);
                if entries.len() >= ef {
                    match entries.last() {
                        Some(last) if new < *last => entries.pop(),
                        _ => continue,
                    };
                }
                let place = entries.partition_point(|old| *old < new);
                entries.insert(place, new);
                if place <= next {
                    // It may well be expanded next.
                    let list = self.list(layer, *node);
                    prefetch_word(list, 0);
                    prefetch_word(list, 16);
                }
                next = next.min(place);
            }
            at = next;
            while entries.get(at).is_some_and(|entry| entry & EXPANDED != 0) {
                at += 1;
            }
        }
        Ok(entries)
    }
}

impl Walk for Graph {
    fn nodes(&self) -> usize {
        self.nodes
    }
    fn neighbours(&self, node: u32, layer: usize, out: &mut Vec<u32>) {
        out.clear();
        out.extend(self.links(layer, node));
    }
    fn prefetch(&self, node: u32) {
        let stride = self.codes.len() / self.nodes.max(1);
        for at in (0..stride.min(512)).step_by(64) {
            crate::kernels::prefetch(self.codes.bytes(), node as usize * stride + at);
        }
    }
}

/// Links a node of `level` into the layers below `self.counts.len()`; callers hold nothing.
pub(crate) struct Linker<'a> {
    pub graph: &'a Graph,
    pub coder: &'a Coder,
    pub locks: &'a [std::sync::Mutex<()>],
    pub ef: usize,
}

/// What a linking thread needs.
#[derive(Default)]
pub(crate) struct Bench {
    pub pool: Pool,
    pub marks: Marks,
    query: CodedQuery,
    other: CodedQuery,
    sorted: Vec<(u32, u32)>,
    chosen: Vec<(u32, u32)>,
    ids: Vec<u32>,
    keys: Vec<u32>,
}

impl Linker<'_> {
    fn code(&self, node: u32) -> &[u8] {
        let stride = self.graph.codes.len() / self.graph.nodes;
        &self.graph.codes.bytes()[node as usize * stride..][..stride]
    }

    /// Node 0 is where walks begin and is linked by the others.
    pub fn link(&self, node: u32, level: usize, bench: &mut Bench) {
        let mut budget = Budget::unlimited();
        let mut query = std::mem::take(&mut bench.query);
        self.coder.query_of(self.code(node), &mut query);
        if let Ok(mut start) = self.graph.descend(&query, level, &mut bench.pool, &mut budget) {
            for layer in (0..=level.min(self.graph.counts.len() - 1)).rev() {
                let walked =
                    self.graph.walk(&query, start, (self.ef, layer), &mut bench.pool, &mut bench.marks, &mut budget);
                let Ok(entries) = walked else { break };
                bench.sorted.clear();
                let found = entries.iter().map(|entry| (entry_key(*entry), entry_node(*entry)));
                bench.sorted.extend(found.filter(|(_, other)| *other != node));
                if let Some(nearest) = bench.sorted.first() {
                    start = *nearest;
                }
                self.choose(self.graph.m, bench);
                self.write(layer, node, &bench.chosen);
                let chosen = std::mem::take(&mut bench.chosen);
                for (key, neighbour) in &chosen {
                    self.link_back(layer, *neighbour, node, *key, bench);
                }
                bench.chosen = chosen;
            }
        }
        bench.query = query;
    }

    fn write(&self, layer: usize, node: u32, chosen: &[(u32, u32)]) {
        let _writing = self.locks[node as usize].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let list = self.graph.list(layer, node);
        // Another may have linked back already: its link stays where there is room.
        let mut rest = Vec::new();
        if list.first().is_some_and(|word| word.load(Ordering::Relaxed) != 0) {
            rest.extend(self.graph.links(layer, node).filter(|old| !chosen.iter().any(|(_, new)| new == old)));
        }
        let all = chosen.iter().map(|(_, new)| *new).chain(rest);
        for (word, other) in list.iter().zip(all) {
            word.store(other + 1, Ordering::Relaxed);
        }
    }

    /// The paper's heuristic (its algorithm 4 without the options) with a little slack, as in DiskANN: of `sorted`, nearest first, into `chosen` at most
    /// `most` of which none is nearer to another chosen one than to the node.
    fn choose(&self, most: usize, bench: &mut Bench) {
        let Bench { other, sorted, chosen, ids, keys, .. } = bench;
        chosen.clear();
        ids.clear();
        let slack = self.coder.slack();
        for (key, node) in sorted.iter() {
            if ids.len() >= most {
                break;
            }
            self.coder.query_of(self.code(*node), other);
            let crowded = ids.chunks(4).any(|some| {
                keys.resize(4, 0);
                other.keys(self.graph.codes.bytes(), some, keys);
                keys[..some.len()].iter().any(|between| between.saturating_add(between / slack) < *key)
            });
            if !crowded {
                ids.push(*node);
                chosen.push((*key, *node));
            }
        }
    }

    fn link_back(&self, layer: usize, of: u32, node: u32, key: u32, bench: &mut Bench) {
        let list = self.graph.list(layer, of);
        let _writing = self.locks[of as usize].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let ids = &mut bench.ids;
        ids.clear();
        ids.extend(self.graph.links(layer, of));
        if ids.contains(&node) {
            return;
        }
        if let Some(free) = list.get(ids.len()) {
            free.store(node + 1, Ordering::Relaxed);
            return;
        }
        self.coder.query_of(self.code(of), &mut bench.other);
        bench.keys.resize(ids.len().max(4), 0);
        bench.other.keys(self.graph.codes.bytes(), ids, &mut bench.keys);
        bench.sorted.clear();
        bench.sorted.extend(bench.keys.iter().copied().zip(ids.iter().copied()));
        bench.sorted.push((key, node));
        bench.sorted.sort_unstable();
        self.choose(list.len(), bench);
        for (at, word) in list.iter().enumerate() {
            word.store(bench.chosen.get(at).map_or(0, |(_, other)| other + 1), Ordering::Relaxed);
        }
    }
}
