//! `vexfs bench`: measurements, not tests.

pub mod filter;
pub mod fs;
mod graph;
pub mod head;
pub mod index;
pub mod soak;
pub mod store;

use std::fs::File;
use std::path::Path;

use vexfs_fs::formats::{Format, Source};
use vexfs_fs::index::{Metric, Space};

/// Rows of a file, as an index keeps them.
struct Rows {
    bytes: Vec<u8>,
    space: Space,
}

fn read(path: &Path) -> Result<Source, String> {
    let at = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
    let format = path.file_name().and_then(Format::of).ok_or_else(|| at(&"neither .vec nor .npy"))?;
    let file = File::open(path).map_err(|error| at(&error))?;
    Source::open(format, &file).map_err(|refusal| at(&refusal.reason))?.ok_or_else(|| at(&"holds no vector"))
}

/// At most `rows` rows.
fn read_base(path: &Path, metric: Metric, rows: Option<usize>) -> Result<Rows, String> {
    let source = read(path)?;
    let shape = source.shape();
    let space = Space::new(shape.dimension, metric, shape.element).map_err(|error| error.to_string())?;
    let mut bytes = source.encode(&space).map_err(|refusal| format!("{}: {}", path.display(), refusal.reason))?;
    bytes.truncate(rows.unwrap_or(usize::MAX).saturating_mul(space.row_bytes()));
    // Memory is measured too.
    bytes.shrink_to_fit();
    Ok(Rows { bytes, space })
}

fn read_queries(path: &Path, space: &Space) -> Result<Vec<Vec<f32>>, String> {
    let source = read(path)?;
    if source.shape().dimension != space.dim() {
        return Err(format!("queries of {} dimensions, base of {}", source.shape().dimension, space.dim()));
    }
    source.rows().map_err(|refusal| refusal.reason)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Numbers in an order of no meaning, the same each time (xorshift).
struct Random(u64);

impl Random {
    /// Seeds that are alike give numbers that aren't.
    fn new(seed: u64) -> Random {
        let mixed = (seed ^ (seed >> 32)).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Random((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1)
    }

    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 20) % n.max(1) as u64) as usize
    }
}
