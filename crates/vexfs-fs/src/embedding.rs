//! A vector attached to a file: the extended attribute `user.vexfs.embedding.f32`, little-endian floats, on the source's
//! own file. `user.vexfs.embedding` is the same vector as text; through the mount it is turned into the other, which
//! takes a third of the space, and computed where it is asked for.
//!
//! The attribute is the truth, as a file's bytes are of the vectors in it, so it is read again whenever it may have
//! changed. What tells that is the change time; and because many things move that, a digest of the value.

use std::os::fd::BorrowedFd;

use rustix::fs::Stat;
use rustix::io::Errno;
use vexfs_store::Fingerprint;
use vexfs_store::index::MAX_DIM;

use crate::formats::{Refusal, parse_text};
use crate::reopen::path_of;
use crate::source::fingerprint;

/// The vector as little-endian `f32`.
pub const BINARY: &str = "user.vexfs.embedding.f32";
/// The vector as text: numbers separated by commas or blanks, in brackets or not.
pub const TEXT: &str = "user.vexfs.embedding";
/// Largest value and list of names of extended attributes that Linux has.
pub const XATTR_MAX: usize = 64 << 10;

/// A spelling of the attribute.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// [`BINARY`].
    Binary,
    /// [`TEXT`].
    Text,
}

impl Form {
    /// The spelling that an attribute's name means.
    pub fn of(name: &[u8]) -> Option<Form> {
        match name {
            name if name == BINARY.as_bytes() => Some(Form::Binary),
            name if name == TEXT.as_bytes() => Some(Form::Text),
            _ => None,
        }
    }
}

/// The attribute as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    form: Form,
    bytes: Vec<u8>,
}

impl Value {
    /// From the bytes of an attribute.
    pub fn new(form: Form, bytes: Vec<u8>) -> Value {
        Value { form, bytes }
    }

    /// The vector.
    pub fn vector(&self) -> Result<Vec<f32>, Refusal> {
        let vector = match self.form {
            Form::Binary => {
                let (numbers, rest) = self.bytes.as_chunks::<4>();
                if !rest.is_empty() {
                    return Err(Refusal::malformed(format!("{BINARY}: {} bytes are no f32 each", self.bytes.len())));
                }
                numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
            }
            Form::Text => of_text(&self.bytes)?,
        };
        match vector.len() {
            0 => Err(Refusal::malformed("an attached vector has at least one number")),
            count if count > MAX_DIM => Err(Refusal::too_big(format!("{count} numbers; at most {MAX_DIM}"))),
            _ if vector.iter().any(|value| !value.is_finite()) => {
                Err(Refusal::malformed("an attached vector's numbers must be finite"))
            }
            _ => Ok(vector),
        }
    }

    /// What tells one value from another: its length and a digest in place of size and modification time, the file's
    /// change time.
    pub fn fingerprint(&self, stat: &Stat) -> Fingerprint {
        // FNV-1a, 128 bits. Whoever makes two values collide keeps their own file's old vector.
        let digest = self.bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128, |hash, byte| {
            (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
        });
        Fingerprint { size: self.bytes.len() as u64, mtime: digest as i128, ctime: fingerprint(stat).ctime }
    }
}

fn of_text(bytes: &[u8]) -> Result<Vec<f32>, Refusal> {
    let text = std::str::from_utf8(bytes).map_err(|error| Refusal::malformed(format!("{TEXT}: {error}")))?;
    // setfattr and programs in C may bring the end of their string along.
    let text = text.trim_end_matches('\0').trim();
    let inner = match (text.strip_prefix('['), text.ends_with(']')) {
        (Some(rest), true) => &rest[..rest.len() - 1],
        (None, false) => text,
        _ => return Err(Refusal::malformed(format!("{TEXT}: a bracket without its other"))),
    };
    Ok(parse_text(inner)?.unwrap_or_default())
}

/// The bytes of a vector, as [`BINARY`] has them.
pub fn to_binary(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The text of a vector, with as many digits as tell each number from its neighbours.
pub fn to_text(vector: &[f32]) -> Vec<u8> {
    let numbers: Vec<String> = vector.iter().map(f32::to_string).collect();
    format!("[{}]", numbers.join(", ")).into_bytes()
}

/// What is attached to a file (a descriptor, `O_PATH` will do), and the file's state: read before the value, so that a
/// change meanwhile shows in the change time. Where both spellings were set beneath the mount, the binary one counts.
pub fn read(file: BorrowedFd<'_>) -> Result<(Stat, Option<Value>), Errno> {
    let stat = rustix::fs::fstat(file)?;
    let path = path_of(file);
    for (form, name) in [(Form::Binary, BINARY), (Form::Text, TEXT)] {
        let mut bytes = Vec::with_capacity(XATTR_MAX);
        match rustix::fs::getxattr(&path, name, rustix::buffer::spare_capacity(&mut bytes)) {
            Ok(_) => return Ok((stat, Some(Value { form, bytes }))),
            // A file system without attributes has none.
            Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok((stat, None))
}

/// Has what is called `name` in `dir` an attached vector? One system call for the many that have no attributes at all.
pub fn is_there(dir: BorrowedFd<'_>, name: &[u8]) -> Result<bool, Errno> {
    let path = [path_of(dir).as_bytes(), b"/", name].concat();
    let mut names = Vec::with_capacity(XATTR_MAX);
    match rustix::fs::llistxattr(&path[..], rustix::buffer::spare_capacity(&mut names)) {
        Ok(_) => Ok(names.split(|byte| *byte == 0).any(|name| Form::of(name).is_some())),
        Err(Errno::OPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests;
