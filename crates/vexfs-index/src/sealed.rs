//! A graph that is never changed, from mapped bytes: what was built, served where it lies.
//!
//! Opening reads a header and maps the rest; [`Sealed::warm`] copies what a walk reads at random places to huge pages,
//! at any time. The order of nodes, their codes and their links are the builder's (see `build.rs`). Lengths are
//! checked when it is opened, links when they are followed: no bytes can make a walk leave its memory.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::build::{GoOn, measure};
use crate::codes::{Coder, Keyed, Width, ordered, unordered};
use crate::graph::{Beam, Coded, Graph, Keys, MOST_NODES, Nodes, Pool, entry_key, entry_node};
use crate::hnsw::MAX_LAYER;
use crate::kernels::{Prepared, asked_ahead, bits, prefetch_row};
use crate::raw::{Huge, Words};
use crate::request::{Budget, Candidate, deliver, has_bit, keep, scan};
use crate::{
    Effort, Element, Filter, Index, Memory, Metric, Neighbor, Region, Request, Scratch, SearchError, Slot, Space, Stats,
};

/// First bytes of the graph section.
pub(crate) const MAGIC: u32 = 0x4752_4835;
/// Those of one whose header ends before [`header::REACH`]; still read.
pub(crate) const MAGIC_4: u32 = 0x4752_4834;
/// Those of one whose header ends before [`header::AMONG`]; still read.
pub(crate) const MAGIC_3: u32 = 0x4752_4833;
/// Offsets in the graph section's header, all u32 little-endian.
pub(crate) mod header {
    pub const MAGIC: usize = 0;
    /// Links of a node in the upper layers.
    pub const M: usize = 4;
    pub const NODES: usize = 8;
    /// Layers; 0 in a graph that is not walked because an exact scan is as good.
    pub const LAYERS: usize = 12;
    /// Width of codes: 0 a byte, 1 a nibble, 2 a sign; u32::MAX where rows are walked themselves.
    pub const WIDTH: usize = 16;
    /// Bytes of the coder that follow the header.
    pub const CODER: usize = 20;
    /// [`super::TARGETS`] values of ef, by recall.
    pub const EF: usize = 24;
    /// Recalls that these came to when the graph was built, f32.
    pub const RECALL: usize = EF + super::TARGETS.len() * 4;
    /// [`super::MAX_LAYER`] + 1 counts of nodes, by layer.
    pub const COUNTS: usize = RECALL + super::TARGETS.len() * 4;
    /// As [`EF`], for walks among what a filter allows: a tenth of all, then three hundredths.
    pub const AMONG: usize = COUNTS + (super::MAX_LAYER + 1) * 4;
    /// [`super::TARGETS`] values of reach, f32.
    pub const REACH: usize = AMONG + super::SHARES.len() * super::TARGETS.len() * 4;
    /// Bytes of the header.
    pub const SIZE: usize = REACH + super::TARGETS.len() * 4;
}
/// Recalls that a graph is calibrated for.
pub(crate) const TARGETS: [f32; 8] = [0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999];

/// What walks need for a recall of one of [`TARGETS`].
#[derive(Copy, Clone, Default)]
pub(crate) struct Calibrated {
    /// Candidates.
    pub ef: u32,
    /// How far a walk that is bounded by distance goes on (see [`Beam`]); infinite where `ef` bounds it.
    pub reach: f32,
    /// The recall that this came to.
    pub recall: f32,
    /// Candidates of a walk among what a filter allows, for each of [`SHARES`].
    pub among: [u32; SHARES.len()],
}

/// Parts that a filter allows for which walks are calibrated.
pub(crate) const SHARES: [f32; 2] = [0.1, 0.03];

/// For each of [`TARGETS`].
pub(crate) type Calibration = [Calibrated; TARGETS.len()];

/// Candidates of walks among the allowed where nothing was measured: paths among them are worse.
pub(crate) fn among_unmeasured(ef: u32) -> [u32; SHARES.len()] {
    [ef + ef / 4, 2 * ef + ef / 2]
}

/// Bytes that are no sealed index.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a sealed index: {0}")]
pub struct FormatError(pub(crate) &'static str);

/// See the module.
pub struct Sealed {
    space: Space,
    pub(crate) vectors: Region,
    codes: Region,
    nodes: usize,
    /// `None` where an exact scan is as good.
    pub(crate) graph: Option<Graph>,
    coder: Option<Coder>,
    /// Codes on huge pages.
    hot: OnceLock<Huge>,
    /// What its own rows need.
    pub(crate) calibration: Calibration,
    /// And what queries that were asked do: for each of [`TARGETS`] ef and the bits of a reach; 0 where nothing is known.
    learned: [AtomicU64; TARGETS.len()],
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..at + 4) {
        Some(b) => u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        None => 0,
    }
}

/// Are the rows' bytes, as they lie, what this coder makes of them?
pub(crate) fn rows_are_codes(space: &Space, coder: &Coder) -> bool {
    let as_they_lie = matches!(space.element(), Element::U8 | Element::Bits);
    coder.is_exact() && as_they_lie && coder.stride() == space.row_bytes()
}

impl Sealed {
    /// Opens sections that [`crate::build`] made. Any bytes give an index or an error.
    pub fn open(space: Space, vectors: Region, codes: Region, graph: Region) -> Result<Sealed, FormatError> {
        let bytes = graph.bytes();
        let size = match u32_at(bytes, header::MAGIC) {
            MAGIC => header::SIZE,
            MAGIC_4 => header::REACH,
            MAGIC_3 => header::AMONG,
            _ => return Err(FormatError("no graph header")),
        };
        if bytes.len() < size {
            return Err(FormatError("no graph header"));
        }
        let nodes = u32_at(bytes, header::NODES) as usize;
        let m = u32_at(bytes, header::M) as usize;
        let layers = u32_at(bytes, header::LAYERS) as usize;
        if nodes.checked_mul(space.row_bytes()) != Some(vectors.bytes().len()) {
            return Err(FormatError("vectors of another length"));
        }
        if !crate::build::M.contains(&m) || layers > MAX_LAYER + 1 || (layers > 0 && nodes > MOST_NODES) {
            return Err(FormatError("impossible parameters"));
        }
        let width = match u32_at(bytes, header::WIDTH) {
            u32::MAX => None,
            0 => Some(Width::Byte),
            1 => Some(Width::Nibble),
            2 => Some(Width::Sign),
            _ => return Err(FormatError("codes of an unknown width")),
        };
        let mut end = size + u32_at(bytes, header::CODER) as usize;
        let stored = bytes.get(size..end).ok_or(FormatError("no coder"))?;
        let coder = match width {
            Some(width) => Some(Coder::from_bytes(&space, width, stored).ok_or(FormatError("not this space's coder"))?),
            None if stored.is_empty() => None,
            None => return Err(FormatError("a coder without codes")),
        };
        let stride = match &coder {
            Some(coder) if layers > 0 && !rows_are_codes(&space, coder) => coder.stride(),
            _ => 0,
        };
        if nodes.checked_mul(stride) != Some(codes.bytes().len()) {
            return Err(FormatError("codes of another length"));
        }
        let mut counts: Vec<usize> = Vec::new();
        let mut lists = Vec::new();
        for layer in 0..layers {
            let count = u32_at(bytes, header::COUNTS + layer * 4) as usize;
            let within = counts.last().map_or(count == nodes, |below| count <= *below);
            if !within || count == 0 {
                return Err(FormatError("layers that don't lie in each other"));
            }
            counts.push(count);
            let start = end;
            let words = count.checked_mul(if layer == 0 { 2 * m } else { m });
            let next = words.and_then(|words| start.checked_add(words.checked_mul(4)?));
            end = next.ok_or(FormatError("too large"))?;
            lists.push(Words::mapped(&graph, start..end).ok_or(FormatError("layers of another length"))?);
        }
        if end != bytes.len() {
            return Err(FormatError("layers of another length"));
        }
        let mut calibration = Calibration::default();
        for (n, known) in calibration.iter_mut().enumerate() {
            let ef_at = |at: usize| u32_at(bytes, at + n * 4).clamp(1, 1 << 20);
            known.ef = ef_at(header::EF);
            known.recall = f32::from_bits(u32_at(bytes, header::RECALL + n * 4));
            known.reach = match f32::from_bits(u32_at(bytes, header::REACH + n * 4)) {
                reach if size > header::REACH && reach >= 1.0 => reach,
                _ => f32::INFINITY,
            };
            known.among = match size > header::AMONG {
                true => std::array::from_fn(|share| ef_at(header::AMONG + share * TARGETS.len() * 4)),
                false => among_unmeasured(known.ef),
            };
        }
        let graph = match layers {
            0 => None,
            _ => Some(Graph::of(counts, m, lists).ok_or(FormatError("layers of another length"))?),
        };
        let (hot, learned) = (OnceLock::new(), Default::default());
        Ok(Sealed { space, vectors, codes, nodes, graph, coder, hot, calibration, learned })
    }

    /// Copies what walks read at random places, codes and layer 0, to huge pages: worth a third of a search's time.
    /// Searches may go on meanwhile. [`Index::memory`] tells how much it is; without memory nothing changes.
    pub fn warm(&self) {
        let Some(graph) = &self.graph else { return };
        graph.warm();
        let codes = self.mapped_codes();
        if self.hot.get().is_none()
            && let Some(mut memory) = Huge::zeroed(codes.len())
        {
            memory.bytes_mut().copy_from_slice(codes);
            // Another thread may have done it meanwhile.
            let _ = self.hot.set(memory);
        }
    }

    /// Bytes that [`Sealed::warm`] copies.
    pub fn hot_bytes(&self) -> usize {
        self.graph.as_ref().map_or(0, |graph| graph.lists(0).len() * 4 + self.mapped_codes().len())
    }

    /// The row of a slot; empty where there is none.
    pub fn row(&self, slot: Slot) -> &[u8] {
        let size = self.space.row_bytes();
        self.vectors.bytes().get(slot.0 as usize * size..).and_then(|rows| rows.get(..size)).unwrap_or_default()
    }

    fn mapped_codes(&self) -> &[u8] {
        match &self.coder {
            Some(coder) if rows_are_codes(&self.space, coder) => self.vectors.bytes(),
            _ => self.codes.bytes(),
        }
    }

    /// The recall of 10 hits that effort for a recall of `target` came to when this was built, on rows that were held
    /// out; `None` where every search is exact.
    pub fn measured_recall(&self, target: f32) -> Option<f32> {
        self.graph.as_ref()?;
        Some(self.calibrated(target)?.recall)
    }

    /// What walks need for a recall of `target`; `None` where only an exact scan will do.
    fn calibrated(&self, target: f32) -> Option<Calibrated> {
        let n = TARGETS.iter().position(|known| *known >= target)?;
        let (rows, queries) = (self.calibration[n], self.learned[n].load(Ordering::Relaxed));
        let reach = rows.reach.max(f32::from_bits(queries as u32));
        let ef = with_learned(rows.ef as usize, (queries >> 32) as usize) as u32;
        Some(Calibrated { ef, reach, ..rows })
    }

    /// Candidates that a walk goes on from, fewer than are asked for where a recall needs no more; `None`: only an exact scan
    /// will do.
    pub(crate) fn ef(&self, request: &Request<'_>) -> Option<usize> {
        // A range has no k: how far a walk goes on is seen as it goes.
        let k = if request.max_distance.is_some() { request.k.min(CALIBRATED_K) } else { request.k };
        let ef = match request.effort {
            Effort::Ef(ef) => ef.max(k),
            Effort::Recall(recall) => {
                // More hits need as many more candidates.
                self.calibrated(recall)?.ef as usize + k.saturating_sub(CALIBRATED_K)
            }
        };
        Some(ef.max(1))
    }

    /// How an unfiltered search walks that would need `ef` candidates: bounded by their distances it may have some more
    /// (decision 18).
    pub(crate) fn unfiltered<'a>(&self, request: &Request<'_>, ef: usize) -> (usize, Plan<'a>) {
        let known = match request.effort {
            // For more hits the last one's distance would bound less than recall asks for.
            Effort::Recall(recall) if request.max_distance.is_none() && request.k <= CALIBRATED_K => {
                self.calibrated(recall)
            }
            _ => None,
        };
        match known.map_or(f32::INFINITY, |known| known.reach) {
            f32::INFINITY => (ef, Plan::All(f32::INFINITY)),
            reach => (ef * WIDEST, Plan::All(reach)),
        }
    }

    /// For each of [`SHARES`] as many candidates of a walk among the allowed as find what `ef` find without a filter.
    fn among(&self, ef: usize) -> [f32; SHARES.len()] {
        let known = self.calibration.iter().find(|known| known.ef as usize >= ef);
        let known = known.unwrap_or(&self.calibration[TARGETS.len() - 1]);
        known.among.map(|among| ef as f32 * among as f32 / known.ef.max(1) as f32)
    }

    /// The share of slots that the filter allows, as it says, or by asking it about some.
    fn share(&self, filter: &dyn Filter) -> f32 {
        const ASKED: usize = 256;
        if let Some(bits) = filter.bits() {
            return bits::best().set(bits) as f32 / self.nodes.max(1) as f32;
        }
        filter.selectivity().unwrap_or_else(|| {
            let step = (self.nodes / ASKED).max(1);
            let asked = (0..self.nodes as u32).step_by(step);
            let all = asked.len().max(1);
            asked.filter(|slot| filter.allows(Slot(*slot))).count() as f32 / all as f32
        })
    }

    pub(crate) fn walker<'a>(&'a self, graph: &'a Graph) -> Walker<'a> {
        Walker {
            space: &self.space,
            graph,
            coder: self.coder.as_ref(),
            codes: self.hot.get().map_or_else(|| self.mapped_codes(), Huge::bytes),
            rows: self.vectors.bytes(),
            order: None,
        }
    }
}

/// Hits that a graph is calibrated for.
pub(crate) const CALIBRATED_K: usize = 10;

/// What a walk looks at: the sealed index, or one that is being built.
pub(crate) struct Walker<'a> {
    pub space: &'a Space,
    pub graph: &'a Graph,
    /// `None` where rows are walked themselves.
    pub coder: Option<&'a Coder>,
    pub codes: &'a [u8],
    pub rows: &'a [u8],
    /// For each node its row, if they are not in order.
    pub order: Option<&'a [u32]>,
}

/// Which nodes are compared.
pub(crate) enum Plan<'a> {
    /// Those that a walk with this reach meets.
    All(f32),
    /// Those that a walk among the allowed meets.
    Allowed(Allowed<'a>),
    /// These.
    These(&'a mut Nodes<'a>),
}

/// A filter over nodes.
#[derive(Copy, Clone)]
pub(crate) enum Filtered<'a> {
    /// A bit each; those behind the end are not allowed.
    Bits(&'a [u64]),
    Asked(&'a dyn Fn(u32) -> bool),
}

/// What a filter allows. Of walks, nothing is found where what is near the query is allowed much less than elsewhere: what is
/// nearest then may lie anywhere.
pub(crate) struct Allowed<'a> {
    pub nodes: Filtered<'a>,
    /// The part that is allowed of all.
    pub share: f32,
    /// Candidates of a walk among them where they are one of [`SHARES`].
    pub efs: [f32; SHARES.len()],
}

impl Allowed<'_> {
    /// Candidates where so large a part is allowed: between those calibrated as a power of it.
    fn ef(&self, share: f32) -> f32 {
        let ([many, few], [least, most]) = (SHARES, self.efs);
        let towards_few = ((many / share).ln() / (many / few).ln()).clamp(0.0, 1.0);
        least * (most / least.max(1.0)).powf(towards_few)
    }
}

/// A query against rows themselves.
struct Rows<'a> {
    walker: &'a Walker<'a>,
    exact: &'a Prepared,
}

impl Keys for Rows<'_> {
    fn ask(&self, node: u32) {
        self.walker.ask(node);
    }
    fn bytes(&self) -> usize {
        self.walker.space.row_bytes()
    }
    fn keys(&self, nodes: &[u32], out: &mut [u32]) {
        for (node, out) in asked_ahead(nodes, ASKED, |node| self.walker.ask(*node)).zip(out) {
            *out = ordered(self.exact.distance(self.walker.row(*node)));
        }
    }
    fn not_beyond(&self, key: u32) -> Option<u32> {
        Some(key)
    }
    fn within(&self, reach: f32, key: u32) -> u32 {
        match self.walker.space.metric() {
            Metric::InnerProduct => u32::MAX,
            _ => ordered(unordered(key).max(0.0) * reach),
        }
    }
}

/// Candidates where rows need so many and queries that were asked others: no fewer than rows need. Who asks for what is
/// nowhere near must not slow down all others: no more than a thousand, or ten times what rows need.
pub(crate) fn with_learned(rows: usize, queries: usize) -> usize {
    rows.max(queries.min((10 * rows).max(1_000)))
}

/// How many times as many candidates as are needed on average a hard query gets.
pub(crate) const WIDEST: usize = 4;
/// Rows asked for ahead of their use.
const ASKED: usize = 3;
/// Candidates of the walk that looks what part of what is around a query is allowed.
const AROUND: usize = 8;
/// The part of a filter's share that must be allowed there for a walk to find what is nearest.
const FEW: f32 = 0.8;
/// Where less is allowed, here as everywhere, too little of it lies two links off for a walk to get on (decision 17).
const SPARSE: f32 = 0.025;
/// Where this part is allowed, a walk through all with as many more candidates costs less than one among the allowed.
const MANY: f32 = 0.4;

impl<'a> Walker<'a> {
    /// Over a graph that is being built, with a coder and its codes if it is walked on any.
    pub fn building(
        space: &'a Space,
        graph: &'a Graph,
        codes: Option<(&'a Coder, &'a [u8])>,
        rows: &'a [u8],
        order: &'a [u32],
    ) -> Walker<'a> {
        let (coder, codes) = codes.map_or((None, &[][..]), |(coder, codes)| (Some(coder), codes));
        Walker { space, graph, coder, codes, rows, order: Some(order) }
    }
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

    /// Asks for a row ahead of its use.
    fn ask(&self, node: u32) {
        prefetch_row(self.row(node));
    }

    /// The `k` nearest by their full vectors of the `ef` nearest that the plan finds, into `scratch.best`.
    pub fn nearest(
        &self,
        exact: &Prepared,
        (k, ef): (usize, usize),
        plan: Plan<'_>,
        scratch: &mut Scratch,
        budget: &mut Budget<'_>,
    ) -> Result<(), SearchError> {
        let mut coded = std::mem::take(&mut scratch.query);
        let coder = self.coder.map(|coder| (coder, coder.query(exact.query(), &mut scratch.values, &mut coded)));
        let found = match coder.filter(|(_, keyed)| *keyed != Keyed::Outside) {
            Some((coder, keyed)) => {
                let keys = Coded { query: &coded, codes: self.codes, stride: coder.stride() };
                let scanned = matches!(plan, Plan::These(_));
                self.candidates(&keys, (k, ef), plan, scratch, budget).and_then(|()| {
                    if keyed == Keyed::Exactly {
                        scratch.rank_by_keys(k, |key| key as f32);
                        return Ok(());
                    }
                    let entries = scratch.pool.entries();
                    let kth = entries.get(k.saturating_sub(1)).filter(|_| !scanned);
                    let near =
                        kth.and_then(|kth| coded.not_beyond(entry_key(*kth), 1.0)).map_or(entries.len(), |limit| {
                            // So far behind the k-th that rounding can't have put it there.
                            entries.partition_point(|entry| entry_key(*entry) <= limit)
                        });
                    self.rerank(near, exact, k, scratch, budget)
                })
            }
            None => {
                let found = self.candidates(&Rows { walker: self, exact }, (k, ef), plan, scratch, budget);
                found.map(|()| scratch.rank_by_keys(k, unordered))
            }
        };
        scratch.query = coded;
        found
    }

    /// What the plan finds are the pool's entries afterwards.
    fn candidates(
        &self,
        query: &impl Keys,
        (k, ef): (usize, usize),
        plan: Plan<'_>,
        scratch: &mut Scratch,
        budget: &mut Budget<'_>,
    ) -> Result<(), SearchError> {
        let Scratch { pool, .. } = scratch;
        match plan {
            Plan::All(reach) => {
                let start = self.graph.descend(query, 0, pool, budget)?;
                self.graph.walk(query, start, Beam { reach, ..Beam::of(0, k, ef) }, pool, budget)?;
            }
            // A walk asks thousands of times: one for each kind of filter.
            Plan::Allowed(plan) => match plan.nodes {
                Filtered::Bits(bits) => {
                    self.among_allowed(query, &|node| has_bit(bits, node), (k, ef), &plan, pool, budget)?
                }
                Filtered::Asked(asked) => self.among_allowed(query, &asked, (k, ef), &plan, pool, budget)?,
            },
            Plan::These(nodes) => {
                Graph::scan(query, nodes, (k, ef), pool, budget)?;
            }
        }
        Ok(())
    }

    /// As the plan says.
    fn among_allowed(
        &self,
        query: &impl Keys,
        allowed: &impl Fn(u32) -> bool,
        (k, ef): (usize, usize),
        plan: &Allowed<'_>,
        pool: &mut Pool,
        budget: &mut Budget<'_>,
    ) -> Result<(), SearchError> {
        let start = self.graph.descend(query, 0, pool, budget)?;
        self.graph.walk(query, start, Beam::of(0, 0, AROUND), pool, budget)?;
        let (met, within) = pool.look_around(allowed);
        let (expected, around) = (plan.share * met as f32, within as f32 / met.max(1) as f32);
        let dense = plan.share.max(around);
        // Of so few some are missing by chance.
        if (within as f32) < expected * FEW - expected.sqrt() || within == 0 || dense < SPARSE {
            pool.clear();
        } else if around >= MANY {
            // Twice as many as hold k allowed ones on average, so that hardly ever fewer are among them.
            let of_all = |allowed: usize| (allowed as f32 / around) as usize;
            self.graph.walk(query, start, Beam::of(0, of_all(2 * k), of_all(ef)), pool, budget)?;
            pool.keep(allowed);
        } else {
            // The more so where the query lies at the edge of what is allowed.
            let more = (plan.share / around).max(1.0);
            let ef = plan.ef(dense) * more;
            self.graph.walk_allowed(query, allowed, (ef as usize).max(k), pool, budget)?;
        }
        Ok(())
    }

    /// The `k` nearest of the pool's first `near` entries by their full vectors, into `scratch.best`.
    fn rerank(
        &self,
        near: usize,
        exact: &Prepared,
        k: usize,
        scratch: &mut Scratch,
        budget: &mut Budget<'_>,
    ) -> Result<(), SearchError> {
        let Scratch { best, pool, .. } = scratch;
        best.clear();
        let entries = &pool.entries()[..near];
        budget.spend(entries.len() as u64)?;
        for entry in asked_ahead(entries, ASKED, |entry| self.ask(entry_node(*entry))) {
            let node = entry_node(*entry);
            keep(best, k, Candidate { distance: exact.distance(self.row(node)), node });
        }
        Ok(())
    }
}

impl Scratch {
    /// The first `k` of the pool's entries, whose keys tell their distances, into `best`.
    fn rank_by_keys(&mut self, k: usize, distance: impl Fn(u32) -> f32) {
        self.best.clear();
        let first = self.pool.entries().iter().take(k);
        self.best.extend(first.map(|e| Candidate { distance: distance(entry_key(*e)), node: entry_node(*e) }));
    }
}

/// So few rows are compared as they are: to compare codes first is no gain.
const FEW_ROWS: f32 = 128.0;

/// What a filtered walk costs, in distances of an unfiltered one, for each candidate; measured (see `share`).
fn walk_cost(ef: f32, share: f32) -> f32 {
    ef * 13.0 * (1.0 + (1.0 / share.max(1e-4)).min(16.0) / 4.0)
}

/// What comparing with all that is allowed costs, in the same unit: memory is read in order.
fn scan_cost(nodes: usize, share: f32, bits: bool) -> f32 {
    nodes as f32 * (share * 0.5 + if bits { 0.002 } else { 0.1 })
}

impl Sealed {
    /// The nearest that a walk, or a scan of codes, finds with `ef` candidates, into `scratch.best`.
    fn nearest(
        &self,
        walker: &Walker<'_>,
        exact: &Prepared,
        (k, ef): (usize, usize),
        request: &Request<'_>,
        scratch: &mut Scratch,
        budget: &mut Budget<'_>,
    ) -> Result<(), SearchError> {
        let Some(filter) = request.filter else {
            let (ef, plan) = self.unfiltered(request, ef);
            return walker.nearest(exact, (k, ef), plan, scratch, budget);
        };
        // Some of what a walk meets isn't allowed.
        let ef = ef.max(k);
        let bits = filter.bits();
        let allowed = |node: u32| filter.allows(Slot(node));
        let share = self.share(filter);
        let nodes = bits.map_or(Filtered::Asked(&allowed), Filtered::Bits);
        let plan = Allowed { nodes, share, efs: self.among(ef) };
        let scan = scan_cost(self.nodes, share, bits.is_some());
        if walk_cost(plan.ef(share), share) < scan {
            // What is allowed may be scattered far from the query, where a walk is long: no longer than the scan.
            budget.give_up_after(scan as u64);
            let walked = walker.nearest(exact, (k, ef), Plan::Allowed(plan), scratch, budget);
            let gave_up = budget.gave_up();
            budget.go_on();
            match walked {
                Err(SearchError::WorkLimit) if gave_up => {}
                Err(error) => return Err(error),
                // Less than asked for: the walk came to an end before it had met all that is allowed.
                Ok(()) if scratch.best.len() < k => {}
                Ok(()) => return Ok(()),
            }
        }
        let mut these = self.these(bits, &allowed);
        // None of those that were asked about may still be many.
        if share > 0.0 && share * self.nodes as f32 <= FEW_ROWS {
            return self.compare(exact, &mut these, k, scratch, budget);
        }
        // A scan's own: coarse codes need some more than what a walk is calibrated for.
        let ef = ef.max(2 * k.min(self.nodes) + 20);
        walker.nearest(exact, (k, ef), Plan::These(&mut these), scratch, budget)
    }

    /// The `k` nearest of these by their full vectors, into `scratch.best`.
    fn compare(
        &self,
        exact: &Prepared,
        these: &mut Nodes<'_>,
        k: usize,
        scratch: &mut Scratch,
        budget: &mut Budget<'_>,
    ) -> Result<(), SearchError> {
        let Scratch { best, links, .. } = scratch;
        best.clear();
        scan(these, |node| self.row(Slot(node)), exact, k, (links, best), budget)
    }

    /// The allowed nodes, by a filter's bits where it has them.
    fn these<'a>(&self, bits: Option<&'a [u64]>, allowed: &'a dyn Fn(u32) -> bool) -> Nodes<'a> {
        let end = self.nodes as u32;
        bits.map_or(Nodes::Passing(0..end, allowed), |bits| Nodes::Set(bits, 0, end))
    }

    /// The hits, into `scratch.best`.
    fn answer(&self, exact: &Prepared, request: &Request<'_>, scratch: &mut Scratch) -> Result<Stats, SearchError> {
        let mut budget = Budget::new(request);
        match (&self.graph, self.ef(request), request.exact) {
            (Some(graph), Some(mut ef), false) => {
                let walker = self.walker(graph);
                loop {
                    let wanted = (request.k.min(self.nodes), ef);
                    self.nearest(&walker, exact, wanted, request, scratch, &mut budget)?;
                    // A range goes on while most of what was found lies within.
                    let Some(most) = request.max_distance else { break };
                    let within = scratch.best.iter().filter(|hit| hit.distance <= most).count();
                    if within >= wanted.0 || within * 2 < scratch.best.len().max(ef) || ef >= self.nodes {
                        break;
                    }
                    ef = (ef * 4).min(self.nodes);
                }
            }
            _ => {
                let allowed = |node: u32| request.allows(node);
                let mut these = self.these(request.filter.and_then(|filter| filter.bits()), &allowed);
                self.compare(exact, &mut these, request.k, scratch, &mut budget)?;
            }
        }
        Ok(budget.stats)
    }
}

impl Index for Sealed {
    fn space(&self) -> &Space {
        &self.space
    }

    fn len(&self) -> usize {
        self.nodes
    }

    fn read(&self, slot: Slot, out: &mut Vec<u8>) -> bool {
        crate::copy(self.row(slot), out)
    }

    fn search(
        &self,
        query: &[f32],
        request: &Request<'_>,
        scratch: &mut Scratch,
        out: &mut Vec<Neighbor>,
    ) -> Result<Stats, SearchError> {
        let exact = Prepared::again(scratch.exact.take(), &self.space, query);
        let answered = self.answer(&exact, request, scratch);
        scratch.exact = Some(exact);
        let stats = answered?;
        deliver(&mut scratch.best, request, out);
        Ok(stats)
    }

    fn is_walked(&self) -> bool {
        self.graph.is_some()
    }

    fn learn(&self, queries: &[Vec<f32>], go_on: GoOn<'_>) -> bool {
        let Some(graph) = &self.graph else { return true };
        let Some(needed) = measure(&self.walker(graph), queries, go_on) else { return false };
        for (learned, needed) in self.learned.iter().zip(needed) {
            learned.store(u64::from(needed.ef) << 32 | u64::from(needed.reach.to_bits()), Ordering::Relaxed);
        }
        true
    }

    fn memory(&self) -> Memory {
        let graph = self.graph.as_ref().map_or(0, Graph::bytes);
        let mapped = self.vectors.bytes().len() + self.codes.bytes().len();
        Memory { index: (graph + self.hot.get().map_or(0, Huge::len)) as u64, vectors: mapped as u64 }
    }
}
