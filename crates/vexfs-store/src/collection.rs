//! A collection in memory: its schema, its parts and the head that takes new points.

use std::ops::Range;
use std::sync::Arc;

use vexfs_index::{Mutable, Scratch, Slot};

use crate::asked::Asked;
use crate::catalog::CollectionRow;
use crate::id::{CollectionId, Generation};
use crate::part::{Part, Reading};
use crate::schema::Schema;
use crate::sync::{ArcSwap, ArcSwapOption, Mutex};

/// Points in a head beyond which it is sealed.
pub const SEAL_POINTS: usize = 50_000;
/// Dead points of a head beyond which it is sealed when they are no fewer than the live ones: they go, as nothing takes
/// them out of a head.
const SEAL_DEAD: u64 = 4_096;
/// Bytes of a head beyond which it is sealed.
pub const SEAL_BYTES: usize = 64 << 20;
/// Rows of one file from which it becomes a segment of its own without passing through the head.
pub const BULK_ROWS: usize = 8_192;
/// Pending points of a head beyond which a writer links its own before it goes on. A head is sealed when it has as many,
/// so that this is met only while one can't be.
const MAX_PENDING: u64 = SEAL_POINTS as u64;

/// See the module.
pub struct Collection {
    /// Its number.
    pub id: CollectionId,
    /// What the catalog holds of it; changed under the volume's writer lock only.
    pub row: Mutex<CollectionRow>,
    /// Complete from the first vector on.
    pub schema: ArcSwapOption<Schema>,
    /// The head first (once there is a schema), then frozen heads, bulk files and segments.
    pub parts: ArcSwap<Vec<Arc<Part>>>,
    /// Held while rows are appended to the head and while the head is changed for a new one.
    pub append: Mutex<()>,
    /// What it was asked.
    pub asked: Asked,
}

impl Collection {
    /// From a row; `schema` if the row is complete.
    pub fn new(id: CollectionId, row: CollectionRow, schema: Option<Schema>) -> Arc<Collection> {
        let parts = schema.as_ref().map(new_head).into_iter().collect();
        Arc::new(Collection {
            id,
            row: Mutex::new(row),
            schema: ArcSwapOption::from_pointee(schema),
            parts: ArcSwap::from_pointee(parts),
            append: Mutex::new(()),
            asked: Asked::default(),
        })
    }

    /// Gives an incomplete collection its schema and its first head.
    pub fn complete(&self, schema: Schema) {
        self.parts.store(Arc::new(vec![new_head(&schema)]));
        self.schema.store(Some(Arc::new(schema)));
    }

    /// The head that takes points now.
    pub fn head(&self) -> Option<Arc<Part>> {
        self.parts.load().first().cloned()
    }

    /// Appends a reading's rows to the head; `None` if there is none.
    pub fn append(&self, reading: &Arc<Reading>, generation: Generation, rows: &[u8]) -> Option<Appended> {
        let _appending = self.append.lock();
        let head = self.head()?;
        let before = head.waiting_bytes();
        let slots = head.append(reading, generation, rows)?;
        let grown = head.waiting_bytes() - before;
        Some(Appended { head, slots, grown })
    }

    /// Are more points pending than may be left to the thread behind?
    pub fn is_far_behind(&self) -> bool {
        self.head().is_some_and(|head| head.pending() > MAX_PENDING)
    }

    /// Is the head to be sealed: for its points, for these bytes, or for the dead?
    pub fn head_is_full(&self, bytes: usize) -> bool {
        self.head().is_some_and(|head| {
            let dead = head.ended_points() >= SEAL_DEAD && head.is_mostly_dead();
            head.index().len() >= SEAL_POINTS || head.waiting_bytes() >= bytes || dead
        })
    }

    /// Bytes that wait to be sealed, the head aside.
    pub fn unsealed_bytes(&self) -> usize {
        self.parts.load().iter().skip(1).map(|part| part.waiting_bytes()).sum()
    }

    /// Points whose reading has not ended.
    pub fn live_points(&self) -> u64 {
        self.parts.load().iter().map(|part| part.live_points()).sum()
    }
}

/// Rows that were appended to a head.
pub struct Appended {
    head: Arc<Part>,
    slots: Range<u32>,
    /// Bytes of memory by which the head grew.
    pub grown: usize,
}

impl Appended {
    /// Puts the rows into the head's graph.
    pub fn link(self, scratch: &mut Scratch) {
        if let Some(index) = self.head.as_head() {
            self.slots.for_each(|slot| index.link(Slot(slot), scratch));
        }
    }
}

/// An empty head for the schema.
pub fn new_head(schema: &Schema) -> Arc<Part> {
    Part::head(Mutable::new(schema.space, schema.params.clone()))
}
