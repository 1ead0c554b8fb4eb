//! Rows without a graph: every search is an exact scan.

use crate::graph::Nodes;
use crate::kernels::Prepared;
use crate::request::{Budget, deliver, scan};
use crate::{Index, Memory, Neighbor, Region, Request, Scratch, SearchError, Slot, Space, Stats};

/// See the module. What a bulk load is until its graph is built.
pub struct Flat {
    space: Space,
    rows: Region,
}

impl Flat {
    /// `rows` are whole rows of the space; bytes of a partial last one are ignored.
    pub fn new(space: Space, rows: Region) -> Flat {
        Flat { space, rows }
    }

    /// All rows.
    pub fn rows(&self) -> &[u8] {
        &self.rows.bytes()[..self.len() * self.space.row_bytes()]
    }

    /// The row of a slot; empty where there is none.
    pub fn row(&self, slot: Slot) -> &[u8] {
        let size = self.space.row_bytes();
        self.rows.bytes().get(slot.0 as usize * size..).and_then(|rows| rows.get(..size)).unwrap_or_default()
    }
}

impl Index for Flat {
    fn space(&self) -> &Space {
        &self.space
    }

    fn len(&self) -> usize {
        self.rows.bytes().len() / self.space.row_bytes()
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
        let query = Prepared::again(scratch.exact.take(), &self.space, query);
        let mut budget = Budget::new(request);
        scratch.best.clear();
        let allowed = |node: u32| request.allows(node);
        let mut nodes = Nodes::Passing(0..self.len() as u32, &allowed);
        let Scratch { best, links, .. } = &mut *scratch;
        let scanned = scan(&mut nodes, |node| self.row(Slot(node)), &query, request.k, (links, best), &mut budget);
        scratch.exact = Some(query);
        scanned?;
        deliver(&mut scratch.best, request, out);
        Ok(budget.stats)
    }

    fn memory(&self) -> Memory {
        Memory { index: 0, vectors: self.rows.bytes().len() as u64 }
    }
}
