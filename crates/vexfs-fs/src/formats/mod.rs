//! Vector formats: which files hold vectors, and what is in them.
//!
//! A reading has two steps, because the collection's schema depends on what comes first: [`Source::open`] tells the
//! shape, [`Source::encode`] gives rows for a space. Whatever the bytes are, the answer is rows or a [`Refusal`].

mod npy;
#[cfg(test)]
mod tests;
mod text;

pub use text::parse as parse_text;

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;
use vexfs_store::PutError;
use vexfs_store::index::{Element, MAX_DIM, Space, VectorError};

/// Most bytes of encoded rows that one file may bring.
pub const MAX_BYTES: u64 = 4 << 30;

/// A format, by the file's name.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// `.vec`: one vector as text.
    Text,
    /// `.npy`: NumPy's format, one vector or a row each.
    Npy,
}

impl Format {
    /// The format of a name's extension, in any case; `None` for a file that holds no vectors.
    pub fn of(name: &OsStr) -> Option<Format> {
        let bytes = name.as_bytes();
        let dot = bytes.iter().rposition(|byte| *byte == b'.')?;
        match bytes[dot + 1..].to_ascii_lowercase().as_slice() {
            b"vec" => Some(Format::Text),
            b"npy" => Some(Format::Npy),
            _ => None,
        }
    }
}

/// Why a file isn't indexed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What close(2) and fsync(2) answer under `--strict`.
    pub errno: Errno,
    /// In words, with the place.
    pub reason: String,
}

impl Refusal {
    /// Bytes that are not what the name promises.
    pub fn malformed(reason: impl Into<String>) -> Refusal {
        Refusal { errno: Errno::INVAL, reason: reason.into() }
    }

    /// Past a limit.
    pub fn too_big(reason: impl Into<String>) -> Refusal {
        Refusal { errno: Errno::TOOBIG, reason: reason.into() }
    }

    /// Is it the fault of a disk or of the machine, and not of what the file holds? Then it may pass.
    pub fn may_pass(&self) -> bool {
        !matches!(self.errno, Errno::INVAL | Errno::TOOBIG | Errno::MSGSIZE)
    }
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Refusal {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        Refusal { errno, reason: format!("can't be read: {error}") }
    }
}

impl From<PutError> for Refusal {
    fn from(error: PutError) -> Refusal {
        let errno = match &error {
            PutError::Vector { error: VectorError::WrongDimension { .. }, .. } => Errno::MSGSIZE,
            PutError::TooLarge(_) => Errno::TOOBIG,
            PutError::Room { errno, .. } => Errno::from_raw_os_error(*errno),
            _ => Errno::INVAL,
        };
        Refusal { errno, reason: error.to_string() }
    }
}

/// What a file says that it holds.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Vectors.
    pub rows: usize,
    /// Numbers in each.
    pub dimension: usize,
    /// What they are stored as; wider types become `f32`.
    pub element: Element,
}

/// A file whose header has been read.
pub enum Source {
    /// The vector of a `.vec`.
    Text(Vec<f32>),
    /// A `.npy` before its data.
    Npy(npy::Array),
}

impl Source {
    /// Reads the header. `None`: the file holds no vector, which is no error.
    pub fn open(format: Format, file: &File) -> Result<Option<Source>, Refusal> {
        let len = file.metadata()?.len();
        if len == 0 {
            return Ok(None);
        }
        let source = match format {
            Format::Text => text::read(file, len)?.map(Source::Text),
            Format::Npy => Some(Source::Npy(npy::Array::open(file, len)?)),
        };
        let Some(source) = source else { return Ok(None) };
        let Shape { rows, dimension, .. } = source.shape();
        if rows == 0 {
            return Ok(None);
        }
        if dimension == 0 {
            return Err(Refusal::malformed("vectors of 0 dimensions"));
        }
        if dimension > MAX_DIM {
            return Err(Refusal::too_big(format!("{dimension} dimensions; at most {MAX_DIM} are supported")));
        }
        Ok(Some(source))
    }

    /// Rows and dimension.
    pub fn shape(&self) -> Shape {
        match self {
            Source::Text(vector) => Shape { rows: 1, dimension: vector.len(), element: Element::F32 },
            Source::Npy(array) => array.shape(),
        }
    }

    /// All rows, encoded for `space`.
    pub fn encode(self, space: &Space) -> Result<Vec<u8>, Refusal> {
        let mut out = Vec::with_capacity(self.encoded_bytes(space)?);
        self.encode_each(space, &mut |row| out.extend_from_slice(row))?;
        Ok(out)
    }

    /// Bytes of all rows, encoded for `space`.
    pub fn encoded_bytes(&self, space: &Space) -> Result<usize, Refusal> {
        let bytes = (self.shape().rows as u64).saturating_mul(space.row_bytes() as u64);
        if bytes > MAX_BYTES {
            return Err(Refusal::too_big(format!("{bytes} bytes of vectors; a file may bring {MAX_BYTES}")));
        }
        Ok(bytes as usize)
    }

    /// Visits the rows in order, encoded for `space`.
    pub fn encode_each(self, space: &Space, visit: &mut dyn FnMut(&[u8])) -> Result<(), Refusal> {
        self.encoded_bytes(space)?;
        let (mut encoded, mut row) = (Vec::with_capacity(space.row_bytes()), 0);
        self.for_each(&mut |vector| {
            encoded.clear();
            space.encode(vector, &mut encoded).map_err(|error| Refusal::from(PutError::Vector { row, error }))?;
            visit(&encoded);
            row += 1;
            Ok(())
        })
    }

    /// All rows as numbers.
    pub fn rows(self) -> Result<Vec<Vec<f32>>, Refusal> {
        let mut rows = Vec::new();
        self.for_each(&mut |row| {
            rows.push(row.to_vec());
            Ok(())
        })?;
        Ok(rows)
    }

    /// One row as numbers.
    pub fn row(self, wanted: usize) -> Result<Vec<f32>, Refusal> {
        let rows = self.shape().rows;
        let mut found = None;
        let mut row = 0;
        self.for_each(&mut |vector| {
            if row == wanted {
                found = Some(vector.to_vec());
            }
            row += 1;
            Ok(())
        })?;
        found.ok_or_else(|| Refusal {
            errno: Errno::NODATA,
            reason: format!("there is no row {wanted}: the file has {rows}"),
        })
    }

    fn for_each(self, visit: &mut dyn FnMut(&[f32]) -> Result<(), Refusal>) -> Result<(), Refusal> {
        match self {
            Source::Text(vector) => visit(&vector),
            Source::Npy(array) => array.for_each(visit),
        }
    }
}
