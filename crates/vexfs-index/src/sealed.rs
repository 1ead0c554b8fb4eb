//! The sealed form: an immutable graph, searched where it lies, in mapped bytes.
//!
//! Nodes are numbered by level, highest first, so a layer's links need no table: layer `l` is an array of the first
//! `count[l]` nodes. Layer 0 and the codes are arrays of fixed stride. Every id is checked at open, so a walk indexes
//! without doubt.

use crate::codes::{CodedQuery, Coder, prefetch_record};
use crate::hnsw::{MAX_LAYER, Walk, descend, walk_layer};
use crate::kernels::Prepared;
use crate::request::{Budget, Candidate, deliver, keep, scan};
use crate::{Effort, Index, Memory, Neighbor, Region, Request, Scratch, SearchError, Slot, Space, Stats};

/// A filter that passes less than this share is answered by an exact scan of what it passes.
const SCAN_SELECTIVITY: f32 = 0.02;
/// First bytes of the graph section.
pub(crate) const MAGIC: u32 = 0x4752_4831;
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
    vectors: Region,
    codes: Region,
    graph: Region,
    nodes: usize,
    m: usize,
    /// Nodes of each layer; empty where there is no graph.
    counts: Vec<usize>,
    /// Where each layer's links begin in the graph section.
    starts: Vec<usize>,
    coder: Option<Coder>,
    ef: [u32; TARGETS.len()],
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
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
        if nodes.checked_mul(space.row_bytes()) != Some(vectors.bytes().len()) {
            return Err(FormatError("vectors of another length"));
        }
        if m > 1024 || layers > MAX_LAYER + 1 {
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
        let coded = if coder.is_some() { nodes * Coder::stride(&space) } else { 0 };
        if codes.bytes().len() != coded {
            return Err(FormatError("codes of another length"));
        }
        let mut counts = Vec::new();
        let mut starts = Vec::new();
        for layer in 0..layers {
            let count = u32_at(bytes, header::COUNTS + layer * 4) as usize;
            let within = counts.last().map_or(count == nodes, |below| count <= *below);
            if !within || count == 0 {
                return Err(FormatError("layers that don't lie in each other"));
            }
            let stride = stride(m, layer);
            let len = count.checked_mul(stride).ok_or(FormatError("too large"))?;
            let links = bytes.get(at..).and_then(|rest| rest.get(..len)).ok_or(FormatError("truncated"))?;
            for list in links.chunks_exact(stride) {
                let degree = u32_at(list, 0) as usize;
                let ids = list[4..].as_chunks::<4>().0;
                let known = |id: &[u8; 4]| (u32::from_le_bytes(*id) as usize) < count;
                if degree > ids.len() || !ids[..degree].iter().all(known) {
                    return Err(FormatError("a link to nowhere"));
                }
            }
            counts.push(count);
            starts.push(at);
            at += len;
        }
        if at != bytes.len() {
            return Err(FormatError("bytes after the last layer"));
        }
        let mut ef = [0; TARGETS.len()];
        for (n, ef) in ef.iter_mut().enumerate() {
            *ef = u32_at(bytes, header::EF + n * 4);
        }
        Ok(Sealed { space, vectors, codes, graph, nodes, m, counts, starts, coder, ef })
    }

    /// Candidates to keep; `None`: only an exact scan will do.
    fn ef(&self, request: &Request<'_>) -> Option<usize> {
        let ef = match request.effort {
            Effort::Ef(ef) => ef,
            Effort::Recall(recall) => {
                let known = TARGETS.iter().position(|target| *target >= recall)?;
                // Calibrated for 10 hits: more hits need as many more candidates.
                (self.ef[known] as usize).max(1) + request.k.saturating_sub(10)
            }
        };
        Some(ef.max(request.k))
    }

    fn exact(&self, query: &Prepared, node: u32) -> f32 {
        query.distance(self.row(Slot(node)))
    }
}

/// Bytes of a node's links in a layer: a count and room.
pub(crate) fn stride(m: usize, layer: usize) -> usize {
    4 + 4 * if layer == 0 { 2 * m } else { m }
}

/// The walk's view: distances by codes, or by rows.
struct View<'a> {
    index: &'a Sealed,
    graph: &'a [u8],
    data: &'a [u8],
    record: usize,
}

impl Walk for View<'_> {
    fn nodes(&self) -> usize {
        self.index.nodes
    }

    fn neighbours(&self, node: u32, layer: usize, out: &mut Vec<u32>) {
        out.clear();
        let stride = stride(self.index.m, layer);
        let start = self.index.starts[layer] + node as usize * stride;
        let list = &self.graph[start..start + stride];
        let degree = u32_at(list, 0) as usize;
        out.extend(list[4..4 + degree * 4].as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)));
    }

    fn prefetch(&self, node: u32) {
        prefetch_record(self.data, node as usize * self.record, self.record);
    }
}

enum Estimate {
    Codes(CodedQuery),
    Rows,
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
        let selective = request.filter.and_then(|f| f.selectivity()).is_some_and(|share| share < SCAN_SELECTIVITY);
        let ef = self.ef(request).filter(|_| !request.exact && !selective && !self.counts.is_empty());
        scratch.best.clear();
        let accept = |node: u32| request.allows(node);
        if let Some(ef) = ef {
            let estimate = match &self.coder {
                Some(coder) => Estimate::Codes(coder.query(query)),
                None => Estimate::Rows,
            };
            let (data, record) = match &estimate {
                Estimate::Codes(_) => (self.codes.bytes(), Coder::stride(&self.space)),
                Estimate::Rows => (self.vectors.bytes(), self.space.row_bytes()),
            };
            let view = View { index: self, graph: self.graph.bytes(), data, record };
            let at = |node: u32| &data[node as usize * record..][..record];
            let top = self.counts.len() - 1;
            match &estimate {
                Estimate::Codes(query) => {
                    let distance = |node: u32| query.distance(at(node));
                    let start = descend(&view, &distance, 0, (top, 0), &mut scratch.links, &mut budget)?;
                    walk_layer(&view, &distance, &accept, start, (ef, 0), scratch, &mut budget)?;
                }
                Estimate::Rows => {
                    let distance = |node: u32| prepared.distance(at(node));
                    let start = descend(&view, &distance, 0, (top, 0), &mut scratch.links, &mut budget)?;
                    walk_layer(&view, &distance, &accept, start, (ef, 0), scratch, &mut budget)?;
                }
            }
            if matches!(estimate, Estimate::Codes(_)) {
                self.rerank(&prepared, request.k, scratch, &mut budget)?;
            }
        }
        if scratch.best.len() < request.k.min(self.nodes) {
            // No walk, or one that didn't find enough of what the filter allows.
            scratch.best.clear();
            let distance = |node: u32| self.exact(&prepared, node);
            scan(0..self.nodes as u32, distance, request, &mut budget, &mut scratch.best)?;
        }
        while scratch.best.len() > request.k {
            scratch.best.pop();
        }
        deliver(&mut scratch.best, request, out);
        Ok(budget.stats)
    }

    fn memory(&self) -> Memory {
        Memory {
            index: (self.graph.bytes().len() + self.codes.bytes().len()) as u64,
            vectors: self.vectors.bytes().len() as u64,
        }
    }
}

impl Sealed {
    /// Ranks the walk's best by their full vectors.
    fn rerank(
        &self,
        query: &Prepared,
        k: usize,
        scratch: &mut Scratch,
        budget: &mut Budget,
    ) -> Result<(), SearchError> {
        let Scratch { best, sorted, .. } = scratch;
        sorted.clear();
        sorted.extend(best.drain());
        sorted.sort_unstable();
        // Codes misjudge by little: what lies far behind the k-th can't come before it.
        sorted.truncate((2 * k).max(k + 20));
        let size = self.space.row_bytes();
        for candidate in sorted.iter() {
            prefetch_record(self.vectors.bytes(), candidate.node as usize * size, size.min(256));
        }
        budget.spend(sorted.len() as u64)?;
        for candidate in sorted.iter() {
            keep(best, k, Candidate { distance: self.exact(query, candidate.node), node: candidate.node });
        }
        Ok(())
    }
}
