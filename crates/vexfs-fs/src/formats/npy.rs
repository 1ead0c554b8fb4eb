//! `.npy`: a 1-D array is one vector, a 2-D array a row each. The header is parsed by `npyz`, behind checks that
//! keep hostile headers small.

use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::FileExt;

use npyz::{DType, NpyFile, NpyHeader, Order, TypeChar, TypeRead};
use vexfs_store::index::Element;

use super::text::ReadAt;
use super::{Refusal, Shape};

/// Longest header that is parsed; NumPy's own arrays of numbers need some 100 bytes.
const MAX_HEADER: u64 = 64 << 10;
/// Numbers of a file in Fortran order are held as many at a time.
const BLOCK_BYTES: usize = 8 << 20;
/// Brackets inside brackets that a header of a plain array can need.
const MAX_NESTING: usize = 8;

/// The element types of a file.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Kind {
    F2,
    F4,
    F8,
    I1,
    U1,
}

impl Kind {
    fn bytes(self) -> usize {
        match self {
            Kind::I1 | Kind::U1 => 1,
            Kind::F2 => 2,
            Kind::F4 => 4,
            Kind::F8 => 8,
        }
    }
}

/// An array whose header is known.
pub struct Array {
    file: File,
    header: NpyHeader,
    data: u64,
    kind: Kind,
    shape: Shape,
}

impl Array {
    /// Reads and checks the header of a file of `len` bytes.
    pub fn open(file: &File, len: u64) -> Result<Array, Refusal> {
        let file = file.try_clone()?;
        let data = header_end(&file, len)?;
        let header = parse_header(&file)?;
        let kind = kind_of(&header.dtype())?;
        let (rows, dimension) = match *header.shape() {
            [dimension] => (1, dimension),
            [rows, dimension] => (rows, dimension),
            ref other => {
                return Err(Refusal::malformed(format!(
                    "an array of {} dimensions; 1 (a vector) or 2 (a row each) are wanted",
                    other.len()
                )));
            }
        };
        let size = kind.bytes() as u64;
        let Some(bytes) = rows.checked_mul(dimension).and_then(|n| n.checked_mul(size)) else {
            return Err(Refusal::too_big(format!("shape ({rows}, {dimension}) is past any file's size")));
        };
        if bytes > len - data {
            return Err(Refusal::malformed(format!(
                "truncated: shape ({rows}, {dimension}) takes {bytes} bytes after the header, the file has {}",
                len - data
            )));
        }
        if rows > u64::from(u32::MAX) {
            return Err(Refusal::too_big(format!("{rows} rows")));
        }
        let element = match kind {
            Kind::F2 => Element::F16,
            Kind::F4 | Kind::F8 => Element::F32,
            Kind::I1 => Element::I8,
            Kind::U1 => Element::U8,
        };
        let shape = Shape { rows: rows as usize, dimension: dimension as usize, element };
        Ok(Array { file, header, data, kind, shape })
    }

    /// Rows, dimension and element.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Visits the rows in order.
    pub fn for_each(self, visit: &mut dyn FnMut(&[f32]) -> Result<(), Refusal>) -> Result<(), Refusal> {
        match self.kind {
            Kind::F2 => self.values::<half::f16>(half::f16::to_f32, visit),
            Kind::F4 => self.values::<f32>(|value| value, visit),
            Kind::F8 => self.values::<f64>(|value| value as f32, visit),
            Kind::I1 => self.values::<i8>(f32::from, visit),
            Kind::U1 => self.values::<u8>(f32::from, visit),
        }
    }

    fn values<T: npyz::Deserialize>(
        self,
        number: fn(T) -> f32,
        visit: &mut dyn FnMut(&[f32]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let Shape { rows, dimension, .. } = self.shape;
        if self.header.order() == Order::Fortran && rows > 1 {
            return self.columns(number, visit);
        }
        let reader = BufReader::with_capacity(256 << 10, ReadAt { file: &self.file, at: self.data });
        let values = NpyFile::with_header(self.header, reader)
            .data::<T>()
            .map_err(|error| Refusal::malformed(error.to_string()))?;
        let mut row = Vec::with_capacity(dimension);
        for value in values {
            row.push(number(value?));
            if row.len() == dimension {
                visit(&row)?;
                row.clear();
            }
        }
        Ok(())
    }

    /// As [`Array::values`], of a file that holds column after column: a block of rows at a time.
    fn columns<T: npyz::Deserialize>(
        self,
        number: fn(T) -> f32,
        visit: &mut dyn FnMut(&[f32]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let Shape { rows, dimension, .. } = self.shape;
        let value = T::reader(&self.header.dtype()).map_err(|error| Refusal::malformed(error.to_string()))?;
        let size = self.kind.bytes();
        let block = (BLOCK_BYTES / (dimension * size_of::<f32>())).clamp(1, rows);
        let (mut table, mut bytes) = (vec![0.0; block * dimension], vec![0; block * size]);
        for first in (0..rows).step_by(block) {
            let count = block.min(rows - first);
            for column in 0..dimension {
                let at = self.data + ((column * rows + first) * size) as u64;
                self.file.read_exact_at(&mut bytes[..count * size], at)?;
                for (row, bytes) in bytes[..count * size].chunks_exact(size).enumerate() {
                    table[row * dimension + column] = number(value.read_one(bytes)?);
                }
            }
            table[..count * dimension].chunks_exact(dimension).try_for_each(&mut *visit)?;
        }
        Ok(())
    }
}

/// Checks magic, version and header length; returns where the data begins.
fn header_end(file: &File, len: u64) -> Result<u64, Refusal> {
    let mut start = [0; 12];
    let got = (len as usize).min(start.len());
    file.read_exact_at(&mut start[..got], 0)?;
    if got < 10 || start[..6] != *b"\x93NUMPY" {
        return Err(Refusal::malformed("no .npy header"));
    }
    let (begin, header) = match (start[6], got) {
        (1, _) => (10, u64::from(u16::from_le_bytes([start[8], start[9]]))),
        (2 | 3, 12) => (12, u64::from(u32::from_le_bytes([start[8], start[9], start[10], start[11]]))),
        (2 | 3, _) => return Err(Refusal::malformed("truncated in the header")),
        (version, _) => {
            return Err(Refusal::malformed(format!(".npy version {version}; 1, 2 and 3 are known")));
        }
    };
    if header > MAX_HEADER {
        return Err(Refusal::too_big(format!("a header of {header} bytes; at most {MAX_HEADER}")));
    }
    if begin + header > len {
        return Err(Refusal::malformed(format!("truncated: the header takes {header} bytes")));
    }
    let mut text = vec![0; header as usize];
    file.read_exact_at(&mut text, begin)?;
    let mut depth = 0usize;
    for byte in text {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return Err(Refusal::malformed("a header of nested brackets"));
        }
    }
    Ok(begin + header)
}

fn parse_header(file: &File) -> Result<NpyHeader, Refusal> {
    // `npyz` multiplies the shape unchecked, which panics where overflow checks are on.
    let parsed = std::panic::catch_unwind(|| NpyHeader::from_reader(ReadAt { file, at: 0 }));
    match parsed {
        Ok(Ok(header)) => Ok(header),
        Ok(Err(error)) => Err(Refusal::malformed(format!("header: {error}"))),
        Err(_) => Err(Refusal::too_big("header: a shape past any file's size")),
    }
}

fn kind_of(dtype: &DType) -> Result<Kind, Refusal> {
    let text = dtype.descr();
    let DType::Plain(plain) = dtype else {
        return Err(Refusal::malformed(format!("dtype {text}: records are no vectors")));
    };
    match (plain.type_char(), plain.size_field()) {
        (TypeChar::Float, 2) => Ok(Kind::F2),
        (TypeChar::Float, 4) => Ok(Kind::F4),
        (TypeChar::Float, 8) => Ok(Kind::F8),
        (TypeChar::Int, 1) => Ok(Kind::I1),
        (TypeChar::Uint, 1) => Ok(Kind::U1),
        (TypeChar::Object, _) => Err(Refusal::malformed("pickled objects are never read")),
        _ => Err(Refusal::malformed(format!("dtype {text}: f2, f4, f8, i1 and u1 are indexed"))),
    }
}
