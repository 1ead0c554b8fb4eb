//! What keeps a head in order: taking out what was deleted, keeping every point within reach.

use super::super::sync::Ordering;
use super::cells::{Pin, State};
use super::links::targets;
use super::{Mutable, lock};
use crate::Scratch;

/// Deleted points that are taken out together, at least and as a share of all.
const SWEEP: (usize, usize) = (64, 8);
/// The share of points after which the reach is looked at again.
const MEND: usize = 4;
/// Times that what is out of reach is looked for: a link that is given may take the place of another.
const ROUNDS: usize = 8;

/// When what was done last.
#[derive(Default)]
pub struct Tended {
    /// Links that had been made when the reach was looked at.
    mended: usize,
}

/// How a head's graph hangs together.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Points in the graph that are not deleted.
    pub points: usize,
    /// Those that a walk in layer 0 from where walks begin doesn't come to.
    pub unreachable: usize,
    /// Links of those points that lead to what is deleted, or nowhere.
    pub stale: usize,
}

impl Mutable {
    /// Does what is due: takes deleted points out of the graph and links what walks don't reach. One thread at a time
    /// does; for others, and where nothing is due, this costs little. Without it a head stays right but grows and slows down.
    pub fn tend(&self, scratch: &mut Scratch) {
        let Ok(mut tended) = self.tended.try_lock() else { return };
        self.cells.recycle();
        let dead = lock(&self.dead).len();
        let swept = dead >= SWEEP.0.max(self.live() / SWEEP.1);
        if swept {
            self.sweep(scratch);
        }
        let linked = self.linked.load(Ordering::SeqCst);
        let grown = linked - tended.mended >= (self.live() / MEND).max(self.scan_below / MEND);
        if !self.is_small() && (swept || grown) {
            tended.mended = linked;
            self.mend(scratch);
        }
    }

    /// As [`Mutable::tend`], also for little: what walks reach is whole and free of what is deleted afterwards, unless others
    /// insert or delete meanwhile. For when there is nothing else to do.
    pub fn tidy(&self, scratch: &mut Scratch) {
        let mut tended = lock(&self.tended);
        let swept = !lock(&self.dead).is_empty();
        if swept {
            self.sweep(scratch);
        }
        let linked = self.linked.load(Ordering::SeqCst);
        if swept || linked != tended.mended {
            tended.mended = linked;
            self.mend(scratch);
        }
        self.cells.recycle();
    }

    /// Takes what is deleted by now out of the graph.
    fn sweep(&self, scratch: &mut Scratch) {
        let dead = std::mem::take(&mut *lock(&self.dead));
        {
            let pin = self.cells.pin();
            for node in 0..self.cells.len() as u32 {
                if self.cells.state(node).is_live() {
                    for layer in 0..=self.cells.level(node) {
                        self.repair(&pin, node, layer, scratch);
                    }
                }
            }
            self.replace_entry();
        }
        self.cells.retire(dead);
        self.cells.recycle();
    }

    /// Walks begin at a living node of the highest layer.
    fn replace_entry(&self) {
        let _raising = self.entry.lock();
        let nodes = (0..self.cells.len() as u32).filter(|node| self.in_graph(*node));
        let highest = nodes.map(|node| (self.cells.level(node), node)).max();
        let current = self.entry.get().filter(|(node, _)| self.cells.state(*node).is_live());
        if let (Some((_, layer)), Some((level, _))) = (current, highest)
            && layer >= level
        {
            return;
        }
        self.entry.set(highest.map(|(level, node)| (node, level)));
    }

    /// Linked and not deleted.
    pub(super) fn in_graph(&self, node: u32) -> bool {
        let state = self.cells.state(node);
        state.is_live() && state.has(State::LINKED)
    }

    /// Links what a walk in layer 0 doesn't reach, there and back, by links that are kept.
    fn mend(&self, scratch: &mut Scratch) {
        let pin = self.cells.pin();
        for _ in 0..ROUNDS {
            let Some((entry, _)) = self.entry.get() else { return };
            let mut met = vec![false; self.cells.len()];
            self.spread(entry, &mut met);
            let mut whole = true;
            for node in 0..met.len() as u32 {
                if met[node as usize] || !self.in_graph(node) {
                    continue;
                }
                whole = false;
                self.attach(&pin, node, &met, scratch);
                self.spread(node, &mut met);
            }
            if whole {
                return;
            }
        }
    }

    fn attach(&self, pin: &Pin<'_>, node: u32, met: &[bool], scratch: &mut Scratch) {
        self.weave(pin, node, scratch);
        let reached = |other: &u32| met.get(*other as usize) == Some(&true);
        let near: Vec<u32> = targets(self.cells.list(node, 0)).filter(reached).collect();
        let all = 0..met.len() as u32;
        if let Some(from) = near.into_iter().chain(all.filter(reached)).find(|from| self.keep_link(*from, node)) {
            self.keep_link(node, from);
        }
    }

    /// Marks what links in layer 0 lead to.
    fn spread(&self, from: u32, met: &mut [bool]) {
        let mut queue = vec![from];
        met[from as usize] = true;
        while let Some(node) = queue.pop() {
            for other in targets(self.cells.list(node, 0)) {
                if let Some(met) = met.get_mut(other as usize)
                    && !*met
                    && self.cells.state(other).is_live()
                {
                    *met = true;
                    queue.push(other);
                }
            }
        }
    }

    /// How the graph hangs together now.
    pub fn reach(&self) -> Reach {
        let _pin = self.cells.pin();
        let mut met = vec![false; self.cells.len()];
        if let Some((entry, _)) = self.entry.get() {
            self.spread(entry, &mut met);
        }
        let mut reach = Reach::default();
        for node in (0..met.len() as u32).filter(|node| self.in_graph(*node)) {
            reach.points += 1;
            reach.unreachable += usize::from(!met[node as usize]);
            let lists = (0..=self.cells.level(node)).flat_map(|layer| targets(self.cells.list(node, layer)));
            reach.stale += lists.filter(|other| !self.cells.state(*other).is_live()).count();
        }
        reach
    }
}
