//! What a vector is: dimension, metric, element type; and from numbers to rows.

use std::fmt;
use std::str::FromStr;

use half::f16;

use crate::MAX_DIM;
use crate::kernels::{self, Prepared};

macro_rules! names {
    ($(#[$doc:meta])* $type:ident { $($(#[$vdoc:meta])* $variant:ident = $name:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
        pub enum $type { $($(#[$vdoc])* $variant),* }

        impl FromStr for $type {
            type Err = String;
            fn from_str(name: &str) -> Result<$type, String> {
                match name {
                    $($name => Ok($type::$variant),)*
                    _ => Err(format!("\"{name}\" is none of {}", [$($name),*].join(", "))),
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($type::$variant => $name),* })
            }
        }
    };
}

names! {
    /// What "near" means.
    Metric {
        /// Squared Euclidean distance.
        L2 = "l2",
        /// Minus the inner product.
        InnerProduct = "ip",
        /// 1 − cosine similarity.
        Cosine = "cosine",
        /// How many bits differ.
        Hamming = "hamming",
    }
}

names! {
    /// What a row's numbers are stored as, little-endian.
    Element {
        /// IEEE 754 binary32.
        F32 = "f32",
        /// IEEE 754 binary16.
        F16 = "f16",
        /// Signed bytes.
        I8 = "i8",
        /// Unsigned bytes.
        U8 = "u8",
        /// Bits: number i, 0 or 1, is bit i % 8 (the lowest first) of byte i / 8; what is left of the last byte is 0.
        Bits = "bits",
    }
}

names! {
    /// What a sealed graph over floats is walked on; hits are always ranked by the full vectors.
    Quantization {
        /// The full vectors.
        None = "none",
        /// 8 bits a number, one scale for all rows of a segment.
        Sq8 = "sq8",
        /// 4 bits a number, after a rotation.
        Sq4 = "sq4",
        /// 1 bit a number, after a rotation (RaBitQ).
        Rabitq = "rabitq",
    }
}

impl Element {
    /// Bytes of so many numbers.
    pub fn bytes(self, numbers: usize) -> usize {
        match self {
            Element::F32 => 4 * numbers,
            Element::F16 => 2 * numbers,
            Element::I8 | Element::U8 => numbers,
            Element::Bits => numbers.div_ceil(8),
        }
    }
}

/// A space that can't be.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpaceError {
    /// 0, or more than [`MAX_DIM`].
    #[error("{0} dimensions; 1 to {MAX_DIM} are supported")]
    Dimension(usize),
    /// Bits are compared by hamming, and nothing else is.
    #[error("metric {metric} with element {element}: hamming goes with bits, and bits with hamming")]
    Mismatch {
        /// The metric.
        metric: Metric,
        /// The element type.
        element: Element,
    },
}

/// A vector that a space can't take.
#[derive(Copy, Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum VectorError {
    /// Another number of numbers.
    #[error("{got} dimensions, {want} are wanted")]
    WrongDimension {
        /// The vector's.
        got: usize,
        /// The space's.
        want: usize,
    },
    /// NaN or an infinity.
    #[error("value {at} is not finite")]
    NotFinite {
        /// Place in the vector, from 0.
        at: usize,
    },
    /// Of length zero, which has no direction.
    #[error("a zero vector has no cosine")]
    ZeroVector,
    /// So long that its squared length is no f32.
    #[error("the vector is too long: its squared length is past f32")]
    TooLong,
    /// Not a number of the element type.
    #[error("value {at} ({value}) is not representable as {element}")]
    NotRepresentable {
        /// Place in the vector, from 0.
        at: usize,
        /// The number.
        value: f32,
        /// The collection's element type.
        element: Element,
    },
}

/// Dimension, metric and element type.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Space {
    dim: usize,
    metric: Metric,
    element: Element,
}

impl Space {
    /// 1 to [`MAX_DIM`] dimensions; bits with hamming, all else without.
    pub fn new(dim: usize, metric: Metric, element: Element) -> Result<Space, SpaceError> {
        match dim {
            1..=MAX_DIM if (metric == Metric::Hamming) != (element == Element::Bits) => {
                Err(SpaceError::Mismatch { metric, element })
            }
            1..=MAX_DIM => Ok(Space { dim, metric, element }),
            _ => Err(SpaceError::Dimension(dim)),
        }
    }

    /// Numbers in a vector.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// What "near" means.
    pub fn metric(&self) -> Metric {
        self.metric
    }

    /// What rows are made of.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.element.bytes(self.dim)
    }

    /// Checks a vector and appends its row; on an error nothing is appended. Under cosine, floats are normalised
    /// (integers stay, the kernels divide by their lengths). f16 rounds to nearest; integers must be exact.
    pub fn encode(&self, values: &[f32], out: &mut Vec<u8>) -> Result<(), VectorError> {
        self.check_query(values)?;
        let scale = match (self.metric, self.element) {
            (Metric::Cosine, Element::F32 | Element::F16) => {
                // In f64: the square of a small f32 is no f32.
                1.0 / values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
            }
            _ => 1.0,
        };
        let start = out.len();
        if self.element == Element::Bits {
            out.resize(start + self.row_bytes(), 0);
            pack(values, &mut out[start..]);
            return Ok(());
        }
        for (at, value) in values.iter().enumerate() {
            let scaled = (f64::from(*value) * scale) as f32;
            let fits = match self.element {
                Element::F32 => {
                    out.extend_from_slice(&scaled.to_le_bytes());
                    true
                }
                Element::F16 => {
                    let short = f16::from_f32(scaled);
                    out.extend_from_slice(&short.to_le_bytes());
                    short.is_finite()
                }
                Element::I8 => {
                    out.push(scaled as i8 as u8);
                    f32::from(scaled as i8) == scaled
                }
                Element::U8 => {
                    out.push(scaled as u8);
                    f32::from(scaled as u8) == scaled
                }
                // Packed above.
                Element::Bits => true,
            };
            if !fits {
                out.truncate(start);
                return Err(VectorError::NotRepresentable { at, value: *value, element: self.element });
            }
        }
        Ok(())
    }

    /// The numbers of a row, as stored.
    pub fn decode(&self, row: &[u8], out: &mut Vec<f32>) {
        out.clear();
        match self.element {
            Element::F32 => out.extend(row.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
            Element::F16 => out.extend(row.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
            Element::I8 => out.extend(row.iter().map(|b| f32::from(*b as i8))),
            Element::U8 => out.extend(row.iter().map(|b| f32::from(*b))),
            Element::Bits => {
                out.extend(row.iter().flat_map(|b| (0..8).map(move |bit| f32::from(b >> bit & 1))).take(self.dim));
            }
        }
    }

    /// Can this be asked for?
    pub fn check_query(&self, values: &[f32]) -> Result<(), VectorError> {
        if values.len() != self.dim {
            return Err(VectorError::WrongDimension { got: values.len(), want: self.dim });
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(VectorError::NotFinite { at });
        }
        let is_bit = |value: &f32| *value == 0.0 || *value == 1.0;
        if self.element == Element::Bits
            && let Some((at, value)) = values.iter().enumerate().find(|(_, value)| !is_bit(value))
        {
            return Err(VectorError::NotRepresentable { at, value: *value, element: self.element });
        }
        let square: f64 = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        // A quarter of the largest f32, so that the squared distance of two such vectors is one too.
        if square > f64::from(f32::MAX) / 4.0 {
            return Err(VectorError::TooLong);
        }
        if self.metric == Metric::Cosine && square == 0.0 {
            return Err(VectorError::ZeroVector);
        }
        Ok(())
    }

    /// Full-precision distance of a query to a row.
    pub fn distance(&self, query: &[f32], row: &[u8]) -> f32 {
        Prepared::new(self, query).distance(row)
    }

    /// The name of the kernels in use on this machine.
    pub fn kernels(&self) -> &'static str {
        kernels::name()
    }
}

/// Sets the bits of the numbers that are not 0; `out` is zeroed and has room for them.
pub(crate) fn pack(values: &[f32], out: &mut [u8]) {
    for (byte, eight) in out.iter_mut().zip(values.chunks(8)) {
        *byte = eight.iter().enumerate().fold(0, |byte, (bit, value)| byte | u8::from(*value != 0.0) << bit);
    }
}
