//! How the memory that a volume may use is shared out.
//!
//! A half is for copies on huge pages, less what names take, which nothing can bound but the number of files. A quarter is
//! for the one build that goes on at a time, whether it seals, merges or compacts: what needs more, be it for one large
//! file, works in a file of its own, whose pages the kernel takes where memory is short. A head takes a fortieth, all
//! of them a twentieth, what waits to be sealed and the catalog's pages a sixteenth each. The rest is slack for what is in the middle of
//! something: scratches, a transaction's rows, what the allocator keeps. Heads and what waits are those of all collections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vexfs_index::build_bytes;

use crate::collection::SEAL_BYTES;
use crate::schema::Schema;
use crate::segment::Segment;

/// The catalog holds small rows that are read once; more pages in memory would only be lost to vectors.
pub const CACHE_BYTES: usize = 8 << 20;

/// Room for what a build keeps in memory of each row (order, level, lock, file), though it works in a file: some 40 bytes.
const ROW_BYTES: u64 = 64;

/// See the module.
pub struct Budget {
    /// Bytes of a head from which it is sealed.
    pub head: usize,
    /// Bytes of all heads from which the largest is sealed.
    pub heads: usize,
    /// Bytes of points that may wait to be sealed, heads aside; past it who brings more waits.
    pub unsealed: usize,
    /// Bytes of the catalog's pages.
    pub cache: usize,
    /// Rows that one file may bring.
    pub rows: u64,
    /// Bytes of a build, rows included, from which it works in a file.
    build: u64,
    /// Bytes for copies on huge pages and for names.
    hot: u64,
    /// Bytes of the copies that there are.
    copied: Arc<AtomicU64>,
}

/// So many bytes of copies, as long as it lives.
pub struct Share {
    copied: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.copied.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

impl Budget {
    /// Of so many bytes; `None`: as much as is useful.
    pub fn new(bytes: Option<u64>) -> Budget {
        let Some(bytes) = bytes else {
            let info = rustix::system::sysinfo();
            let machine = info.totalram.saturating_mul(u64::from(info.mem_unit));
            return Budget {
                head: SEAL_BYTES,
                heads: 4 * SEAL_BYTES,
                unsealed: 4 * SEAL_BYTES,
                cache: CACHE_BYTES,
                rows: machine / 2 / ROW_BYTES,
                build: u64::MAX,
                hot: u64::MAX,
                copied: Arc::default(),
            };
        };
        let share = |part: u64| usize::try_from(bytes / part).unwrap_or(usize::MAX);
        Budget {
            head: share(40).min(SEAL_BYTES),
            heads: share(20).min(4 * SEAL_BYTES),
            unsealed: share(16).min(4 * SEAL_BYTES),
            cache: share(16).clamp(1 << 20, CACHE_BYTES),
            rows: bytes / ROW_BYTES,
            build: bytes / 4,
            hot: bytes / 2,
            copied: Arc::default(),
        }
    }

    /// Rows that a build in memory has room for, and so what a merge may be of. Four heads' at least: a point of a head
    /// takes more than half of what one of a build does.
    pub fn rows_in_memory(&self, schema: &Schema) -> u64 {
        self.build / (schema.space.row_bytes() + build_bytes(&schema.space, &schema.params)) as u64
    }

    /// Bytes of the copies that there are.
    pub fn copied(&self) -> u64 {
        self.copied.load(Ordering::Acquire)
    }

    /// Copies to huge pages what walks of the segment read, if there is memory for it beside `names`; otherwise it is
    /// served from the map, at the price of a third of a search's time.
    pub fn warm(&self, segment: &Segment, names: u64) {
        let most = self.hot.saturating_sub(names);
        let bytes = segment.index.hot_bytes() as u64;
        let more = |copied: u64| copied.checked_add(bytes).filter(|copied| *copied <= most);
        if bytes == 0 || self.copied.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_err() {
            return;
        }
        let share = Share { copied: Arc::clone(&self.copied), bytes };
        // Where it has one already this one goes back.
        if segment.copies.set(share).is_ok() {
            segment.index.warm();
        }
    }
}
