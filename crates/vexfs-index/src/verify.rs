//! Looks at a sealed graph as a whole: what a search takes on trust, and steps around where it is wrong.

use crate::sealed::{FormatError, Sealed};

impl Sealed {
    /// Does every link lead to a node of its layer, and a walk from where walks begin to every node?
    pub fn verify(&self) -> Result<(), FormatError> {
        let Some(graph) = &self.graph else { return Ok(()) };
        for (layer, count) in graph.counts.iter().enumerate() {
            let mut nodes = 0..*count as u32;
            if nodes.any(|node| graph.links(layer, node).any(|link| link as usize >= *count)) {
                return Err(FormatError("a link to a node that isn't there"));
            }
        }
        let mut met = vec![false; graph.nodes];
        let mut waiting = vec![0u32];
        let mut reached = 0;
        while let Some(node) = waiting.pop() {
            let Some(seen) = met.get_mut(node as usize) else { continue };
            if !std::mem::replace(seen, true) {
                reached += 1;
                waiting.extend(graph.links(0, node));
            }
        }
        match reached == graph.nodes {
            true => Ok(()),
            false => Err(FormatError("nodes that no walk reaches")),
        }
    }
}

#[cfg(test)]
mod tests;
