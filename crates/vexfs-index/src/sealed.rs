//! The sealed form: an immutable graph over bytes that stay where they are.
//!
//! The graph and the codes are copied to huge pages when a file is opened, and every link is checked then; the full
//! vectors stay where they are, mapped.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use crate::build::M;
use crate::codes::Coder;
use crate::graph::{Graph, MOST_NODES, entry_key, entry_node};
use crate::hnsw::{MAX_LAYER, descend, walk_layer};
use crate::kernels::{Prepared, prefetch};
use crate::request::{Budget, Candidate, deliver, keep, scan};
use crate::{Effort, Index, Memory, Neighbor, Region, Request, Scratch, SearchError, Slot, Space, Stats};

/// First bytes of the graph section.
pub(crate) const MAGIC: u32 = 0x4752_4832;
/// Offsets in the graph section's header, all u32 little-endian.
pub(crate) mod header {
    pub const MAGIC: usize = 0;
    /// Links of a node in the upper layers.
    pub const M: usize = 4;
    pub const NODES: usize = 8;
    /// Layers; 0 in a graph that is not walked because an exact scan is as good.
    pub const LAYERS: usize = 12;
    /// Bytes of the coder that follow the header; u32::MAX where rows are walked themselves.
    pub const CODER: usize = 16;
    /// [`super::TARGETS`] values of ef, by recall.
    pub const EF: usize = 20;
    /// [`super::MAX_LAYER`] + 1 counts of nodes, by layer.
    pub const COUNTS: usize = 52;
    /// Bytes of the header.
    pub const SIZE: usize = COUNTS + (super::MAX_LAYER + 1) * 4;
}
/// Recalls that a graph is calibrated for.
pub(crate) const TARGETS: [f32; 8] = [0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999];

/// Bytes that are no sealed index.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a sealed index: {0}")]
pub struct FormatError(pub(crate) &'static str);

/// See the module.
pub struct Sealed {
    space: Space,
    pub(crate) vectors: Region,
    nodes: usize,
    /// `None` where an exact scan is as good.
    graph: Option<Graph>,
    coder: Option<Coder>,
    ef: [u32; TARGETS.len()],
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..at + 4) {
        Some(b) => u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        None => 0,
    }
}

impl Sealed {
    /// Opens sections that [`crate::build`] made. Any bytes give an index or an error.
    pub fn open(space: Space, vectors: Region, codes: Region, graph: Region) -> Result<Sealed, FormatError> {
        let bytes = graph.bytes();
        if bytes.len() < header::SIZE || u32_at(bytes, header::MAGIC) != MAGIC {
            return Err(FormatError("no graph header"));
        }
        let nodes = u32_at(bytes, header::NODES) as usize;
        let m = u32_at(bytes, header::M) as usize;
        let layers = u32_at(bytes, header::LAYERS) as usize;
        let rows = vectors.bytes();
        if nodes.checked_mul(space.row_bytes()) != Some(rows.len()) {
            return Err(FormatError("vectors of another length"));
        }
        if !M.contains(&m) || layers > MAX_LAYER + 1 || (layers > 0 && nodes > MOST_NODES) {
            return Err(FormatError("impossible parameters"));
        }
        let (coder, mut at) = match u32_at(bytes, header::CODER) {
            u32::MAX => (None, header::SIZE),
            len => {
                let end = header::SIZE + len as usize;
                let stored = bytes.get(header::SIZE..end).ok_or(FormatError("no coder"))?;
                let coder = Coder::from_bytes(&space, stored).ok_or(FormatError("not this space's coder"))?;
                (Some(coder), end)
            }
        };
        let stride = if coder.is_some() && layers > 0 { Coder::stride(&space) } else { 0 };
        let stored = coder.as_ref().is_some_and(|coder| !coder.is_exact());
        if Some(codes.bytes().len()) != nodes.checked_mul(if stored { stride } else { 0 }) {
            return Err(FormatError("codes of another length"));
        }
        let mut counts: Vec<usize> = Vec::new();
        let mut length = at;
        for layer in 0..layers {
            let count = u32_at(bytes, header::COUNTS + layer * 4) as usize;
            let within = counts.last().map_or(count == nodes, |below| count <= *below);
            if !within || count == 0 {
                return Err(FormatError("layers that don't lie in each other"));
            }
            counts.push(count);
            let words = count.checked_mul(if layer == 0 { 2 * m } else { m });
            let end = words.and_then(|words| length.checked_add(words.checked_mul(4)?));
            length = end.ok_or(FormatError("too large"))?;
        }
        if length != bytes.len() {
            return Err(FormatError("layers of another length"));
        }
        let mut ef = [0; TARGETS.len()];
        for (n, ef) in ef.iter_mut().enumerate() {
            *ef = u32_at(bytes, header::EF + n * 4).clamp(1, 1 << 20);
        }
        if layers == 0 {
            return Ok(Sealed { space, vectors, nodes, graph: None, coder, ef });
        }
        // From here on the lengths are the file's own, so no damage can ask for more memory than it has bytes.
        let mut hot = Graph::new(counts, m, stride).ok_or(FormatError("no memory for the graph"))?;
        for layer in 0..layers {
            let limit = hot.counts[layer] as u32;
            let words = hot.lists(layer);
            for (word, id) in words.iter().zip(bytes[at..].as_chunks::<4>().0) {
                let id = u32::from_le_bytes(*id);
                if id > limit {
                    return Err(FormatError("a link to nowhere"));
                }
                word.store(id, Ordering::Relaxed);
            }
            at += words.len() * 4;
        }
        match &coder {
            Some(coder) if coder.is_exact() => {
                let size = space.row_bytes();
                let mut values = Vec::new();
                for (row, code) in rows.chunks_exact(size).zip(hot.codes.bytes_mut().chunks_exact_mut(stride)) {
                    coder.encode(row, &mut values, code);
                }
            }
            Some(_) => hot.codes.bytes_mut().copy_from_slice(codes.bytes()),
            None => {}
        }
        Ok(Sealed { space, vectors, nodes, graph: Some(hot), coder, ef })
    }

    /// Candidates to keep; `None`: only an exact scan will do.
    fn ef(&self, request: &Request<'_>) -> Option<usize> {
        let ef = match request.effort {
            Effort::Ef(ef) => ef,
            Effort::Recall(recall) => {
                let known = TARGETS.iter().position(|target| *target >= recall)?;
                // Calibrated for 10 hits: more hits need as many more candidates.
                self.ef[known] as usize + request.k.saturating_sub(10)
            }
        };
        Some(ef.max(request.k).max(1))
    }

    /// The share of slots that the filter allows, as it says, or by asking it about some.
    fn share(&self, request: &Request<'_>) -> f32 {
        const ASKED: usize = 256;
        let Some(filter) = request.filter else {
            return 1.0;
        };
        filter.selectivity().unwrap_or_else(|| {
            let step = (self.nodes / ASKED).max(1);
            let asked = (0..self.nodes as u32).step_by(step);
            let all = asked.len().max(1);
            asked.filter(|slot| filter.allows(Slot(*slot))).count() as f32 / all as f32
        })
    }
}

/// What a walk looks at: the sealed index, or one that is being built.
pub(crate) struct Walker<'a> {
    pub space: &'a Space,
    pub graph: &'a Graph,
    /// `None` where rows are walked themselves.
    pub coder: Option<&'a Coder>,
    pub rows: &'a [u8],
    /// For each node its row, if they are not in order.
    pub order: Option<&'a [u32]>,
}

impl Walker<'_> {
    /// The row of the input that a node holds.
    pub fn input(&self, node: u32) -> u32 {
        self.order.map_or(node, |order| order[node as usize])
    }

    pub fn row(&self, node: u32) -> &[u8] {
        let size = self.space.row_bytes();
        &self.rows[self.input(node) as usize * size..][..size]
    }

    /// The `k` nearest that a walk with `ef` candidates finds, by their full vectors, into `scratch.best`.
    pub fn nearest(
        &self,
        query: &[f32],
        exact: &Prepared,
        k: usize,
        ef: usize,
        scratch: &mut Scratch,
        budget: &mut Budget,
    ) -> Result<(), SearchError> {
        let Some(coder) = self.coder else {
            return self.nearest_allowed(query, exact, (k, ef), &|_| true, scratch, budget);
        };
        scratch.best.clear();
        let Scratch { pool, marks, query: coded, values, best, sorted, .. } = scratch;
        let is_exact = coder.query(query, values, coded);
        let start = self.graph.descend(coded, 0, pool, budget)?;
        let entries = self.graph.walk(coded, start, (ef, 0), pool, marks, budget)?;
        let many = if is_exact { k } else { reranked(k) };
        let entries = &entries[..entries.len().min(many)];
        if is_exact {
            let hits = entries.iter().map(|e| Candidate { distance: entry_key(*e) as f32, node: entry_node(*e) });
            best.extend(hits);
            return Ok(());
        }
        sorted.clear();
        sorted.extend(entries.iter().map(|e| Candidate { distance: 0.0, node: entry_node(*e) }));
        self.rerank(exact, k, scratch, budget)
    }

    /// The same among those that are `allowed`; the walk goes through the others.
    pub fn nearest_allowed(
        &self,
        query: &[f32],
        exact: &Prepared,
        (k, ef): (usize, usize),
        allowed: &impl Fn(u32) -> bool,
        scratch: &mut Scratch,
        budget: &mut Budget,
    ) -> Result<(), SearchError> {
        let top = self.graph.counts.len() - 1;
        match self.coder {
            Some(coder) => {
                let mut coded = std::mem::take(&mut scratch.query);
                coder.query(query, &mut scratch.values, &mut coded);
                let distance = |node: u32| {
                    let mut key = [0];
                    coded.keys(self.graph.codes.bytes(), &[node], &mut key);
                    key[0] as f32
                };
                let start = descend(self.graph, &distance, 0, (top, 0), &mut scratch.links, budget)
                    .and_then(|start| walk_layer(self.graph, &distance, allowed, start, (ef, 0), scratch, budget));
                scratch.query = coded;
                start?;
            }
            None => {
                let distance = |node: u32| exact.distance(self.row(node));
                let start = descend(self.graph, &distance, 0, (top, 0), &mut scratch.links, budget)?;
                walk_layer(self.graph, &distance, allowed, start, (ef, 0), scratch, budget)?;
            }
        }
        let Scratch { best, sorted, .. } = scratch;
        sorted.clear();
        sorted.extend(best.drain());
        sorted.sort_unstable();
        sorted.truncate(reranked(k));
        self.rerank(exact, k, scratch, budget)
    }

    /// The `k` nearest of `scratch.sorted` by their full vectors.
    fn rerank(
        &self,
        exact: &Prepared,
        k: usize,
        scratch: &mut Scratch,
        budget: &mut Budget,
    ) -> Result<(), SearchError> {
        let Scratch { best, sorted, .. } = scratch;
        let size = self.space.row_bytes();
        let ask = |candidate: &Candidate| {
            let start = self.input(candidate.node) as usize * size;
            (0..size.min(1024)).step_by(64).for_each(|at| prefetch(self.rows, start + at));
        };
        sorted.iter().take(3).for_each(ask);
        budget.spend(sorted.len() as u64)?;
        for (n, candidate) in sorted.iter().enumerate() {
            if let Some(later) = sorted.get(n + 3) {
                ask(later);
            }
            let distance = exact.distance(self.row(candidate.node));
            keep(best, k, Candidate { distance, node: candidate.node });
        }
        Ok(())
    }
}

/// Candidates that are ranked by their full vectors: codes misjudge by little, so what lies far behind the k-th can't
/// come before it.
fn reranked(k: usize) -> usize {
    k + k / 2 + 10
}

impl Index for Sealed {
    fn space(&self) -> &Space {
        &self.space
    }

    fn len(&self) -> usize {
        self.nodes
    }

    fn row(&self, slot: Slot) -> &[u8] {
        let size = self.space.row_bytes();
        &self.vectors.bytes()[slot.0 as usize * size..][..size]
    }

    fn search(
        &self,
        query: &[f32],
        request: &Request<'_>,
        scratch: &mut Scratch,
        out: &mut Vec<Neighbor>,
    ) -> Result<Stats, SearchError> {
        let prepared = Prepared::new(&self.space, query);
        let mut budget = Budget::new(request);
        scratch.best.clear();
        if let (Some(graph), Some(ef), false) = (&self.graph, self.ef(request), request.exact) {
            let walker = Walker {
                space: &self.space,
                graph,
                coder: self.coder.as_ref(),
                rows: self.vectors.bytes(),
                order: None,
            };
            if request.filter.is_none() {
                walker.nearest(query, &prepared, request.k, ef, scratch, &mut budget)?;
            } else {
                // What an exact scan of what is allowed costs, in distances, and what a walk is expected to.
                let share = self.share(request);
                let scan = 2.0 * share * self.nodes as f32 + self.nodes as f32 / 16.0;
                let walk = 16.0 * ef as f32 / share.max(1e-6);
                if walk < scan {
                    // A filter that allows what lies far from the query makes walks long: no longer than the scan.
                    budget.give_up_after(scan as u64);
                    let (asked, passed) = (Cell::new(0u32), Cell::new(0u32));
                    let accept = |node: u32| {
                        let allowed = request.allows(node);
                        asked.set(asked.get() + 1);
                        passed.set(passed.get() + u32::from(allowed));
                        allowed
                    };
                    match walker.nearest_allowed(query, &prepared, (request.k, ef), &accept, scratch, &mut budget) {
                        Err(SearchError::WorkLimit) if budget.gave_up() => scratch.best.clear(),
                        other => other?,
                    }
                    // Much less allowed around the query than elsewhere: what is nearest may lie where the walk
                    // never came, so only the scan is sure.
                    if (passed.get() as f32) < 0.5 * share * asked.get() as f32 {
                        scratch.best.clear();
                    }
                    budget.go_on();
                }
            }
        }
        if scratch.best.len() < request.k.min(self.nodes) {
            // No walk, or one that didn't find enough of what the filter allows.
            scratch.best.clear();
            let distance = |node: u32| prepared.distance(self.row(Slot(node)));
            scan(0..self.nodes as u32, distance, request, &mut budget, &mut scratch.best)?;
        }
        deliver(&mut scratch.best, request, out);
        Ok(budget.stats)
    }

    fn memory(&self) -> Memory {
        Memory {
            index: self.graph.as_ref().map_or(0, |graph| graph.bytes() as u64),
            vectors: self.vectors.bytes().len() as u64,
        }
    }
}
