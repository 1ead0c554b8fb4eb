//! From rows to a sealed index: link in parallel, calibrate, number for locality, write flat.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::codes::{CodedQuery, Coder, prefetch_record};
use crate::hnsw::{Entry, Growing, Links, MAX_LAYER, Walk, descend, insert, level, walk_layer};
use crate::kernels::{Prepared, between};
use crate::request::{Budget, Candidate, Scratch, keep};
use crate::sealed::{MAGIC, TARGETS, header, stride};
use crate::space::{Element, Quantization};
use crate::{Params, Space};

/// Fewer rows get no graph: an exact scan of them is as fast as a walk and never misses.
const GRAPH_FROM: usize = 1_000;
/// Rows that are kept out until the graph has been calibrated with them.
const HELD_OUT: usize = 200;
/// Hits that recall is measured over.
const CALIBRATED_K: usize = 10;
/// Times that nodes which were cut off are looked for.
const CONNECT_ROUNDS: usize = 8;
/// Values of ef that are tried, smallest first.
const EFS: [u32; 16] = [10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096];

/// A sealed index as bytes, for [`crate::Sealed::open`].
pub struct Sections {
    /// For each slot the row of the input that it holds.
    pub order: Vec<u32>,
    /// Rows in slot order.
    pub vectors: Vec<u8>,
    /// Codes in slot order; empty where rows are walked themselves.
    pub codes: Vec<u8>,
    /// Header, coder, links.
    pub graph: Vec<u8>,
}

/// Builds over whole `rows` with so many `threads`. `None` if `stop` was set meanwhile.
pub fn build(space: &Space, rows: &[u8], params: &Params, threads: usize, stop: &AtomicBool) -> Option<Sections> {
    let nodes = rows.len() / space.row_bytes();
    if nodes < GRAPH_FROM {
        return Some(Sections {
            order: (0..nodes as u32).collect(),
            vectors: rows[..nodes * space.row_bytes()].to_vec(),
            codes: Vec::new(),
            graph: head(params.m, nodes, &[], None, [0; TARGETS.len()]),
        });
    }
    let coded = matches!(space.element(), Element::F32 | Element::F16) && params.quantization == Quantization::Sq8;
    let coder = coded.then(|| Coder::fit(space, rows));
    let mut codes = Vec::new();
    if let Some(coder) = &coder {
        codes.reserve_exact(nodes * Coder::stride(space));
        for row in rows.chunks_exact(space.row_bytes()) {
            coder.encode(row, &mut codes);
        }
    }
    let levels: Vec<u8> = (0..nodes as u32).map(|node| level(params.seed, node, params.m) as u8).collect();
    let links = levels.iter().map(|level| Links::new(params.m, usize::from(*level))).collect();
    let builder = Builder { space, params, rows, coder: coder.as_ref(), codes: &codes, links, entry: Entry::default() };

    let step = (nodes / HELD_OUT.min(nodes / 20)).max(1);
    let held_out = |node: &u32| (*node as usize) % step == step / 2;
    let (last, first): (Vec<u32>, Vec<u32>) = (0..nodes as u32).partition(held_out);
    builder.link(&first, &levels, threads, stop);
    if stop.load(Ordering::Acquire) {
        return None;
    }
    let ef = builder.calibrate(&last, &first, threads);
    builder.link(&last, &levels, threads, stop);
    if stop.load(Ordering::Acquire) {
        return None;
    }
    builder.connect();
    Some(builder.write(&levels, ef))
}

struct Builder<'a> {
    space: &'a Space,
    params: &'a Params,
    rows: &'a [u8],
    coder: Option<&'a Coder>,
    codes: &'a [u8],
    links: Vec<Links>,
    entry: Entry,
}

impl Walk for Builder<'_> {
    fn nodes(&self) -> usize {
        self.links.len()
    }

    fn neighbours(&self, node: u32, layer: usize, out: &mut Vec<u32>) {
        self.links[node as usize].read(self.params.m, layer, out);
    }

    fn prefetch(&self, node: u32) {
        match self.coder {
            Some(_) => {
                let record = Coder::stride(self.space);
                prefetch_record(self.codes, node as usize * record, record);
            }
            None => prefetch_record(self.rows, node as usize * self.space.row_bytes(), self.space.row_bytes()),
        }
    }
}

impl Growing for Builder<'_> {
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
        self.links.get(node as usize)
    }
    fn between(&self, one: u32, other: u32) -> f32 {
        match self.coder {
            Some(_) => Coder::between(self.space, self.code(one), self.code(other)),
            None => between(self.space, self.row(one), self.row(other)),
        }
    }
}

impl Builder<'_> {
    fn row(&self, node: u32) -> &[u8] {
        let size = self.space.row_bytes();
        &self.rows[node as usize * size..][..size]
    }

    fn code(&self, node: u32) -> &[u8] {
        let size = Coder::stride(self.space);
        &self.codes[node as usize * size..][..size]
    }

    fn link(&self, nodes: &[u32], levels: &[u8], threads: usize, stop: &AtomicBool) {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut scratch = Scratch::default();
            while let Some(node) = nodes.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let level = usize::from(levels[*node as usize]);
                match self.coder {
                    Some(coder) => {
                        let query = coder.query_of(self.code(*node));
                        insert(self, *node, level, &|other| query.distance(self.code(other)), &mut scratch);
                    }
                    None => {
                        let row = self.row(*node);
                        let distance = |other| between(self.space, row, self.row(other));
                        insert(self, *node, level, &distance, &mut scratch);
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.max(1) {
                scope.spawn(work);
            }
            work();
        });
    }

    /// For each target the smallest ef that reaches it on rows that are not in the graph yet; the largest tried
    /// where none does.
    fn calibrate(&self, queries: &[u32], linked: &[u32], threads: usize) -> [u32; TARGETS.len()] {
        let next = AtomicUsize::new(0);
        let found = (0..EFS.len()).map(|_| AtomicUsize::new(0)).collect::<Vec<_>>();
        let work = || {
            let mut scratch = Scratch::default();
            let mut numbers = Vec::new();
            while let Some(node) = queries.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.space.decode(self.row(*node), &mut numbers);
                let exact = Prepared::new(self.space, &numbers);
                let coded = self.coder.map(|coder| coder.query(&numbers));
                let mut truth = BinaryHeap::new();
                for other in linked {
                    let distance = exact.distance(self.row(*other));
                    keep(&mut truth, CALIBRATED_K, Candidate { distance, node: *other });
                }
                // Equally far is equally right.
                let limit = truth.peek().map_or(f32::INFINITY, |farthest| farthest.distance);
                for (n, ef) in EFS.iter().enumerate() {
                    let hits = self.probe(&exact, coded.as_ref(), *ef as usize, &mut scratch);
                    let right = hits.iter().filter(|hit| hit.distance <= limit).count().min(CALIBRATED_K);
                    found[n].fetch_add(right, Ordering::Relaxed);
                    if right == CALIBRATED_K {
                        // What more candidates find is no less.
                        for more in &found[n + 1..] {
                            more.fetch_add(right, Ordering::Relaxed);
                        }
                        break;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.max(1) {
                scope.spawn(work);
            }
            work();
        });
        let all = (queries.len() * CALIBRATED_K).max(1) as f32;
        TARGETS.map(|target| {
            let reached = |found: &AtomicUsize| found.load(Ordering::Relaxed) as f32 / all >= target;
            EFS[found.iter().position(reached).unwrap_or(EFS.len() - 1)]
        })
    }

    /// What a search with this ef would answer.
    fn probe(&self, exact: &Prepared, coded: Option<&CodedQuery>, ef: usize, scratch: &mut Scratch) -> Vec<Candidate> {
        let mut budget = Budget::unlimited();
        let distance = |node: u32| match coded {
            Some(query) => query.distance(self.code(node)),
            None => exact.distance(self.row(node)),
        };
        let Some((entry, top)) = self.entry.get() else { return Vec::new() };
        let Ok(start) = descend(self, &distance, entry, (top, 0), &mut scratch.links, &mut budget) else {
            return Vec::new();
        };
        if walk_layer(self, &distance, &|_| true, start, (ef, 0), scratch, &mut budget).is_err() {
            return Vec::new();
        }
        let mut hits: Vec<Candidate> = scratch.best.drain().collect();
        hits.sort_unstable();
        hits.truncate(CALIBRATED_K + 20);
        hits.iter_mut().for_each(|hit| hit.distance = exact.distance(self.row(hit.node)));
        hits.sort_unstable();
        hits.truncate(CALIBRATED_K);
        hits
    }

    /// Gives every node that a walk in layer 0 can't reach from the entry a link from one that it can: choosing
    /// neighbours may have taken a node's last one away, and then no effort would find it.
    fn connect(&self) {
        let Some((entry, _)) = self.entry.get() else { return };
        let mut links = Vec::new();
        // Replacing a link may cut another node off, so look again; it ends where nothing is cut off any more.
        for _ in 0..CONNECT_ROUNDS {
            let mut met = vec![false; self.links.len()];
            let mut degree = vec![0u32; self.links.len()];
            let mut queue = vec![entry];
            met[entry as usize] = true;
            while let Some(node) = queue.pop() {
                self.neighbours(node, 0, &mut links);
                for other in &links {
                    degree[*other as usize] += 1;
                    if !std::mem::replace(&mut met[*other as usize], true) {
                        queue.push(*other);
                    }
                }
            }
            let cut_off: Vec<u32> = (0..self.links.len() as u32).filter(|node| !met[*node as usize]).collect();
            if cut_off.is_empty() {
                return;
            }
            for node in cut_off {
                self.neighbours(node, 0, &mut links);
                let known = links.iter().copied().filter(|other| met[*other as usize]);
                let nearest =
                    known.min_by(|a, b| self.between(node, *a).total_cmp(&self.between(node, *b))).unwrap_or(entry);
                self.links[nearest as usize].adopt(self.params.m, node, &mut degree);
                met[node as usize] = true;
            }
        }
    }

    /// Nodes by level, highest first, and within a level as a walk from the entry meets them in layer 0: what is
    /// read together lies together.
    fn order(&self, levels: &[u8]) -> Vec<u32> {
        let nodes = self.links.len();
        let mut met = vec![false; nodes];
        let mut order: Vec<u32> = Vec::with_capacity(nodes);
        let mut links = Vec::new();
        let entry = self.entry.get().map_or(0, |(entry, _)| entry);
        // From the entry first; then from whatever that didn't reach.
        for start in std::iter::once(entry).chain(0..nodes as u32) {
            if std::mem::replace(&mut met[start as usize], true) {
                continue;
            }
            let mut at = order.len();
            order.push(start);
            while let Some(node) = order.get(at).copied() {
                at += 1;
                self.neighbours(node, 0, &mut links);
                for other in &links {
                    if !std::mem::replace(&mut met[*other as usize], true) {
                        order.push(*other);
                    }
                }
            }
        }
        // The entry is of the highest level and was met first, so it becomes node 0.
        order.sort_by_key(|node| Reverse(levels[*node as usize]));
        order
    }

    fn write(&self, levels: &[u8], ef: [u32; TARGETS.len()]) -> Sections {
        let order = self.order(levels);
        let mut place = vec![0u32; order.len()];
        for (slot, node) in order.iter().enumerate() {
            place[*node as usize] = slot as u32;
        }
        let top = usize::from(levels[order[0] as usize]);
        let counts: Vec<u32> = (0..=top)
            .map(|layer| order.iter().take_while(|node| usize::from(levels[**node as usize]) >= layer).count() as u32)
            .collect();
        let m = self.params.m;
        let mut graph = head(m, order.len(), &counts, self.coder, ef);
        let mut links = Vec::new();
        for (layer, count) in counts.iter().enumerate() {
            for node in &order[..*count as usize] {
                let end = graph.len() + stride(m, layer);
                self.neighbours(*node, layer, &mut links);
                graph.extend_from_slice(&(links.len() as u32).to_le_bytes());
                for other in &links {
                    graph.extend_from_slice(&place[*other as usize].to_le_bytes());
                }
                graph.resize(end, 0);
            }
        }
        let vectors = order.iter().flat_map(|node| self.row(*node)).copied().collect();
        let codes = match self.coder {
            Some(_) => order.iter().flat_map(|node| self.code(*node)).copied().collect(),
            None => Vec::new(),
        };
        Sections { order, vectors, codes, graph }
    }
}

/// The graph section's header and coder.
fn head(m: usize, nodes: usize, counts: &[u32], coder: Option<&Coder>, ef: [u32; TARGETS.len()]) -> Vec<u8> {
    let mut bytes = vec![0; header::SIZE];
    let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(header::MAGIC, MAGIC);
    put(header::M, m as u32);
    put(header::NODES, nodes as u32);
    put(header::LAYERS, counts.len() as u32);
    for (n, ef) in ef.iter().enumerate() {
        put(header::EF + n * 4, *ef);
    }
    for (layer, count) in counts.iter().enumerate().take(MAX_LAYER + 1) {
        put(header::COUNTS + layer * 4, *count);
    }
    match coder {
        Some(coder) => {
            let stored = coder.to_bytes();
            put(header::CODER, stored.len() as u32);
            bytes.extend_from_slice(&stored);
        }
        None => put(header::CODER, u32::MAX),
    }
    bytes
}
