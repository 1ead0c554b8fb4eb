//! A head's graph by slots, for who looks at it (`explore.rs`).

use super::{Mutable, links};
use crate::{Index, Slot};

impl Mutable {
    /// The point that walks begin at, and its layer.
    pub(crate) fn entry_point(&self) -> Option<(u32, usize)> {
        let _pin = self.cells.pin();
        let (node, layer) = self.entry.get()?;
        Some((self.slot_of(node)?, layer))
    }

    /// The highest layer that a point is linked in; `None` where it is pending or gone.
    pub(crate) fn top(&self, slot: u32) -> Option<usize> {
        let _pin = self.cells.pin();
        let node = self.node(Slot(slot)).filter(|node| self.slot_of(*node) == Some(slot))?;
        Some(self.cells.level(node))
    }

    /// Replaces `out` by the points that a point's list in a layer leads to, deleted ones left out.
    pub(crate) fn linked_to(&self, slot: u32, layer: usize, out: &mut Vec<u32>) {
        let _pin = self.cells.pin();
        out.clear();
        if let Some(node) = self.node(Slot(slot)).filter(|node| self.slot_of(*node) == Some(slot)) {
            out.extend(links::targets(self.cells.list(node, layer)).filter_map(|other| self.slot_of(other)));
        }
    }

    /// Full-precision distance of two points; infinite where one is gone.
    pub(crate) fn apart(&self, one: u32, other: u32) -> f32 {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        match self.read(Slot(one), &mut a) && self.read(Slot(other), &mut b) {
            true => crate::kernels::between(&self.space, &a, &b),
            false => f32::INFINITY,
        }
    }

    /// The living point that a node of the graph holds.
    fn slot_of(&self, node: u32) -> Option<u32> {
        self.cells.state(node).slot().filter(|_| self.in_graph(node))
    }
}
