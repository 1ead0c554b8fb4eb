//! A file's rows on their way in: in memory, or, where the budget has no room for so many, in a file of their own.

use vexfs_index::{Bytes, Huge, Place};

use rustix::io::Errno;

use crate::collection::BULK_ROWS;
use crate::error::PutError;
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
    /// Room for so many rows, for [`Volume::put`]. An error where they are more than memory may be taken for, or the file
    /// that is to hold them can't be had.
    pub fn rows(&self, target: &Target, count: usize) -> Result<Rows, PutError> {
        let budget = &self.inner.budget;
        if count as u64 > budget.rows {
            let room = budget.rows;
            return Err(PutError::TooLarge(format!(
                "{count} rows; the volume's memory has room to index {room} of a file"
            )));
        }
        let bytes = count * target.space.row_bytes();
        if count < BULK_ROWS || bytes <= budget.unsealed {
            return Ok(Rows(Kept::Memory(Vec::with_capacity(bytes))));
        }
        let files = |len| self.inner.disk.scratch(len);
        let file = Place::Files(&files).zeroed(bytes).map_err(|error| PutError::Room {
            bytes,
            errno: error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()),
            message: error.to_string(),
        })?;
        Ok(Rows(Kept::File(file, 0)))
    }
}
