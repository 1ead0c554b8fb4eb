//! The sealed graph in memory: records of fixed stride on huge pages, and the walk over them.
//!
//! Nodes are numbered by level, highest first, so layer `l` is the first `counts[l]` nodes and node 0 is where walks
//! begin. A list of links is room for so many words: a neighbour's number + 1, or 0 from where the list ends. Lists
//! are atomics because the build links from several threads; a walk takes no lock.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::codes::{CodedQuery, Coder};
use crate::kernels::{asked_ahead, prefetch_word};
use crate::raw::{Place, Words};
use crate::request::{Budget, Marks, SearchError};
use crate::sealed::CALIBRATED_K;

/// See the module.
pub(crate) struct Graph {
    pub nodes: usize,
    pub m: usize,
    /// Nodes of each layer.
    pub counts: Vec<usize>,
    layers: Vec<Words>,
    /// Layer 0 once more, on huge pages.
    hot: OnceLock<Words>,
}

/// A query against the nodes of a graph.
pub(crate) trait Keys {
    /// Keys of the nodes, the smaller the nearer; `out` has room for them.
    fn keys(&self, nodes: &[u32], out: &mut [u32]);
    /// Asks for what a node's key is made of ahead of its use.
    fn ask(&self, node: u32);
    /// Bytes of that.
    fn bytes(&self) -> usize;
    /// The largest key of what may in truth be nearer than a node of this key; `None` if keys don't tell.
    fn not_beyond(&self, key: u32) -> Option<u32>;
    /// The largest key of what is at most `reach` times as far as a node of this key, by squared distance; of all where
    /// distances have no zero.
    fn within(&self, reach: f32, key: u32) -> u32;
}

/// How far a walk in a layer goes.
#[derive(Copy, Clone)]
pub(crate) struct Beam {
    pub layer: usize,
    /// Hits wanted.
    pub k: usize,
    /// Candidates that it goes on from at most, if `k` is not more.
    pub ef: usize,
    /// How many times as far as the [`CALIBRATED_K`]-th they may be at most, by squared distance.
    pub reach: f32,
}

impl Beam {
    /// However far candidates are.
    pub fn of(layer: usize, k: usize, ef: usize) -> Beam {
        Beam { layer, k, ef, reach: f32::INFINITY }
    }
}

/// Against coded rows.
pub(crate) struct Coded<'a> {
    pub query: &'a CodedQuery,
    pub codes: &'a [u8],
    pub stride: usize,
}

impl Keys for Coded<'_> {
    #[inline]
    fn keys(&self, nodes: &[u32], out: &mut [u32]) {
        self.query.keys(self.codes, nodes, out);
    }
    #[inline(always)]
    fn ask(&self, node: u32) {
        crate::kernels::codes::ask(self.codes, node, self.stride);
    }
    fn bytes(&self) -> usize {
        self.stride
    }
    fn not_beyond(&self, key: u32) -> Option<u32> {
        self.query.not_beyond(key, FAR_OFF)
    }
    fn within(&self, reach: f32, key: u32) -> u32 {
        self.query.within(reach, key)
    }
}

/// What a walk needs besides the graph; a part of the scratch.
#[derive(Default)]
pub(crate) struct Pool {
    /// Sorted: key << 32 | node << 1 | expanded.
    entries: Vec<u64>,
    batch: Vec<u32>,
    keys: Vec<u32>,
    /// Neighbours that a filter keeps out.
    blocked: Vec<u32>,
    pub marks: Marks,
}

impl Pool {
    pub fn bytes(&self) -> usize {
        let words = self.batch.capacity() + self.keys.capacity() + self.blocked.capacity();
        8 * self.entries.capacity() + 4 * words + self.marks.bytes()
    }

    /// What the last walk found, nearest first; see [`entry_key`] and [`entry_node`].
    pub fn entries(&self) -> &[u64] {
        &self.entries
    }

    /// Forgets those that are not allowed.
    pub fn keep(&mut self, allowed: impl Fn(u32) -> bool) {
        self.entries.retain(|entry| allowed(entry_node(*entry)));
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// How many nodes the last walk met, and how many of them are allowed: [`Graph::walk_allowed`] begins at these.
    pub fn look_around(&mut self, allowed: impl Fn(u32) -> bool) -> (usize, usize) {
        let met = self.marks.met();
        self.batch.clear();
        self.batch.extend(met.iter().copied().filter(|node| allowed(*node)));
        (met.len(), self.batch.len())
    }
}

/// The bit of a pool's entry that says that it was expanded.
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

fn room(m: usize, layer: usize) -> usize {
    if layer == 0 { 2 * m } else { m }
}

impl Graph {
    /// Without links, to be built.
    pub fn new(counts: Vec<usize>, m: usize, place: Place<'_>) -> io::Result<Graph> {
        let words = |(layer, count): (usize, &usize)| Ok(Words::Own(place.zeroed(count * room(m, layer) * 4)?));
        let layers = counts.iter().enumerate().map(words).collect::<io::Result<_>>()?;
        let nodes = counts.first().copied().unwrap_or(0);
        Ok(Graph { nodes, m, counts, layers, hot: OnceLock::new() })
    }

    /// Of lists that are there: for each layer as many as it has nodes. `None` if they aren't.
    pub fn of(counts: Vec<usize>, m: usize, layers: Vec<Words>) -> Option<Graph> {
        let fits = |(layer, (words, count)): (usize, (&Words, &usize))| words.get().len() == count * room(m, layer);
        let fit = layers.len() == counts.len() && layers.iter().zip(&counts).enumerate().all(fits);
        fit.then(|| Graph { nodes: counts.first().copied().unwrap_or(0), m, counts, layers, hot: OnceLock::new() })
    }

    /// Room of a list.
    pub fn room(&self, layer: usize) -> usize {
        room(self.m, layer)
    }

    /// All lists of a layer.
    #[inline]
    pub fn lists(&self, layer: usize) -> &[AtomicU32] {
        let hot = if layer == 0 { self.hot.get() } else { None };
        hot.or_else(|| self.layers.get(layer)).map_or(&[], Words::get)
    }

    /// A node's list in a layer; empty where it has none.
    #[inline]
    pub fn list(&self, layer: usize, node: u32) -> &[AtomicU32] {
        let room = self.room(layer);
        let start = node as usize * room;
        self.lists(layer).get(start..start + room).unwrap_or_default()
    }

    /// Neighbours; those that damaged bytes make up may not exist.
    #[inline]
    pub fn links<'a>(&'a self, layer: usize, node: u32) -> impl Iterator<Item = u32> + 'a {
        let words = self.list(layer, node).iter().map(|word| word.load(Ordering::Relaxed));
        words.take_while(|word| *word != 0).map(|word| word - 1)
    }

    /// Bytes of memory kept, mapped ones not counted.
    pub fn bytes(&self) -> usize {
        self.layers.iter().chain(self.hot.get()).map(Words::kept).sum()
    }

    /// Copies layer 0 to huge pages.
    pub fn warm(&self) {
        if let (None, Some(hot)) = (self.hot.get(), self.layers.first().and_then(Words::warmed)) {
            // Another thread may have done it meanwhile.
            let _ = self.hot.set(hot);
        }
    }

    /// From node 0 in the top layer down to `bottom` + 1, each time to the nearest node: its key and number.
    pub fn descend(
        &self,
        query: &impl Keys,
        bottom: usize,
        pool: &mut Pool,
        budget: &mut Budget<'_>,
    ) -> Result<(u32, u32), SearchError> {
        let Pool { batch, keys, .. } = pool;
        keys.resize(self.m.max(keys.len()), 0);
        let mut first = [0];
        query.keys(&[0], &mut first);
        budget.spend(1)?;
        let mut at = (first[0], 0);
        for layer in (bottom + 1..self.counts.len()).rev() {
            loop {
                batch.clear();
                batch.extend(self.links(layer, at.1).filter(|node| (*node as usize) < self.nodes));
                batch.iter().for_each(|node| query.ask(*node));
                query.keys(batch, keys);
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

    /// The nearest nodes of a layer that a walk from `start` finds are the pool's entries afterwards: those that the beam
    /// takes in, or the `k` nearest if these are more. It goes on from those alone (with a reach, Al-Jazzazi et al.'s
    /// distance-adaptive beam search, arXiv 2505.15636).
    pub fn walk<'p>(
        &self,
        query: &impl Keys,
        start: (u32, u32),
        Beam { layer, k, ef, reach }: Beam,
        pool: &'p mut Pool,
        budget: &mut Budget<'_>,
    ) -> Result<&'p [u64], SearchError> {
        let Pool { entries, batch, keys, marks, .. } = pool;
        let (lists, room) = (self.lists(layer), self.room(layer));
        marks.start(self.nodes);
        marks.meet(start.1);
        entries.clear();
        entries.push(entry(start.0, start.1));
        let (mut at, mut limit) = (0, u32::MAX);
        let goes_on = |at: usize, met: usize| at < met && (at < ef || met < k);
        while goes_on(at, entries.len()) {
            batch.clear();
            let mut next = at;
            for _ in 0..EXPANDED_TOGETHER {
                if !goes_on(next, entries.len()) {
                    break;
                }
                let current = &mut entries[next];
                *current |= EXPANDED;
                for link in list_of(lists, room, entry_node(*current)) {
                    let word = link.load(Ordering::Relaxed);
                    if word == 0 {
                        break;
                    }
                    if marks.meet(word - 1) {
                        batch.push(word - 1);
                        query.ask(word - 1);
                    }
                }
                budget.stats.hops += 1;
                while entries.get(next).is_some_and(|entry| entry & EXPANDED != 0) {
                    next += 1;
                }
            }
            budget.spend(batch.len() as u64)?;
            keys.resize(batch.len().max(keys.len()), 0);
            query.keys(batch, keys);
            let near = keys.iter().copied().zip(batch.iter().copied()).filter(|(key, _)| *key <= limit);
            at = offer_all(entries, ef.max(k), near, next, (lists, room));
            if reach < f32::INFINITY
                && let Some(kth) = entries.get(CALIBRATED_K - 1)
            {
                limit = query.within(reach, entry_key(*kth));
                while entries.last().is_some_and(|last| entry_key(*last) > limit) {
                    entries.pop();
                }
            }
        }
        Ok(entries)
    }

    /// The same as [`Graph::walk`] in layer 0 among the nodes that are `allowed`. Where few neighbours are, those of
    /// the others are looked at in their stead (ACORN-1, arXiv 2403.04871). It begins at those that
    /// [`Pool::look_around`] found.
    pub fn walk_allowed<'p>(
        &self,
        query: &impl Keys,
        allowed: &impl Fn(u32) -> bool,
        ef: usize,
        pool: &'p mut Pool,
        budget: &mut Budget<'_>,
    ) -> Result<&'p [u64], SearchError> {
        let Pool { entries, batch, keys, blocked, marks } = pool;
        let (lists, room) = (self.lists(0), self.room(0));
        let enough = room / ENOUGH;
        marks.start(self.nodes);
        batch.retain(|node| marks.meet(*node));
        entries.clear();
        let mut next = 0;
        loop {
            budget.spend(batch.len() as u64)?;
            keys.resize(batch.len().max(keys.len()), 0);
            query.keys(batch, keys);
            let near = keys.iter().copied().zip(batch.iter().copied());
            next = offer_all(entries, ef, near, next, (lists, room));
            batch.clear();
            let mut expanded = 0;
            while expanded < EXPANDED_TOGETHER {
                let Some(current) = entries.get_mut(next) else { break };
                *current |= EXPANDED;
                expanded += 1;
                let before = batch.len();
                let mut direct = 0;
                blocked.clear();
                for link in list_of(lists, room, entry_node(*current)) {
                    let word = link.load(Ordering::Relaxed);
                    if word == 0 {
                        break;
                    }
                    if allowed(word - 1) {
                        direct += 1;
                        if marks.meet(word - 1) {
                            batch.push(word - 1);
                            query.ask(word - 1);
                        }
                    } else if marks.meet(word - 1) {
                        blocked.push(word - 1);
                    }
                }
                if direct >= enough {
                    blocked.clear();
                }
                for through in asked_ahead(blocked, ASKED, |node| ask(list_of(lists, room, *node))) {
                    if batch.len() - before >= enough {
                        break;
                    }
                    for link in list_of(lists, room, *through) {
                        let word = link.load(Ordering::Relaxed);
                        if word == 0 {
                            break;
                        }
                        if allowed(word - 1) && marks.meet(word - 1) {
                            batch.push(word - 1);
                            query.ask(word - 1);
                        }
                    }
                    // A list that is looked through costs about what a distance does.
                    budget.spend(1)?;
                }
                budget.stats.hops += 1;
                while entries.get(next).is_some_and(|entry| entry & EXPANDED != 0) {
                    next += 1;
                }
            }
            if expanded == 0 {
                return Ok(entries);
            }
        }
    }

    /// Of `nodes`, each compared, what may be among the `k` nearest are the pool's entries afterwards: where keys don't
    /// tell how far they may be off, the `ef` nearest.
    pub fn scan(
        query: &impl Keys,
        nodes: &mut Nodes<'_>,
        (k, ef): (usize, usize),
        pool: &mut Pool,
        budget: &mut Budget<'_>,
    ) -> Result<(), SearchError> {
        let Pool { entries, batch, keys, .. } = pool;
        entries.clear();
        // Entries from here on are too far; how many there are before the next look at that.
        let (mut end, mut room) = (u64::MAX, 2 * ef.max(k) + SCANNED);
        let together = (SCANNED_BYTES / query.bytes().max(1)).clamp(1, SCANNED);
        while nodes.next(batch) {
            budget.spend(batch.len() as u64)?;
            keys.resize(SCANNED, 0);
            let mut later = batch.chunks(together).skip(1);
            for some in batch.chunks(together) {
                later.next().unwrap_or_default().iter().for_each(|node| query.ask(*node));
                query.keys(some, keys);
                entries.extend(keys.iter().zip(some).map(|(key, node)| entry(*key, *node)).filter(|new| *new < end));
                if entries.len() >= room {
                    end = nearest_of(entries, (k, ef), query);
                    // What stays may be much: no more than one look for each time that it doubles.
                    room = 2 * entries.len().max(ef).max(k) + SCANNED;
                }
            }
        }
        nearest_of(entries, (k, ef), query);
        entries.sort_unstable();
        Ok(())
    }
}

/// Drops what can't be among the `k` nearest; what comes later can't from the entry that is returned.
fn nearest_of(entries: &mut Vec<u64>, (k, ef): (usize, usize), query: &impl Keys) -> u64 {
    if entries.len() <= k {
        return u64::MAX;
    }
    let (_, kth, _) = entries.select_nth_unstable(k.saturating_sub(1));
    match query.not_beyond(entry_key(*kth)) {
        Some(limit) => {
            let end = entry(limit, MOST_NODES as u32);
            entries.retain(|old| *old <= end);
            end
        }
        None if entries.len() > ef.max(k) => {
            let (_, end, _) = entries.select_nth_unstable(ef.max(k));
            let end = *end;
            entries.truncate(ef.max(k));
            end
        }
        None => u64::MAX,
    }
}

/// Nodes to compare, some at a time.
pub(crate) enum Nodes<'a> {
    /// Those that pass, of those below the end.
    Passing(std::ops::Range<u32>, &'a dyn Fn(u32) -> bool),
    /// Those that are set, from a word on, of those below the end: bits behind it are nobody's.
    Set(&'a [u64], usize, u32),
}

impl Nodes<'_> {
    /// Replaces `batch` by the next nodes; false when there are none any more.
    pub fn next(&mut self, batch: &mut Vec<u32>) -> bool {
        const BATCH: usize = 256;
        batch.clear();
        match self {
            Nodes::Passing(range, passes) => batch.extend(range.filter(|node| passes(*node)).take(BATCH)),
            Nodes::Set(words, at, end) => {
                while let Some(word) = words.get(*at).filter(|_| batch.len() < BATCH) {
                    let mut left = *word;
                    while left != 0 {
                        let node = (*at * 64) as u32 + left.trailing_zeros();
                        left &= left - 1;
                        if node < *end {
                            batch.push(node);
                        }
                    }
                    *at += 1;
                }
            }
        }
        !batch.is_empty()
    }
}

/// Candidates whose links are read in one round of a walk: a round waits for memory twice, for links and for codes,
/// and two candidates wait together. More compare too many that are far; measured.
const EXPANDED_TOGETHER: usize = 2;
/// How much more than a walk a scan allows keys to be off by. The k-th of very many keys is one that rounding has made
/// too small, and the row that is looked for may be one that it has made too large; a walk compares few.
const FAR_OFF: f32 = 1.5;
/// Nodes that a scan compares at most while it asks for the next, and their bytes: processors wait for some thirty lines
/// at a time.
const SCANNED: usize = 16;
const SCANNED_BYTES: usize = 2048;
/// Lists asked for ahead of their use.
const ASKED: usize = 6;
/// A filtered walk that finds this part of a list's room allowed looks no further than the list.
const ENOUGH: usize = 2;

#[inline]
fn list_of(lists: &[AtomicU32], room: usize, node: u32) -> &[AtomicU32] {
    let start = node as usize * room;
    lists.get(start..start + room).unwrap_or_default()
}

#[inline]
fn ask(list: &[AtomicU32]) {
    prefetch_word(list, 0);
    prefetch_word(list, 16);
}

/// Puts a node where it belongs among the `ef` nearest; `None` if it doesn't.
#[inline]
fn offer(entries: &mut Vec<u64>, ef: usize, key: u32, node: u32) -> Option<usize> {
    let new = entry(key, node);
    if entries.len() >= ef {
        if entries.last().is_none_or(|last| new >= *last) {
            return None;
        }
        entries.pop();
    }
    let place = entries.partition_point(|old| *old < new);
    entries.insert(place, new);
    Some(place)
}

/// Offers nodes with their keys. All entries before `next` are expanded; returns the first that is not, and asks for
/// the links of what may well be expanded next.
#[inline]
fn offer_all(
    entries: &mut Vec<u64>,
    ef: usize,
    near: impl Iterator<Item = (u32, u32)>,
    mut next: usize,
    (lists, room): (&[AtomicU32], usize),
) -> usize {
    for (key, node) in near {
        let Some(place) = offer(entries, ef, key, node) else { continue };
        if place <= next {
            ask(list_of(lists, room, node));
        }
        next = next.min(place);
    }
    while entries.get(next).is_some_and(|entry| entry & EXPANDED != 0) {
        next += 1;
    }
    next
}

/// Links a node of `level` into the layers below `self.counts.len()`; callers hold nothing.
pub(crate) struct Linker<'a> {
    pub graph: &'a Graph,
    /// Of bytes.
    pub coder: &'a Coder,
    pub codes: &'a [u8],
    pub locks: &'a [std::sync::Mutex<()>],
    pub ef: usize,
}

/// What a linking thread needs.
#[derive(Default)]
pub(crate) struct Bench {
    pub pool: Pool,
    query: CodedQuery,
    other: CodedQuery,
    sorted: Vec<(u32, u32)>,
    chosen: Vec<(u32, u32)>,
    ids: Vec<u32>,
    keys: Vec<u32>,
}

impl Linker<'_> {
    fn code(&self, node: u32) -> &[u8] {
        let stride = self.coder.stride();
        &self.codes[node as usize * stride..][..stride]
    }

    /// Node 0 is where walks begin and is linked by the others.
    pub fn link(&self, node: u32, level: usize, bench: &mut Bench) {
        let mut budget = Budget::unlimited();
        let mut query = std::mem::take(&mut bench.query);
        self.coder.query_of(self.code(node), &mut query);
        let coded = Coded { query: &query, codes: self.codes, stride: self.coder.stride() };
        if let Ok(mut start) = self.graph.descend(&coded, level, &mut bench.pool, &mut budget) {
            for layer in (0..=level.min(self.graph.counts.len() - 1)).rev() {
                let walked = self.graph.walk(&coded, start, Beam::of(layer, 0, self.ef), &mut bench.pool, &mut budget);
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
                other.keys(self.codes, some, keys);
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
        bench.other.keys(self.codes, ids, &mut bench.keys);
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
