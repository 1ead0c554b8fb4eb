//! Looks at a sealed graph as a whole: what a search takes on trust, and steps around where it is wrong.

use crate::sealed::{FormatError, Sealed};
use crate::{Index, Metric};

impl Sealed {
    /// Does every link lead to another node of its layer, and a walk from where walks begin to every node? The latter is not
    /// asked of inner product, where builds leave short vectors without links (see `build.rs`).
    pub fn verify(&self) -> Result<(), FormatError> {
        let report = self.explore().connectivity();
        if report.layers.iter().any(|layer| layer.broken > 0) {
            return Err(FormatError("a link to a node that isn't there"));
        }
        match report.unreachable > 0 && self.space().metric() != Metric::InnerProduct {
            true => Err(FormatError("nodes that no walk reaches")),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
