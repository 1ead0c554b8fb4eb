//! Vectors in memory: distance kernels, quantisation, HNSW graphs (Malkov & Yashunin, arXiv 1603.09320), filters.
//!
//! A pure library: it opens no file, knows no FUSE and starts no thread but those of [`build_in`]. Rows are byte
//! slices, little-endian, [`Space::row_bytes`] long; queries are `f32`. Inside the index smaller distances are
//! nearer: L2 is the squared Euclidean distance, inner product is negated, cosine is 1 − similarity.

mod build;
mod codes;
mod explore;
mod flat;
mod graph;
mod hnsw;
mod kernels;
mod mutable;
mod raw;
mod request;
mod sealed;
mod space;
mod sync;
#[cfg(test)]
mod tests;
mod verify;
// Not below `mutable`, which a test compiles a second time.
#[cfg(test)]
#[path = "mutable/schedules.rs"]
mod mutable_schedules;
#[cfg(test)]
#[path = "mutable/tests.rs"]
mod mutable_tests;

use std::sync::Arc;

pub use build::{Built, GoOn, Sections, build, build_bytes, build_in};
pub use explore::{Connectivity, Explorer, LayerReport};
pub use flat::Flat;
pub use mutable::{Mutable, Reach};
pub use raw::{Huge, Place};
pub use request::{Bits, Effort, Filter, Neighbor, Request, Scratch, SearchError, Stats, Until};
pub use sealed::{FormatError, Sealed};
pub use space::{Element, Metric, Quantization, Space, SpaceError, VectorError};

/// Most numbers in a vector.
pub const MAX_DIM: usize = 65_536;

/// A point's dense number inside one index.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// How a graph is built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Params {
    /// Links of a node in the upper layers; twice as many in layer 0.
    pub m: usize,
    /// Candidates kept while a node is linked.
    pub ef_construction: usize,
    /// What a sealed graph is walked on.
    pub quantization: Quantization,
    /// Of the random levels.
    pub seed: u64,
}

impl Default for Params {
    fn default() -> Params {
        Params { m: 16, ef_construction: 200, quantization: Quantization::Sq8, seed: 0x5eed }
    }
}

/// Bytes that live as long as the index over them: a mapped file, or memory.
pub trait Bytes: Send + Sync {
    /// The bytes; always the same ones.
    fn bytes(&self) -> &[u8];
}

/// Shared bytes.
pub type Region = Arc<dyn Bytes>;

impl Bytes for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A region of a copy of `bytes`.
pub fn region(bytes: &[u8]) -> Region {
    Arc::new(bytes.to_vec())
}

/// A region of `bytes`.
pub fn region_from(bytes: Vec<u8>) -> Region {
    Arc::new(bytes)
}

/// Bytes that an index keeps, a point's share being the quotient.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Graph and codes.
    pub index: u64,
    /// Full-precision rows.
    pub vectors: u64,
}

/// Something that can be searched.
pub trait Index: Send + Sync {
    /// What its rows are.
    fn space(&self) -> &Space;
    /// Slots given out.
    fn len(&self) -> usize;
    /// Replaces `out` by the row of a slot. False (and `out` is empty) where it holds no point, or none any more.
    fn read(&self, slot: Slot, out: &mut Vec<u8>) -> bool;
    /// Writes the hits to `out`, nearest first, ties by slot: `k` of them where `k` allowed points exist.
    fn search(
        &self,
        query: &[f32],
        request: &Request<'_>,
        scratch: &mut Scratch,
        out: &mut Vec<Neighbor>,
    ) -> Result<Stats, SearchError>;
    /// Bytes kept.
    fn memory(&self) -> Memory;
    /// True without slots.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Is a graph walked? Otherwise every search is exact.
    fn is_walked(&self) -> bool {
        false
    }

    /// Measures what a recall takes for `queries` that were asked: from now on no less is done for it (decision 19). False
    /// if it was not to `go_on`, which is asked before each.
    fn learn(&self, _queries: &[Vec<f32>], _go_on: GoOn<'_>) -> bool {
        true
    }
}

/// For [`Index::read`], of rows that are never empty.
fn copy(row: &[u8], out: &mut Vec<u8>) -> bool {
    out.clear();
    out.extend_from_slice(row);
    !row.is_empty()
}
