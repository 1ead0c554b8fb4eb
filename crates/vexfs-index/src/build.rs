//! From rows to a sealed index: code, link in parallel, calibrate, number for locality, write flat.

use std::cmp::Reverse;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::codes::{Coder, Width};
use crate::graph::{Bench, Graph, Linker, MOST_NODES, Nodes};
use crate::hnsw::{MAX_LAYER, level};
use crate::kernels::Prepared;
use crate::raw::{Huge, Place};
use crate::request::{Budget, Scratch};
use crate::sealed::{
    Allowed, CALIBRATED_K, Calibrated, Calibration, Filtered, MAGIC, Plan, SHARES, TARGETS, WIDEST, Walker,
    among_unmeasured, header, rows_are_codes,
};
use crate::space::Quantization;
use crate::{Element, Metric, Params, Space};

/// Fewer rows get no graph: an exact scan of them is as fast as a walk and never misses.
const GRAPH_FROM: usize = 1_000;
/// Rows that are kept out until the graph has been calibrated with them.
const HELD_OUT: usize = 500;
/// Where a filter allows fewer rows all of them are compared rather than walked among.
const WALKED_FROM: f32 = 2_000.0;
/// Candidates of a filtered walk that are tried at most: a scan costs less than more.
const MOST_FILTERED: f32 = 512.0;
/// The part of what a recall misses that filtered walks are to find besides: filters differ.
const MARGIN: f32 = 0.15;
/// The recall that a walk bounded by distance may lose for looking at less.
const MAY_MISS: f32 = 0.005;
/// Rows of those kept out that filtered walks are calibrated with.
const FILTERED: usize = 250;
/// Candidates of a scan of codes too coarse to tell how far off they are: among so many are the nearest.
const COARSE: usize = 1_000;
/// Times that nodes which were cut off are looked for.
const CONNECT_ROUNDS: usize = 8;
/// Values of ef that are tried, smallest first.
const EFS: [f32; 29] = [
    3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 14.0, 17.0, 20.0, 24.0, 28.0, 34.0, 40.0, 48.0, 56.0, 68.0, 80.0, 96.0, 112.0,
    136.0, 160.0, 192.0, 256.0, 384.0, 512.0, 1024.0, 2048.0, 4096.0,
];
/// Reaches that are tried, less 1, smallest first.
const REACHES: [f32; 24] = [
    0.0, 0.01, 0.013, 0.017, 0.022, 0.029, 0.037, 0.048, 0.063, 0.082, 0.106, 0.138, 0.18, 0.23, 0.3, 0.39, 0.51, 0.67,
    0.87, 1.1, 1.5, 1.9, 2.5, 3.2,
];
/// Links of a node at least and at most.
pub(crate) const M: std::ops::RangeInclusive<usize> = 2..=512;

/// Bytes that a build works on for each row of `space`, the row aside.
pub fn build_bytes(space: &Space, params: &Params) -> usize {
    let m = params.m.clamp(*M.start(), *M.end());
    // A level has a node in m of the one below it, so all upper ones together have one in m - 1.
    let links = 4 * (2 * m + m.div_ceil(m - 1));
    let codes = match space.element() {
        Element::Bits => space.row_bytes(),
        _ => space.dim().next_multiple_of(64),
    };
    let coarse = match params.quantization {
        Quantization::Sq4 => codes / 2,
        Quantization::Rabitq => codes / 8 + 16,
        Quantization::None | Quantization::Sq8 => 0,
    };
    // Level, lock, and the numbers of nodes, rows and slots in each other's order.
    links + codes + coarse + 1 + size_of::<Mutex<()>>() + 6 * size_of::<u32>()
}

/// A sealed index that is not in one piece yet.
pub struct Built {
    /// For each slot the row of the input that it holds.
    pub order: Vec<u32>,
    /// Header and coder.
    head: Vec<u8>,
    /// For each slot its node.
    nodes: Vec<u32>,
    graph: Option<Graph>,
    /// `None` where rows are walked themselves or, as they lie, are their own codes.
    codes: Option<Codes>,
}

/// Takes bytes one after another.
type Put<'a> = &'a mut dyn FnMut(&[u8]) -> io::Result<()>;

impl Built {
    /// The rows that it was built over, in slot order.
    pub fn vectors(&self, space: &Space, rows: &[u8], put: Put<'_>) -> io::Result<()> {
        let size = space.row_bytes();
        self.order.iter().try_for_each(|row| put(&rows[*row as usize * size..][..size]))
    }

    /// Codes in slot order.
    pub fn codes(&self, put: Put<'_>) -> io::Result<()> {
        let Some(Codes { coder, bytes }) = &self.codes else { return Ok(()) };
        let stride = coder.stride();
        self.nodes.iter().try_for_each(|node| put(&bytes.bytes()[*node as usize * stride..][..stride]))
    }

    /// Header, coder, links.
    pub fn graph(&self, put: Put<'_>) -> io::Result<()> {
        put(&self.head)?;
        let Some(graph) = &self.graph else { return Ok(()) };
        let mut slots = vec![0u32; self.nodes.len()];
        for (slot, node) in self.nodes.iter().enumerate() {
            slots[*node as usize] = slot as u32;
        }
        let mut list = Vec::new();
        for (layer, count) in graph.counts.iter().enumerate() {
            for node in &self.nodes[..*count] {
                list.clear();
                for other in graph.links(layer, *node) {
                    list.extend_from_slice(&(slots[other as usize] + 1).to_le_bytes());
                }
                list.resize(graph.room(layer) * 4, 0);
                put(&list)?;
            }
        }
        Ok(())
    }
}

/// A sealed index as bytes, for [`crate::Sealed::open`].
pub struct Sections {
    /// For each slot the row of the input that it holds.
    pub order: Vec<u32>,
    /// Rows in slot order.
    pub vectors: Vec<u8>,
    /// Codes in slot order; empty where rows are walked themselves or, as they lie, are their own codes.
    pub codes: Vec<u8>,
    /// Header, coder, links.
    pub graph: Vec<u8>,
}

/// As [`build_in`], in memory, and in one piece.
pub fn build(space: &Space, rows: &[u8], params: &Params, threads: usize, go_on: GoOn<'_>) -> Option<Sections> {
    // Nothing else than a disk fails.
    let built = build_in(Place::Memory, space, rows, params, threads, go_on).ok()??;
    let (mut vectors, mut codes, mut graph) = (Vec::new(), Vec::new(), Vec::new());
    let into = |section: &mut Vec<u8>, bytes: &[u8]| {
        section.extend_from_slice(bytes);
        Ok(())
    };
    built.vectors(space, rows, &mut |bytes| into(&mut vectors, bytes)).ok()?;
    built.codes(&mut |bytes| into(&mut codes, bytes)).ok()?;
    built.graph(&mut |bytes| into(&mut graph, bytes)).ok()?;
    Some(Sections { order: built.order, vectors, codes, graph })
}

/// Asked before each row is linked, by the thread that links it: false ends the build, and while it doesn't answer the
/// thread waits.
pub type GoOn<'a> = &'a (dyn Fn() -> bool + Sync);

/// Builds over whole `rows` with so many `threads`, in `place`. `None` if it was not to `go_on`.
pub fn build_in(
    place: Place<'_>,
    space: &Space,
    rows: &[u8],
    params: &Params,
    threads: usize,
    go_on: GoOn<'_>,
) -> io::Result<Option<Built>> {
    let nodes = rows.len() / space.row_bytes();
    let m = params.m.clamp(*M.start(), *M.end());
    let levels: Vec<u8> = (0..nodes as u32).map(|node| level(params.seed, node, m) as u8).collect();
    // Highest levels first, otherwise as they came.
    let mut order: Vec<u32> = (0..nodes as u32).collect();
    order.sort_by_key(|row| Reverse(levels[*row as usize]));
    let graph = if (GRAPH_FROM..=MOST_NODES).contains(&nodes) {
        let top = usize::from(levels[order[0] as usize]);
        let counts: Vec<usize> =
            (0..=top).map(|layer| order.partition_point(|row| usize::from(levels[*row as usize]) >= layer)).collect();
        let fine = || encode(Coder::fit(space, rows, Width::Byte), rows, &order, place);
        match Graph::new(counts, m, place).and_then(|graph| Ok((graph, fine()?))) {
            // An exact scan still works.
            Err(error) if error.kind() == io::ErrorKind::OutOfMemory => None,
            made => Some(made?),
        }
    } else {
        None
    };
    let Some((graph, fine)) = graph else {
        let order = (0..nodes as u32).collect();
        let head = head(m, nodes, &[], None, Calibration::default());
        return Ok(Some(Built { order, head, nodes: Vec::new(), graph: None, codes: None }));
    };
    let held = HELD_OUT.min(nodes / 20);
    let level = |node: u32| usize::from(levels[order[node as usize] as usize]);
    let locks: Vec<Mutex<()>> = (0..nodes).map(|_| Mutex::new(())).collect();
    let linker = Linker {
        graph: &graph,
        coder: &fine.coder,
        codes: fine.bytes.bytes(),
        locks: &locks,
        ef: params.ef_construction.clamp(m, 10_000),
    };
    // The rows that came last would all be from one place in sorted input: take every so many-th instead.
    let bottom = graph.counts.get(1).copied().unwrap_or(0).max(1);
    let step = ((nodes - bottom) / held.max(1)).max(1);
    let is_held = |node: u32| node as usize > bottom && (node as usize - bottom) % step == step / 2;
    let (last, first): (Vec<u32>, Vec<u32>) = (1..nodes as u32).partition(|node| is_held(*node));
    if !link(&linker, &first, &level, threads, go_on) {
        return Ok(None);
    }
    // Links are chosen on bytes, whatever a search walks on.
    let coarse = match params.quantization {
        // They are as short as codes get.
        _ if space.element() == Element::Bits => None,
        Quantization::Sq4 => Some(encode(Coder::fit(space, rows, Width::Nibble), rows, &order, place)?),
        Quantization::Rabitq => Some(encode(Coder::fit(space, rows, Width::Sign), rows, &order, place)?),
        Quantization::None | Quantization::Sq8 => None,
    };
    // Where none of the codes would do rows are walked themselves.
    let walks = coarse.is_some() || params.quantization != Quantization::None || fine.coder.is_exact();
    let walked = walks.then_some(coarse.as_ref().unwrap_or(&fine));
    let fine_walker = Walker::building(space, &graph, Some((&fine.coder, fine.bytes.bytes())), rows, &order);
    let walked = walked.map(|codes| (&codes.coder, codes.bytes.bytes()));
    let walker = Walker::building(space, &graph, walked, rows, &order);
    let calibration = calibrate(&walker, &fine_walker, &last, &is_held, threads);
    if !link(&linker, &last, &level, threads, go_on) {
        return Ok(None);
    }
    // By inner product most links lead to the few long vectors that are the answers; short ones are left without,
    // and links taken from the long ones for them would cost more than they bring.
    if space.metric() != Metric::InnerProduct {
        connect(&graph);
    }
    let nodes = renumber(&graph);
    let head = head(m, nodes.len(), &graph.counts, walker.coder, calibration);
    let rows = nodes.iter().map(|node| order[*node as usize]).collect();
    let codes = match coarse {
        Some(coarse) => Some(coarse),
        None => walks.then_some(fine),
    };
    let codes = codes.filter(|codes| !rows_are_codes(space, &codes.coder));
    Ok(Some(Built { order: rows, head, nodes, graph: Some(graph), codes }))
}

/// Coded rows in the order of nodes.
struct Codes {
    coder: Coder,
    bytes: Huge,
}

fn encode(coder: Coder, rows: &[u8], order: &[u32], place: Place<'_>) -> io::Result<Codes> {
    let (size, stride) = (rows.len() / order.len().max(1), coder.stride());
    let mut bytes = place.zeroed(order.len() * stride)?;
    let mut values = Vec::new();
    for (row, code) in order.iter().zip(bytes.bytes_mut().chunks_exact_mut(stride)) {
        coder.encode(&rows[*row as usize * size..][..size], &mut values, code);
    }
    Ok(Codes { coder, bytes })
}

/// False if it was not to go on.
fn link(
    linker: &Linker<'_>,
    nodes: &[u32],
    level: &(impl Fn(u32) -> usize + Sync),
    threads: usize,
    go_on: GoOn<'_>,
) -> bool {
    let (next, ended) = (AtomicUsize::new(0), AtomicBool::new(false));
    on_threads(threads, || {
        let mut bench = Bench::default();
        while let Some(node) = nodes.get(next.fetch_add(1, Ordering::Relaxed)) {
            if ended.load(Ordering::Relaxed) || !go_on() {
                ended.store(true, Ordering::Relaxed);
                return;
            }
            linker.link(*node, level(*node), &mut bench);
        }
    });
    !ended.into_inner()
}

fn on_threads(threads: usize, work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 1..threads.max(1) {
            scope.spawn(&work);
        }
        work();
    });
}

/// What searches need on rows that are not in the graph yet. What is true is found by `fine`.
fn calibrate(
    walker: &Walker<'_>,
    fine: &Walker<'_>,
    held: &[u32],
    is_held: &(impl Fn(u32) -> bool + Sync),
    threads: usize,
) -> Calibration {
    let numbers = |node: &u32| {
        let mut numbers = Vec::new();
        walker.space.decode(walker.row(*node), &mut numbers);
        numbers
    };
    let queries: Vec<Vec<f32>> = held.iter().map(numbers).collect();
    // A build's own `go_on` counts what is linked.
    let mut calibration =
        Questions::new(walker, fine, &queries, &|node| !is_held(node), (threads, &|| true)).unfiltered();
    for (n, share) in SHARES.iter().enumerate() {
        if (walker.graph.nodes as f32) < WALKED_FROM / share {
            continue;
        }
        // Scattered as if by chance.
        let end = (share * 65_536.0) as u32;
        let is_allowed = |node: u32| !is_held(node) && node.wrapping_mul(0x9e37_79b9) >> 16 < end;
        let queries = &queries[..queries.len().min(FILTERED)];
        let some = Questions::new(walker, fine, queries, &is_allowed, (threads, &|| true));
        let targets = TARGETS.map(|target| target + (1.0 - target) * MARGIN);
        let tried = &EFS[..EFS.iter().filter(|ef| **ef <= MOST_FILTERED).count()];
        let measured = some.needed(&targets, tried, &|ef| {
            let nodes = Filtered::Asked(&is_allowed);
            (ef as usize, Plan::Allowed(Allowed { nodes, share: *share, efs: [ef; SHARES.len()] }))
        });
        let measured = measured.map(|ef| ef.unwrap_or(MOST_FILTERED).ceil() as u32);
        calibration.iter_mut().zip(measured).for_each(|(known, ef)| known.among[n] = ef);
    }
    calibration
}

/// What unfiltered searches for `queries` need, on one thread; `None` if it was not to `go_on`.
pub(crate) fn measure(walker: &Walker<'_>, queries: &[Vec<f32>], go_on: GoOn<'_>) -> Option<Calibration> {
    let needed = Questions::new(walker, walker, queries, &|_| true, (1, go_on)).unfiltered();
    // What was ended early is wrong.
    go_on().then_some(needed)
}

/// What walks found.
#[derive(Copy, Clone)]
struct Found {
    /// Of the true neighbours.
    recall: f32,
    /// Distances that were computed, those aside where all had been found with less.
    distances: usize,
}

/// Vectors that are asked for, and how far the last of the nearest is.
struct Questions<'a> {
    walker: &'a Walker<'a>,
    threads: usize,
    go_on: GoOn<'a>,
    asked: Vec<(&'a [f32], f32)>,
}

impl<'a> Questions<'a> {
    /// Where what is near is one of those that `may` be found.
    fn new(
        walker: &'a Walker<'a>,
        fine: &Walker<'_>,
        queries: &'a [Vec<f32>],
        may: &(impl Fn(u32) -> bool + Sync),
        (threads, go_on): (usize, GoOn<'a>),
    ) -> Questions<'a> {
        let asked: Mutex<Vec<(&[f32], f32)>> = Mutex::new(Vec::new());
        let next = AtomicUsize::new(0);
        let is_coarse = fine.coder.is_some_and(|coder| coder.width() != Width::Byte);
        let size = (CALIBRATED_K, if is_coarse { COARSE } else { CALIBRATED_K });
        on_threads(threads, || {
            let mut scratch = Scratch::default();
            while let Some(query) = queries.get(next.fetch_add(1, Ordering::Relaxed)).filter(|_| go_on()) {
                if walker.space.check_query(query).is_err() {
                    continue;
                }
                let exact = Prepared::new(walker.space, query);
                let mut others = Nodes::Passing(0..walker.graph.nodes as u32, may);
                let plan = Plan::These(&mut others);
                if fine.nearest(&exact, size, plan, &mut scratch, &mut Budget::unlimited()).is_ok() {
                    // Equally far is equally right.
                    let limit = scratch.best.peek().map_or(f32::INFINITY, |farthest| farthest.distance);
                    asked.lock().unwrap_or_else(PoisonError::into_inner).push((query, limit));
                }
            }
        });
        Questions { walker, threads, go_on, asked: asked.into_inner().unwrap_or_else(PoisonError::into_inner) }
    }

    /// What the plans of `tries` with their ef find; each finds no less than the one before.
    fn recall<'p>(&self, tries: &[f32], plan: &(impl Fn(f32) -> (usize, Plan<'p>) + Sync)) -> Vec<Found> {
        let next = AtomicUsize::new(0);
        let all: Vec<[AtomicUsize; 2]> = tries.iter().map(|_| Default::default()).collect();
        on_threads(self.threads, || {
            let mut scratch = Scratch::default();
            let next = || self.asked.get(next.fetch_add(1, Ordering::Relaxed)).filter(|_| (self.go_on)());
            while let Some((query, limit)) = next() {
                let exact = Prepared::new(self.walker.space, query);
                for (n, tried) in tries.iter().enumerate() {
                    let ((ef, plan), mut budget) = (plan(*tried), Budget::unlimited());
                    let is_filtered = matches!(plan, Plan::Allowed(_));
                    let walked = self.walker.nearest(&exact, (CALIBRATED_K, ef), plan, &mut scratch, &mut budget);
                    let hits = if walked.is_ok() { scratch.best.iter() } else { break };
                    let right = match hits.len() {
                        // A filtered walk that finds too few is followed by a scan.
                        ..CALIBRATED_K if is_filtered => CALIBRATED_K,
                        _ => hits.filter(|hit| hit.distance <= *limit).count().min(CALIBRATED_K),
                    };
                    let [found, distances] = &all[n];
                    found.fetch_add(right, Ordering::Relaxed);
                    distances.fetch_add(budget.stats.distances as usize, Ordering::Relaxed);
                    if right == CALIBRATED_K {
                        // What more candidates find is no less.
                        all[n + 1..].iter().for_each(|[more, _]| _ = more.fetch_add(right, Ordering::Relaxed));
                        break;
                    }
                }
            }
        });
        let most = (self.asked.len() * CALIBRATED_K).max(1) as f32;
        let found = |[found, distances]: [AtomicUsize; 2]| Found {
            recall: found.into_inner() as f32 / most,
            distances: distances.into_inner(),
        };
        all.into_iter().map(found).collect()
    }

    /// For each target what unfiltered walks need, and what they come to.
    fn unfiltered(&self) -> Calibration {
        let most = EFS[EFS.len() - 1] as usize;
        let efs = self.needed(&TARGETS, &EFS, &|ef| (ef as usize, Plan::All(f32::INFINITY)));
        let reaches = self.needed(&TARGETS, &REACHES, &|more| (most, Plan::All(1.0 + more)));
        std::array::from_fn(|n| {
            let ef = efs[n].map_or(most as u32, |ef| ef.ceil() as u32);
            let walked = |ef: usize, reach: f32| (reach, self.recall(&[reach], &|reach| (ef, Plan::All(reach)))[0]);
            let (unbounded, far) = walked(ef as usize, f32::INFINITY);
            let near = reaches[n].map(|more| walked(ef as usize * WIDEST, 1.0 + more));
            // Coarse codes put the nearest too near for their distance to tell much.
            let near = near.filter(|(_, near)| near.distances < far.distances && near.recall >= far.recall - MAY_MISS);
            let (reach, chosen) = near.unwrap_or((unbounded, far));
            Calibrated { ef, reach, recall: chosen.recall, among: among_unmeasured(ef) }
        })
    }

    /// For each target which try reaches it, if one does.
    fn needed<'p>(
        &self,
        targets: &[f32; TARGETS.len()],
        tries: &[f32],
        plan: &(impl Fn(f32) -> (usize, Plan<'p>) + Sync),
    ) -> [Option<f32>; TARGETS.len()] {
        let recalls: Vec<f32> = self.recall(tries, plan).into_iter().map(|found| found.recall).collect();
        targets.map(|target| reaching(target, &recalls, tries))
    }
}

/// What of `tries` comes to a recall, if one does.
pub(crate) fn reaching(target: f32, recalls: &[f32], tries: &[f32]) -> Option<f32> {
    match recalls.iter().position(|recall| *recall >= target)? {
        0 => Some(tries[0]),
        // Between two that were tried recall rises about evenly.
        at => {
            let share = (target - recalls[at - 1]) / (recalls[at] - recalls[at - 1]).max(f32::MIN_POSITIVE);
            Some(tries[at - 1] + (tries[at] - tries[at - 1]) * share)
        }
    }
}

/// Gives every node that a walk in layer 0 can't reach from node 0 a link from one that it can: choosing neighbours
/// may have taken a node's last one away, and then no effort would find it.
fn connect(graph: &Graph) {
    // Replacing a link may cut another node off, so look again; it ends where nothing is cut off any more.
    for _ in 0..CONNECT_ROUNDS {
        let mut met = vec![false; graph.nodes];
        let mut degree = vec![0u32; graph.nodes];
        let mut queue = vec![0];
        met[0] = true;
        while let Some(node) = queue.pop() {
            for other in graph.links(0, node) {
                degree[other as usize] += 1;
                if !std::mem::replace(&mut met[other as usize], true) {
                    queue.push(other);
                }
            }
        }
        let cut_off: Vec<u32> = (0..graph.nodes as u32).filter(|node| !met[*node as usize]).collect();
        if cut_off.is_empty() {
            return;
        }
        for node in cut_off {
            // A node's own links come nearest first.
            let from = graph.links(0, node).find(|other| met[*other as usize]).unwrap_or(0);
            let list = graph.list(0, from);
            let target = |word: &AtomicU32| word.load(Ordering::Relaxed);
            let free = list.iter().find(|word| target(word) == 0);
            let place = free.or_else(|| list.iter().max_by_key(|word| degree[target(word) as usize - 1]));
            let Some(place) = place else { continue };
            if let Some(replaced) = target(place).checked_sub(1) {
                // Links of nodes that were cut off themselves have not been counted.
                let links = &mut degree[replaced as usize];
                *links = links.saturating_sub(1);
            }
            place.store(node + 1, Ordering::Relaxed);
            degree[node as usize] += 1;
            met[node as usize] = true;
        }
    }
}

/// Within the nodes of a level as a walk from node 0 meets them in layer 0: what is read together lies together.
fn renumber(graph: &Graph) -> Vec<u32> {
    let nodes = graph.nodes;
    let mut met = vec![false; nodes];
    let mut order: Vec<u32> = Vec::with_capacity(nodes);
    for start in 0..nodes as u32 {
        if std::mem::replace(&mut met[start as usize], true) {
            continue;
        }
        let mut at = order.len();
        order.push(start);
        while let Some(node) = order.get(at).copied() {
            at += 1;
            for other in graph.links(0, node) {
                if !std::mem::replace(&mut met[other as usize], true) {
                    order.push(other);
                }
            }
        }
    }
    // Layers stay prefixes: a node's level is how many layers hold it.
    order.sort_by_key(|node| Reverse(graph.counts.iter().filter(|count| (*node as usize) < **count).count()));
    order
}

/// The graph section's header and coder.
fn head(m: usize, nodes: usize, counts: &[usize], coder: Option<&Coder>, calibration: Calibration) -> Vec<u8> {
    let mut bytes = vec![0; header::SIZE];
    let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(header::MAGIC, MAGIC);
    put(header::M, m as u32);
    put(header::NODES, nodes as u32);
    put(header::LAYERS, counts.len() as u32);
    for (n, known) in calibration.iter().enumerate() {
        put(header::EF + n * 4, known.ef);
        put(header::RECALL + n * 4, known.recall.to_bits());
        put(header::REACH + n * 4, known.reach.to_bits());
        for (share, among) in known.among.iter().enumerate() {
            put(header::AMONG + (share * TARGETS.len() + n) * 4, *among);
        }
    }
    for (layer, count) in counts.iter().enumerate().take(MAX_LAYER + 1) {
        put(header::COUNTS + layer * 4, *count as u32);
    }
    match coder {
        Some(coder) => {
            let stored = coder.to_bytes();
            put(header::WIDTH, coder.width() as u32);
            put(header::CODER, stored.len() as u32);
            bytes.extend_from_slice(&stored);
        }
        None => put(header::WIDTH, u32::MAX),
    }
    bytes
}
