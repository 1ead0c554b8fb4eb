//! Links between nodes: how they are written, and how a node is woven into the graph.
//!
//! Promises: a list is changed under the lock of its node only, and then leads to living nodes only, as far as was known
//! (decision 5). A reader beside a writer may see some old and some new links; all are nodes of the layer, as a node's
//! level never changes. Links marked as kept stay until their node or that which they lead to is deleted.

use std::sync::PoisonError;

use super::super::sync::{AtomicU32, AtomicU64, Mutex, MutexGuard, Ordering};
use super::cells::Pin;
use super::{Graph, Mutable};
use crate::Metric;
use crate::Scratch;
use crate::hnsw::{choose, descend, walk_layer};
use crate::kernels::between;
use crate::request::{Budget, Candidate};

/// The bit of a word that says that its link is kept. The others are the node's number + 1; 0 from where the list ends.
const KEPT: u32 = 1 << 31;

/// What a list's links lead to.
#[inline]
pub fn targets(list: &[AtomicU32]) -> impl Iterator<Item = u32> + '_ {
    words(list).map(target)
}

fn words(list: &[AtomicU32]) -> impl Iterator<Item = u32> + '_ {
    list.iter().map(|word| word.load(Ordering::Relaxed)).take_while(|word| *word != 0)
}

fn target(word: u32) -> u32 {
    (word & !KEPT).wrapping_sub(1)
}

/// Where walks begin: a node of the highest layer.
#[derive(Default)]
pub struct Entry {
    /// 0, or layer << 32 | node + 1.
    packed: AtomicU64,
    raising: Mutex<()>,
}

impl Entry {
    /// Node and layer; `None` in a graph without nodes.
    pub fn get(&self) -> Option<(u32, usize)> {
        match self.packed.load(Ordering::SeqCst) {
            0 => None,
            packed => Some(((packed as u32) - 1, (packed >> 32) as usize)),
        }
    }

    /// Held by who changes it.
    pub fn lock(&self) -> MutexGuard<'_, ()> {
        self.raising.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Under the lock.
    pub fn set(&self, entry: Option<(u32, usize)>) {
        let packed = entry.map_or(0, |(node, layer)| (layer as u64) << 32 | u64::from(node + 1));
        self.packed.store(packed, Ordering::SeqCst);
    }
}

impl Mutable {
    fn between(&self, pin: &Pin<'_>, one: u32, other: u32) -> f32 {
        match (pin.row(one), pin.row(other)) {
            (Some(one), Some(other)) => between(&self.space, one, other),
            _ => f32::INFINITY,
        }
    }

    /// Links are chosen with a little slack, as in DiskANN, where distances have a zero.
    fn slack(&self) -> f32 {
        if self.space.metric() == Metric::InnerProduct { 1.0 } else { 1.1 }
    }

    fn room(&self, layer: usize) -> usize {
        if layer == 0 { 2 * self.params.m } else { self.params.m }
    }

    /// Under the lock of the list's node.
    fn write(&self, list: &[AtomicU32], words: impl Iterator<Item = u32>) {
        let mut at = 0;
        for (place, word) in list.iter().zip(words) {
            place.store(word, Ordering::Relaxed);
            at += 1;
        }
        list.iter().skip(at).for_each(|place| place.store(0, Ordering::Relaxed));
    }

    /// Links a node, or links it anew.
    pub(super) fn weave(&self, pin: &Pin<'_>, node: u32, scratch: &mut Scratch) {
        let level = self.cells.level(node);
        let Some(row) = pin.row(node) else { return };
        let distance = |other: u32| match pin.row(other) {
            Some(other) => between(&self.space, row, other),
            None => f32::INFINITY,
        };
        let raising = self.entry.lock();
        let Some((entry, top)) = self.entry.get() else {
            if self.cells.state(node).is_live() {
                self.entry.set(Some((node, level)));
            }
            return;
        };
        // The lock is kept only by one that raises the top: others may link beside it.
        let raising = (level > top).then_some(raising);
        let graph = Graph { head: self, pin };
        let mut budget = Budget::unlimited();
        let start = descend(&graph, &distance, entry, (top, level.min(top)), &mut scratch.links, &mut budget);
        let Ok(mut start) = start else { return };
        let mut alone = false;
        for layer in (0..=level.min(top)).rev() {
            let accept = |other: u32| other != node && self.cells.state(other).is_live();
            let size = (self.params.ef_construction, layer);
            if walk_layer(&graph, &distance, &accept, start, size, scratch, &mut budget).is_err() {
                return;
            }
            let Scratch { best, sorted, chosen, .. } = scratch;
            sorted.clear();
            sorted.extend(best.drain());
            sorted.sort_unstable();
            chosen.clear();
            choose(&|a, b| self.between(pin, a, b), self.slack(), sorted, self.params.m, chosen);
            self.join(node, layer, chosen);
            start = sorted.first().copied().unwrap_or(start);
            alone = sorted.is_empty();
            let neighbours = std::mem::take(chosen);
            for neighbour in &neighbours {
                self.link_back(pin, neighbour, node, layer, scratch);
            }
            scratch.chosen = neighbours;
        }
        // Where all that a walk meets is deleted, walks begin here from now on.
        let raising = raising.or_else(|| alone.then(|| self.entry.lock()));
        if raising.is_some() && self.cells.state(node).is_live() {
            self.entry.set(Some((node, level)));
        }
    }

    /// Adds neighbours to a node's own links. What others linked back to already stays where there is room, what is kept
    /// in any case.
    fn join(&self, node: u32, layer: usize, chosen: &[Candidate]) {
        let list = self.cells.list(node, layer);
        let Some(_writing) = self.cells.lock(node) else { return };
        let is_new = |word: &u32| !chosen.iter().any(|new| new.node == target(*word));
        let live = |node: u32| self.cells.state(node).is_live();
        let old: Vec<u32> = words(list).filter(|word| live(target(*word))).collect();
        let kept = old.iter().copied().filter(|word| word & KEPT != 0);
        let fresh = chosen.iter().map(|new| new.node).filter(|new| live(*new));
        let fresh = fresh.filter(|new| !old.contains(&((new + 1) | KEPT))).map(|new| new + 1);
        let rest = old.iter().copied().filter(|word| word & KEPT == 0 && is_new(word));
        self.write(list, kept.chain(fresh).chain(rest));
    }

    /// Adds `node` to the neighbours of `of`, choosing anew where there is no room.
    fn link_back(&self, pin: &Pin<'_>, of: &Candidate, node: u32, layer: usize, scratch: &mut Scratch) {
        let list = self.cells.list(of.node, layer);
        let Some(_writing) = self.cells.lock(of.node) else { return };
        let state = (self.cells.state(of.node), self.cells.state(node));
        let Scratch { links: current, sorted, .. } = scratch;
        current.clear();
        current.extend(words(list));
        if !state.0.is_live() || !state.1.is_live() || current.iter().any(|word| target(*word) == node) {
            return;
        }
        if let Some(free) = list.get(current.len()) {
            free.store(node + 1, Ordering::Relaxed);
            return;
        }
        sorted.clear();
        sorted.push(Candidate { node, distance: of.distance });
        self.choose_anew(pin, of.node, layer, scratch);
    }

    /// Writes the links of a node, chosen from `scratch.sorted` and, where they live, the words in `scratch.links`. Under the
    /// node's lock.
    fn choose_anew(&self, pin: &Pin<'_>, node: u32, layer: usize, scratch: &mut Scratch) {
        let Scratch { links: current, sorted, chosen, .. } = scratch;
        current.retain(|word| self.cells.state(target(*word)).is_live());
        let far = |other: u32| self.between(pin, node, other);
        sorted.extend(current.iter().map(|word| Candidate { node: target(*word), distance: far(target(*word)) }));
        sorted.sort_unstable();
        current.retain(|word| word & KEPT != 0);
        chosen.clear();
        let mut kept = 0;
        for word in current.iter() {
            chosen.push(Candidate { node: target(*word), distance: 0.0 });
            kept += 1;
        }
        choose(&|a, b| self.between(pin, a, b), self.slack(), sorted, self.room(layer), chosen);
        let fresh = chosen.iter().skip(kept).map(|new| new.node + 1);
        self.write(self.cells.list(node, layer), current.iter().copied().chain(fresh));
    }

    /// Replaces a node's links to what is deleted by the best of those and of what that was linked to.
    pub(super) fn repair(&self, pin: &Pin<'_>, node: u32, layer: usize, scratch: &mut Scratch) {
        let list = self.cells.list(node, layer);
        let live = |node: u32| self.cells.state(node).is_live();
        if targets(list).all(live) {
            return;
        }
        let Some(_writing) = self.cells.lock(node) else { return };
        let Scratch { links: current, sorted, chosen: _, .. } = scratch;
        current.clear();
        current.extend(words(list));
        sorted.clear();
        let lost = current.iter().map(|word| target(*word)).filter(|other| !live(*other));
        let heirs = lost.flat_map(|lost| targets(self.cells.list(lost, layer)));
        let mut heirs: Vec<u32> = heirs.filter(|heir| *heir != node && live(*heir)).collect();
        heirs.sort_unstable();
        heirs.dedup();
        heirs.retain(|heir| !current.iter().any(|word| target(*word) == *heir));
        sorted.extend(heirs.iter().map(|heir| Candidate { node: *heir, distance: self.between(pin, node, *heir) }));
        // Far ones are not chosen anyway.
        sorted.sort_unstable();
        sorted.truncate(self.params.ef_construction);
        self.choose_anew(pin, node, layer, scratch);
    }

    /// A link in layer 0 that is kept; false where there is no room for it.
    pub(super) fn keep_link(&self, from: u32, to: u32) -> bool {
        let list = self.cells.list(from, 0);
        let Some(_writing) = self.cells.lock(from) else { return false };
        if !self.cells.state(from).is_live() || !self.cells.state(to).is_live() {
            return false;
        }
        let word = |place: &AtomicU32| place.load(Ordering::Relaxed);
        let there = list.iter().find(|place| word(place) != 0 && target(word(place)) == to);
        let free = || list.iter().find(|place| word(place) == 0);
        // The last one is the farthest of those that were chosen.
        let loose = || list.iter().rev().find(|place| word(place) & KEPT == 0);
        match there.or_else(free).or_else(loose) {
            Some(place) => {
                place.store((to + 1) | KEPT, Ordering::Relaxed);
                true
            }
            None => false,
        }
    }
}
