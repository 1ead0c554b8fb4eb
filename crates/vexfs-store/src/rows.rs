//! A file's rows on their way in: in memory, or, where the budget has no room for so many, in a file of their own.

use vexfs_index::{Bytes, Huge, Place};

use crate::collection::BULK_ROWS;
use crate::put::Target;
use crate::volume::Volume;

/// Encoded rows, one after another.
pub struct Rows(Kept);

enum Kept {
    Memory(Vec<u8>),
    /// So many of the bytes are rows.
    File(Huge, usize),
}

impl Rows {
    /// Adds a row, or several; what is more than was asked room for is left out.
    pub fn push(&mut self, rows: &[u8]) {
        match &mut self.0 {
            Kept::Memory(bytes) => bytes.extend_from_slice(rows),
            Kept::File(bytes, filled) => {
                if let Some(to) = bytes.bytes_mut().get_mut(*filled..*filled + rows.len()) {
                    to.copy_from_slice(rows);
                    *filled += rows.len();
                }
            }
        }
    }
}

impl From<Vec<u8>> for Rows {
    fn from(bytes: Vec<u8>) -> Rows {
        Rows(Kept::Memory(bytes))
    }
}

impl Bytes for Rows {
    fn bytes(&self) -> &[u8] {
        match &self.0 {
            Kept::Memory(bytes) => bytes,
            Kept::File(bytes, filled) => &bytes.bytes()[..*filled],
        }
    }
}

impl Volume {
    /// Room for so many rows, for [`Volume::put`].
    pub fn rows(&self, target: &Target, count: usize) -> Rows {
        let bytes = count * target.space.row_bytes();
        if count >= BULK_ROWS && bytes > self.inner.budget.unsealed {
            let files = |len| self.inner.disk.scratch(len);
            match Place::Files(&files).zeroed(bytes) {
                Ok(file) => return Rows(Kept::File(file, 0)),
                Err(error) => {
                    log::warn!("{bytes} bytes of rows are kept in memory, as there is no file for them: {error}")
                }
            }
        }
        Rows(Kept::Memory(Vec::with_capacity(bytes)))
    }
}
