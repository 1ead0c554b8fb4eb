//! Nodes in memory that never moves: row, links, lock and state of each; and when a node may be used again.
//!
//! Promises: a row is read only while its reader is counted ([`Cells::pin`]) and its node holds a point; it is written
//! only while nobody can read it (decision 5 has the argument). Chunks double in size, so that a number finds its node
//! with one look and an empty index costs nothing.
#![allow(unsafe_code)]

use std::alloc::{Layout, handle_alloc_error};
use std::sync::{OnceLock, PoisonError};

use super::super::sync::{AtomicU32, AtomicU64, AtomicUsize, Mutex, MutexGuard, Ordering, Words};
use crate::hnsw::level;
use crate::kernels::prefetch;
use crate::raw::Huge;

/// Nodes of the first chunk.
const FIRST: usize = 64;
/// Chunks: as many as hold all numbers of nodes.
const CHUNKS: usize = 26;
/// Bytes of a row that are asked for ahead of their use.
const ASKED: usize = 1024;

/// What a node holds: the point's slot and how far it has come. Zero is nothing.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct State(u64);

impl State {
    const HELD: u64 = 1;
    /// Somebody links it, or has, or nobody shall.
    pub const CLAIMED: u64 = 2;
    /// Its links are complete.
    pub const LINKED: u64 = 4;
    /// Deleted.
    pub const DEAD: u64 = 8;

    fn held(slot: u32) -> State {
        State(u64::from(slot) << 8 | State::HELD)
    }

    /// The point, if there is one, dead or alive.
    pub fn slot(self) -> Option<u32> {
        self.has(State::HELD).then_some((self.0 >> 8) as u32)
    }

    pub fn has(self, flag: u64) -> bool {
        self.0 & flag != 0
    }

    /// Does it hold a point that is not deleted?
    pub fn is_live(self) -> bool {
        self.0 & (State::HELD | State::DEAD) == State::HELD
    }
}

struct Chunk {
    rows: Huge,
    states: Box<[AtomicU64]>,
    /// Layer 0: room for `2m` links of each node.
    lists: Words,
    /// The layers above: room for `m` links in each of a node's.
    upper: Box<[AtomicU32]>,
    /// Where each node's begin; one more than there are nodes.
    upper_from: Box<[u32]>,
    locks: Box<[Mutex<()>]>,
}

/// See the module.
pub struct Cells {
    row_bytes: usize,
    m: usize,
    seed: u64,
    chunks: [OnceLock<Box<Chunk>>; CHUNKS],
    /// Nodes that were ever used are below.
    high: AtomicUsize,
    free: Mutex<Vec<u32>>,
    epoch: AtomicUsize,
    /// Who runs in the epochs of each parity.
    counted: [AtomicUsize; 2],
    /// What was taken out of the graph, by epoch. Its lock is held while the epoch rises.
    limbo: Mutex<Vec<(usize, Vec<u32>)>>,
}

/// Counted as a reader as long as it lives.
pub struct Pin<'a> {
    cells: &'a Cells,
    epoch: usize,
}

/// Chunk and place of a node.
#[inline]
fn place(node: u32) -> (usize, usize) {
    let shifted = node as usize / FIRST + 1;
    let chunk = shifted.ilog2() as usize;
    (chunk, node as usize - FIRST * ((1 << chunk) - 1))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cells {
    pub fn new(row_bytes: usize, m: usize, seed: u64) -> Cells {
        Cells {
            row_bytes,
            m,
            seed,
            chunks: [const { OnceLock::new() }; CHUNKS],
            high: AtomicUsize::new(0),
            free: Mutex::new(Vec::new()),
            epoch: AtomicUsize::new(0),
            counted: [AtomicUsize::new(0), AtomicUsize::new(0)],
            limbo: Mutex::new(Vec::new()),
        }
    }

    /// Nodes that were ever used are below.
    #[inline]
    pub fn len(&self) -> usize {
        self.high.load(Ordering::SeqCst)
    }

    #[inline]
    fn chunk(&self, node: u32) -> Option<(&Chunk, usize)> {
        let (chunk, at) = place(node);
        Some((self.chunks.get(chunk)?.get()?, at))
    }

    fn new_chunk(&self, chunk: usize) -> Box<Chunk> {
        let nodes = FIRST << chunk;
        let first = FIRST * ((1 << chunk) - 1);
        let mut upper_from = vec![0; nodes + 1];
        for at in 0..nodes {
            upper_from[at + 1] = upper_from[at] + (level(self.seed, (first + at) as u32, self.m) * self.m) as u32;
        }
        let bytes = nodes * self.row_bytes;
        let memory = Huge::zeroed(bytes).zip(Words::zeroed(nodes * 2 * self.m));
        // As everywhere else where memory ends.
        let (rows, lists) =
            memory.unwrap_or_else(|| handle_alloc_error(Layout::array::<u8>(bytes).unwrap_or(Layout::new::<u8>())));
        Box::new(Chunk {
            rows,
            states: (0..nodes).map(|_| AtomicU64::new(0)).collect(),
            lists,
            upper: (0..upper_from[nodes]).map(|_| AtomicU32::new(0)).collect(),
            upper_from: upper_from.into(),
            locks: (0..nodes).map(|_| Mutex::new(())).collect(),
        })
    }

    /// A node that holds the row, without links.
    pub fn add(&self, slot: u32, row: &[u8]) -> u32 {
        let recycled = lock(&self.free).pop();
        let node = recycled.unwrap_or_else(|| self.high.fetch_add(1, Ordering::SeqCst) as u32);
        let (number, at) = place(node);
        let chunk = self.chunks[number].get_or_init(|| self.new_chunk(number));
        let row = &row[..row.len().min(self.row_bytes)];
        // SAFETY: the range is the node's own. Nobody else has the node: it came off the free list, or its number was
        // never given before. Nobody reads the row: the state is zero, and was when the grace period began after
        // which the node was put on the list (see `recycle`), so rows that were handed out before are back.
        unsafe { chunk.rows.write(at * self.row_bytes, row) };
        {
            let _writing = self.lock(node);
            for layer in 0..=self.level(node) {
                self.list(node, layer).iter().for_each(|word| word.store(0, Ordering::Relaxed));
            }
        }
        chunk.states[at].store(State::held(slot).0, Ordering::SeqCst);
        node
    }

    /// Layers of a node above 0: the node's, not the point's, so that its memory can stay as it is.
    pub fn level(&self, node: u32) -> usize {
        let Some((chunk, at)) = self.chunk(node) else { return 0 };
        (chunk.upper_from[at + 1] - chunk.upper_from[at]) as usize / self.m
    }

    /// Links of a node in a layer; empty where it has no such layer.
    #[inline]
    pub fn list(&self, node: u32, layer: usize) -> &[AtomicU32] {
        let Some((chunk, at)) = self.chunk(node) else { return &[] };
        if layer == 0 {
            return chunk.lists.get().get(at * 2 * self.m..(at + 1) * 2 * self.m).unwrap_or_default();
        }
        let start = chunk.upper_from[at] as usize + (layer - 1) * self.m;
        if start >= chunk.upper_from[at + 1] as usize {
            return &[];
        }
        &chunk.upper[start..start + self.m]
    }

    /// Held by who changes a node's links. `None` where there is no such node.
    pub fn lock(&self, node: u32) -> Option<MutexGuard<'_, ()>> {
        self.chunk(node).map(|(chunk, at)| lock(&chunk.locks[at]))
    }

    #[inline]
    pub fn state(&self, node: u32) -> State {
        self.chunk(node).map_or(State(0), |(chunk, at)| State(chunk.states[at].load(Ordering::SeqCst)))
    }

    /// Sets flags of a node that holds the slot's point; the state before. `None` (and nothing) if it doesn't.
    pub fn mark(&self, node: u32, slot: u32, flags: u64) -> Option<State> {
        let (chunk, at) = self.chunk(node)?;
        let holds = |state: u64| (State(state).slot() == Some(slot)).then_some(state | flags);
        chunk.states[at].fetch_update(Ordering::SeqCst, Ordering::SeqCst, holds).ok().map(State)
    }

    /// From now on until the pin is dropped, rows that are seen stay.
    pub fn pin(&self) -> Pin<'_> {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            self.counted[epoch % 2].fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return Pin { cells: self, epoch };
            }
            self.counted[epoch % 2].fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Takes nodes that no link leads to out of use.
    pub fn retire(&self, nodes: Vec<u32>) {
        for node in &nodes {
            if let Some((chunk, at)) = self.chunk(*node) {
                chunk.states[at].store(0, Ordering::SeqCst);
            }
        }
        let mut limbo = lock(&self.limbo);
        limbo.push((self.epoch.load(Ordering::SeqCst), nodes));
    }

    /// Makes what was retired long enough ago free. True if there is more to wait for.
    pub fn recycle(&self) -> bool {
        let mut limbo = lock(&self.limbo);
        while !limbo.is_empty() {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let old = limbo.iter().take_while(|(retired, _)| *retired + 2 <= epoch).count();
            if old > 0 {
                let nodes = limbo.drain(..old).flat_map(|(_, nodes)| nodes);
                lock(&self.free).extend(nodes);
            } else if self.counted[(epoch + 1) % 2].load(Ordering::SeqCst) == 0 {
                // Nobody is left of the epoch before this one.
                self.epoch.store(epoch + 1, Ordering::SeqCst);
            } else {
                break;
            }
        }
        !limbo.is_empty()
    }

    /// Bytes kept: links and what belongs to them.
    pub fn bytes(&self) -> usize {
        let chunk = |chunk: &Chunk| {
            let each = size_of::<AtomicU64>() + size_of::<Mutex<()>>() + size_of::<u32>();
            chunk.states.len() * each + (chunk.lists.get().len() + chunk.upper.len()) * size_of::<AtomicU32>()
        };
        self.chunks.iter().filter_map(OnceLock::get).map(|some| chunk(some)).sum()
    }
}

impl Pin<'_> {
    /// The row of a node; `None` where it holds no point.
    #[inline]
    pub fn row(&self, node: u32) -> Option<&[u8]> {
        let (chunk, at) = self.cells.chunk(node)?;
        let state = State(chunk.states[at].load(Ordering::SeqCst));
        let size = self.cells.row_bytes;
        // SAFETY: the range is the node's own and was written before its state said that it holds a point. It will
        // be written again only two epochs after the state became zero, which it wasn't a moment ago; by then this
        // pin, from which the row is borrowed, is gone.
        state.has(State::HELD).then(|| unsafe { chunk.rows.slice(at * size, size) })
    }

    /// The row will be wanted soon.
    #[inline]
    pub fn prefetch(&self, node: u32) {
        if let Some((chunk, at)) = self.cells.chunk(node) {
            let size = self.cells.row_bytes;
            (0..size.min(ASKED)).step_by(64).for_each(|byte| prefetch_at(&chunk.rows, at * size + byte));
        }
    }
}

#[inline]
fn prefetch_at(rows: &Huge, at: usize) {
    prefetch(rows.nothing(), at);
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.cells.counted[self.epoch % 2].fetch_sub(1, Ordering::SeqCst);
    }
}
