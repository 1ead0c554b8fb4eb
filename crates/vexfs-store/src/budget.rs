//! How the memory that a volume may use is shared out.
//!
//! It covers what is kept: heads, what waits to be sealed, copies on huge pages. A build takes what it needs for the rows
//! that it is of, a few times their bytes, and gives it back: heads are sealed early enough, and merges are kept small
//! enough, that this fits too. A single file that is larger than that, and compacting when asked, take what they take.

use std::sync::atomic::{AtomicU64, Ordering};

use vexfs_index::Index;

use crate::collection::SEAL_BYTES;
use crate::segment::Segment;

/// See the module.
pub struct Budget {
    /// Bytes of a head's vectors from which it is sealed.
    pub head: usize,
    /// Bytes of a collection's vectors that may wait to be sealed, the head aside; past it who brings more waits.
    pub unsealed: usize,
    /// Bytes of vectors that a merge may be of.
    pub merge: u64,
    /// Bytes left for copies on huge pages.
    hot: AtomicU64,
}

impl Budget {
    /// Of so many bytes; `None`: as much as is useful.
    pub fn new(bytes: Option<u64>) -> Budget {
        let Some(bytes) = bytes else {
            return Budget {
                head: SEAL_BYTES,
                unsealed: 4 * SEAL_BYTES,
                merge: u64::MAX,
                hot: AtomicU64::new(u64::MAX),
            };
        };
        let eighth = usize::try_from(bytes / 8).unwrap_or(usize::MAX);
        // A point of a head takes its vector about twice: the row and its links.
        let head = (eighth / 2).clamp(1 << 16, SEAL_BYTES);
        // Four heads at least, or nothing would ever be merged.
        let merge = (bytes / 8).max(4 * head as u64);
        Budget { head, unsealed: eighth.min(4 * SEAL_BYTES), merge, hot: AtomicU64::new(bytes / 2) }
    }

    /// Copies to huge pages what walks of the segment read, if there is memory for it; otherwise it is served from the
    /// map, at the price of a third of a search's time.
    pub fn warm(&self, segment: &Segment) {
        let wanted = segment.hot_bytes;
        let taken = self.hot.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(wanted));
        if taken.is_ok() {
            segment.index.warm();
        }
    }

    /// The segment and its copies are gone.
    pub fn cooled(&self, segment: &Segment) {
        if segment.index.memory().index > 0 {
            self.hot.fetch_add(segment.hot_bytes, Ordering::AcqRel);
        }
    }
}
